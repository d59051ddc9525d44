"""Turns recorded calls and gradients into the factors of the Jacobian."""

from torch_eft.measure.jacobian.layers.formed import formed_as_it_comes
from torch_eft.measure.jacobian.layers.kinds import factors, in_order_of_factors, weighted
from torch_eft.measure.jacobian.layers.places import Axis

__all__ = ["Axis", "factors", "formed_as_it_comes", "in_order_of_factors", "weighted"]
