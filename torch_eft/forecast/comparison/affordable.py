"""Work whose cost grows with the number of points: tried on a few of them before it is done on all."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_FIRST = 8
"""Points of the first trial; problems no larger are done without one."""
_NOISE = 0.25
"""Growth below this share of the first trial's time is not told from chance: it may be as large."""


class TooDearError(ValueError):
    """Not worth its time; the message says how much it would take.

    Attributes:
        spent: Seconds that finding out took.
    """

    spent: float = 0.0


def trials(points: int) -> list[int]:
    """On how many points it is tried: 8, twice as many and so on, and all."""
    counts = [min(points, _FIRST)]
    while counts[-1] < points:
        counts.append(min(points, 2 * counts[-1]))
    return counts


def within(seconds: float, points: int, compute: Callable[[int], T], work: Callable[[int], float]) -> tuple[T, float]:
    """``compute(points)``, after trials on fewer points, as long as it stays affordable.

    The time is taken as a part that does not grow and one that does as ``work``; what the first trial took counts as
    the former. From every trial the largest one is gone on to that can be afforded.

    Args:
        seconds: Allowed in all.
        points: Of the whole problem.
        compute: Does it on the first few points.
        work: How the growing part grows with the number of points, up to a factor.

    Returns:
        The result for the whole, and the time that all took.

    Raises:
        TooDearError: If it would take longer.
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
            error = TooDearError(
                f"{tried} training points took {took:.2g} s, so that {points} would take about {coming[points]:.2g} s; "
                f"{max(0.0, seconds - (now - begun)):.2g} s are left of what is allowed"
            )
            error.spent = now - begun
            raise error
        left = left[left.index(affordable[-1]) :]
