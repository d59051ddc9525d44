"""When to measure."""

from collections.abc import Callable
from typing import Literal, TypeAlias

Every: TypeAlias = int | Literal["epoch"] | Callable[[int], bool]


def checked_every(every: Every) -> Every:
    """``every`` itself.

    Raises:
        ValueError: If it is no positive integer, ``"epoch"`` or a function of the step.
    """
    if every == "epoch" or callable(every) or (isinstance(every, int) and not isinstance(every, bool) and every > 0):
        return every
    raise ValueError(
        f"every: {every!r} given; give 'epoch', a positive number of optimizer steps, or a function of the step"
    )


def due(every: Every, step: int) -> bool:
    """Whether a measurement is due after ``step`` optimizer steps (``"epoch"``: never, epochs are announced)."""
    if every == "epoch":
        return False
    return bool(every(step)) if callable(every) else step % every == 0
