"""Schedules: when to measure besides the first and the last weights, which always are.

A schedule is ``"auto"``, ``"epoch"``, a number of optimizer steps, ``linear(k)``, ``logarithmic(per_decade)`` or any
function of the step; in a configuration file also ``"100"``, ``"linear:100"`` and ``"log:10"``. ``"auto"`` is due at
the points of a ``Curve``, at ten steps a decade, and when an epoch is announced.

Of what is due, a budget leaves out whatever it must but for what a ``Curve`` takes.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from torch_eft.results.choices import nearest

Every: TypeAlias = int | str | Callable[[int], bool]

AUTO = "auto"

_ALLOWED = (
    "give 'auto', 'epoch', a positive number of optimizer steps, 'log:10' (10 measurements per decade of steps), "
    "'linear:100', or a function of the step"
)


@dataclass(frozen=True)
class linear:
    """Due every ``steps`` optimizer steps.

    Args:
        steps: A positive integer, else ``ValueError``.

    Example:
        >>> from torch_eft.live import linear
        >>> [step for step in range(1, 10) if linear(4)(step)]
        [4, 8]
    """

    steps: int

    def __post_init__(self) -> None:
        _positive_integer("linear: steps", self.steps)

    def __call__(self, step: int) -> bool:
        """Return whether a measurement is due after ``step`` steps."""
        return step % self.steps == 0


@dataclass(frozen=True)
class logarithmic:
    """Due at the steps round(10^(j / per_decade)), j = 0, 1, ...: dense where most of the motion is.

    Args:
        per_decade: A positive integer, else ``ValueError``.

    Example:
        >>> from torch_eft.live import logarithmic
        >>> [step for step in range(1, 101) if logarithmic(3)(step)]
        [1, 2, 5, 10, 22, 46, 100]
    """

    per_decade: int = 10

    def __post_init__(self) -> None:
        _positive_integer("logarithmic: per_decade", self.per_decade)

    def __call__(self, step: int) -> bool:
        """Return whether a measurement is due after ``step`` steps."""
        if step < 1:
            return False
        nearest = round(self.per_decade * math.log10(step))
        return any(round(10 ** (j / self.per_decade)) == step for j in (nearest - 1, nearest, nearest + 1))

    def following(self, step: int) -> int:
        """Return the first step after ``step`` at which a measurement is due."""
        first = math.floor(self.per_decade * math.log10(max(1, step)))
        return next(later for j in itertools.count(first) if (later := round(10 ** (j / self.per_decade))) > step)


@dataclass(frozen=True)
class Curve:
    """Steps with even distances on a logarithmic axis: as many as make a curve of any training.

    With theta_0 they are at least ``POINTS``, if there are as many steps: 1, 2, 4, 8, ... and the last one; denser
    where the training is shorter, and at first where its length is not known: as many they are from 64 steps on then.

    Args:
        origin: Optimizer steps at theta_0.
        total: Those at the end; None: not known.

    Example:
        >>> from torch_eft.live.config.schedule import Curve
        >>> Curve(0, 2000).points(2000)
        [1, 2, 4, 8, 16, 32, 63, 126, 252, 502, 1002, 2000]
        >>> Curve(0, 300).points(300)
        [1, 2, 3, 5, 8, 13, 22, 38, 63, 106, 179, 300]
        >>> Curve(0, None).points(300)
        [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 128, 256]
    """

    origin: int = 0
    total: int | None = None

    def points(self, until: int) -> list[int]:
        """The steps up to ``until``, without that of theta_0."""
        steps = _distances(None if self.total is None else self.total - self.origin)
        return [self.origin + step for step in steps[: bisect_right(steps, until - self.origin)]]

    def passed(self, since: int, step: int) -> bool:
        """Return whether a point is after ``since``, and not after ``step``."""
        steps = _distances(None if self.total is None else self.total - self.origin)
        return bisect_right(steps, since - self.origin) < bisect_right(steps, step - self.origin)

    def following(self, step: int) -> int | None:
        """Return the first point after a step; None if there is none."""
        steps = _distances(None if self.total is None else self.total - self.origin)
        place = bisect_right(steps, step - self.origin)
        return self.origin + steps[place] if place < len(steps) else None

    def left(self, step: int) -> int:
        """Return how many points are to come between ``step`` and the last one; 0 if their number is not known."""
        return 0 if self.total is None else sum(step < point < self.total for point in self.points(self.total))


@lru_cache(maxsize=16)
def _distances(length: int | None) -> tuple[int, ...]:
    """The points of a curve of so many steps, or of an unknown number, by their distance from theta_0."""
    if length is None:
        return tuple(sorted({1, *(round(2 ** (j / 2)) for j in range(2, POINTS)), *(2**k for k in range(6, 48))}))
    if length >= 2 ** (POINTS - 2):  # then these are as many
        return (*(2**k for k in range(length.bit_length()) if 2**k < length), length)
    steps = [round(max(1, length) ** (j / (POINTS - 2))) for j in range(POINTS - 1)]
    return tuple(min(length, max(step, place)) for place, step in enumerate(steps, 1) if place <= length)


POINTS = 13
"""Measurements, that of theta_0 among them, that draw curves of 12 points: some are of what lies between two."""


def checked_every(every: Every) -> Every:
    """Check a schedule.

    Returns:
        ``every`` itself, or the schedule that a string names.

    Raises:
        ValueError: If it is not one of those allowed.
    """
    if every in (AUTO, "epoch") or (callable(every) and not isinstance(every, str)):
        return every
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return every
    if isinstance(every, str):
        kind, _, number = every.rpartition(":")
        makers: dict[str, Callable[[int], Callable[[int], bool]]] = {"": linear, "linear": linear, "log": logarithmic}
        if kind in makers and number.isdecimal() and int(number) > 0:
            return makers[kind](int(number))
    raise ValueError(f"every: {every!r} given{nearest(every, ['epoch'])}; {_ALLOWED}")


def due(every: Every, step: int, since: int | None = None, curve: Curve | None = None) -> bool:
    """Return whether a measurement fell due at one of the steps after ``since``, up to ``step``.

    A loop need not look after every step: with several optimizers a batch takes several.

    Args:
        every: The schedule; epochs are never due here, they are announced.
        step: Optimizer steps taken.
        since: Those taken when the loop looked last; None, or one that is not earlier, for ``step`` alone.
        curve: The curve of ``"auto"``; None: that of a training from step 0 on.

    Returns:
        Whether one is due.
    """
    first = step if since is None else min(since + 1, step)
    if every == AUTO:
        return (curve or Curve()).passed(first - 1, step) or due(logarithmic(), step, since)
    if isinstance(every, str):
        return False
    if callable(every):
        return any(every(each) for each in range(first, step + 1))
    return step // every > (first - 1) // every


def not_before(every: Every, step: int, curve: Curve) -> int:
    """Return a later step before which nothing is due, so that a loop of many steps need not ask at each.

    Args:
        every: The schedule.
        step: Optimizer steps taken.
        curve: The curve of ``"auto"``.

    Returns:
        The step; the next one where a schedule does not tell.
    """
    if every != AUTO:
        return step + 1
    decades = logarithmic().following(step)
    return min(decades, curve.following(step) or decades)


def _positive_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r} given; give a positive integer")
