"""Sinks for a Trainer's loggers: all take scalars, TensorBoard's takes pages and figures too."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from torch_eft.live.instrument import History, MeasurementWarning
from torch_eft.live.record.sinks import JSONLSink, Sink, TensorBoardSink
from torch_eft.results.tags import in_scalars_tab


class LoggerSink(Sink):
    """Scalars to any Lightning logger, by ``log_metrics``.

    Args:
        logger: The logger.
        label: Before the tags, where another monitor's are those without.
        all_tags: Whether all tags go there; False: those of TensorBoard's Scalars tab.
    """

    def __init__(self, logger: Logger, label: str = "", all_tags: bool = True) -> None:
        self.logger, self._prefix, self._all = logger, f"{label}/" if label else "", all_tags

    def scalars(self, step: int, values: Mapping[str, float], epoch: int | None = None) -> None:
        """``log_metrics`` with the optimizer step."""
        chosen = {self._prefix + name: value for name, value in values.items() if self._all or in_scalars_tab(name)}
        if chosen:
            self.logger.log_metrics(chosen, step=step)

    def resume(self, step: int, history: History) -> None:
        """Repeat earlier measurements to a ``CSVLogger``, which begins its file anew."""
        if isinstance(self.logger, CSVLogger):
            for at, values in sorted(history.items()):
                self.scalars(at, values)


def logger_sinks(trainer: Trainer, jsonl: str | None, label: str = "") -> list[Sink]:
    """The sinks of a Trainer: its loggers, and a JSONL file next to the first one's files.

    Args:
        trainer: The Trainer.
        jsonl: The file's name; None for none.
        label: Sets this monitor's results apart from another's: a run of its own in TensorBoard, tags with this before
            them elsewhere.

    Returns:
        One sink per logger and kind of content.
    """
    sinks: list[Sink] = []
    for logger in trainer.loggers:
        if label and isinstance(logger, TensorBoardLogger):
            from torch.utils.tensorboard import SummaryWriter

            sinks.append(TensorBoardSink(SummaryWriter(os.path.join(logger.log_dir, label))))
            continue
        sinks.append(LoggerSink(logger, label, all_tags=not isinstance(logger, TensorBoardLogger)))
        if isinstance(logger, TensorBoardLogger):
            sinks.append(TensorBoardSink(logger.experiment, scalars=False))
    directory = log_directory(trainer)
    if jsonl is not None and directory is not None:
        sinks.append(JSONLSink(directory / jsonl))
    elif jsonl is not None and any("://" in str(logger.save_dir) for logger in trainer.loggers):
        warnings.warn(
            f"torch_eft: {jsonl} is written on this machine only, and the loggers write to an address "
            f"({trainer.loggers[0].save_dir}): they have the scalars, but `torch-eft report` has nothing to read; give "
            "a local CSVLogger besides, or jsonl=False",
            MeasurementWarning,
            stacklevel=2,
        )
    return sinks


def log_directory(trainer: Trainer) -> Path | None:
    """The directory on this machine in which the first logger with files there keeps them."""
    return next((place for logger in trainer.loggers if (place := _directory(logger)) is not None), None)


def _directory(logger: Logger) -> Path | None:
    """The directory of this run's files; ``Trainer.log_dir`` is a collective, which one rank must not call."""
    place = getattr(logger, "log_dir", None)
    if "://" in str(place or logger.save_dir):  # an address, of which a path would make local folders
        return None
    if place is not None:
        return Path(place)
    if logger.save_dir is None:
        return None
    return Path(logger.save_dir, str(logger.name or ""), str(logger.version or ""))
