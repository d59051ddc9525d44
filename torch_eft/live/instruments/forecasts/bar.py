"""The bar that moves while a forecast is computed: what is being done, how far it is, and what was left out."""

import time
from collections.abc import Callable
from typing import TextIO

from torch_eft.forecast.comparison.work import Allowance
from torch_eft.results.progress.bar import Bar


class ForecastBar:
    """Shows how far a forecast is, as ``Bar`` does. Use it as a context manager.

    Args:
        allowance: The work, which reports to this bar from now on.
        stream: Where it is shown; None: stderr.
        clock: Seconds, for what is shown; no decision depends on it.
    """

    def __init__(
        self, allowance: Allowance, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._allowance = allowance
        self._bar = Bar("computing the forecast", stream, clock)

    def __enter__(self) -> "ForecastBar":
        self._bar.begin()
        self._allowance.report = self
        return self

    def __exit__(self, *unused: object) -> None:
        self._allowance.report = None
        self._bar.close()

    def __call__(self, part: str, share: float) -> None:
        """Show that ``share`` of the counted work is done, and a part of it is being computed."""
        allowance = self._allowance
        note = f"left out: {allowance.left_out}" if allowance.left_out else ""
        self._bar.show(share, part=part, planned=allowance.planned, note=note)
