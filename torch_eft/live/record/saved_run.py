"""A run from its files: what was measured, what was predicted, and what was said of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_eft.live.record.history import RunHistory
from torch_eft.results.presentation.html import table_html
from torch_eft.results.tags import MEASURED, PREFIX, split_tag
from torch_eft.results.trajectory import Validity
from torch_eft.tensorboard.run_info import PLUGIN_NAME, RUN_INFO_TAG, Records, find_jsonl, parse_run_info, read_jsonl
from torch_eft.tensorboard.verdicts import Verdict, reading, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_EVENTS = "*tfevents*"
_PAGE = re.compile(rf"{PREFIX}/(\w+)/text_summary")


@dataclass(frozen=True, repr=False)
class SavedRun:
    """A run read from its files.

    Args:
        path: The file or directory that was read.
        history: ``{optimizer step: {tag: value}}``, measurements and forecasts.
        info: What the run says of itself: network, ``r``, ``regime``, ``optimizer``, ``diagnosis``, ...; empty where
            nothing was written.
        events: ``[{"step", "quantity", "text"}]``.
        pages: ``{name: Markdown}``.

    Example:
        >>> import tempfile, torch
        >>> import torch_eft as eft
        >>> folder = tempfile.mkdtemp()
        >>> model, x = torch.nn.Linear(2, 1), torch.ones(3, 2)
        >>> observer = eft.live.Observer(model, x, preset="light", logdir=folder)
        >>> observer.begin()
        >>> observer.finish()
        >>> run = eft.load_run(folder)
        >>> run.history == observer.history, run.forecasts
        (True, {})
    """

    path: Path
    history: RunHistory
    info: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Mapping[str, Any], ...] = ()
    pages: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        lines = [f"  {name}: {text}" for name, text in self._lines().items()]
        return "\n".join(["SavedRun(", *lines, ")"])

    def _repr_html_(self) -> str:
        flag = "" if self.validity is None else self.validity.flag
        return table_html("SavedRun", self._lines(), flag)

    def _lines(self) -> dict[str, str]:
        lines = {"path": str(self.path), "history": str(self.history)}
        known = {name: self.info.get(name) for name in ("network", "depth", "width", "r", "regime", "optimizer")}
        lines |= {
            name: f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in known.items()
            if value is not None
        }
        if self.forecasts:
            lines["forecasts"] = ", ".join(self.forecasts)
        if self.validity is not None:
            lines["validity"] = str(self.validity)
        return lines

    @property
    def forecasts(self) -> dict[str, dict[str, dict[int, float]]]:
        """``{quantity: {series: {step: value}}}``: orders, medians, bands and z-scores, as far as they were logged."""
        found: dict[str, dict[str, dict[int, float]]] = {}
        for step, scalars in sorted(self.history.items()):
            for name, value in scalars.items():
                quantity, series = split_tag(name) or ("", MEASURED)
                if series != MEASURED and not series.startswith("layer/"):
                    found.setdefault(quantity, {}).setdefault(series, {})[step] = value
        return found

    @property
    def validity(self) -> Validity | None:
        """Where the theory holds for this run, or why it does not apply; None where the run does not say."""
        known = self.info.get("validity")
        return None if not known else Validity(known["flag"], known["reason"])

    def verdict(self, quantity: str) -> Verdict | None:
        """Compare a quantity with its prediction, as ``torch_eft.tensorboard.verdict`` does."""
        return verdict(self.history, quantity)

    def reading(self, quantity: str) -> str | None:
        """Say what the last value of a quantity means, as ``torch_eft.tensorboard.reading`` does."""
        return reading(self.history, quantity)

    def plot(self, *quantities: str) -> "Figure":
        """Draw what was measured over what was predicted, as ``RunHistory.plot`` does."""
        return self.history.plot(*quantities, title=str(self.info.get("network") or ""))

    def to_pandas(self) -> "DataFrame":
        """The history as a table, as ``RunHistory.to_pandas`` makes it."""
        return self.history.to_pandas()


def load_run(path: str | Path) -> SavedRun:
    """Read a run back from its log directory: from ``eft.jsonl``, or from TensorBoard's files where there is none.

    Args:
        path: A run's log directory, an ``eft.jsonl``, or a directory with one run below it.

    Returns:
        The run: ``.history`` as the monitor had it, ``.forecasts``, ``.validity``, ``.plot()``, ``.to_pandas()``.

    Raises:
        FileNotFoundError: If there is no such path, or no run of ours at or below it.
        ValueError: If there are several runs, or the files hold no measurement.

    Example:
        >>> import torch_eft as eft
        >>> eft.load_run("no/such/run")
        Traceback (most recent call last):
        FileNotFoundError: no/such/run: no such file or directory; give a run's log directory or its eft.jsonl
    """
    path = Path(path)
    try:
        files = find_jsonl(path)
    except FileNotFoundError:
        files = sorted({file.parent for file in path.rglob(_EVENTS)}) if path.is_dir() else []
        files = [folder for folder in files if _has_ours(folder)]
        if not files:
            raise
    if len(files) > 1:
        shown = ", ".join(str(file) for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise ValueError(f"{path}: {len(files)} runs are below it; give one of {shown}")
    (file,) = files
    records = _from_event_files(file) if file.is_dir() else read_jsonl(file)
    if records.corrupt and not (records.measurements or records.info or records.pages):
        raise ValueError(
            f"{file}: not an eft.jsonl; give a run's log directory, or read a saved history by RunHistory.load"
        )
    if not records.measurements:
        raise ValueError(f"{file}: it holds no measurement; the run ended before its first one")
    return SavedRun(
        file, RunHistory(records.measurements), records.info or {}, tuple(records.events), dict(records.pages)
    )


def _accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def _has_ours(folder: Path) -> bool:
    tags = _accumulated(folder).Tags()
    return any(split_tag(name) for name in (*tags["scalars"], *tags["tensors"]))


def _from_event_files(folder: Path) -> Records:
    """What TensorBoard's files hold: numbers in single precision, pages, and the description of the run."""
    from tensorboard.util.tensor_util import make_ndarray

    accumulated = _accumulated(folder)
    tags = accumulated.Tags()
    records = Records(folder)
    for name in tags["scalars"]:
        for point in accumulated.Scalars(name) if split_tag(name) else ():
            records.measurements.setdefault(point.step, {})[name] = point.value
    for name in tags["tensors"]:
        points = accumulated.Tensors(name)
        values = [(point.step, make_ndarray(point.tensor_proto)) for point in points]
        plugin = accumulated.SummaryMetadata(name).plugin_data.plugin_name
        if name == RUN_INFO_TAG:
            records.info = parse_run_info(values[-1][1].item())
            records.events = list((records.info or {}).get("events") or [])
        elif plugin == PLUGIN_NAME and split_tag(name):  # scalars that the tab EFT shows alone
            for step, value in values:
                records.measurements.setdefault(step, {})[name] = float(value)
        elif (page := _PAGE.fullmatch(name)) is not None:
            records.pages[page[1]] = values[-1][1].flat[0].decode()
    return records
