"""Lightning callbacks: attach them to a training that you already have."""

from torch_eft.callbacks.bundle import EFTMonitor
from torch_eft.callbacks.monitor import MeasurementWarning
from torch_eft.callbacks.ntk import NTKMonitor
from torch_eft.callbacks.representation import RepresentationMonitor
from torch_eft.callbacks.theory import TheoryComparison

__all__ = ["EFTMonitor", "MeasurementWarning", "NTKMonitor", "RepresentationMonitor", "TheoryComparison"]
