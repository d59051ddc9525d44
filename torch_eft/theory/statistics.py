"""The statistics of an MLP ensemble at initialisation, layer by layer.

Infinite width (PDLT 4.1 and 8.2; index-free):
    K^(1) = C_b + C_W x.x / n_0                 Theta^(1) = lambda_b + lambda_W x.x / n_0
    K^(l+1) = C_b + C_W M_00                    Theta^(l+1) = lambda_b + lambda_W M_00 + C_W M_11 * Theta^(l)
with M_pp = <sigma^(p)_a sigma^(p)_b> under N(0, K^(l)).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.expectations import moment_matrix


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of layer l on N points.

    Args:
        layer: l = 1 .. L.
        K: (N, N), ``E[z_{i;a} z_{j;b}] = delta_ij K_ab``.
        Theta: (N, N), ``E[H_{ij;ab}] = delta_ij Theta_ab``.
    """

    layer: int
    K: Tensor
    Theta: Tensor


def initial_statistics(ensemble: MLPEnsemble, x: Tensor) -> list[LayerStatistics]:
    """K and Theta at every layer, l = 1 .. L.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0), any real dtype.

    Returns:
        One ``LayerStatistics`` a layer, float64, on the device of ``x``.

    Raises:
        ValueError: If ``x`` does not fit ``ensemble.widths[0]``, is empty or not finite.
        QuadratureError: If the activation is not smooth enough for quadrature.
    """
    x = check_inputs("x", x, ensemble)
    gram = x @ x.T / ensemble.widths[0]
    gram = (gram + gram.T) / 2
    K = ensemble.C_b[0] + ensemble.C_W[0] * gram
    Theta = ensemble.lambda_b[0] + ensemble.lambda_W[0] * gram
    layers = [LayerStatistics(1, K, Theta)]
    for index in range(1, ensemble.depth):
        M_00 = moment_matrix(ensemble.activation, K, 0)
        M_11 = moment_matrix(ensemble.activation, K, 1)
        K = ensemble.C_b[index] + ensemble.C_W[index] * M_00
        Theta = ensemble.lambda_b[index] + ensemble.lambda_W[index] * M_00 + ensemble.C_W[index] * M_11 * Theta
        layers.append(LayerStatistics(index + 1, K, Theta))
    return layers


def check_inputs(name: str, x: Tensor, ensemble: MLPEnsemble) -> Tensor:
    """``x`` as float64 (N, n_0).

    Raises:
        ValueError: Naming ``name``, if the shape or the values are not usable.
    """
    n_0 = ensemble.widths[0]
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != n_0 or x.shape[0] == 0:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: {given} given; widths[0] = {n_0} asks for a tensor of shape (N, {n_0}), N >= 1")
    x = x.to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: contains NaN or infinite values; inputs must be finite")
    return x
