"""Work whose cost grows with the number of training points: tried on few of them before it is done on all."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_FIRST = 8
_GROWTH = 4.0
"""Time grows at most with this power of the number of points (measured: 1 to 4)."""


class TooDearError(ValueError):
    """Not worth its time; the message says how much it would take.

    Attributes:
        spent: Seconds that finding out took.
    """

    spent: float = 0.0


def within(seconds: float, points: int, compute: Callable[[int], T], growth: float = 2.0) -> tuple[T, float]:
    """``compute(points)``, after doubling from 8 points up to it, as long as it stays affordable.

    Args:
        seconds: Allowed in all.
        points: Of the whole problem.
        compute: Does it on so many points.
        growth: Time grows at least with this power of the number of points.

    Returns:
        The result for all points, and the time that all took.

    Raises:
        TooDearError: If it would take longer.
    """
    begun = time.perf_counter()
    count = min(points, _FIRST)
    while True:
        started = time.perf_counter()
        result = compute(count)
        now = time.perf_counter()
        if count == points:
            return result, now - begun
        following, spent = min(points, 2 * count), now - started
        least = spent * (points / count) ** growth
        coming = spent * (following / count) ** _GROWTH
        if now - begun + max(least, coming) > seconds:
            error = TooDearError(
                f"{count} of {points} training points took {spent:.2g} s, so that all take about "
                f"{max(least, coming):.2g} s or more; {max(0.0, seconds):.2g} s are left of what is allowed"
            )
            error.spent = now - begun
            raise error
        count = following
