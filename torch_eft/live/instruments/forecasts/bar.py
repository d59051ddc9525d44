"""The bar that moves while a forecast is computed: what is being done, how far it is, and what was left out."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from torch_eft.forecast.comparison.work import Allowance

SILENT = 2.0
"""Seconds of work, counted or passed, up to which nothing is shown."""

_EACH = 0.1


class ForecastBar:
    """Shows how far a forecast is, on stderr: a bar in a terminal, elsewhere one line if it takes long.

    Bars of training, such as Lightning's, stay where they are: in a terminal this one is tqdm's, in a line of its own
    that it clears. Use it as a context manager.

    Args:
        allowance: The work, which reports to this bar from now on.
        stream: Where it is shown; None: stderr.
        clock: Seconds, for what is shown; no decision depends on it.
    """

    def __init__(
        self, allowance: Allowance, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._allowance, self._stream, self._clock = allowance, stream or sys.stderr, clock
        self._bar: Any = None
        self._told = False
        self._begun = self._latest = clock()

    def __enter__(self) -> "ForecastBar":
        self._begun = self._clock()
        self._allowance.report = self
        return self

    def __exit__(self, *unused: object) -> None:
        self._allowance.report = None
        if self._bar is not None:
            self._bar.close()

    def __call__(self, part: str, share: float) -> None:
        """Show that ``share`` of the counted work is done, and a part of it is being computed."""
        passed = self._clock() - self._begun
        if max(self._allowance.planned, passed) < SILENT:
            return
        if not self._stream.isatty():
            if not self._told:
                whole = self._expected(passed, share)
                print(f"torch_eft: computing the forecast, {whole}{self._left_out}", file=self._stream, flush=True)
                self._told = True
            return
        if self._bar is not None and passed - self._latest < _EACH and share < 1:
            return
        self._latest = passed
        text = f"{passed:.0f} s of {self._expected(passed, share)}: {part}{self._left_out}"
        line = "torch_eft: computing the forecast [{bar:20}] " + text
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=1.0,
                initial=share,
                bar_format=line,
                ascii="-#",
                leave=False,
                dynamic_ncols=True,
                mininterval=0.0,
                file=self._stream,
            )
            return
        self._bar.n, self._bar.bar_format = share, line
        self._bar.refresh()

    def _expected(self, passed: float, share: float) -> str:
        """The whole time: what was counted, until what has passed says how fast this machine is."""
        whole = passed / share if share > 0.1 and passed > SILENT else self._allowance.planned
        return f"~{max(whole, passed):.0f} s"

    @property
    def _left_out(self) -> str:
        return f" (left out: {self._allowance.left_out})" if self._allowance.left_out else ""
