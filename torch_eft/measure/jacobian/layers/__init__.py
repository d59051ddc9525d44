"""Turns recorded calls and gradients into the factors of the Jacobian."""

from torch_eft.measure.jacobian.layers.formed import Formed, worth_forming
from torch_eft.measure.jacobian.layers.kinds import factors, in_order_of_factors, weighted
from torch_eft.measure.jacobian.layers.places import Axis

__all__ = ["Axis", "Formed", "factors", "in_order_of_factors", "weighted", "worth_forming"]
