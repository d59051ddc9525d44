"""Where results go. A sink takes what it can show and ignores the rest."""

import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torch import Tensor

from torch_eft.live.instrument import Event, History, MeasurementWarning
from torch_eft.results.tags import PREFIX, in_scalars_tab
from torch_eft.tensorboard.run_info import SCHEMA, dump_json, scalar_summary, write_run_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


class Sink:
    """Base of all sinks; every method does nothing.

    Attributes:
        draws: Whether figures are wanted: if no sink wants them, none is drawn.

    Example:
        >>> from torch_eft.live import Sink
        >>> class Printer(Sink):
        ...     def scalars(self, step, values, epoch=None):
        ...         print(step, values)
        >>> Printer().scalars(0, {"eft/ntk_trace/measured": 2.0})
        0 {'eft/ntk_trace/measured': 2.0}
    """

    draws = False

    def scalars(self, step: int, values: Mapping[str, float], epoch: int | None = None) -> None:
        """``{tag: value}`` of one step; a step may come more than once, with other tags."""

    def text(self, name: str, markdown: str, step: int) -> None:
        """A page; a later one of the same name replaces it."""

    def event(self, event: Event) -> None:
        """A mark on the time axis."""

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        """A figure."""

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """The distribution of ``values``."""

    def run_info(self, info: Mapping[str, Any]) -> None:
        """The summary of the run, plain types; replaces an earlier one."""

    def resume(self, step: int, history: History) -> None:
        """The training goes on from a checkpoint: what an interrupted one left of later steps no longer holds.

        Args:
            step: The latest step that holds.
            history: What was measured up to it, and holds.
        """

    def flush(self) -> None:
        """Bring everything to disk."""

    def close(self) -> None:
        """The training is over."""


def local_path(place: str | Path, what: str) -> Path:
    """Return a place as a path.

    Args:
        place: A file or directory.
        what: Name of the argument, for the message.

    Returns:
        The path.

    Raises:
        ValueError: If it is an address such as ``s3://...``, of which a path would make local folders.
        TypeError: If it is no path.
    """
    if not isinstance(place, str | os.PathLike):
        raise TypeError(f"{what}: {place!r} given; give a directory, such as 'runs/1'")
    if "://" in str(place):
        raise ValueError(
            f"{what}: {str(place)!r} is an address, and this writes files on this machine only; give a local directory"
            ", and a SummaryWriter of that address by sinks=[TensorBoardSink(writer)] for scalars and figures there"
        )
    return Path(place)


class JSONLSink(Sink):
    """An append-only file of JSON lines, on disk after every measurement.

    Lines: ``{"kind": "run", ...}`` what is known of the run (the last one holds), ``{"kind": "measurement", "step",
    "epoch", "time", "scalars"}`` (of a repeated step, what comes later holds), ``{"kind": "resumed", "step"}`` (later
    steps above do not hold any more), ``{"kind": "event", "step", "quantity", "text"}`` and ``{"kind": "page", "name",
    "text", "step"}``. Where the file cannot be written, one warning says so and training goes on.

    Args:
        path: The file; its directory is made.

    Raises:
        ValueError: If ``path`` is an address such as ``s3://...``.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from torch_eft.live import JSONLSink
        >>> path = Path(tempfile.mkdtemp(), "eft.jsonl")
        >>> sink = JSONLSink(path)
        >>> sink.text("notes", "a page", 0)
        >>> path.read_text().rstrip()
        '{"kind":"page","name":"notes","text":"a page","step":0}'
        >>> sink.close()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = local_path(path, "path")
        self.broken = False
        self._file: TextIO | None = None

    def scalars(self, step: int, values: Mapping[str, float], epoch: int | None = None) -> None:
        """A line ``measurement``, with the time in seconds since 1970."""
        line = {"kind": "measurement", "step": step, "epoch": epoch, "time": time.time(), "scalars": dict(values)}
        self._write(line)

    def resume(self, step: int, history: History) -> None:
        """A line ``resumed``; in a new file after those of ``history``, whose time is not known."""
        if not self.path.exists():
            for at, values in sorted(history.items()):
                self._write({"kind": "measurement", "step": at, "epoch": None, "time": None, "scalars": dict(values)})
        self._write({"kind": "resumed", "step": step})

    def text(self, name: str, markdown: str, step: int) -> None:
        """A line ``page``."""
        self._write({"kind": "page", "name": name, "text": markdown, "step": step})

    def event(self, event: Event) -> None:
        """A line ``event``."""
        self._write({"kind": "event", **asdict(event)})

    def run_info(self, info: Mapping[str, Any]) -> None:
        """A line ``run``."""
        self._write({"kind": "run", "schema": SCHEMA, **info})

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # reported when the line was written
                file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self.broken:
            return
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(dump_json(line) + "\n")
            self._file.flush()
        except OSError as error:
            self.broken = True
            warnings.warn(
                f"torch_eft: {self.path} cannot be written ({error.strerror or error}); training and the other loggers "
                "go on without it",
                MeasurementWarning,
                stacklevel=2,
            )

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - stays open during the training
        if not _ends_a_line(self.path):  # a process that was killed left half a line
            file.write("\n")
        return file


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"


class TensorBoardSink(Sink):
    """A torch ``SummaryWriter``: at most twelve scalars for the Scalars tab, all others for the tab EFT alone.

    Args:
        writer: The writer, or anything with its methods.
        scalars: Whether the twelve go there too; False if a logger already writes them.

    Example:
        >>> from torch_eft.live import TensorBoardSink
        >>> class Writer:  # or torch.utils.tensorboard.SummaryWriter
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, value, step)
        >>> TensorBoardSink(Writer()).scalars(3, {"eft/ntk_trace/measured": 2.0})
        eft/ntk_trace/measured 2.0 3
    """

    draws = True

    def __init__(self, writer: "SummaryWriter", scalars: bool = True) -> None:
        self.writer = writer
        self._scalars = scalars

    def scalars(self, step: int, values: Mapping[str, float], epoch: int | None = None) -> None:
        """Write one point per tag."""
        for name, value in sorted(values.items()):
            file_writer = None if in_scalars_tab(name) else getattr(self.writer, "file_writer", None)
            if file_writer is not None:  # a writer that was closed opens again by its own methods alone
                file_writer.add_summary(scalar_summary(name, value), step)
            elif self._scalars or not in_scalars_tab(name):
                self.writer.add_scalar(name, value, step)

    def text(self, name: str, markdown: str, step: int) -> None:
        """A page of the text tab, ``eft/<name>``."""
        self.writer.add_text(f"{PREFIX}/{name}", markdown, step)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        """A picture of the images tab, ``eft/<name>``."""
        self.writer.add_figure(f"{PREFIX}/{name}", figure, step, close=False)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """A histogram."""
        self.writer.add_histogram(tag, values.detach().cpu(), step, bins="auto")

    def run_info(self, info: Mapping[str, Any]) -> None:
        """The summary that the EFT tab reads."""
        if self.writer.file_writer is not None:
            write_run_info(self.writer, info)

    def resume(self, step: int, history: History) -> None:
        """A mark from which TensorBoard drops later steps of earlier event files, as ``purge_step`` does."""
        if (file_writer := self.writer.file_writer) is not None:
            from tensorboard.compat.proto.event_pb2 import Event as Record
            from tensorboard.compat.proto.event_pb2 import SessionLog

            file_writer.add_event(Record(session_log=SessionLog(status=SessionLog.START)), step + 1)

    def flush(self) -> None:
        """Write what is queued."""
        self.writer.flush()
