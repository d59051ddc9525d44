"""Criticality: which (C_b, C_W) keep the kernel and its gradients from exploding or vanishing.

Susceptibilities (PDLT 5.1): chi_par = C_W d<sigma^2>/dK, chi_perp = C_W <sigma'^2>; critical
means chi_par = chi_perp = 1 at a fixed point K* of K -> C_b + C_W <sigma^2>_K. Three ways:

* scale-invariant (PDLT 5.2): sigma with two slopes; any K is a fixed point;
* K* = 0 (PDLT 5.3.3): sigma(0) = 0, sigma'(0) != 0; attractive if a_1 < 0 in
  K -> K + a_1 K^2, a_1 = sigma'''/sigma' + (3/4) (sigma''/sigma')^2 at 0;
* half-stable K* > 0 (PDLT 5.3.4): <sigma sigma''>_{K*} = 0, C_b >= 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.activations import Activation, ActivationLike, get_activation
from torch_eft.theory.expectations import expectation

_K_RANGE = (1e-2, 1e2)


@dataclass(frozen=True)
class CriticalPoint:
    """A critical initialisation.

    Args:
        universality_class: ``"scale-invariant"``, ``"K*=0"`` or ``"half-stable"``.
        C_b: Critical bias variance.
        C_W: Critical rescaled weight variance.
        K_star: The fixed point; None where every K is one.
        nu: Growth of the four-point vertex at criticality, V / (n K^2) ~ nu l / n (PDLT 5.4, A.3).
    """

    universality_class: str
    C_b: float
    C_W: float
    K_star: float | None
    nu: float


def slope_of_variance(activation: Activation, K: Tensor) -> Tensor:
    """d<sigma^2>/dK = <sigma'^2> + <sigma sigma''>, elementwise in ``K``: chi_par / C_W."""
    if activation.slopes is not None:
        return torch.full_like(K, mean_power(activation.slopes, 2))
    return expectation(lambda z: activation(z, 1).square() + activation(z) * activation(z, 2), K)


def slope_squared(activation: Activation, K: Tensor) -> Tensor:
    """<sigma'^2>, elementwise in ``K``: chi_perp / C_W."""
    if activation.slopes is not None:
        return torch.full_like(K, mean_power(activation.slopes, 2))
    return expectation(lambda z: activation(z, 1).square(), K)


def power_mean(activation: Activation, K: Tensor, power: int) -> Tensor:
    """<sigma^p> for p = 2 or 4, elementwise in ``K``."""
    if activation.slopes is not None:
        return mean_power(activation.slopes, power) * math.prod(range(1, power, 2)) * K ** (power // 2)
    return expectation(lambda z: activation(z) ** power, K)


def mean_power(slopes: tuple[float, float], power: int) -> float:
    """A_p = (slope_-^p + slope_+^p) / 2 (PDLT 5.2)."""
    return (slopes[0] ** power + slopes[1] ** power) / 2


def criticality(activation: ActivationLike) -> CriticalPoint | None:
    """The critical initialisation of an activation, computed from its Gaussian expectations.

    Where both kinds exist, an attractive K* = 0 is preferred to a half-stable K* > 0.

    Args:
        activation: A name, an ``Activation`` or an elementwise smooth function.

    Returns:
        The critical point, or None where there is none (e.g. sigmoid, softplus).

    Raises:
        ValueError: If the activation is unknown.
        QuadratureError: If the activation is not smooth enough for quadrature.
    """
    activation = get_activation(activation)
    if activation.slopes is not None:
        A_2, A_4 = mean_power(activation.slopes, 2), mean_power(activation.slopes, 4)
        return CriticalPoint("scale-invariant", 0.0, 1 / A_2, None, 3 * A_4 / A_2**2 - 1)
    origin = torch.zeros((), dtype=torch.float64, device="cpu")
    s_0, s_1, s_2, s_3 = (float(activation(origin, order)) for order in range(4))
    if abs(s_0) < 1e-12 and abs(s_1) > 1e-12 and s_3 / s_1 + 0.75 * (s_2 / s_1) ** 2 < 0:
        return CriticalPoint("K*=0", 0.0, 1 / s_1**2, 0.0, 2 / 3)
    return _half_stable(activation)


def _half_stable(activation: Activation) -> CriticalPoint | None:
    def imbalance(K: Tensor) -> Tensor:
        return expectation(lambda z: activation(z) * activation(z, 2), K)

    grid = torch.logspace(math.log10(_K_RANGE[0]), math.log10(_K_RANGE[1]), 41, dtype=torch.float64, device="cpu")
    signs = imbalance(grid).sign()
    for index in (signs[1:] * signs[:-1] < 0).nonzero().flatten().tolist():
        low, high = grid[index], grid[index + 1]
        for _ in range(60):  # bisection to rounding
            middle = (low + high) / 2
            low, high = (middle, high) if bool(imbalance(middle).sign() == signs[index]) else (low, middle)
        K_star = (low + high) / 2
        C_W = 1 / slope_squared(activation, K_star)
        variance = power_mean(activation, K_star, 2)
        C_b = K_star - C_W * variance
        if float(C_b) >= 0:
            nu = C_W**2 * (power_mean(activation, K_star, 4) - variance**2) / K_star**2
            return CriticalPoint("half-stable", float(C_b), float(C_W), float(K_star), float(nu))
    return None
