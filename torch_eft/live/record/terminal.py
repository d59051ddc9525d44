"""What a terminal shows of a run: what is expected when it starts, what came of it when it ends; on lines of their own.

The numbers are those of the tab's first screen (``torch_eft.tensorboard.answers``). Progress bars stay where they are:
tqdm's make room for a line, Rich's take what is printed. The logger ``torch_eft.terminal`` writes it, so that
``logging.getLogger("torch_eft.terminal").setLevel("ERROR")`` is silence.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch_eft.live.instrument import History
from torch_eft.live.record.sinks import JSONLSink, Sink, TensorBoardSink
from torch_eft.results.regime import amount, first_sentence, theory
from torch_eft.tensorboard.answers import summary
from torch_eft.tensorboard.run_info import Records

terminal = logging.getLogger("torch_eft.terminal")


class _OwnLines(logging.Handler):
    """Writes each message to stderr, above the bars that are shown there or on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message."""
        try:
            text = self.format(record)
            bars = sys.modules.get("tqdm")
            if bars is None:
                print(text, file=sys.stderr, flush=True)
            else:
                bars.tqdm.write(text, file=sys.stderr)
        except Exception:
            self.handleError(record)


if not terminal.handlers:
    terminal.addHandler(_OwnLines())
    terminal.propagate = False
    terminal.setLevel(logging.INFO)


def first_lines(
    info: Mapping[str, Any], expected: tuple[float, float] | None, left_out: Sequence[str], place: str
) -> list[str]:
    """Return what is known when training starts: the network and what is expected, what is left out, where to look.

    Args:
        info: The run info.
        expected: The band of 90 % of the NTK's drift at the end, if the theory says it.
        left_out: What the forecasts leave out, and the argument that brings it.
        place: Where results are, and how to look at them; empty: in ``history`` alone.

    Returns:
        One to three lines.
    """
    parts = [str(info.get("network") or "network")]
    if not info.get("depth"):
        parts[0] += f", {info.get('parameters') or 0:,} parameters"
    if (r := info.get("r")) is not None:
        parts.append(f"r = L/n = {r:.2g}")
    if expected is not None:
        parts.append(f"expected NTK drift {_range(*expected)} %")
    badge = theory(info)
    why = first_sentence(badge.reason.removeprefix("no forecast: ").removeprefix("measurements only: "))
    parts.append(f"theory: {badge.name}" + (f" ({why})" if badge.name == "measured only" else ""))
    lines = [" | ".join(parts)]
    if left_out:
        lines.append(f"left out of the forecast: {' | '.join(left_out)}")
    return lines + [place] * bool(place)


def last_lines(info: Mapping[str, Any], history: History, cost: str, left_out: str) -> list[str]:
    """Return what came of a run: measured beside predicted, the verdict and the cost, and what was left out.

    Args:
        info: The run info.
        history: Everything measured.
        cost: The cost of measuring, in words.
        left_out: What the budget left out, and the argument that brings it; empty: nothing.

    Returns:
        Two or three lines.
    """
    found = summary(info, Records(Path(), measurements=history).series())
    drift, features, ending = found["drift"], found["features"], found["ending"]
    parts = []
    if drift["measured"] is not None:
        band = drift["low"] is not None and drift["high"] is not None
        parts.append(
            f"NTK moved {amount(drift['measured'])}"
            + (f" (predicted {_range(drift['low'], drift['high'])})" if band else "")
        )
    if features is not None:
        parts.append(f"features moved {amount(features)}")
    parts += [f"outputs {value}" for name, value, _ in found["compared"]["rows"] if name == "outputs"]
    step = max(history, default=0)
    start = f"{ending['words']}: " if ending["state"] in ("diverged", "early") else f"step {step}: "
    lines = [start + (", ".join(parts) or "nothing was measured")]
    lines.append(f"{_verdict(found)}; {cost}")
    return lines + [f"left out: {left_out}"] * bool(left_out)


def place_of(sinks: Sequence[Sink]) -> str:
    """Return how to look at what some sinks write; empty where nothing is drawn or kept."""
    for sink in sinks:
        directory = getattr(getattr(sink, "writer", None), "log_dir", None)
        if isinstance(sink, TensorBoardSink) and directory:
            path = Path(directory)
            return (
                f"tensorboard --logdir {_short(path.parent if path.name.startswith('version_') else path)}   (tab EFT)"
            )
    files = [sink.path for sink in sinks if isinstance(sink, JSONLSink)]
    return f"torch-eft report {_short(files[0])}" if files else ""


def _short(path: Path) -> str:
    """The path as seen from here, where that is shorter."""
    with suppress(ValueError):  # on another drive
        return min(os.path.relpath(path), str(path), key=len)
    return str(path)


def _verdict(found: Mapping[str, Any]) -> str:
    """The regime and what it means; before that, that a network is deep for its width."""
    badge, size = found["regime"], found["size"]
    meaning = badge["reason"].partition(": ")[2] or badge["reason"]
    words = f"{badge['name']}: {first_sentence(meaning)}"
    return words if size is None or not size["remedy"] else f"{size['remedy'].rstrip('.')}; {words}"


def _range(low: float, high: float) -> str:
    """A range in percent, e.g. ``3.4 .. 6.1``."""
    return f"{100 * low:.2g} .. {100 * high:.2g}"
