"""All one- and two-label moments of one layer: <f(z_a) g(z_b)> with f, g products of derivatives of sigma.

``M_pq(ab) = <sigma^(p)_a sigma^(q)_b>_K`` and, where one label carries several factors, e.g.
``<sigma''_a sigma'_a sigma_b^2>``. Smooth activations: Mehler's series (see ``expectations``), one set of Hermite
coefficients for every product of derivatives, shared by all pairs. Two-slope activations: closed forms,
derived by differentiating the arc-cosine kernel with respect to K, so that M_20, M_22, ... are RESPONSES, finite
and distributional whatever automatic differentiation makes of sigma'' at the kink.
"""

import math

import torch
from torch import Tensor

from torch_eft.theory.activations import Activation
from torch_eft.theory.expectations import RELATIVE_ERROR, QuadratureError, _correlation, _resolved_grid

Orders = tuple[int, ...]
"""Derivatives multiplied at one label: (2, 1) is sigma'' sigma'."""

_MAX_TERMS = 20000


class PairMoments:
    """Two-label moments under N(0, K), each computed once when first asked for.

    Args:
        activation: sigma.
        K: (N, N), float64.
    """

    def __init__(self, activation: Activation, K: Tensor) -> None:
        self.activation = activation
        self.K = K
        self._moments: dict[tuple[Orders, Orders], Tensor] = {}
        self._coefficients: dict[Orders, Tensor] = {}
        self._rho, self._sine, self._scale = _correlation(K)

    def __call__(self, p: int, q: int) -> Tensor:
        """M_pq, (N, N)."""
        return self.product((p,), (q,))

    def product(self, first: Orders, second: Orders) -> Tensor:
        """<prod sigma^(p)_a prod sigma^(q)_b>, (N, N), p over ``first`` and q over ``second``."""
        key = (tuple(sorted(first)), tuple(sorted(second)))
        if key not in self._moments:
            mirror = self._moments.get((key[1], key[0]))
            self._moments[key] = self._compute(*key) if mirror is None else mirror.T
        return self._moments[key]

    def _compute(self, first: Orders, second: Orders) -> Tensor:
        if self.activation.slopes is not None:
            return two_slope_moment(self.activation.slopes, self.K, first, second)
        columns_a, columns_b = self._both(first, second)
        moment = torch.zeros_like(self.K)
        for a, b in zip(reversed(columns_a.unbind(1)), reversed(columns_b.unbind(1)), strict=True):
            moment = torch.addcmul(torch.outer(a, b), moment, self._rho)
        return moment

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

        def function(z: Tensor) -> Tensor:
            return torch.stack([self.activation(z, order) for order in orders]).prod(0)

        deviation = self.K.diagonal()[:, None].sqrt()
        name = f"{self.activation.name}, derivatives {orders}"
        u, weight = _resolved_grid([function, lambda z: function(z).square()], deviation, name)
        values = function(deviation * u) * weight.sqrt()
        total = values.square().sum(1)
        before, current = torch.zeros_like(weight), weight.sqrt()
        columns, remainder = [], total.clone()
        for k in range(_MAX_TERMS):
            column = values @ current
            columns.append(column)
            remainder = remainder - column.square()
            if k % 16 == 15 and k + 1 >= least and bool((remainder <= RELATIVE_ERROR * total).all()):
                self._coefficients[orders] = torch.stack(columns, 1)
                return self._coefficients[orders]
            before, current = current, (u * current - math.sqrt(k) * before) / math.sqrt(k + 1)
        raise QuadratureError(
            f"activation: the Hermite series of {name} does not converge to {RELATIVE_ERROR:g}; it must be smooth"
        )


def two_slope_moment(slopes: tuple[float, float], K: Tensor, first: Orders, second: Orders) -> Tensor:
    """Closed forms for two slopes; entries with parallel inputs are those of one merged label.

    Raises:
        ValueError: If the moment has no closed form here.
    """
    rho, sine, scale = _correlation(K)
    even, odd = (slopes[1] - slopes[0]) / 2, (slopes[1] + slopes[0]) / 2
    c, g = even**2 * 2 / math.pi, odd**2
    if (first, second) == ((0,), (0,)):
        return g * K + c * scale * (sine + rho * rho.asin())
    if (first, second) == ((1,), (1,)):
        return g + c * rho.asin()
    if len(first) != 1 or len(second) != 1:
        raise ValueError(f"orders {first}, {second}: no closed form for two-slope activations")
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
