"""Kernels at infinite width, K and Theta at every layer (PDLT 4.1 and 8.2; index-free).

    K^(1) = C_b + C_W x.x / n_0                 Theta^(1) = lambda_b + lambda_W x.x / n_0
    K^(l+1) = C_b + C_W M_00                    Theta^(l+1) = lambda_b + lambda_W M_00 + C_W M_11 * Theta^(l)

with M_pq = <sigma^(p)_a sigma^(q)_b> under N(0, K^(l)); where weights or biases are not Gaussian, under the law of one
neuron that is left at infinite width (``neuron``).
"""

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble, check_ensemble
from torch_eft.theory.gaussian.two_point_moments import Kinks, TwoPointMoments
from torch_eft.theory.initialization.neuron.pairs import neuron_pairs

InfiniteWidthLayers = tuple[list[Tensor], list[Tensor], list[TwoPointMoments]]
"""K and Theta at layers 1 .. L, and two-point moments at layers 1 .. L-1."""


def infinite_width(ensemble: MLPEnsemble, x: Tensor, kinks: Kinks = "autograd") -> InfiniteWidthLayers:
    """K and Theta at layers 1 .. L, and the two-label moments at layers 1 .. L-1, for checked inputs."""
    gram = x @ x.T / ensemble.widths[0]
    gram = (gram + gram.T) / 2
    g = ensemble.C_W[0] * gram
    K = [ensemble.C_b[0] + g]
    Theta = [ensemble.lambda_b[0] + ensemble.lambda_W[0] * gram]
    pairs = []
    for index in range(1, ensemble.depth):
        moments = neuron_pairs(ensemble, index - 1, g, x, kinks)
        M_00, M_11 = moments.explicit((0,), (0,)), moments.explicit((1,), (1,))
        g = ensemble.C_W[index] * M_00
        K.append(ensemble.C_b[index] + g)
        Theta.append(
            ensemble.lambda_b[index] + ensemble.lambda_W[index] * M_00 + ensemble.C_W[index] * M_11 * Theta[-1]
        )
        pairs.append(moments)
    return K, Theta, pairs


def check_inputs(name: str, x: Tensor, ensemble: MLPEnsemble) -> Tensor:
    """Return ``x`` as float64, (N, n_0).

    Raises:
        TypeError: If ``ensemble`` is not an ``MLPEnsemble``.
        ValueError: Naming ``name``, if the shape or the values are not usable.
    """
    check_ensemble(ensemble)
    n_0 = ensemble.widths[0]
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != n_0 or x.shape[0] == 0:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: {given} given; widths[0] = {n_0} asks for a tensor of shape (N, {n_0}), N >= 1")
    x = x.to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: contains NaN or infinite values; inputs must be finite")
    return x
