"""The four-point vertex of a residual MLP layer by layer: the tower whose growth at late layers is nu."""

import math
from dataclasses import dataclass

import torch

from torch_eft.theory.gaussian.activations import ActivationLike, get_activation
from torch_eft.theory.signal_propagation.residual import hermite_modes, variance_of_square
from torch_eft.theory.signal_propagation.susceptibility import check_nonnegative, check_residual


@dataclass(frozen=True)
class ResidualFlow:
    """The single-input flow of a residual MLP, layers l = 1 .. depth; V/n is Cov(z_i^2, z_j^2), i != j.

    Args:
        K: Kernel, one value per layer.
        V: Four-point vertex, one value per layer, units K^2; V^(1) = 0.
        V_error: Bound on the contribution of the Hermite modes left out, one value per layer.
    """

    K: tuple[float, ...]
    V: tuple[float, ...]
    V_error: tuple[float, ...]


def residual_flow(
    activation: ActivationLike, residual: float, C_b: float, C_W: float, K: float, depth: int
) -> ResidualFlow:
    """K and V layer by layer to order 1/n, by the tower derived in ``signal_propagation.residual``.

    Args:
        activation: A name, an ``Activation`` or an elementwise function.
        residual: Strength gamma of the skip connection, in [0, 1).
        C_b: Bias variance >= 0, layers 2 .. depth.
        C_W: Rescaled weight variance >= 0, layers 2 .. depth.
        K: Kernel of the first layer > 0.
        depth: Number of layers >= 1.

    Returns:
        The flow.

    Raises:
        ValueError: If an argument is out of range.
        QuadratureError: If the activation is not smooth between its ``kinks``.
    """
    activation, gamma = get_activation(activation), check_residual(residual)
    for name, value in (("C_b", C_b), ("C_W", C_W), ("K", K)):
        check_nonnegative(name, value)
    if K == 0 or depth < 1:
        raise ValueError(f"K, depth: {K:g}, {depth} given; give a first kernel > 0 and at least one layer")
    modes = 8 if gamma == 0 else min(max(8, math.ceil(math.log(1e-14) / math.log(gamma))), 1024)
    order = torch.arange(1, modes + 1, dtype=torch.float64, device="cpu")
    u, c, u_rest, c_error = torch.zeros_like(order), 0.0, 0.0, 0.0
    kernels, vertices, errors = [float(K)], [0.0], [0.0]
    for _ in range(depth - 1):
        mean, variance = variance_of_square(activation, K)
        K_next = gamma**2 * K + C_b + C_W * mean
        w = C_W / (math.sqrt(2) * K_next) * hermite_modes(activation, K, modes)[1:]
        w_2, power = float(w[1]), C_W**2 * variance / (2 * K_next**2)
        # Cauchy-Schwarz on the modes left out.
        w_rest = math.sqrt(max(power - float(w.square().sum()), 0.0))
        w[1] = 0.0
        rho = gamma * math.sqrt(K / K_next)
        gain = rho**2 + w_2
        c_error = gain**2 * c_error + 2 * gain * w_rest * u_rest
        c = gain**2 * c + 2 * rho**2 * w_2 + power + 2 * gain * float(w @ u)
        u_rest = rho ** (modes + 1) * (abs(gain) * u_rest + w_rest)
        u = rho**order * (gain * u + w)
        K = K_next
        kernels.append(float(K))
        vertices.append(2 * K**2 * c)
        errors.append(2 * K**2 * c_error)
    return ResidualFlow(tuple(kernels), tuple(vertices), tuple(errors))
