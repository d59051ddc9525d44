"""Two-label moments of two slopes (ReLU, leaky ReLU) where weights or biases are not Gaussian, at infinite width.

With h = (R - L) / 2 and m = (R + L) / 2 of the slopes, and a symmetric bias b shared by both labels,

    <s_a s_b> = m^2 K_ab + h^2 <|z_a| |z_b|>        <s'_a s'_b> = m^2 + h^2 <sgn z_a sgn z_b>.

Both follow from the density of (u_a, u_b) at (-b, -b), integrated from correlation 0 (Plackett 1954; z = u + b, s^2 =
g_aa, t^2 = g_bb, g_ab = s t sin(theta_ab)):

    <sgn sgn> = <erf(b / sqrt2 s) erf(b / sqrt2 t)>_b + (2 / pi) int_0^theta_ab < exp(-b^2 q) >_b dtheta
    <|z||z|>  = <E|u_a + b| E|u_b + b|>_b + g_ab <erf erf>_b + (2 / pi) int (g_ab - s t sin theta) < exp(-b^2 q) >_b
    q = (1/s^2 + 1/t^2 - 2 sin(theta) / (s t)) / (2 cos^2(theta)).

The mean of exp(-b^2 q) over a uniform or a truncated normal b is an error function. For one label a symmetric law of
the bias changes neither. The fourth cumulant of the first layer's weights counts to first order, by closed forms.
"""

import math

import torch
from torch import Tensor

from torch_eft.theory.gaussian.laws import TRUNCATED_BOUND, TRUNCATED_VARIANCE, Law
from torch_eft.theory.gaussian.quadrature import gauss_legendre
from torch_eft.theory.gaussian.scale_invariant import (
    Orders,
    ScaleInvariantPairs,
    arc_cosine_response,
    correlation,
)
from torch_eft.theory.gaussian.two_point_moments import Kinks

_ANGLES = 32
"""Nodes of the integral over the correlation, and of that over the bias."""

_NEARLY_PARALLEL = 1e-3
"""Sine of the angle between inputs below which a fourth cumulant, whose effect is proportional to it, is not counted:
its terms cancel there."""


class TwoSlopePairs(ScaleInvariantPairs):
    """The interface of ``two_point_moments.TwoPointMoments``; <s s> and <s' s'> are under the law, others Gaussian.

    Args:
        slopes: (negative, positive).
        K: (N, N), bias included.
        kinks: The meaning of explicit derivatives at a kink.
        law: Of the bias.
        C_b: Its variance.
        quartic: Coefficient and inputs of the first layer's fourth cumulant; None elsewhere.
    """

    def __init__(
        self,
        slopes: tuple[float, float],
        K: Tensor,
        kinks: Kinks,
        law: Law,
        C_b: float,
        quartic: tuple[float, Tensor] | None,
    ) -> None:
        super().__init__(slopes, K, kinks == "distributional")
        self.gaussian = ScaleInvariantPairs(slopes, K, kinks == "distributional")
        self._law, self._C_b, self._quartic = law, C_b, quartic
        self._known: tuple[Tensor, Tensor] | None = None

    def explicit(self, first: Orders, second: Orders) -> Tensor:
        """<prod sigma^(p)_a prod sigma^(q)_b>, (N, N)."""
        if first == second and first in ((0,), (1,)):
            if self._known is None:
                self._known = self._moments()
            return self._known[first[0]]
        return super().explicit(first, second)

    def _moments(self) -> tuple[Tensor, Tensor]:
        values, slopes = (arc_cosine_response(self.slopes, self.K, p, p) for p in (0, 1))
        if self._quartic is not None:
            values = values + self._fourth_order(0)
            slopes = slopes + self._fourth_order(1)
        if self._law != "gaussian" and self._C_b > 0:
            even = ((self.slopes[1] - self.slopes[0]) / 2) ** 2
            mine, gaussian = _absolute_and_sign(self.K, self._law, self._C_b), _gaussian_absolute_and_sign(self.K)
            values = values + even * (mine[0] - gaussian[0])
            slopes = slopes + even * (mine[1] - gaussian[1])
        return values, slopes

    def _fourth_order(self, p: int) -> Tensor:
        """(1/24) kappa <d^4 s^(p)_a s^(p)_b>."""
        assert self._quartic is not None
        coefficient, x = self._quartic
        total = torch.zeros_like(self.K)
        for i in range(5):
            kappa = coefficient * x**i @ (x ** (4 - i)).T
            total = total + math.comb(4, i) / 24 * kappa * arc_cosine_response(self.slopes, self.K, p + i, p + 4 - i)
        return torch.where(correlation(self.K)[1] < _NEARLY_PARALLEL, 0.0, total)


def _gaussian_absolute_and_sign(K: Tensor) -> tuple[Tensor, Tensor]:
    """<|z_a| |z_b|> and <sgn z_a sgn z_b> under N(0, K)."""
    return arc_cosine_response((-1.0, 1.0), K, 0, 0), arc_cosine_response((-1.0, 1.0), K, 1, 1)


def _absolute_and_sign(K: Tensor, law: Law, C_b: float) -> tuple[Tensor, Tensor]:
    """The same where the bias, of variance C_b within K, has another law; on the diagonal exactly K and 1."""
    g = K - C_b
    rho, _, scale = correlation(g)
    deviation = g.diagonal().clamp_min(0.0).sqrt()
    b, probability = _positive_nodes(law, C_b, K)
    ratio = b[:, None] / (math.sqrt(2.0) * deviation.clamp_min(_TINY))  # (nodes, N)
    erf, edge = torch.erf(ratio), torch.exp(-ratio.square())
    size = b[:, None] * erf + math.sqrt(2 / math.pi) * deviation * edge
    sign = torch.einsum("k,ka,kb->ab", probability, erf, erf)
    absolute = torch.einsum("k,ka,kb->ab", probability, size, size) + g * sign
    end = rho.asin()
    nodes_u, weights = gauss_legendre(_ANGLES, K)
    inverse = 1 / deviation.clamp_min(_TINY)
    apart = (inverse[:, None] - inverse[None, :]).square()
    product = torch.outer(inverse, inverse)
    for u, weight in zip((nodes_u + 1).tolist(), (weights / 2).tolist(), strict=True):
        # Nodes crowd towards the end, where unequal variances make the density steep: theta = end (1 - (1 - v)^2).
        v = u / 2
        theta = end * (1 - (1 - v) ** 2)
        density = 2 / math.pi * weight * 2 * (1 - v) * end
        sine, cosine = theta.sin(), theta.cos().square().clamp_min(_TINY)
        density = density * _mean_exponential((apart + 2 * (1 - sine) * product) / (2 * cosine), law, C_b)
        sign = sign + density
        absolute = absolute + (g - scale * sine) * density
    same = torch.eye(len(K), dtype=torch.bool, device=K.device)
    return torch.where(same, K, absolute), torch.where(same, 1.0, sign)


_TINY = 1e-150


def _positive_nodes(law: Law, C_b: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights for even functions of the bias, crowded at 0: they may vary as fast as u is small."""
    v, weights = gauss_legendre(_ANGLES, like)
    v = (v + 1) / 2
    bound, curvature = _bound_and_curvature(law, C_b)
    b = bound * v**3
    weights = weights * v**2 * torch.exp(-curvature * b.square())
    return b, weights / weights.sum()


def _bound_and_curvature(law: Law, C_b: float) -> tuple[float, float]:
    """The density of the bias is proportional to exp(-curvature b^2) up to the bound."""
    if law == "uniform":
        return math.sqrt(3 * C_b), 0.0
    return TRUNCATED_BOUND * math.sqrt(C_b), TRUNCATED_VARIANCE / (2 * C_b)


def _mean_exponential(q: Tensor, law: Law, C_b: float) -> Tensor:
    """<exp(-b^2 q)> over the bias."""
    bound, curvature = _bound_and_curvature(law, C_b)

    def integral(rate: Tensor) -> Tensor:
        root = bound * rate.sqrt()
        safe = root.clamp_min(1e-6)
        return torch.where(root > 1e-6, torch.erf(safe) / safe * (math.sqrt(math.pi) / 2), 1 - root.square() / 3)

    return integral(q + curvature) / integral(torch.full_like(q[:1, :1], curvature))
