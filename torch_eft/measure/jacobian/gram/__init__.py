"""Gram matrices of per-sample Jacobians that are kept as factors.

A layer o = W h has dz_{i;a}/dW = sum_t g_{i;a,t} h_{a,t}^T, with h its inputs (D numbers), g = dz/do (E numbers) and t
the T places of one sample at which the weight is used: pixels, tokens, times. Along theta + s v all of them are series
in s, and so is the Jacobian, J = J_0 + s J_1 + s^2 J_2: J_0 is the Jacobian, J_1 = d^2z . v, 2 J_2 = d^3z . v . v. A
Gram matrix of two orders (m, n) is J_m lambda J_n^T.

Rows are pairs (output i, sample a), outputs first. Of three ways the one with the fewest operations is taken:

    one place:  (g . g') * (a . a'), entry by entry, without forming J;
    explicit:   J formed for some columns at a time;
    mixed:      (a . a') between places, applied to g' and closed with g, without forming J.
"""

from torch_eft.measure.jacobian.gram.dense import DenseFactor, Orders, mirror
from torch_eft.measure.jacobian.gram.forms import FORMED, PerOutput
from torch_eft.measure.jacobian.gram.outer import EmbeddingFactor, OuterProductFactor
from torch_eft.measure.jacobian.gram.tied import TiedFactor

Factor = OuterProductFactor | DenseFactor | TiedFactor

__all__ = [
    "FORMED",
    "DenseFactor",
    "EmbeddingFactor",
    "Factor",
    "Orders",
    "OuterProductFactor",
    "PerOutput",
    "TiedFactor",
    "mirror",
]
