"""All two-label moments of one layer, <f(z_a) g(z_b)>, with f, g products of derivatives of sigma.

``explicit(p.., q..)``: <prod sigma^(p)_a prod sigma^(q)_b>, e.g. M_pq(ab) = <sigma^(p)_a sigma^(q)_b>_K (PDLT 4.2),
with derivatives as in the network's own Taylor coefficients. ``response(p, q, i, j)``: the derivatives
d_a^i d_b^j of sigma^(p)_a sigma^(q)_b that arise when an expectation responds to a change of K. For smooth sigma both
are M_{p+i, q+j}; at a kink they are not (see ``scale_invariant``). Routes, chosen by the activation:

* scale-invariant (linear, ReLU, leaky ReLU): closed forms (``scale_invariant``);
* a kink at zero (ELU, SELU): integrals quadrant by quadrant and delta functions (``piecewise``);
* erf (Williams 1996) and sin, M_00 and M_11: closed forms;
* every other smooth function: Mehler's expansion in Hermite polynomials (Mehler 1866)

      <f(z_a) g(z_b)> = sum_k f_k(K_aa) g_k(K_bb) rho^k,    f_k(K) = <f(sqrt(K) u) he_k(u)>_{u ~ N(0,1)},

  he_k orthonormal, rho = K_ab / sqrt(K_aa K_bb). By Cauchy-Schwarz the tail for any pair is at most
  sqrt(tail_a tail_b), where tail_a = <f(z_a)^2> - sum_{k kept} f_k(K_aa)^2 is known: the truncation error is bounded,
  not guessed. K is never inverted, so repeated and parallel inputs are ordinary.
"""

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.piecewise import PiecewisePairs
from torch_eft.theory.gaussian.quadrature import RELATIVE_ERROR, QuadratureError, resolved_grid
from torch_eft.theory.gaussian.scale_invariant import Orders, ScaleInvariantPairs, correlation

Kinks = Literal["autograd", "distributional"]
"""Explicit second derivatives at a kink: 0 almost everywhere, as in automatic differentiation of the network, or the
delta functions of a smooth activation sharpened to the kink."""

_MAX_TERMS = 20000
_BLOCK = 32
_AT_ONCE = 2**14
"""Terms of a series over all pairs that are summed at once; more of them one power after the other."""


class TwoPointMoments(Protocol):
    """Two-label moments under N(0, K)."""

    def single(self, orders: Orders) -> Tensor:
        """<prod sigma^(p)_a>, (N,)."""
        ...

    def explicit(self, first: Orders, second: Orders) -> Tensor:
        """<prod sigma^(p)_a prod sigma^(q)_b>, (N, N), p over ``first`` and q over ``second``."""
        ...

    def response(self, p: int, q: int, i: int, j: int) -> Tensor:
        """<d_a^i d_b^j sigma^(p)_a sigma^(q)_b>, (N, N)."""
        ...


def two_point_moments(activation: Activation, K: Tensor, kinks: Kinks = "autograd") -> TwoPointMoments:
    """The two-label moments of an activation under N(0, K).

    Args:
        activation: sigma.
        K: (N, N), float64.
        kinks: The meaning of explicit derivatives at a kink.

    Returns:
        The moments, computed when first asked for.

    Raises:
        ValueError: If sigma has kinks elsewhere than at zero.
    """
    if activation.slopes is not None:
        return ScaleInvariantPairs(activation.slopes, K, kinks == "distributional")
    if activation.kinks == (0.0,):
        return PiecewisePairs(activation, K, kinks == "distributional")
    if activation.kinks:
        raise ValueError(
            f"activation: {activation.name} has kinks at {', '.join(f'{k:g}' for k in activation.kinks)}; expectations "
            "of two inputs exist for smooth functions and for a kink at 0. Use criticality() for one input"
        )
    return SmoothPairs(activation, K)


class SmoothPairs:
    """Two-label moments of a smooth sigma, each computed once when first asked for.

    Args:
        activation: sigma.
        K: (N, N), float64.
    """

    def __init__(self, activation: Activation, K: Tensor) -> None:
        self.activation = activation
        self.K = K
        self._moments: dict[tuple[Orders, Orders], Tensor] = {}
        self._coefficients: dict[Orders, Tensor] = {}
        self._rho, _, self._scale = correlation(K)

    def single(self, orders: Orders) -> Tensor:
        """<prod sigma^(p)_a>, (N,)."""
        half = len(orders) // 2
        return self.explicit(orders[:half], orders[half:]).diagonal()

    def explicit(self, first: Orders, second: Orders) -> Tensor:
        """<prod sigma^(p)_a prod sigma^(q)_b>, (N, N), p over ``first`` and q over ``second``."""
        key = (tuple(sorted(first)), tuple(sorted(second)))
        if key not in self._moments:
            mirror = self._moments.get((key[1], key[0]))
            self._moments[key] = self.computed(*key) if mirror is None else mirror.T
        return self._moments[key]

    def response(self, p: int, q: int, i: int, j: int) -> Tensor:
        """<d_a^i d_b^j sigma^(p)_a sigma^(q)_b>, (N, N)."""
        return self.explicit((p + i,), (q + j,))

    def computed(self, first: Orders, second: Orders) -> Tensor:
        """As ``explicit``, and not kept."""
        closed_form = _CLOSED_FORMS.get((self.activation.name, first, second))
        if closed_form is not None:
            return closed_form(self.K)
        return self._series(*self._both(first, second))

    def _series(self, first: Tensor, second: Tensor) -> Tensor:
        """sum_k f_k(a) g_k(b) rho^k from columns (N, terms)."""
        count, terms = first.shape
        if count**2 * terms <= _AT_ONCE:
            powers = self._rho[:, :, None] ** torch.arange(terms, dtype=first.dtype, device=first.device)
            return torch.einsum("ak,bk,abk->ab", first, second, powers)
        moment = torch.zeros_like(self.K)
        for a, b in zip(reversed(first.unbind(1)), reversed(second.unbind(1)), strict=True):
            moment = torch.addcmul(torch.outer(a, b), moment, self._rho)
        return moment

    def fourth_order(self, first: Orders, second: Orders, x: Tensor) -> Tensor:
        """(1/24) sum_k (x_k d)^4 of the moment, (N, N): what a fourth cumulant sum_k x_ak x_bk x_ck x_dk adds.

        Args:
            first: Derivatives at a.
            second: Derivatives at b.
            x: (N, n), one direction per column.

        Returns:
            (N, N).
        """
        columns = self._both(first, second)
        deviation = self.K.diagonal()[:, None].sqrt()
        deviation = torch.where(deviation > 0, deviation, torch.inf)
        total = torch.zeros_like(self.K)
        for i in range(5):
            # d^i f has the Hermite coefficients f_{k+i} sqrt((k+i)! / k!) / sqrt(K)^i.
            sides = []
            for coefficients, times in zip(columns, (i, 4 - i), strict=True):
                k = torch.arange(coefficients.shape[1] - 4, dtype=self.K.dtype, device=self.K.device)
                raised = coefficients[:, times : times + len(k)]
                for step in range(1, times + 1):
                    raised = raised * (k + step).sqrt() / deviation
                sides.append(raised)
            total = total + math.comb(4, i) / 24 * (x**i @ (x ** (4 - i)).T) * self._series(*sides)
        return total

    def _both(self, first: Orders, second: Orders) -> tuple[Tensor, Tensor]:
        """Coefficients of both functions, to the same number of terms: enough for each."""
        least = 0
        for orders in (first, second):
            least = max(least, self._expand(orders, 0).shape[1])
        return self._expand(first, least)[:, :least], self._expand(second, least)[:, :least]

    def _expand(self, orders: Orders, least: int) -> Tensor:
        """f_k(K_aa), (N, terms), at least ``least`` terms and enough for RELATIVE_ERROR."""
        known = self._coefficients.get(orders)
        if known is not None and known.shape[1] >= least:
            return known

        self._coefficients[orders] = hermite_coefficients(self.activation, orders, self.K.diagonal(), least)
        return self._coefficients[orders]


class Differentiable(Protocol):
    """A function of one number with its derivatives, such as an ``Activation``."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def __call__(self, z: Tensor, order: int = 0) -> Tensor:
        """Its derivative of an order."""
        ...


def hermite_coefficients(activation: Differentiable, orders: Orders, variance: Tensor, least: int = 0) -> Tensor:
    """f_k(K) = <f(sqrt(K) u) he_k(u)> of a product f of derivatives of a smooth sigma.

    Args:
        activation: sigma.
        orders: The derivatives multiplied.
        variance: K of every label, (N,).
        least: Number of terms at least.

    Returns:
        (N, terms): so many that the rest of <f^2> is at most RELATIVE_ERROR of it.

    Raises:
        QuadratureError: If the series does not converge.
    """

    def function(z: Tensor) -> Tensor:
        value = torch.ones_like(z)
        for order in orders:  # an empty product is 1
            value = value * activation(z, order)
        return value

    deviation = variance[:, None].sqrt()
    name = f"{activation.name}, derivatives {orders}"
    u, weight = resolved_grid([function, lambda z: function(z).square()], deviation, name)
    values = function(deviation * u) * weight.sqrt()
    total = values.square().sum(1)
    before, current = torch.zeros_like(weight), weight.sqrt()
    blocks, remainder = [], total.clone()
    for start in range(0, _MAX_TERMS, _BLOCK):  # one matrix product per block of Hermite functions
        basis = []
        for k in range(start, start + _BLOCK):
            basis.append(current)
            before, current = current, (u * current - math.sqrt(k) * before) / math.sqrt(k + 1)
        blocks.append(values @ torch.stack(basis, 1))
        remainder = remainder - blocks[-1].square().sum(1)
        if start + _BLOCK >= least and bool((remainder <= RELATIVE_ERROR * total).all()):
            return torch.cat(blocks, 1)
    raise QuadratureError(
        f"activation: the Hermite series of {name} does not converge to {RELATIVE_ERROR:g} within {_MAX_TERMS} "
        f"terms (variance up to {float(variance.max()):.3g}); the function must be smooth, and inputs "
        "scaled so that the variance is not far above 1"
    )


def _erf_moment(K: Tensor) -> Tensor:
    root = (1 + 2 * K.diagonal()).sqrt()
    return (2 / math.pi) * (2 * K / torch.outer(root, root)).asin()


def _erf_slope_moment(K: Tensor) -> Tensor:
    stretched = 1 + 2 * K.diagonal()
    return (4 / math.pi) / (torch.outer(stretched, stretched) - 4 * K.square()).sqrt()


def _sin_moment(K: Tensor) -> Tensor:
    mean = (K.diagonal()[:, None] + K.diagonal()[None, :]) / 2
    return ((K - mean).exp() - (-K - mean).exp()) / 2


def _sin_slope_moment(K: Tensor) -> Tensor:
    mean = (K.diagonal()[:, None] + K.diagonal()[None, :]) / 2
    return ((K - mean).exp() + (-K - mean).exp()) / 2


_CLOSED_FORMS: dict[tuple[str, Orders, Orders], Callable[[Tensor], Tensor]] = {
    ("erf", (0,), (0,)): _erf_moment,
    ("erf", (1,), (1,)): _erf_slope_moment,
    ("sin", (0,), (0,)): _sin_moment,
    ("sin", (1,), (1,)): _sin_slope_moment,
}
