"""Lightning callbacks: attach them to a training that you already have."""

from torch_eft.callbacks.monitor import EFTMonitor
from torch_eft.callbacks.monitors import NTKMonitor, RepresentationMonitor, TheoryComparison
from torch_eft.live import MeasurementWarning, linear, logarithmic

__all__ = [
    "EFTMonitor",
    "MeasurementWarning",
    "NTKMonitor",
    "RepresentationMonitor",
    "TheoryComparison",
    "linear",
    "logarithmic",
]
