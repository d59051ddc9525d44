"""Work whose cost grows with the number of points: timed on a few of them before it is done on all."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_FIRST = 8
"""Points of the first trial; problems no larger are done without one."""
_NOISE = 0.25
"""Growth below this share of the first trial's time may be chance; this much growth is assumed."""


class TooExpensiveError(ValueError):
    """Raised for work that would take longer than allowed.

    Attributes:
        spent: Seconds taken to find out.
    """

    def __init__(self, message: str, spent: float = 0.0) -> None:
        super().__init__(message)
        self.spent = spent


def trials(points: int) -> list[int]:
    """Return the numbers of points of the trials: 8, 16, 32 and so on, and all."""
    counts = [min(points, _FIRST)]
    while counts[-1] < points:
        counts.append(min(points, 2 * counts[-1]))
    return counts


def within(seconds: float, points: int, compute: Callable[[int], T], work: Callable[[int], float]) -> tuple[T, float]:
    """Run ``compute(points)`` after trials on fewer points, as long as it stays within the time limit.

    The time is modeled as a fixed part plus one that grows as ``work``; the first trial is taken as all fixed. After
    each trial, the next is the largest problem that still fits the time limit.

    Args:
        seconds: Time limit for everything.
        points: Size of the whole problem.
        compute: Solves the problem of the first few points.
        work: Growth of the growing part with the number of points, up to a factor.

    Returns:
        The result for the whole problem, and the time that everything took.

    Raises:
        TooExpensiveError: If it would take longer.
    """
    begun = time.perf_counter()
    left = trials(points)
    fixed: float | None = None
    while True:
        tried = left.pop(0)
        started = time.perf_counter()
        result = compute(tried)
        now = time.perf_counter()
        if tried == points:
            return result, now - begun
        took = now - started
        fixed = took if fixed is None else min(fixed, took)
        each = max(took - fixed, _NOISE * fixed) / work(tried)
        coming = {count: fixed + each * work(count) for count in left}
        affordable = [count for count in left if now - begun + coming[count] <= seconds]
        if not affordable:
            raise TooExpensiveError(
                f"{tried} training points took {took:.2g} s, so that {points} would take about {coming[points]:.2g} s; "
                f"{max(0.0, seconds - (now - begun)):.2g} s are left of what is allowed",
                spent=now - begun,
            )
        left = left[left.index(affordable[-1]) :]
