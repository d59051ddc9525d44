"""The callback for ``transformers.Trainer``, and three lines for a loop under ``accelerate``.

With a Trainer::

    from torch_eft.callbacks.hugging_face import EFTCallback

    trainer = Trainer(model, args, train_dataset=data, callbacks=[EFTCallback(probe="first_batch:8")])

In a loop of your own, before it, in it and after it::

    observer = Observer(accelerator.unwrap_model(model), probe, optimizer, logdir="runs/eft", output_fn=some_logits)
    observer.begin()            # theta_0
    observer.measure(step)      # after every optimizer step; measures if due
    observer.finish()

Measured is the model in evaluation mode and in the precision of its parameters, half precision widened to single: mixed
precision, dropout and gradient checkpointing are the training's own affair. A Trainer shows callbacks neither batches
nor losses, so that there are measurements, and predictions along the realized path, but no forecast.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from torch_eft.live import Event, Instrument, JSONLSink, Observer, Obstacle, RunHistory, Sink, TensorBoardSink
from torch_eft.live.config.presets import Preset
from torch_eft.live.config.probes import ProbeLike, first_count, first_samples
from torch_eft.live.config.schedule import AUTO, Every
from torch_eft.live.record.sinks import local_path
from torch_eft.live.run.reference import KeepTheta
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.tensorboard.run_info import JSONL_NAME

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

try:
    from transformers import TrainerCallback
except ImportError:  # optional: the constructor says so
    TrainerCallback = object

MOST_OUTPUTS = 16
"""Of a larger vocabulary, as many logits are measured: the NTK has a row for every sample and output."""

_LABELS = ("labels", "label", "label_ids")
_STATE = "eft.pt"


def some_logits(returned: Any) -> Tensor:
    """Take the logits that a model returned, of a sequence at its last position, and 16 of more than 16, spread evenly.

    Args:
        returned: What the forward of a model of transformers returns.

    Returns:
        (N, C).

    Raises:
        ValueError: If it has no logits.

    Example:
        >>> import torch
        >>> from torch_eft.callbacks.hugging_face import some_logits
        >>> some_logits({"logits": torch.zeros(4, 7, 50257)}).shape
        torch.Size([4, 16])
    """
    logits = all_logits(returned)
    count = logits.shape[-1]
    if count <= MOST_OUTPUTS:
        return logits
    return logits[:, torch.arange(MOST_OUTPUTS, device=logits.device) * count // MOST_OUTPUTS]


def all_logits(returned: Any) -> Tensor:
    """Take the logits that a model returned, of a sequence at its last position; as ``some_logits``, but all."""
    try:
        logits = returned["logits"]
    except (KeyError, TypeError, IndexError):
        raise ValueError(
            f"output_fn: the model returns {type(returned).__name__} without logits; give output_fn= with (N, C) of "
            "it, such as lambda out: out.last_hidden_state[:, 0]"
        ) from None
    return logits[:, -1] if logits.ndim == 3 else logits


class EFTCallback(TrainerCallback):
    """Measures a model while ``transformers.Trainer`` trains it: ``callbacks=[EFTCallback(probe=batch)]``.

    Args:
        probe: Fixed inputs: what the tokenizer returns, a dict of tensors (targets are left out) or one tensor, without
            padding at the end; or ``"first_batch:8"``, the first 8 samples of the training data set.
        preset: As for ``EFTMonitor``.
        every: As for ``EFTMonitor``.
        budget: As for ``EFTMonitor``.
        logdir: Where TensorBoard files and ``eft.jsonl`` go; None: the folder ``eft`` in the Trainer's ``output_dir``.
        instruments: As for ``EFTMonitor``.
        extra: As for ``EFTMonitor``.
        outputs: As for ``EFTMonitor``; ``"probes:16"`` measures all logits on 16 random directions.
        output_fn: Converts the model's output to (N, C); None: logits, as ``some_logits`` takes them.
        memory: As for ``EFTMonitor``.
        on_error: ``"warn"`` or ``"raise"``.
        keep_theta_0: As for ``EFTMonitor``.

    Attributes:
        observer: The observer that measures.

    Raises:
        ImportError: If transformers is missing.
        ValueError: If an argument is not usable.
        TypeError: If the probe is of no such kind.
    """

    def __init__(
        self,
        probe: ProbeLike,
        *,
        preset: Preset | None = None,
        every: Every = AUTO,
        budget: float | None = 0.05,
        logdir: str | Path | None = None,
        instruments: Sequence[str | Instrument] | None = None,
        extra: Sequence[str | Instrument] = (),
        outputs: str = "auto",
        output_fn: OutputFn | None = None,
        memory: int = DEFAULT_MEMORY,
        on_error: Literal["warn", "raise"] = "warn",
        keep_theta_0: KeepTheta = "checkpoint",
    ) -> None:
        if TrainerCallback is object:
            raise ImportError("EFTCallback needs transformers: pip install 'torch-eft[hf]'")
        self._first = first_count(probe)
        self._logdir = logdir
        self.observer = Observer(
            None,
            _without_labels(probe),
            preset=preset,
            every=every,
            budget=budget,
            instruments=instruments,
            extra=extra,
            outputs=outputs,
            output_fn=output_fn or (all_logits if str(outputs).startswith("probes") else some_logits),
            memory=memory,
            keep_theta_0=keep_theta_0,
            on_error=on_error,
            name=type(self).__name__,
            say=tqdm.write,
        )

    @property
    def history(self) -> RunHistory:
        """``{optimizer step: {tag: value}}``; ``.plot()``, ``.to_pandas()``, ``.save()``."""
        return self.observer.history

    @property
    def events(self) -> list[Event]:
        """Quantities that left their band, predictions that left their validity."""
        return self.observer.events

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """``[(step, what went wrong)]``."""
        return self.observer.skipped

    def overhead(self) -> str:
        """One sentence on what measuring has cost, and on what was left out."""
        return self.observer.overhead()

    # ---- the Trainer's events

    def on_train_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **given: Any
    ) -> None:
        """Take theta_0, or go on from a checkpoint's."""
        if not state.is_world_process_zero:
            return
        model: nn.Module = given["model"]
        optimizer, loader = given.get("optimizer"), given["train_dataloader"]
        logdir = Path(args.output_dir, "eft") if self._logdir is None else local_path(self._logdir, "logdir")
        sinks = self._sinks(logdir)
        kept = Path(args.output_dir, f"checkpoint-{state.global_step}", _STATE)
        if state.global_step > 0 and kept.exists():
            with self.observer.recorder.guard():
                self.observer.load_state_dict(torch.load(kept, map_location="cpu", weights_only=True))
        if self._first is not None:
            try:
                probe = first_samples(loader.dataset, self._first, loader.collate_fn, inputs_of=_without_labels)
                self.observer.check(model, probe)
            except Exception as error:
                self.observer.refuse(error, sinks)
                return
        self.observer.begin(
            state.global_step,
            obstacle=Obstacle("transformers.Trainer shows callbacks neither batches nor losses"),
            total_steps=state.max_steps if state.max_steps > 0 else None,
            model=model,
            optimizers=[] if optimizer is None else [_plain(optimizer)],
            place=(args.process_index, args.world_size),
            sinks=sinks,
            theta_file=logdir / "eft-theta_0.pt",
        )

    def on_pre_optimizer_step(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **given: Any
    ) -> None:
        """Show the gradient and the learning rates in force to the instruments."""
        if state.is_world_process_zero and given.get("optimizer") is not None:
            self.observer.before_step(_plain(given["optimizer"]))

    def on_step_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **given: Any
    ) -> None:
        """Measure if it is due."""
        if state.is_world_process_zero:
            self.observer.measure(state.global_step, epoch=_epoch(state))

    def on_epoch_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **given: Any
    ) -> None:
        """Measure if the schedule is by epochs."""
        if state.is_world_process_zero and self.observer.every in (AUTO, "epoch"):
            self.observer.measure(state.global_step, due_now=True, epoch=_epoch(state))

    def on_save(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **given: Any
    ) -> None:
        """Keep history and theta_0 beside the Trainer's checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            with self.observer.recorder.guard():
                torch.save(self.observer.state_dict(), folder / _STATE)

    def on_train_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **given: Any
    ) -> None:
        """Measure the final weights if that was not done, and say what it cost."""
        if state.is_world_process_zero:
            self.observer.finish(state.global_step, epoch=_epoch(state))

    def _sinks(self, folder: Path) -> list[Sink]:
        from torch.utils.tensorboard import SummaryWriter

        return [TensorBoardSink(SummaryWriter(str(folder))), JSONLSink(folder / JSONL_NAME)]


def _plain(optimizer: Any) -> Optimizer:
    """The optimizer that accelerate wrapped."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, Optimizer) else optimizer


def _epoch(state: "TrainerState") -> int | None:
    return None if state.epoch is None else int(state.epoch)


def _without_labels(batch: Any) -> Any:
    """A batch as the model takes it to answer: a tokenizer's, a collator's, or a tensor."""
    if hasattr(batch, "keys"):
        return {name: batch[name] for name in batch.keys() if name not in _LABELS}  # noqa: SIM118 - of any mapping
    return batch
