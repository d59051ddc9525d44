"""What one real network does: ``nn.Module`` in, tensors out; no Lightning."""

from torch_eft.measure.ensembles.learning_rates import LearningRates, read_learning_rates
from torch_eft.measure.ensembles.read import NotAnMLPError, ReadEnsemble, read_ensemble
from torch_eft.measure.ensembles.seeds import SeedEnsemble, seed_ensemble
from torch_eft.measure.ensembles.statistics import Comparison
from torch_eft.measure.forward.kinks import kinked_operations
from torch_eft.measure.forward.output import output
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.jacobian.engine import Estimate
from torch_eft.measure.jets.jet import NoJetRuleError
from torch_eft.measure.kernels.dntk import AlmostEverywhereWarning, Contracted, contracted, ddntk, dntk
from torch_eft.measure.kernels.metrics import (
    as_matrix,
    as_trace,
    kernel_distance,
    ntk_trace,
    relative_change,
    top_eigenvalue,
)
from torch_eft.measure.kernels.ntk import Coverage, coverage, ntk, ntk_estimate
from torch_eft.measure.kernels.products import Eigenpairs, ntk_eigenpairs, ntk_vector_product, pull_back
from torch_eft.measure.losses import TrainingLoss, recognise_loss
from torch_eft.measure.network.snapshot import Plan, Snapshot, take_snapshot
from torch_eft.measure.representations.alignment import centred, effective_rank, linear_cka, target_alignment
from torch_eft.measure.representations.change import (
    LayerChange,
    RepresentationChange,
    block_drift,
    movement,
    representation_change,
)
from torch_eft.measure.representations.hidden_kernels import Representation, hidden_kernels, representation
from torch_eft.measure.taylor.displacement import Interval, interval
from torch_eft.measure.taylor.model import ShadowModel
from torch_eft.measure.taylor.perturbative import PerturbativeShadow
from torch_eft.measure.taylor.recorder import TrajectoryRecorder
from torch_eft.measure.taylor.secant import Secant, secant, secant_ntk
from torch_eft.measure.taylor.series import TaylorSeries, taylor_series, taylor_terms
from torch_eft.measure.taylor.sized_dntk import SizedDNTK, sized_dntk
from torch_eft.measure.taylor.sizes import TaylorSizes, taylor_sizes
from torch_eft.measure.training_loss import SquaredError, UnrecognisedLossError, recognise_squared_error

__all__ = [
    "AlmostEverywhereWarning",
    "Comparison",
    "Contracted",
    "Coverage",
    "Eigenpairs",
    "Estimate",
    "Interval",
    "LayerChange",
    "LearningRates",
    "NoJetRuleError",
    "NotAnMLPError",
    "PerturbativeShadow",
    "Plan",
    "Probe",
    "ReadEnsemble",
    "Representation",
    "RepresentationChange",
    "Secant",
    "SeedEnsemble",
    "ShadowModel",
    "SizedDNTK",
    "Snapshot",
    "SquaredError",
    "TaylorSeries",
    "TaylorSizes",
    "TrainingLoss",
    "TrajectoryRecorder",
    "UnrecognisedLossError",
    "as_matrix",
    "as_trace",
    "block_drift",
    "centred",
    "contracted",
    "coverage",
    "ddntk",
    "dntk",
    "effective_rank",
    "hidden_kernels",
    "interval",
    "kernel_distance",
    "kinked_operations",
    "linear_cka",
    "movement",
    "ntk",
    "ntk_eigenpairs",
    "ntk_estimate",
    "ntk_trace",
    "ntk_vector_product",
    "output",
    "pull_back",
    "read_ensemble",
    "read_learning_rates",
    "recognise_loss",
    "recognise_squared_error",
    "relative_change",
    "representation",
    "representation_change",
    "secant",
    "secant_ntk",
    "seed_ensemble",
    "sized_dntk",
    "take_snapshot",
    "target_alignment",
    "taylor_series",
    "taylor_sizes",
    "taylor_terms",
    "top_eigenvalue",
]
