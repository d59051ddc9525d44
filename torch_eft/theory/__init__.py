"""What an ensemble of networks does: pure functions of tensors, float64, no ``nn.Module``."""

from torch_eft.theory.activations import (
    Activation,
    available_activations,
    get_activation,
    leaky_relu,
    register_activation,
)
from torch_eft.theory.aspect_ratio import infinite_width_validity, output_fluctuation, regime
from torch_eft.theory.blocks import block, tiles
from torch_eft.theory.criticality import CriticalPoint, criticality
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.expectations import QuadratureError
from torch_eft.theory.prediction import InfiniteWidthTraining, predict_training
from torch_eft.theory.sampling import ntk_trace_spread, sample_ntk
from torch_eft.theory.statistics import QUANTITIES, LayerStatistics, initial_statistics

__all__ = [
    "QUANTITIES",
    "Activation",
    "CriticalPoint",
    "InfiniteWidthTraining",
    "LayerStatistics",
    "MLPEnsemble",
    "QuadratureError",
    "available_activations",
    "block",
    "criticality",
    "get_activation",
    "infinite_width_validity",
    "initial_statistics",
    "leaky_relu",
    "ntk_trace_spread",
    "output_fluctuation",
    "predict_training",
    "regime",
    "register_activation",
    "sample_ntk",
    "tiles",
]
