"""Two-label moments of an activation that is smooth but for a kink at zero (ELU, SELU, softsign), in any derivative.

A derivative of such a sigma is a function, smooth on either side, and delta functions where lower derivatives jump:

    d^i {sigma^(p)} = {sigma^(p+i)} + sum_{k < i} J_{p+k} delta^(i-1-k),        J_k = sigma^(k)(0+) - sigma^(k)(0-),

{.} being the value almost everywhere. The functions' part is a polar integral over the four quadrants of (z_a, z_b),
smooth in each; a delta function leaves a Gaussian integral over the other label, and two of them the density and
its derivatives at the origin. As in ``scale_invariant``, responses are always distributional, explicit derivatives by
``kinks``. At coincident inputs only sums of responses mean anything (of the merged label): their delta parts are put
where every such sum counts them once.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.quadrature import RELATIVE_ERROR, QuadratureError, expectation, gauss_legendre
from torch_eft.theory.gaussian.scale_invariant import Orders, correlation

_HALF_RANGE = 11.0
_LEVELS = ((32, 16), (48, 24), (72, 36), (108, 54), (162, 81))
_CHUNK = 2**22


class PiecewisePairs:
    """Two-label moments; the interface of ``two_point_moments.TwoPointMoments``.

    Args:
        activation: sigma, with ``kinks == (0.0,)``.
        K: (N, N), float64.
        distributional: Whether explicit derivatives carry delta functions.
    """

    def __init__(self, activation: Activation, K: Tensor, distributional: bool) -> None:
        self.activation, self.K, self.distributional = activation, K, distributional
        self.edge = KinkDerivatives(activation)
        rho, sine, self._scale = correlation(K)
        self._theta = torch.atan2(sine, rho)
        self._merged = sine == 0
        variance = K.diagonal()
        self._density = 1.0 / (2 * math.pi * variance).sqrt()
        self._slope = K / variance[:, None]  # z_b = slope z_a + rest, with this variance:
        self._rest = torch.where(self._merged, variance[None, :], self._scale.square() * sine**2 / variance[:, None])
        self._known: dict[tuple, Tensor] = {}

    def single(self, orders: Orders) -> Tensor:
        """<prod sigma^(p)_a>, (N,)."""
        value = expectation(_product(self.activation, orders), self.K.diagonal(), (0.0,))
        return value + self._explicit_delta(orders) * self._density

    def explicit(self, first: Orders, second: Orders) -> Tensor:
        """<prod sigma^(p)_a prod sigma^(q)_b>, (N, N)."""
        total = self._functions(first, second)
        at_a, at_b = self._explicit_delta(first), self._explicit_delta(second)
        apart = torch.zeros_like(total)
        if at_a:
            apart = apart + at_a * self._delta_and_function(0, second)
        if at_b:
            apart = apart + at_b * self._delta_and_function(0, first).T
        if at_a and at_b:
            apart = apart + at_a * at_b * self._two_deltas(0, 0)
        together = self._explicit_delta((*first, *second)) * self._density
        return total + torch.where(self._merged, together[:, None], apart)

    def response(self, p: int, q: int, i: int, j: int) -> Tensor:
        """<d_a^i d_b^j sigma^(p)_a sigma^(q)_b>, (N, N)."""
        total = self._functions((p + i,), (q + j,))
        apart = torch.zeros_like(total)
        deltas_a, deltas_b = self._deltas(p, i), self._deltas(q, j)
        for m, weight in deltas_a:
            apart = apart + weight * self._delta_and_function(m, (q + j,))
        for m, weight in deltas_b:
            apart = apart + weight * self._delta_and_function(m, (p + i,)).T
        for m, weight in deltas_a:
            for n, other in deltas_b:
                apart = apart + weight * other * self._two_deltas(m, n)
        return total + torch.where(self._merged, self._merged_delta(p, q, i, j)[:, None], apart)

    def _deltas(self, p: int, i: int) -> list[tuple[int, float]]:
        """(order m, weight) of the delta functions in d^i sigma^(p)."""
        lowest = 0 if self.distributional else p
        deltas = [(p + i - 1 - k, self.edge.jump(k)) for k in range(lowest, p + i)]
        return [(m, weight) for m, weight in deltas if weight]

    def _merged_delta(self, p: int, q: int, i: int, j: int) -> Tensor:
        """The delta part of the sum of responses of h = {sigma^(p) sigma^(q)} at one label.

        One derivative: d_a + d_b gives h' (in the slot 0, 1). Two: h''/2 out of the slots (2, 0)/2 + (1, 1) + (0, 2)/2.
        Four: h''''/8, out of the slots weighted 1, 4, 6, 4, 1 over 8. <delta'> = 0 and <delta''> = -<delta> / K.

        Returns:
            (N,).
        """
        zero = torch.zeros_like(self._density)
        if (i, j) == (0, 1):
            return self.edge.jump_of_product(p, q, 0) * self._density
        if (i, j) == (1, 1):
            return self.edge.jump_of_product(p, q, 1) / 2 * self._density
        if (i, j) == (2, 2):
            curvature = self.edge.jump_of_product(p, q, 3) - self.edge.jump_of_product(p, q, 1) / self.K.diagonal()
            return curvature / 6 * self._density
        return zero

    def _explicit_delta(self, orders: Orders) -> float:
        return self.edge.delta_weight(orders) if self.distributional else 0.0

    def _functions(self, first: Orders, second: Orders) -> Tensor:
        """<{first}_a {second}_b> by quadrature in polar coordinates, refined until it settles."""
        key = ("functions", tuple(sorted(first)), tuple(sorted(second)))
        if key not in self._known:
            mirror = self._known.get((key[0], key[2], key[1]))
            self._known[key] = self._settled(first, second) if mirror is None else mirror.T
        return self._known[key]

    def _settled(self, first: Orders, second: Orders) -> Tensor:
        f, g = _product(self.activation, first), _product(self.activation, second)
        before, size = self._polar(f, g, *_LEVELS[0])
        for level in _LEVELS[1:]:
            value, size = self._polar(f, g, *level)
            if bool(((value - before).abs() <= 10 * RELATIVE_ERROR * size).all()):
                return value
            before = value
        raise QuadratureError(
            f"activation: the Gaussian integral of {self.activation.name}, derivatives {first} and {second}, does not "
            f"settle to {10 * RELATIVE_ERROR:g}; it must be smooth on either side of zero"
        )

    def _polar(self, f: Callable, g: Callable, radial: int, angular: int) -> tuple[Tensor, Tensor]:
        """The integral, and that of the integrand's absolute value."""
        nodes, weights = gauss_legendre(radial, self.K)
        r, radial_weights = (nodes + 1) * _HALF_RANGE / 2, weights * _HALF_RANGE / 2
        radial_weights = radial_weights * r * torch.exp(-r.square() / 2) / (2 * math.pi)
        nodes, weights = gauss_legendre(angular, self.K)
        root, count = self.K.diagonal().sqrt(), len(self.K)
        total, size = torch.zeros_like(self.K).flatten(), torch.zeros_like(self.K).flatten()
        theta = self._theta.flatten()
        sd_a, sd_b = root.repeat_interleave(count), root.repeat(count)
        right = math.pi / 2
        for part in torch.arange(len(theta), device=theta.device).split(max(1, _CHUNK // (radial * angular))):
            turn = theta[part]
            edges = [turn * 0 - right, turn - right, turn * 0 + right, turn + right, turn * 0 + 3 * right]
            for low, high in zip(edges[:-1], edges[1:], strict=True):
                half = (high - low)[:, None] / 2
                phi = low[:, None] + half * (1 + nodes)
                z_a = (sd_a[part, None] * phi.cos())[..., None] * r
                z_b = (sd_b[part, None] * (phi - turn[:, None]).cos())[..., None] * r
                value = f(z_a) * g(z_b) * radial_weights
                total[part] += (value.sum(-1) * weights * half).sum(-1)
                size[part] += (value.abs().sum(-1) * weights * half).sum(-1)
        return total.reshape_as(self.K), size.reshape_as(self.K)

    def _delta_and_function(self, m: int, orders: Orders) -> Tensor:
        """<delta^(m)(z_a) {orders}(z_b)> for different inputs, (N, N); m > 0 for a single derivative."""
        at_zero = (1.0, 0.0, -1.0 / self.K.diagonal()[:, None], 0.0)  # derivatives of the density of z_a, over it
        total = torch.zeros_like(self.K)
        for k in range(m + 1):
            total = total + math.comb(m, k) * at_zero[m - k] * self._slope**k * self._shifted(orders, k)
        return (-1) ** m * total * self._density[:, None]

    def _shifted(self, orders: Orders, k: int) -> Tensor:
        """<d^k {orders}(z_b)> given z_a = 0."""
        if k == 0:
            return expectation(_product(self.activation, orders), self._rest, (0.0,))
        (q,) = orders
        value = expectation(_product(self.activation, (q + k,)), self._rest, (0.0,))
        density = 1.0 / (2 * math.pi * self._rest).sqrt()
        for lower in range(k):
            n = k - 1 - lower
            value = value + self.edge.jump(q + lower) * density * (1.0, 0.0, -1.0 / self._rest)[n]
        return value

    def _two_deltas(self, m: int, n: int) -> Tensor:
        """<delta^(m)(z_a) delta^(n)(z_b)> for different inputs: derivatives of the density at the origin."""
        if (m + n) % 2:
            return torch.zeros_like(self.K)
        variance = self.K.diagonal()
        determinant = self._rest * variance[:, None]
        P_aa, P_ab, P_bb = variance[None, :] / determinant, -self.K / determinant, variance[:, None] / determinant

        def isserlis(a: int, b: int) -> Tensor:
            """E[x^a y^b] for covariance P."""
            if a + b == 0:
                return torch.ones_like(self.K)
            if a == 0:
                return (b - 1) * P_bb * isserlis(0, b - 2) if b > 1 else torch.zeros_like(self.K)
            same = (a - 1) * P_aa * isserlis(a - 2, b) if a > 1 else torch.zeros_like(self.K)
            return same + (b * P_ab * isserlis(a - 1, b - 1) if b else 0.0)

        return (-1) ** ((m + n) // 2) * isserlis(m, n) / (2 * math.pi * determinant.sqrt())


class KinkDerivatives:
    """One-sided derivatives of sigma at its kink at zero, and the jumps J of products of them.

    Args:
        activation: sigma.
    """

    def __init__(self, activation: Activation) -> None:
        self.sides = lru_cache(activation.sides)
        self.jump = lru_cache(activation.jump)

    def jump_of_product(self, p: int, q: int, order: int) -> float:
        """The jump of the derivative of sigma^(p) sigma^(q) of the given order, by Leibniz."""
        total = 0.0
        for i in range(order + 1):
            (left, right), (left_q, right_q) = self.sides(p + i), self.sides(q + order - i)
            total += math.comb(order, i) * (right * right_q - left * left_q)
        return total

    def delta_weight(self, orders: Orders) -> float:
        """The weight of delta(z) in prod sigma^(p), explicit derivatives of one label.

        A sigma'' with m sigma' beside it is the derivative of sigma'^{m+1} / (m+1); where sigma' is continuous, a
        sigma''' multiplies continuous functions.

        Args:
            orders: The derivatives multiplied.

        Returns:
            The weight, 0 where there is no delta function.

        Raises:
            ValueError: If the product has no value: delta functions squared, or delta' times a jump.
        """
        zeros, ones, value = orders.count(0), orders.count(1), self.sides(0)[1]
        highest = max(orders, default=0)
        if highest < 2 or (highest == 2 and not self.jump(1)):
            return 0.0
        if highest == 2 and orders.count(2) == 1:
            left, right = self.sides(1)
            return value**zeros * (right ** (ones + 1) - left ** (ones + 1)) / (ones + 1)
        if highest == 3 and not self.jump(1) and orders.count(3) == 1 and not orders.count(2):
            return value**zeros * self.sides(1)[1] ** ones * self.jump(2)
        raise ValueError(f"orders {orders}: products of delta functions have no value for a kinked activation")


def _product(activation: Activation, orders: Orders) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.stack([activation(z, order) for order in orders]).prod(0)
