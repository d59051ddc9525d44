"""Work whose cost grows with the size of a problem: tried on small ones before it is done on the whole."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")

_FIRST = (8, 4, 1, 3)
_GROWTH = 4.0
"""Time grows at most with this power of the number of training points (measured: 1 to 4)."""


class TooDearError(ValueError):
    """Not worth its time; the message says how much it would take.

    Attributes:
        spent: Seconds that finding out took.
    """

    spent: float = 0.0


@dataclass(frozen=True)
class Size:
    """Of a forecast.

    Args:
        points: N, on which is trained.
        probes: N_p, on which is looked.
        outputs: n_L.
        layers: L.
    """

    points: int
    probes: int
    outputs: int
    layers: int

    def __str__(self) -> str:
        """In words."""
        layers = f"{self.outputs} outputs and {self.layers} layers"
        return f"{self.points} training points, {self.probes} probe points, {layers}"

    def ladder(self) -> "list[Size]":
        """From at most 8 points, 4 probes, one output and 3 layers by doubling the points up to the whole."""
        points, probes, outputs, layers = _FIRST
        count = min(self.points, points)
        rungs = [
            Size(count, min(self.probes, probes), outputs, min(self.layers, layers)),
            replace(self, points=count),
        ]
        while count < self.points:
            count = min(self.points, 2 * count)
            rungs.append(replace(self, points=count))
        return list(dict.fromkeys(rungs))

    def over(self, other: "Size", power: float) -> float:
        """How much more it takes than another one, with this power of the points; all else linearly."""
        rest = self.probes / other.probes * self.outputs / other.outputs * self.layers / other.layers
        return (self.points / other.points) ** power * rest


def within(seconds: float, size: Size, compute: Callable[[Size], T], growth: float = 2.0) -> tuple[T, float]:
    """``compute(size)``, after smaller ones, as long as it stays affordable.

    Args:
        seconds: Allowed in all.
        size: Of the whole problem.
        compute: Does it at a size.
        growth: Time grows at least with this power of the number of points.

    Returns:
        The result for the whole, and the time that all took.

    Raises:
        TooDearError: If it would take longer.
    """
    begun = time.perf_counter()
    rungs = size.ladder()
    for rung, following in zip(rungs, [*rungs[1:], size], strict=True):
        started = time.perf_counter()
        result = compute(rung)
        now = time.perf_counter()
        if rung == size:
            break
        coming = (now - started) * max(size.over(rung, growth), following.over(rung, _GROWTH))
        if now - begun + coming > seconds:
            error = TooDearError(
                f"{rung} took {now - started:.2g} s, so that {size} take about {coming:.2g} s; "
                f"{max(0.0, seconds):.2g} s are left of what is allowed"
            )
            error.spent = now - begun
            raise error
    return result, now - begun
