"""Gaussian moments of scale-invariant activations (linear, ReLU, leaky ReLU, |z|), exactly, for up to four labels.

Two kinds of derivative must not be confused. RESPONSES, derivatives of Gaussian expectations with respect to K, are
finite for every convention for sigma'' at the kink: the arc-cosine kernel (Cho & Saul 2009), differentiated. EXPLICIT
derivatives multiply one another in the network's own Taylor coefficients: sigma'' is 0 for ``kinks="autograd"`` and
(slope_+ - slope_-) delta(z) for ``"distributional"``.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_eft.theory.gaussian.orthant import Covariance, SignedMoments

Orders = tuple[int, ...]
"""Derivatives multiplied at one label: (2, 1) is sigma'' sigma'."""

_ROUNDING_ANGLE = 8 * torch.finfo(torch.float64).eps
_CHUNK = 2**21


def correlation(K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rho, sqrt(1 - rho^2), sqrt(K_aa K_bb)); angles below rounding are exactly 0 or pi."""
    variance = K.diagonal()
    return correlation_of(K, variance[:, None], variance[None, :])


def correlation_of(K: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``correlation``, of a block with its variances K_aa and K_bb, which broadcast against it."""
    scale = (rows * columns).sqrt()
    rho = torch.where(scale > 0, K / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1.0, 1.0)
    # 1 - rho^2 below rounding: the two inputs are (anti)parallel as far as K can tell, and asin is steep there.
    sine_squared = (1.0 - rho) * (1.0 + rho)
    parallel = sine_squared < _ROUNDING_ANGLE
    rho = torch.where(parallel & (scale > 0), rho.sign(), rho)
    return rho, torch.where(parallel, 0.0, sine_squared).sqrt(), scale


class ScaleInvariantPairs:
    """Two-label moments; the interface of ``two_point_moments.TwoPointMoments``.

    Args:
        slopes: (negative, positive).
        K: (N, N), float64.
        distributional: Whether explicit second derivatives are delta functions.
    """

    def __init__(self, slopes: tuple[float, float], K: Tensor, distributional: bool) -> None:
        self.slopes, self.K, self.distributional = slopes, K, distributional
        variance = K.diagonal()
        self._pair = SignedMoments(((variance[:, None], K), (K, variance[None, :])))
        self._single = SignedMoments(((variance,),))

    def single(self, orders: Orders) -> Tensor:
        """<prod sigma^(p)_a>, (N,)."""
        return self._product(self._single, [orders]).expand(len(self.K))

    def explicit(self, first: Orders, second: Orders) -> Tensor:
        """<prod sigma^(p)_a prod sigma^(q)_b>, (N, N)."""
        if first == second and first in ((0,), (1,)):
            return arc_cosine_response(self.slopes, self.K, *first, *second)  # accurate at nearly parallel inputs
        return self._product(self._pair, [first, second]).expand_as(self.K)

    def response(self, p: int, q: int, i: int, j: int) -> Tensor:
        """<d_a^i d_b^j sigma^(p)_a sigma^(q)_b>, (N, N)."""
        return arc_cosine_response(self.slopes, self.K, p + i, q + j)

    def _product(self, moments: SignedMoments, orders: list[Orders]) -> Tensor:
        return scale_invariant_product(self.slopes, moments, orders, self.distributional)


class ScaleInvariantMoments:
    """Moments with three or four labels; the interface of ``four_point_moments.FourPointMoments``.

    Args:
        slopes: (negative, positive).
        K: (N, N), float64.
        distributional: Whether explicit second derivatives are delta functions.
    """

    def __init__(self, slopes: tuple[float, float], K: Tensor, distributional: bool) -> None:
        self.slopes, self.K, self.distributional = slopes, K, distributional

    def moment(self, factors: Sequence[tuple[Orders, Tensor]]) -> Tensor:
        """<prod f>, one axis per factor, in chunks of the first."""
        sizes = [len(index) for _, index in factors]
        rows = max(1, _CHUNK // math.prod(sizes[1:]))
        parts = []
        for part in factors[0][1].split(rows):
            indices = [part, *(index for _, index in factors[1:])]
            value = scale_invariant_product(
                self.slopes, SignedMoments(self._entries(indices)), [o for o, _ in factors], self.distributional
            )
            parts.append(value.expand([len(index) for index in indices]))
        return torch.cat(parts)

    @property
    def pairable(self) -> bool:
        """True: ``paired`` has them."""
        return True

    def paired(self, left: tuple[Orders, Orders], right: tuple[Orders, Orders], index: Tensor) -> Tensor:
        """<f_a g_b h_c k_d> for labels a, b in one row of an index (P, N) and c, d in one row: (P, N, N, P, N, N)."""
        P, N = index.shape
        rows = max(1, _CHUNK // (P * N**4))
        parts = []
        for some in index.split(rows):
            places = [
                some.reshape(-1, N, 1, 1, 1, 1),
                some.reshape(-1, 1, N, 1, 1, 1),
                index.reshape(1, 1, 1, P, N, 1),
                index.reshape(1, 1, 1, P, 1, N),
            ]
            entries = tuple(tuple(self.K[places[min(i, j)], places[max(i, j)]] for j in range(4)) for i in range(4))
            value = scale_invariant_product(self.slopes, SignedMoments(entries), [*left, *right], self.distributional)
            parts.append(value.expand(len(some), N, N, P, N, N))
        return torch.cat(parts)

    def _entries(self, indices: list[Tensor]) -> Covariance:
        count = len(indices)

        def entry(i: int, j: int) -> Tensor:
            shape = [1] * count
            shape[i] = len(indices[i])
            if i == j:
                return self.K.diagonal()[indices[i]].reshape(shape)
            shape[j] = len(indices[j])
            block = self.K[indices[min(i, j)]][:, indices[max(i, j)]]
            return block.reshape(shape)

        return tuple(tuple(entry(i, j) for j in range(count)) for i in range(count))


def scale_invariant_product(
    slopes: tuple[float, float], moments: SignedMoments, orders: Sequence[Orders], distributional: bool
) -> Tensor:
    """<prod over labels of prod sigma^(p)>, with at most one explicit second derivative.

    With L, R the slopes, sigma'^m = (R^m + L^m) / 2 + (R^m - L^m) / 2 sgn z and sigma = z sigma'. A second derivative
    with m first ones is the derivative of sigma'^{m+1} / (m+1): (R^{m+1} - L^{m+1}) / (m+1) delta(z); with a sigma
    it is 0.

    Args:
        slopes: (negative, positive): L, R.
        moments: Expectations of monomials times signs, one position per label.
        orders: The derivatives multiplied at each label.
        distributional: Whether a second derivative is a delta function or zero.

    Returns:
        Broadcast over the entries of the covariance.

    Raises:
        ValueError: If derivatives beyond that are asked for: products of delta functions have no value.
    """
    left, right = slopes
    highest = max(max(label, default=0) for label in orders)
    if highest > 2 or sum(label.count(2) for label in orders) > 1:
        raise ValueError(f"orders {tuple(orders)}: products of delta functions have no value for a kinked activation")
    if highest == 2:
        if not distributional or left == right:
            return moments.density(0) * 0.0
        return _with_delta(slopes, moments, orders)
    total = moments(tuple(0 for _ in orders), ()) * 0.0
    powers = tuple(label.count(0) for label in orders)
    weights = [
        ((right ** len(label) + left ** len(label)) / 2, (right ** len(label) - left ** len(label)) / 2)
        for label in orders
    ]
    for signed in itertools.product((False, True), repeat=len(orders)):
        weight = math.prod(pair[sign] for pair, sign in zip(weights, signed, strict=True))
        if weight != 0:
            total = total + weight * moments(powers, tuple(index for index, sign in enumerate(signed) if sign))
    return total


def _with_delta(slopes: tuple[float, float], moments: SignedMoments, orders: Sequence[Orders]) -> Tensor:
    (at,) = (index for index, label in enumerate(orders) if 2 in label)
    others = [label for index, label in enumerate(orders) if index != at]
    given = moments.given_zero(at)

    def value(together: tuple[int, ...]) -> Tensor:
        """The labels ``together`` coincide with the delta's: their slopes jump where it sits."""
        merged = [*orders[at], *(order for index in together for order in others[index])]
        if 0 in merged:
            return moments.density(at) * 0.0
        count = merged.count(1) + 1
        rest = [index for index in range(len(others)) if index not in together]
        weight = (slopes[1] ** count - slopes[0] ** count) / count
        inner = scale_invariant_product(slopes, given.only(rest), [others[index] for index in rest], False)
        return weight * moments.density(at) * inner

    total = value(())
    for size in range(1, len(others) + 1):
        for together in itertools.combinations(range(len(others)), size):
            same = given.vanishing(together)
            if bool(same.any()):
                total = torch.where(same, value(together), total)
    return total


def arc_cosine_response(slopes: tuple[float, float], K: Tensor, p: int, q: int) -> Tensor:
    """<d_a^p d_b^q sigma_a sigma_b> for p + q even; at coincident inputs the response of one merged label.

    Args:
        slopes: (negative, positive).
        K: (N, N), float64.
        p: Order of the derivative at a.
        q: Order of the derivative at b.

    Returns:
        (N, N).

    Raises:
        ValueError: If there is no closed form for the orders.
    """
    rho, sine, scale = correlation(K)
    even, odd = (slopes[1] - slopes[0]) / 2, (slopes[1] + slopes[0]) / 2
    c, g = even**2 * 2 / math.pi, odd**2
    if (p, q) == (0, 0):
        return g * K + c * scale * (sine + rho * rho.asin())
    if (p, q) == (1, 1):
        return g + c * rho.asin()
    if even == 0:
        return torch.zeros_like(K)
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
    if (p, q) in forms:
        return torch.where(merged, 0.0, forms[p, q]())
    if (q, p) in forms:
        return arc_cosine_response(slopes, K, q, p).T
    raise ValueError(f"orders {(p, q)}: no closed form for scale-invariant activations")
