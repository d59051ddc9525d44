"""Results to scalars, layouts, figures and pages of TensorBoard; no Trainer needed."""

from torch_eft.tensorboard.figures import comparison_figure, kernel_figure, layers_figure
from torch_eft.tensorboard.layout import comparison_layout
from torch_eft.tensorboard.tags import TITLES, compared_quantities, compared_scalars, tag

__all__ = [
    "TITLES",
    "compared_quantities",
    "compared_scalars",
    "comparison_figure",
    "comparison_layout",
    "kernel_figure",
    "layers_figure",
    "tag",
]
