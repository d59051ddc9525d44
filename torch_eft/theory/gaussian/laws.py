"""Laws of a single weight or bias at initialization, besides the Gaussian.

The sum over a wide layer's weights is Gaussian whatever their law; the bias is one number, and its law survives the
limit of infinite width. Of the weights' law the fourth moment is left at order 1/n. Orthogonal weights are those of a
random matrix with orthonormal rows or columns (Haar), times a number: not independent.
"""

import math
from typing import Literal

import numpy
import torch
from torch import Tensor

Law = Literal["gaussian", "uniform", "truncated normal", "orthogonal"]

LAWS: tuple[Law, ...] = ("gaussian", "uniform", "truncated normal", "orthogonal")

_CUT = 2.0
"""Where a truncated normal law is cut, in standard deviations before the cut: the custom of Keras, timm and JAX."""

_NODES = ((0.2, 4), (0.4, 6), (0.7, 8), (math.inf, 16))
"""Gauss-Legendre nodes of a bias by its largest value. The rules reach 1e-7 for squares of tanh, GELU and their slopes,
2e-6 up to the third derivative and 6e-5 for squares of the sixth, far below the next order in 1/n; every node costs as
much as all of a Gaussian law. Even numbers, so that opposite nodes can be taken together."""


def _truncated(cut: float) -> tuple[float, float]:
    """Variance and excess kurtosis of a standard normal number kept between -cut and cut."""
    edge = 2 * cut * math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi) / math.erf(cut / math.sqrt(2))
    variance = 1 - edge
    return variance, (3 * variance - cut**2 * edge) / variance**2 - 3


TRUNCATED_VARIANCE, _TRUNCATED_KURTOSIS = _truncated(_CUT)

TRUNCATED_BOUND = _CUT / math.sqrt(TRUNCATED_VARIANCE)
"""Largest absolute value of a truncated normal number in its own standard deviations."""

EXCESS_KURTOSIS: dict[Law, float] = {
    "gaussian": 0.0,
    "uniform": -1.2,
    "truncated normal": _TRUNCATED_KURTOSIS,
    "orthogonal": 0.0,
}
"""<w^4> / <w^2>^2 - 3 of independent numbers."""


def bias_nodes(law: Law, variance: float, like: Tensor, smooth: bool = True) -> tuple[Tensor, Tensor] | None:
    """Values of a bias of mean 0 and their probabilities, which integrate over its law.

    Args:
        law: Of the bias.
        variance: C_b.
        like: Gives dtype and device.
        smooth: Whether what is integrated is smooth on the scale of 1, as an activation without a kink is.

    Returns:
        (nodes,) each; None where the bias is Gaussian or 0, and adds its variance to that of the sum over weights.
    """
    if law == "gaussian" or variance == 0:
        return None
    bound = (math.sqrt(3.0) if law == "uniform" else TRUNCATED_BOUND) * math.sqrt(variance)
    nodes, weights = numpy.polynomial.legendre.leggauss(
        next(count for most, count in _NODES if bound <= most) if smooth else _NODES[-1][1]
    )
    if law == "truncated normal":
        weights = weights * numpy.exp(-((_CUT * nodes) ** 2) / 2)
    values, weight = like.new_tensor(nodes), like.new_tensor(weights / weights.sum())
    return bound * values, weight


def draw(law: Law, variance: float, shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Weights (n_out, n_in) or biases (n_out,) of a law, with the mean square given.

    Args:
        law: Of every entry; ``"orthogonal"`` for matrices only.
        variance: Of one entry.
        shape: Of what is drawn.
        generator: Of the random numbers, on the device of ``like``.
        like: Gives dtype and device.

    Returns:
        Of the shape.
    """
    size = math.sqrt(variance)
    uniform_or_normal = torch.rand if law in ("uniform", "truncated normal") else torch.randn
    numbers = uniform_or_normal(shape, generator=generator, dtype=like.dtype, device=like.device)
    if law == "uniform":
        return (2 * numbers - 1) * (math.sqrt(3.0) * size)
    if law == "truncated normal":  # by inversion
        inside = math.erf(_CUT / math.sqrt(2))
        return torch.erfinv((2 * numbers - 1) * inside) * (math.sqrt(2 / TRUNCATED_VARIANCE) * size)
    if law == "orthogonal":
        tall = numbers if shape[0] >= shape[1] else numbers.T
        q, r = torch.linalg.qr(tall)
        q = q * r.diagonal().sign()  # Haar: the signs of the triangle are a choice of the algorithm
        return (q if shape[0] >= shape[1] else q.T) * (math.sqrt(max(shape)) * size)
    return numbers * size
