"""Schedules: when to measure besides the first and the last weights, which always are.

A schedule is ``"epoch"``, a number of optimizer steps, ``linear(k)``, ``logarithmic(per_decade)`` or any function of
the step; in a configuration file also ``"100"``, ``"linear:100"`` and ``"log:10"``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch_eft.results.choices import nearest

Every: TypeAlias = int | str | Callable[[int], bool]

_ALLOWED = (
    "give 'epoch', a positive number of optimizer steps, 'log:10' (10 measurements per decade of steps), 'linear:100', "
    "or a function of the step"
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


def checked_every(every: Every) -> Every:
    """Check a schedule.

    Returns:
        ``every`` itself, or the schedule that a string names.

    Raises:
        ValueError: If it is not one of those allowed.
    """
    if every == "epoch" or (callable(every) and not isinstance(every, str)):
        return every
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return every
    if isinstance(every, str):
        kind, _, number = every.rpartition(":")
        makers: dict[str, Callable[[int], Callable[[int], bool]]] = {"": linear, "linear": linear, "log": logarithmic}
        if kind in makers and number.isdecimal() and int(number) > 0:
            return makers[kind](int(number))
    raise ValueError(f"every: {every!r} given{nearest(every, ['epoch'])}; {_ALLOWED}")


def due(every: Every, step: int, since: int | None = None) -> bool:
    """Return whether a measurement fell due at one of the steps after ``since``, up to ``step``.

    A loop need not look after every step: with several optimizers a batch takes several.

    Args:
        every: The schedule; ``"epoch"`` is never due here, epochs are announced.
        step: Optimizer steps taken.
        since: Those taken when the loop looked last; None, or one that is not earlier, for ``step`` alone.

    Returns:
        Whether one is due.
    """
    if isinstance(every, str):
        return False
    first = step if since is None else min(since + 1, step)
    if callable(every):
        return any(every(each) for each in range(first, step + 1))
    return step // every > (first - 1) // every


def _positive_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r} given; give a positive integer")
