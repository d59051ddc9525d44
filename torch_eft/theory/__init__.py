"""The theory of an ensemble of networks: pure functions of float64 tensors, without ``nn.Module``.

    ensemble             MLPEnsemble: widths, activation, variances and learning rates of a random MLP
    gaussian             expectations of activations under N(0, K), closed or integrated or sampled
    signal_propagation   susceptibilities, critical points, regimes
    initialization       statistics at initialization: K, Theta and the 1/n vertices, in full, in blocks, in tiles
    estimates            single numbers that follow: aspect ratio, learning rates, spread over seeds, expected drift
    architecture         convolutions, skips and norms, read off a module: kernels at infinite width, spread over seeds;
                         the vertices of chains of convolutions
    training             the trained network at order 0 and 1/n; any loss and minibatches by sampling; Adam's first
                         step; regression with the kernels; on one page, ``derivation``: which vertex enters which
                         observable, and why
    hidden_layers        the movement of hidden representations in training
    hierarchy            one network's NTK, dNTK and ddNTK through its training, and the law of its drift

Each folder imports from those above it, ``hierarchy`` and ``hidden_layers`` also from ``training``.
"""

from torch_eft.theory.architecture.chains.vertices import architecture_vertices
from torch_eft.theory.architecture.kernels import architecture_kernels
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.architecture.reading.graph import NotReadableError
from torch_eft.theory.architecture.reading.read import read_architecture
from torch_eft.theory.architecture.statistics import ArchitectureStatistics, architecture_statistics
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.aspect_ratio import AspectRatio, aspect_ratio
from torch_eft.theory.estimates.exact import dead_probability, exact_statistics
from torch_eft.theory.estimates.expected_drift import ExpectedDrift, expected_drift
from torch_eft.theory.estimates.learning_rates import (
    LearningRateShares,
    equivalence_learning_rates,
    largest_learning_rate,
)
from torch_eft.theory.estimates.sampling import ntk_trace_spread, sample_ntk
from torch_eft.theory.estimates.seed_spread import SeedSpread, seed_spread
from torch_eft.theory.gaussian.activations import (
    Activation,
    available_activations,
    get_activation,
    leaky_relu,
    register_activation,
)
from torch_eft.theory.gaussian.quadrature import QuadratureError
from torch_eft.theory.hidden_layers.predict import predict_representation
from torch_eft.theory.hidden_layers.result import HiddenLayerForecast, RepresentationForecast
from torch_eft.theory.hidden_layers.statistics import RepresentationStatistics, representation_statistics
from torch_eft.theory.hierarchy.drift.joint import NetworkDraws
from torch_eft.theory.hierarchy.drift.predict import predict_drift
from torch_eft.theory.hierarchy.drift.result import (
    ContractedSize,
    DrawnNetworks,
    DriftForecast,
    DriftQuantiles,
    KernelDrift,
    NTKDrift,
)
from torch_eft.theory.hierarchy.drift.sampled import PathDraws
from torch_eft.theory.hierarchy.evolution import Hierarchy, train_hierarchy
from torch_eft.theory.initialization.statistics import (
    STATISTICS,
    LayerStatistics,
    initial_statistics,
    statistics_memory,
)
from torch_eft.theory.initialization.vertex_blocks import VertexBlock, VertexTile, vertex_block, vertex_tiles
from torch_eft.theory.signal_propagation.critical_point import CriticalPoint, UnstablePoint, criticality
from torch_eft.theory.signal_propagation.regimes import (
    first_order_validity,
    infinite_width_validity,
    output_fluctuation,
    regime,
)
from torch_eft.theory.signal_propagation.susceptibility import (
    FixedPoint,
    Susceptibilities,
    fixed_points,
    susceptibilities,
)
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.infinite_width import FrozenArchitecture, FrozenChain, FrozenTraining
from torch_eft.theory.training.outputs.fourth_cumulant import FourthCumulant, predict_fourth_cumulant
from torch_eft.theory.training.outputs.kernel_regression import KernelRegression, predict_kernel_regression
from torch_eft.theory.training.predict import predict_training
from torch_eft.theory.training.sign_descent import SignStep, predict_sign_step

__all__ = [
    "STATISTICS",
    "Activation",
    "Architecture",
    "ArchitectureStatistics",
    "AspectRatio",
    "ContractedSize",
    "CriticalPoint",
    "DrawnNetworks",
    "DriftForecast",
    "DriftQuantiles",
    "ExpectedDrift",
    "FiniteWidthTraining",
    "FixedPoint",
    "FourthCumulant",
    "FrozenArchitecture",
    "FrozenChain",
    "FrozenTraining",
    "HiddenLayerForecast",
    "Hierarchy",
    "KernelDrift",
    "KernelRegression",
    "LayerStatistics",
    "LearningRateShares",
    "MLPEnsemble",
    "NTKDrift",
    "NetworkDraws",
    "NotReadableError",
    "PathDraws",
    "QuadratureError",
    "RepresentationForecast",
    "RepresentationStatistics",
    "SeedSpread",
    "SignStep",
    "Susceptibilities",
    "UnstablePoint",
    "VertexBlock",
    "VertexTile",
    "architecture_kernels",
    "architecture_statistics",
    "architecture_vertices",
    "aspect_ratio",
    "available_activations",
    "criticality",
    "dead_probability",
    "equivalence_learning_rates",
    "exact_statistics",
    "expected_drift",
    "first_order_validity",
    "fixed_points",
    "get_activation",
    "infinite_width_validity",
    "initial_statistics",
    "largest_learning_rate",
    "leaky_relu",
    "ntk_trace_spread",
    "output_fluctuation",
    "predict_drift",
    "predict_fourth_cumulant",
    "predict_kernel_regression",
    "predict_representation",
    "predict_sign_step",
    "predict_training",
    "read_architecture",
    "regime",
    "register_activation",
    "representation_statistics",
    "sample_ntk",
    "seed_spread",
    "statistics_memory",
    "susceptibilities",
    "train_hierarchy",
    "vertex_block",
    "vertex_tiles",
]
