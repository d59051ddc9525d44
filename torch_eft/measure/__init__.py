"""Measurements of one real network: ``nn.Module`` in, tensors out; no Lightning."""

from torch_eft.measure.ensembles.learning_rates import LearningRates, read_learning_rates
from torch_eft.measure.ensembles.read import NotAnMLPError, read_ensemble
from torch_eft.measure.ensembles.seeds import SeedStatistics, statistics_over_seeds
from torch_eft.measure.ensembles.statistics import TheoryAgreement
from torch_eft.measure.forward.checks import MemoryLimitError, NotFiniteError
from torch_eft.measure.forward.kinks import kinked_operations
from torch_eft.measure.forward.output import Tokens, last_token, mean_over_tokens, output
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.jacobian.blocks import Estimate
from torch_eft.measure.jets.jet import NoJetRuleError
from torch_eft.measure.kernels.dntk import DDNTK, AlmostEverywhereWarning, NTKDerivatives, ddntk, dntk, ntk_derivatives
from torch_eft.measure.kernels.metrics import (
    as_matrix,
    as_trace,
    kernel_distance,
    ntk_trace,
    relative_change,
    top_eigenvalue,
)
from torch_eft.measure.kernels.ntk import Coverage, coverage, ntk, ntk_estimate
from torch_eft.measure.kernels.preconditioner import (
    OptimizerStep,
    optimizer_step,
    preconditioner,
    stability_bound,
)
from torch_eft.measure.kernels.products import Eigenpairs, ntk_eigenpairs, ntk_vector_product, ntk_vjp
from torch_eft.measure.kernels.random_outputs import Estimated, RandomOutputEstimates
from torch_eft.measure.kernels.random_outputs import estimates as random_output_estimates
from torch_eft.measure.kernels.steps.gradient_noise import GradientNoise, batch_changes, gradient_noise
from torch_eft.measure.kernels.steps.output_step import OutputStep, output_step
from torch_eft.measure.kernels.steps.preconditioned_drift import PreconditionedDrift, preconditioned_drift
from torch_eft.measure.kernels.steps.sharpness import Sharpness, sharpness
from torch_eft.measure.network.network import Network
from torch_eft.measure.network.snapshot import Plan, Snapshot, take_snapshot
from torch_eft.measure.representations.alignment import centered, effective_rank, linear_cka, target_alignment
from torch_eft.measure.representations.change import (
    LayerChange,
    RepresentationChange,
    block_drift,
    compare_representations,
    movement,
    representation_change,
)
from torch_eft.measure.representations.hidden_kernels import Representation, hidden_kernels, representation
from torch_eft.measure.taylor.displacement import DisplacementTerms, RelativeDNTK, displacement_terms, relative_dntk
from torch_eft.measure.taylor.model import TaylorModel
from torch_eft.measure.taylor.perturbative import PerturbativeTaylorModel
from torch_eft.measure.taylor.secant import NTKChange, ntk_change, ntk_finite_difference
from torch_eft.measure.taylor.series import TaylorSeries, TaylorSizes, taylor_series, taylor_sizes, taylor_terms
from torch_eft.measure.training_loss import (
    SquaredError,
    TrainingLoss,
    UnrecognizedLossError,
    recognize_loss,
    recognize_squared_error,
)

__all__ = [
    "DDNTK",
    "AlmostEverywhereWarning",
    "Coverage",
    "DisplacementTerms",
    "Eigenpairs",
    "Estimate",
    "Estimated",
    "GradientNoise",
    "LayerChange",
    "LearningRates",
    "MemoryLimitError",
    "NTKChange",
    "NTKDerivatives",
    "Network",
    "NoJetRuleError",
    "NotAnMLPError",
    "NotFiniteError",
    "OptimizerStep",
    "OutputStep",
    "PerturbativeTaylorModel",
    "Plan",
    "PreconditionedDrift",
    "Probe",
    "RandomOutputEstimates",
    "RelativeDNTK",
    "Representation",
    "RepresentationChange",
    "SeedStatistics",
    "Sharpness",
    "Snapshot",
    "SquaredError",
    "TaylorModel",
    "TaylorSeries",
    "TaylorSizes",
    "TheoryAgreement",
    "Tokens",
    "TrainingLoss",
    "UnrecognizedLossError",
    "as_matrix",
    "as_trace",
    "batch_changes",
    "block_drift",
    "centered",
    "compare_representations",
    "coverage",
    "ddntk",
    "displacement_terms",
    "dntk",
    "effective_rank",
    "gradient_noise",
    "hidden_kernels",
    "kernel_distance",
    "kinked_operations",
    "last_token",
    "linear_cka",
    "mean_over_tokens",
    "movement",
    "ntk",
    "ntk_change",
    "ntk_derivatives",
    "ntk_eigenpairs",
    "ntk_estimate",
    "ntk_finite_difference",
    "ntk_trace",
    "ntk_vector_product",
    "ntk_vjp",
    "optimizer_step",
    "output",
    "output_step",
    "preconditioned_drift",
    "preconditioner",
    "random_output_estimates",
    "read_ensemble",
    "read_learning_rates",
    "recognize_loss",
    "recognize_squared_error",
    "relative_change",
    "relative_dntk",
    "representation",
    "representation_change",
    "sharpness",
    "stability_bound",
    "statistics_over_seeds",
    "take_snapshot",
    "target_alignment",
    "taylor_series",
    "taylor_sizes",
    "taylor_terms",
    "top_eigenvalue",
]
