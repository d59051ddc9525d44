"""The join of the two wings: the theory of a network on a probe, beside what is measured of it."""

from torch_eft.forecast.comparison.compared import Compared
from torch_eft.forecast.comparison.ensemble import EnsembleComparison
from torch_eft.forecast.comparison.instance import InstanceComparison

__all__ = ["Compared", "EnsembleComparison", "InstanceComparison"]
