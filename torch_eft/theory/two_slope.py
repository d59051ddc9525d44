"""Two-label moments of activations with two slopes (linear, ReLU, leaky ReLU, |z|), in closed form.

The arc-cosine kernel (Cho & Saul 2009) and its derivatives with respect to K: M_20, M_22, ... are RESPONSES of Gaussian
expectations, finite and distributional, whatever automatic differentiation makes of sigma'' at the kink.
"""

import math

import torch
from torch import Tensor

from torch_eft.theory.expectations import gauss_legendre

Orders = tuple[int, ...]
"""Derivatives multiplied at one label: (2, 1) is sigma'' sigma'."""

_ROUNDING_ANGLE = 8 * torch.finfo(torch.float64).eps


def correlation(K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rho, sqrt(1 - rho^2), sqrt(K_aa K_bb)); angles below rounding are exactly 0 or pi."""
    variance = K.diagonal()
    scale = torch.outer(variance, variance).sqrt()
    rho = torch.where(scale > 0, K / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1.0, 1.0)
    # 1 - rho^2 below rounding: the two inputs are (anti)parallel as far as K can tell, and asin is steep there.
    sine_squared = (1.0 - rho) * (1.0 + rho)
    parallel = sine_squared < _ROUNDING_ANGLE
    rho = torch.where(parallel & (scale > 0), rho.sign(), rho)
    return rho, torch.where(parallel, 0.0, sine_squared).sqrt(), scale


def two_slope_moment(slopes: tuple[float, float], K: Tensor, first: Orders, second: Orders) -> Tensor:
    """Closed forms for two slopes; responses at parallel inputs are those of one merged label.

    Raises:
        ValueError: If a product of derivatives beyond the first is asked for (a product of delta functions).
    """
    if slopes[0] == slopes[1] and max((*first, *second), default=0) > 1:
        return torch.zeros_like(K)  # linear: the second derivative vanishes
    rho, sine, scale = correlation(K)
    even, odd = (slopes[1] - slopes[0]) / 2, (slopes[1] + slopes[0]) / 2
    c, g = even**2 * 2 / math.pi, odd**2
    if (first, second) == ((0,), (0,)):
        return g * K + c * scale * (sine + rho * rho.asin())
    if (first, second) == ((1,), (1,)):
        return g + c * rho.asin()
    if len(first) != 1 or len(second) != 1 or sum(first) + sum(second) == 1:
        return _two_slope_product(slopes, K, first, second)
    K_aa, K_bb = K.diagonal()[:, None].expand_as(K), K.diagonal()[None, :].expand_as(K)
    merged = (sine == 0) | (scale == 0)
    root = torch.where(merged, 1.0, scale * sine)  # sqrt(D), D = K_aa K_bb - K_ab^2
    forms = {
        (2, 0): lambda: c * root / K_aa,
        (2, 2): lambda: c / root,
        (3, 1): lambda: -c * K / (K_aa * root),
        (4, 0): lambda: c * (K_bb / (K_aa * root) - 2 * root / K_aa**2),
        (5, 1): lambda: c * K * (2 / (K_aa**2 * root) + K_bb / (K_aa * root**3)),
        (4, 2): lambda: -c * K_bb / root**3,
        (3, 3): lambda: c * K / root**3,
    }
    orders = (first[0], second[0])
    if orders in forms:
        return torch.where(merged, 0.0, forms[orders]())
    if orders[::-1] in forms:
        return two_slope_moment(slopes, K, second, first).T
    raise ValueError(f"orders {first}, {second}: no closed form for two-slope activations")


def _two_slope_product(slopes: tuple[float, float], K: Tensor, first: Orders, second: Orders) -> Tensor:
    """Products of sigma and sigma' at either label, in polar coordinates of (z_a, z_b).

    With z_a = r sqrt(K_aa) cos(phi), z_b = r sqrt(K_bb) cos(phi - theta), cos(theta) = rho, the radial integral is a
    factorial and the angular one a trigonometric polynomial on each of the four arcs between sign changes: twelve
    Gauss-Legendre nodes an arc are exact to rounding.
    """
    if max((*first, *second), default=0) > 1:
        raise ValueError(f"orders {first}, {second}: products of delta functions have no value for a kinked activation")
    rho, sine, _ = correlation(K)
    theta = torch.atan2(sine, rho)
    powers = first.count(0), second.count(0)
    nodes, weights = gauss_legendre(12, K)
    # Signs of z_a and z_b on the arcs that end where one of them vanishes.
    edges = [-math.pi / 2 + 0 * theta, theta - math.pi / 2, math.pi / 2 + 0 * theta, theta + math.pi / 2]
    edges.append(edges[0] + 2 * math.pi)
    total = torch.zeros_like(K)
    for index, (sign_a, sign_b) in enumerate(((1, -1), (1, 1), (-1, 1), (-1, -1))):
        half = (edges[index + 1] - edges[index])[..., None] / 2
        phi = edges[index][..., None] + half * (1 + nodes)
        angular = phi.cos() ** powers[0] * (phi - theta[..., None]).cos() ** powers[1]
        arc = (angular * weights * half).sum(-1)
        slope = slopes[sign_a > 0] ** len(first) * slopes[sign_b > 0] ** len(second)
        total = total + slope * arc
    degree = sum(powers)
    radial = 2 ** (degree / 2) * math.gamma(degree / 2 + 1) / (2 * math.pi)
    root = K.diagonal().sqrt()
    return total * radial * torch.outer(root ** powers[0], root ** powers[1])
