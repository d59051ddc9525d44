"""Moments <f(z_a) f(z_b)> of pairs of labels for one activation, in rectangular blocks, with their response to K.

A block has the labels a of one sample and b of another, and needs K_ab and the variances K_aa, K_bb; so kernels over
many samples and positions go block by block. f is sigma, its slope sigma', or z sigma'(z), which gains of norms bring.
Closed forms for scale-invariant sigma, Mehler's series for smooth ones (``gaussian.two_point_moments``, whose bounds
on truncation hold). By Price's theorem

    d<f_a f_b> / dK_ab = <f'_a f'_b>,      d<f_a f_b> / dK_aa = <f''_a f_b> / 2,      d<f_a f_b> / dm_a = <f'_a f_b>,

m the mean of z; at a kink these are the distributional ones. All is at m = 0: norms subtract the mean over neurons,
whose fluctuation is a common m of all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.scale_invariant import correlation_of
from torch_eft.theory.gaussian.two_point_moments import hermite_coefficients

Factor = Literal["value", "slope", "gain"]
"""sigma, sigma' or z sigma'(z)."""

_TILE = 2**17
"""Entries of a block that are worked on at once: they stay in a processor's cache."""

_SAME = 1e-13
"""Relative difference up to which two variances are one: of rounding."""

_KEPT = 20000
"""Variances whose coefficients are kept."""


class ActivationPairs:
    """Moments of pairs of labels of one activation.

    Args:
        activation: sigma, scale-invariant or smooth.

    Raises:
        ValueError: If it has kinks and is not scale-invariant: there is no closed form in blocks.
    """

    def __init__(self, activation: Activation) -> None:
        if activation.slopes is None and activation.kinks:
            raise ValueError(f"{activation.name} has a kink and no closed form here")
        self.activation = activation
        self._tables = {"value": _Coefficients(activation), "gain": _Coefficients(_ScaledSlope(activation))}

    def moment(
        self, factor: Factor, K: Tensor, rows: Tensor, columns: Tensor, means: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """<f(z_a) f(z_b)>, differentiable in all.

        Args:
            factor: f.
            K: Blocks, (B, P, P').
            rows: K_aa, (B, P).
            columns: K_bb, (B, P').
            means: m_a and m_b, which are 0; None where nothing is differentiated by them.

        Returns:
            (B, P, P').
        """
        if self.activation.slopes is not None:
            order = 1 if factor == "slope" else 0  # z sigma' is sigma
            return _ArcCosine.apply(K, rows, columns, self.activation.slopes, order, *(means or (None, None)))
        table = self._tables["gain" if factor == "gain" else "value"]
        return _Mehler.apply(K, rows, columns, table, int(factor == "slope"), *(means or (None, None)))

    def quartic(
        self, factor: Factor, K: Tensor, rows: Tensor, columns: Tensor, cumulants: Sequence[Tensor]
    ) -> Tensor | None:
        """What fourth cumulants of the two labels add, at first order; of a smooth sigma, no part of the graph.

        Args:
            factor: f.
            K: Blocks, (B, P, P').
            rows: K_aa, (B, P).
            columns: K_bb, (B, P').
            cumulants: Those of a b^3, a^2 b^2, a^3 b, (B, P, P'), and of a^4, (B, P, 1), b^4, (B, 1, P').

        Returns:
            (B, P, P'); None for an activation with a kink.
        """
        if self.activation.slopes is not None:
            return None
        table, p = self._tables["gain" if factor == "gain" else "value"], int(factor == "slope")
        one, two, three, first, second = cumulants
        with torch.no_grad():
            found = first * _series(table, p + 4, p, K, rows, columns)
            found = found + 4 * three * _series(table, p + 3, p + 1, K, rows, columns)
            found = found + 6 * two * _series(table, p + 2, p + 2, K, rows, columns)
            found = found + 4 * one * _series(table, p + 1, p + 3, K, rows, columns)
            return (found + second * _series(table, p, p + 4, K, rows, columns)) / 24


class Quartic:
    """-sum_f a_f b_f c_f d_f: the fourth cumulant of a sum of independent numbers that are not Gaussian, at labels.

    Args:
        parts: a_f of samples at positions, (U, P, f), the excess kurtosis in it.
    """

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    def cumulants(self, rows: Tensor, columns: Tensor) -> list[Tensor]:
        """As ``ActivationPairs.quartic`` takes them, for pairs of samples, (B,) each."""
        found: list[list[Tensor]] = [[], [], []]
        step = max(1, _TILE // self.parts[0].numel())
        for a, b in zip(rows.split(step), columns.split(step), strict=True):
            left, right = self.parts[a], self.parts[b]
            for power, kept in enumerate(found, 1):
                kept.append(-(left**power @ (right ** (4 - power)).mT))
        fourth = -(self.parts**4).sum(-1)
        return [*map(torch.cat, found), fourth[rows][:, :, None], fourth[columns][:, None, :]]

    def size(self, variance: Tensor) -> float:
        """The largest excess kurtosis, of labels whose variance is (U, P)."""
        kurtosis = (self.parts**4).sum(-1) / variance.square()
        return float(kurtosis[variance > 0].max()) if bool((variance > 0).any()) else 0.0


@lru_cache(maxsize=8)
def activation_pairs(activation: Activation) -> ActivationPairs:
    """Return the moments of an activation, with the coefficients that they have computed before."""
    return ActivationPairs(activation)


@dataclass(frozen=True)
class _ScaledSlope:
    """z sigma'(z), with its first two derivatives."""

    activation: Activation

    @property
    def name(self) -> str:
        return f"z {self.activation.name}'(z)"

    def __call__(self, z: Tensor, order: int = 0) -> Tensor:
        below = self.activation(z, order) * order if order else 0.0
        return below + z * self.activation(z, order + 1)


class _Coefficients:
    """f_k of the derivatives of a function, kept by variance.

    Args:
        function: f and its derivatives.
    """

    def __init__(self, function: Activation | _ScaledSlope) -> None:
        self._function = function
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, order: int, variance: Tensor, least: int = 0) -> Tensor:
        """f_k of the derivative of that order, (..., terms), at least so many."""
        wanted = variance.detach().flatten().unique()
        values, table = self._known.get(order, (wanted[:0], wanted.new_zeros(0, 0)))
        if len(values) and values.device != wanted.device:
            values, table = values.to(wanted.device), table.to(wanted.device)
        new = wanted if not len(values) else wanted[(_nearest(values, wanted) - wanted).abs() > _SAME * wanted]
        if len(values) + len(new) > _KEPT:
            values, table, new = wanted[:0], wanted.new_zeros(0, 0), wanted
        if len(new) or table.shape[1] < least:
            found = (
                hermite_coefficients(self._function, (order,), new, max(least, table.shape[1])) if len(new) else None
            )
            terms = max(least, table.shape[1] if found is None else found.shape[1])
            if len(values) and table.shape[1] < terms:
                table = hermite_coefficients(self._function, (order,), values, terms)
            if found is not None:
                terms = max(table.shape[1], found.shape[1])
                place = torch.cat([values, new]).argsort()
                table = torch.cat([_padded(table, terms), _padded(found, terms)])[place]
                values = torch.cat([values, new])[place]
            self._known[order] = (values, table)
        return table[_places(values, variance.detach())]


def _places(values: Tensor, wanted: Tensor) -> Tensor:
    """Of the nearest of sorted values."""
    after = torch.searchsorted(values, wanted.contiguous()).clamp(1, max(1, len(values) - 1))
    before = after - 1
    after = after.clamp_max(len(values) - 1)
    return torch.where((values[after] - wanted).abs() < (values[before] - wanted).abs(), after, before)


def _nearest(values: Tensor, wanted: Tensor) -> Tensor:
    return values[_places(values, wanted)]


class _ArcCosine(torch.autograd.Function):
    """Cho and Saul 2009, order 0 and 1; c = (R - L)^2 / (2 pi), g = (R + L)^2 / 4 of the slopes L, R."""

    @staticmethod
    def forward(
        ctx: Any, K: Tensor, rows: Tensor, columns: Tensor, slopes: tuple[float, float], order: int, *means: Any
    ) -> Tensor:
        c, g = (slopes[1] - slopes[0]) ** 2 / (2 * math.pi), (slopes[1] + slopes[0]) ** 2 / 4
        rho, sine, scale = correlation_of(K, rows[..., :, None], columns[..., None, :])
        ctx.order, ctx.c, ctx.g, ctx.mixed = order, c, g, (slopes[1] ** 2 - slopes[0] ** 2) / 4
        ctx.save_for_backward(K, rows, columns)
        if order == 1:
            return g + c * rho.asin()
        return g * K + c * scale * (sine + rho * rho.asin())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = gradients
        K, rows, columns = ctx.saved_tensors
        c, g = ctx.c, ctx.g
        rho, sine, scale = correlation_of(K, rows[..., :, None], columns[..., None, :])
        if ctx.order == 0:
            curvature = W * scale * sine * (c / 2)
            own = W * (g + c * rho.asin()), _over(curvature, rows, -1), _over(curvature, columns, -2), None, None
            if not ctx.needs_input_grad[5]:
                return (*own, None, None)
            shifted = W * (1 + rho) * (ctx.mixed * math.sqrt(2 / math.pi))  # <sigma'_a sigma_b> over the root of K_bb
            at_rows = (shifted * columns.sqrt()[..., None, :]).sum(-1)
            return (*own, at_rows, (shifted * rows.sqrt()[..., :, None]).sum(-2))
        merged = (sine == 0) | (scale == 0)
        slope = torch.where(merged, 0.0, W * c / torch.where(merged, 1.0, scale * sine))
        turned = slope * K * -0.5
        own = slope, _over(turned, rows, -1), _over(turned, columns, -2), None, None
        if not ctx.needs_input_grad[5]:
            return (*own, None, None)
        shifted = W * (2 * ctx.mixed * math.sqrt(1 / (2 * math.pi)))  # <sigma''_a sigma'_b> times the root of K_aa
        return (*own, _over(shifted, rows.sqrt(), -1), _over(shifted, columns.sqrt(), -2))


def _over(X: Tensor, variance: Tensor, summed: int) -> Tensor:
    """Sum over one label of a block, and divide by the variance of the other; 0 where that is 0."""
    total = X.sum(summed)
    return torch.where(variance > 0, total / torch.where(variance > 0, variance, 1.0), 0.0)


class _Mehler(torch.autograd.Function):
    """sum_k f_k(K_aa) f_k(K_bb) rho^k."""

    @staticmethod
    def forward(
        ctx: Any, K: Tensor, rows: Tensor, columns: Tensor, table: _Coefficients, order: int, *means: Any
    ) -> Tensor:
        ctx.save_for_backward(K, rows, columns)
        ctx.table, ctx.order = table, order
        return _series(table, order, order, K, rows, columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (W,) = gradients
        K, rows, columns = ctx.saved_tensors
        f, p = ctx.table, ctx.order
        own = _series(f, p + 1, p + 1, K, rows, columns) * W
        at_rows = (_series(f, p + 2, p, K, rows, columns) * W).sum(-1) / 2
        at_columns = (_series(f, p, p + 2, K, rows, columns) * W).sum(-2) / 2
        if not ctx.needs_input_grad[5]:
            return own, at_rows, at_columns, None, None, None, None
        left = (_series(f, p + 1, p, K, rows, columns) * W).sum(-1)
        return own, at_rows, at_columns, None, None, left, (_series(f, p, p + 1, K, rows, columns) * W).sum(-2)


def _series(table: _Coefficients, p: int, q: int, K: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    left, right = table.of(p, rows), table.of(q, columns)
    terms = max(left.shape[-1], right.shape[-1])
    if terms > left.shape[-1]:
        left = table.of(p, rows, terms)
    if terms > right.shape[-1]:
        right = table.of(q, columns, terms)
    terms = max(left.shape[-1], right.shape[-1])
    left, right = _padded(left, terms), _padded(right, terms)
    rho, _, _ = correlation_of(K, rows[..., :, None], columns[..., None, :])
    result = torch.empty_like(K)
    step = max(1, _TILE // (K.shape[-1] * K.shape[-2]))
    lines = max(1, _TILE // (step * K.shape[-1]))
    for start in range(0, len(K), step):
        part = slice(start, start + step)
        for line in range(0, K.shape[-2], lines):
            place = (part, slice(line, line + lines))
            a, b, r = left[place], right[part], rho[place]
            total = a[..., -1, None] * b[..., None, :, -1]
            for k in range(terms - 2, -1, -1):
                total = torch.addcmul(a[..., k, None] * b[..., None, :, k], total, r)
            result[place] = total
    return result


def _padded(coefficients: Tensor, terms: int) -> Tensor:
    return F.pad(coefficients, (0, terms - coefficients.shape[-1]))
