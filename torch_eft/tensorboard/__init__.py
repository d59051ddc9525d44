"""Turns results into scalars, figures and pages of TensorBoard; no Trainer needed."""

from typing import TYPE_CHECKING, Any

from torch_eft.results.quantities import QUANTITIES, Quantity, register_quantity
from torch_eft.results.tags import compared_quantities, layer_tag, layer_theory_tag, tag
from torch_eft.tensorboard.figures import comparison_figure, kernel_figure, layers_figure
from torch_eft.tensorboard.verdicts import Verdict, reading, verdict

if TYPE_CHECKING:
    from torch_eft.results.trajectory import trajectory_figure

__all__ = [
    "QUANTITIES",
    "Quantity",
    "Verdict",
    "compared_quantities",
    "comparison_figure",
    "kernel_figure",
    "layer_tag",
    "layer_theory_tag",
    "layers_figure",
    "reading",
    "register_quantity",
    "tag",
    "trajectory_figure",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name == "trajectory_figure":  # trajectories are tensors, and the tab's server does without torch
        from torch_eft.results import trajectory

        return trajectory.trajectory_figure
    raise AttributeError(f"module 'torch_eft.tensorboard' has no attribute {name!r}")
