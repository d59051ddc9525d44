"""Averages of weights, by Lightning's callbacks: measured are the weights that are trained."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")
"""Callbacks by name: not every version of Lightning has both."""


def which_weights(trainer: "Trainer") -> str | None:
    """Return which weights are measured where a callback averages them; None where none does."""
    names = [
        type(callback).__name__
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if any(base.__name__ in _AVERAGES for base in type(callback).__mro__)
    ]
    if not names:
        return None
    return (
        f"Measured are the weights that are trained, at every step and at the end: not their average, which {names[0]} "
        "keeps beside them and puts in their place for validation or when training ends. "
        "`torch_eft.measure` takes the averaged network, or any other, by itself."
    )
