"""Single-input moments of an activation, the susceptibilities they give, and the fixed points of the kernel.

The kernel of one input follows K -> F(K) = gamma^2 K + C_b + C_W <s^2>_K; gamma = 0 is the plain MLP. With it
(PDLT 5.1; gamma^2 from the skip connection):

    chi_par  = gamma^2 + C_W d<s^2>/dK = gamma^2 + C_W (<s'^2> + <s s''>),
    chi_perp = gamma^2 + C_W <s'^2>.

Where s' jumps, s'' has a delta function: <s s''> contains s(k) [s'](k) p_K(k) at every kink k, p_K the density of
N(0, K). All quantities are dimensionless numbers; K is the variance of one preactivation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.gaussian.activations import Activation, ActivationLike, get_activation
from torch_eft.theory.gaussian.quadrature import expectation

K_RANGE = (1e-3, 1e2)
"""The range in which fixed points are searched for."""

_TANGENT = 1e-10
"""|F(K) - K| / K at an extremum of F - K below which the curve touches: quadrature has 1e-12."""

_SMALLEST = 1e-290
"""Stands for K = 0, so that a kink at 0 still has its two sides."""


@dataclass(frozen=True)
class Susceptibilities:
    """The susceptibilities of one layer.

    Args:
        chi_par: Susceptibility of the kernel.
        chi_perp: Susceptibility of gradients and of the angle between inputs.

    Example:
        >>> from torch_eft import theory
        >>> theory.susceptibilities("relu", C_W=2.0, K=1.0)
        Susceptibilities(chi_par=1.0, chi_perp=1.0)
    """

    chi_par: float
    chi_perp: float


@dataclass(frozen=True)
class FixedPoint:
    """A fixed point of the kernel at given (C_b, C_W).

    Args:
        K: The kernel there.
        chi_par: Susceptibility of the kernel.
        chi_perp: Susceptibility of gradients and of the angle between inputs.
        stable: Whether it attracts from either side (at K = 0: from above).

    Example:
        >>> from torch_eft import theory
        >>> point = theory.fixed_points("linear", C_b=0.5, C_W=0.5)[0]
        >>> round(point.K, 9), point.chi_par, point.stable
        (1.0, 0.5, True)
    """

    K: float
    chi_par: float
    chi_perp: float
    stable: bool


def mean_power(slopes: tuple[float, float], power: int) -> float:
    """A_p = (slope_-^p + slope_+^p) / 2 (PDLT 5.2)."""
    return (slopes[0] ** power + slopes[1] ** power) / 2


def power_mean(activation: Activation, K: Tensor, power: int) -> Tensor:
    """<s^p> for p = 2 or 4, elementwise in ``K``."""
    if activation.slopes is not None:
        return mean_power(activation.slopes, power) * math.prod(range(1, power, 2)) * K ** (power // 2)
    return expectation(lambda z: activation(z) ** power, K, activation.kinks)


def slope_squared(activation: Activation, K: Tensor) -> Tensor:
    """<s'^2>, elementwise in ``K``: chi_perp / C_W of the plain MLP."""
    if activation.slopes is not None:
        return torch.full_like(K, mean_power(activation.slopes, 2))
    return expectation(lambda z: activation(z, 1).square(), K.clamp_min(_SMALLEST), activation.kinks)


def imbalance(activation: Activation, K: Tensor) -> Tensor:
    """<s s''>, elementwise in ``K``, with the delta functions at kinks: (chi_par - chi_perp) / C_W."""
    if activation.slopes is not None:
        return torch.zeros_like(K)
    K = K.clamp_min(_SMALLEST)
    total = expectation(lambda z: activation(z) * activation(z, 2), K, activation.kinks)
    for kink in activation.kinks:
        weight = float(activation(torch.tensor(kink, dtype=K.dtype, device="cpu"))) * activation.jump(1, kink)
        if weight != 0:
            total = total + weight * torch.exp(-(kink**2) / (2 * K)) / (2 * math.pi * K).sqrt()
    return total


def slope_of_variance(activation: Activation, K: Tensor) -> Tensor:
    """d<s^2>/dK = <s'^2> + <s s''>, elementwise in ``K``: chi_par / C_W of the plain MLP."""
    return slope_squared(activation, K) + imbalance(activation, K)


def curvature_of_variance(activation: Activation, K: Tensor) -> Tensor:
    """d^2<s^2>/dK^2 = <s s' (z^3 - 3 K z)> / (2 K^3), elementwise in ``K`` > 0; kinks need no delta functions here."""

    def value(z: Tensor) -> Tensor:
        return activation(z) * activation(z, 1)

    cubic = expectation(lambda z: value(z) * z**3, K, activation.kinks)
    return (cubic - 3 * K * expectation(lambda z: value(z) * z, K, activation.kinks)) / (2 * K**3)


def check_residual(residual: float) -> float:
    """Return the strength gamma of the skip connection as a float.

    Raises:
        ValueError: If it is not in [0, 1).
    """
    if not 0 <= residual < 1:
        raise ValueError(
            f"residual: {residual:g} given; z' = gamma z + b + W s(z) is critical only for 0 <= gamma < 1 "
            "(0 is the plain MLP); scale the skip connection down"
        )
    return float(residual)


def check_nonnegative(name: str, value: float) -> Tensor:
    """Return ``value`` as a float64 scalar.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: {value:g} given; it must be finite and >= 0")
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def susceptibilities(activation: ActivationLike, C_W: float, K: float, *, residual: float = 0.0) -> Susceptibilities:
    """The susceptibilities chi_par and chi_perp of one layer at the kernel K (PDLT 5.1).

    Raises ``ValueError`` if an argument is out of range; ``QuadratureError`` if the activation is not smooth between
    its ``kinks``.

    Args:
        activation: A name, an ``Activation`` or an elementwise function.
        C_W: Rescaled weight variance >= 0.
        K: Kernel of the layer before >= 0; 0 is the limit from above.
        residual: gamma in [0, 1).

    Returns:
        gamma^2 + C_W d<s^2>/dK and gamma^2 + C_W <s'^2>.

    Example:
        >>> from torch_eft import theory
        >>> theory.susceptibilities("tanh", C_W=1.0, K=0.0).chi_perp
        1.0
    """
    activation, variance = get_activation(activation), check_nonnegative("K", K)
    check_nonnegative("C_W", C_W)
    skip = check_residual(residual) ** 2
    perpendicular = float(slope_squared(activation, variance))
    parallel = perpendicular + float(imbalance(activation, variance))
    return Susceptibilities(skip + C_W * parallel, skip + C_W * perpendicular)


def fixed_points(
    activation: ActivationLike,
    C_b: float,
    C_W: float,
    *,
    residual: float = 0.0,
    K_range: tuple[float, float] = K_RANGE,
) -> list[FixedPoint]:
    """The fixed points K = F(K) in ``K_range``, and K = 0 where it is one, in ascending order.

    F - K is sampled at 201 points equally spaced in log K, and at its extrema (chi_par = 1) wherever the slope changes
    its sign between them; bisection follows wherever F - K changes its sign. An extremum with |F - K| < 1e-10 K counts
    as a half-stable point, which the curve only touches. Structure finer than the spacing can be missed.

    Raises ``QuadratureError`` if the activation is not smooth between its ``kinks``.

    Args:
        activation: A name, an ``Activation`` or an elementwise function.
        C_b: Bias variance >= 0.
        C_W: Rescaled weight variance >= 0.
        residual: gamma in [0, 1).
        K_range: 0 < K_min < K_max.

    Returns:
        The fixed points.

    Raises:
        ValueError: If an argument is out of range, or if every K is a fixed point (scale invariance at criticality).

    Example:
        >>> from torch_eft import theory
        >>> [round(point.K, 9) for point in theory.fixed_points("linear", C_b=0.5, C_W=0.5)]
        [1.0]
    """
    activation = get_activation(activation)
    check_nonnegative("C_b", C_b)
    check_nonnegative("C_W", C_W)
    skip = check_residual(residual) ** 2
    if not 0 < K_range[0] < K_range[1] < math.inf:
        raise ValueError(f"K_range: {K_range} given; give two positive numbers in ascending order")

    def drift(K: Tensor) -> Tensor:
        return (skip - 1) * K + C_b + C_W * power_mean(activation, K, 2)

    def slope(K: Tensor) -> Tensor:
        return skip - 1 + C_W * slope_of_variance(activation, K)

    def point(K: float, stable: bool | None = None) -> FixedPoint:
        chi = susceptibilities(activation, C_W, K, residual=residual)
        return FixedPoint(K, chi.chi_par, chi.chi_perp, abs(chi.chi_par) < 1 if stable is None else stable)

    grid = log_grid(K_range, 201)
    if bool((drift(grid).abs() <= _TANGENT * grid).all()):
        raise ValueError(
            f"C_b, C_W: at C_b = {C_b:g}, C_W = {C_W:g} every K is a fixed point of {activation.name}; "
            "give values off criticality to find single ones"
        )
    points = []
    if C_b == 0 and C_W * float(power_mean(activation, torch.zeros_like(grid[0]), 2)) < 1e-24:
        points.append(point(0.0, stable=bool(drift(grid[0]) < 0)))
    extrema = sign_changes(slope, grid)
    places = torch.cat([grid, grid.new_tensor(extrema)]).sort().values
    values = drift(places)
    touches = torch.isin(places, grid.new_tensor(extrema)) & (values.abs() <= _TANGENT * places)
    signs = torch.where(touches, 0.0, values.sign())
    points += [point(K) for K in places[(values == 0) & ~touches].tolist()]  # a sample that hits one exactly
    for index in touches.nonzero().flatten().tolist():
        points.append(point(float(places[index]), stable=bool(signs[index - 1] > 0 > signs[index + 1])))
    points += [point(K) for K in sign_changes(drift, places, signs)]
    return sorted(points, key=lambda fixed: fixed.K)


def log_grid(K_range: tuple[float, float], count: int) -> Tensor:
    """``count`` variances equally spaced in log K, float64."""
    return torch.logspace(math.log10(K_range[0]), math.log10(K_range[1]), count, dtype=torch.float64, device="cpu")


def sign_changes(function: Callable[[Tensor], Tensor], grid: Tensor, signs: Tensor | None = None) -> list[float]:
    """The places where ``function`` changes its sign between neighbors of ``grid``, by bisection to rounding."""
    signs = function(grid).sign() if signs is None else signs
    roots = []
    for index in (signs[1:] * signs[:-1] < 0).nonzero().flatten().tolist():
        low, high = grid[index], grid[index + 1]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if bool(function(middle).sign() == signs[index]) else (low, middle)
        roots.append(float((low + high) / 2))
    return roots
