"""What a forecast costs, counted before it is made, and which of its parts an allowance covers.

Work is counted in seconds of one core of a common machine, by the numbers of points, outputs, layers and steps: the
same forecast is made on any machine, however busy.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch_eft.results.progress.bar import MULTIPLICATIONS_PER_SECOND
from torch_eft.results.progress.work import listening

Report = Callable[[str, float], None]
"""Gets what is being computed, and the share of all counted work that is done."""


class Allowance:
    """Work that the parts of one forecast may take together; the most useful parts come first.

    Args:
        seconds: Work allowed, in seconds of one core; the user's ``forecast_seconds``.
        report: Called with how far the work is.

    Attributes:
        report: As given.

    Example:
        >>> from torch_eft.forecast.comparison.work import Allowance
        >>> allowance = Allowance(10.0)
        >>> allowance.plan({"the NTK": 2.0, "the mean output": 39.5})
        >>> allowance.covers("the NTK"), allowance.covers("the mean output")
        (True, False)
        >>> allowance.left_out
        'the mean output; forecast_seconds=42 brings it'
        >>> allowance.refusal("the mean output")
        'about 40 s of work of one core, 10 s are allowed: forecast_seconds=42 brings it'
    """

    def __init__(self, seconds: float, report: Report | None = None) -> None:
        self.seconds, self.report = seconds, report
        self._parts: dict[str, float] = {}
        self._covered: dict[str, float] = {}
        self._done: dict[str, float] = {}

    def plan(self, parts: Mapping[str, float]) -> None:
        """Decide which parts are made: each that fits into what those before it leave.

        Args:
            parts: ``{name: work in seconds}``, after all that were planned before; of those of the same name it is the
                new work.
        """
        self._parts |= parts
        self._done = {name: work for name, work in self._done.items() if name not in parts}
        self._covered, left = {}, self.seconds
        for name, work in self._parts.items():
            if work <= left:
                self._covered[name] = work
                left -= work

    def covers(self, name: str) -> bool:
        """Return whether a planned part is made."""
        return name in self._covered

    @property
    def planned(self) -> float:
        """Work of all parts that are made, in seconds of one core."""
        return sum(self._covered.values())

    @property
    def left_out(self) -> str:
        """The parts that are not made, and the argument that brings them; empty if all are."""
        names = [name for name in self._parts if name not in self._covered]
        pronoun = "it" if len(names) == 1 else "them"
        return f"{', '.join(names)}; {self._needed(names[-1])} brings {pronoun}" if names else ""

    def refusal(self, name: str) -> str:
        """Return why a part is not made, and the argument that brings it."""
        work = self._parts[name]
        allowed = f"{self.seconds:g} s are allowed: {self._needed(name)} brings it"
        return f"about {shown(work)} of work of one core, {allowed}"

    def _needed(self, last: str) -> str:
        names = list(self._parts)
        needed = sum(self._parts[name] for name in names[: names.index(last) + 1])
        return f"forecast_seconds={math.floor(needed) + 1}"

    @contextmanager
    def working(self, name: str, multiplications: float | None = None) -> Iterator[None]:
        """Report how far the work is, while a part is made inside.

        Args:
            name: The part.
            multiplications: How many it says that it has done, in all (``torch_eft.results.progress.work``); None: as
                many as fit into its counted work.
        """
        report, work = self.report, self._covered.get(name, 0.0)
        if report is None:
            yield
            return
        before, planned = sum(self._done.values()), max(self.planned, 1e-9)
        whole, done = multiplications or max(work, 1e-9) * MULTIPLICATIONS_PER_SECOND, 0.0

        def listener(more: float) -> None:
            nonlocal done
            done += more
            report(name, min(1.0, (before + min(0.99, done / whole) * work) / planned))

        report(name, min(1.0, before / planned))
        with listening(listener):
            yield
        self._done[name] = work
        report(name, min(1.0, (before + work) / planned))


def shown(seconds: float) -> str:
    """Return seconds to two digits."""
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"
