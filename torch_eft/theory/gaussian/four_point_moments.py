"""Gaussian expectations with three to six labels, <f(z_a) g(z_b) h(z_c) k(z_d) ..>, f .. products of derivatives.

A weighted set of points (``points``) and one matrix product per moment: pair features of two labels each, taken about
their exact means M_pq, so that only the connected part is summed. Where the points are a random sample, the lowest
chaos of each feature, also known exactly, is removed as a control variate,

    f g = <f g> + sum_a <d_a f g> z_a + (1/2) sum_ab <d_a d_b f g> (z_a z_b - K_ab) + residual,

the residuals are multiplied, and the exact covariance of what was removed is added. Explicit delta functions (a
kink with ``kinks="distributional"``) leave an expectation at z_a = 0. Scale-invariant activations have an
exact route of their own (``scale_invariant.ScaleInvariantMoments``).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from torch_eft.results.progress.work import worked
from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.piecewise import KinkDerivatives
from torch_eft.theory.gaussian.points import GridPoints, Points
from torch_eft.theory.gaussian.scale_invariant import Orders
from torch_eft.theory.gaussian.two_point_moments import SmoothPairs, TwoPointMoments

_ROWS = 2**18
_PAIRED_ROWS = 2**12
_CHUNK = 2**24
_CACHED = 2**24

Factor = tuple[Orders, Tensor]
"""The derivatives multiplied at a label, and the index of inputs it runs over."""


class FourPointMoments(Protocol):
    """Moments with three or more different labels."""

    def moment(self, factors: Sequence[Factor]) -> Tensor:
        """<prod f>, one axis per factor."""
        ...


class SummedMoments:
    """Moments under one set of points.

    Args:
        activation: sigma.
        K: (N, N).
        points: The points.
        pairs: The exact two-label moments.
        control: Whether to remove the lowest chaos (random samples of a smooth sigma).
        distributional: Whether explicit derivatives at a kink carry delta functions.
    """

    def __init__(
        self,
        activation: Activation,
        K: Tensor,
        points: Points | GridPoints,
        pairs: TwoPointMoments,
        control: bool = False,
        distributional: bool = False,
    ) -> None:
        self.activation, self.K, self.points, self.pairs = activation, K, points, pairs
        self._smooth = pairs if control and isinstance(pairs, SmoothPairs) else None
        self._edge = KinkDerivatives(activation) if distributional and activation.kinked else None
        self._features: dict[tuple[int, Orders], Tensor] = {}

    def moment(self, factors: Sequence[Factor]) -> Tensor:
        """<prod f>, one axis per factor, of two halves; of three, the one with the most derivatives is split off."""
        order = list(range(len(factors)))
        if len(factors) == 3:
            order.sort(key=lambda index: -len(factors[index][0]))
        half = len(factors) // 2
        left, right = ([factors[index] for index in part] for part in (order[:half], order[half:]))
        mean_left, mean_right = (
            exact_mean(self.pairs, side) if len(side) < 3 else self.moment(side).flatten() for side in (left, right)
        )
        total = self._covariance(left, right, mean_left, mean_right) + torch.outer(mean_left, mean_right)
        result = total.reshape([len(factors[index][1]) for index in order])
        result = result.permute([order.index(axis) for axis in range(len(order))])
        return result if self._edge is None else result + self._delta_part(factors, self._edge)

    @property
    def pairable(self) -> bool:
        """Whether ``paired`` has them: without delta functions."""
        return self._edge is None

    def paired(self, left: tuple[Orders, Orders], right: tuple[Orders, Orders], index: Tensor) -> Tensor:
        """<f_a g_b h_c k_d> for labels a, b in one row of an index and c, d in one row.

        Args:
            left: The derivatives at a and at b.
            right: Those at c and at d.
            index: (P, N), inputs.

        Returns:
            (P, N, N, P, N, N).
        """
        rows, columns = index[:, :, None], index[:, None, :]
        means = [self.pairs.explicit(*side)[rows, columns].flatten() for side in (left, right)]
        total = means[0].new_zeros(len(means[0]), len(means[1]))
        for number, (z, weights) in enumerate(self.points.chunks(_PAIRED_ROWS)):
            first, second = (
                products_in_rows([self._feature(orders, z, number) for orders in side], index) - mean.to(z.dtype)
                for side, mean in zip((left, right), means, strict=True)
            )
            total += ((first if weights is None else first * weights[:, None]).T @ second).double()
            worked(len(first) * total.numel())
        if isinstance(self.points, Points) and self.points.weights is None:
            total = total / self.points.count
        shape = (len(index), index.shape[1], index.shape[1])
        return (total + torch.outer(*means)).reshape(*shape, *shape)

    def _covariance(self, left: list[Factor], right: list[Factor], mean_left: Tensor, mean_right: Tensor) -> Tensor:
        removed_left, removed_right = self._removed(left), self._removed(right)
        rows = max(1, _CHUNK // (len(mean_left) + len(mean_right)))
        total = mean_left.new_zeros(len(mean_left), len(mean_right))
        for number, (z, weights) in enumerate(self.points.chunks(_ROWS)):
            features_left, features_right = self._columns(left, z, number), self._columns(right, z, number)
            for start in range(0, len(z), rows):
                part = slice(start, start + rows)
                first = products([column[part] for column in features_left]) - mean_left.to(z.dtype)
                second = products([column[part] for column in features_right]) - mean_right.to(z.dtype)
                if removed_left is not None and removed_right is not None:
                    first, second = first - removed_left.values(z[part]), second - removed_right.values(z[part])
                if weights is not None:
                    first = first * weights[part, None]
                total += (first.T @ second).double()
                worked(len(first) * total.numel())
        if isinstance(self.points, Points) and self.points.weights is None:
            total = total / self.points.count
        if removed_left is not None and removed_right is not None:
            total = total + removed_left.covariance(removed_right)
        return total

    def _columns(self, factors: list[Factor], z: Tensor, number: int) -> list[Tensor]:
        """The functions of a group at one chunk of points, (S, n_i) each."""
        return [self._feature(orders, z, number)[:, index] for orders, index in factors]

    def _feature(self, orders: Orders, z: Tensor, number: int) -> Tensor:
        known = self._features.get((number, orders))
        if known is None:
            known = torch.stack([self.activation(z, order) for order in orders]).prod(0)
            if self.points.count * z.shape[1] <= _CACHED:
                self._features[number, orders] = known
        return known

    def _removed(self, factors: list[Factor]) -> "_LowestChaos | None":
        return None if self._smooth is None or len(factors) > 2 else _LowestChaos(self._smooth, factors)

    def _delta_part(self, factors: Sequence[Factor], edge: KinkDerivatives) -> Tensor:
        """The contribution of delta functions at one label; labels that coincide with it merge into it."""
        assert isinstance(self.points, Points)
        total = self.K.new_zeros([len(index) for _, index in factors])
        for at, (orders, index) in enumerate(factors):
            if max(orders) < 2:
                continue
            others = [label for label in range(len(factors)) if label != at]
            for row, input_ in enumerate(index.tolist()):
                given = self.points.given_zero(input_, self.K)
                density = float(1 / (2 * math.pi * self.K[input_, input_]).sqrt())
                for size in range(len(others) + 1):
                    for together in itertools.combinations(others, size):
                        places = [(factors[label][1] == input_).nonzero().flatten() for label in together]
                        if any(len(same) == 0 for same in places):
                            continue
                        merged = (*orders, *(order for label in together for order in factors[label][0]))
                        rest = [label for label in others if label not in together]
                        value = edge.delta_weight(merged) * density * self._plain(given, [factors[i] for i in rest])
                        target = total.select(at, row)
                        for label, same in reversed(list(zip(together, places, strict=True))):
                            target = target.select(label - (label > at), int(same[0]))
                        target.copy_(value)
        return total

    def _plain(self, points: Points, factors: list[Factor]) -> Tensor:
        """<prod f> of up to three labels, summed without exact means."""
        weights = points.weights
        if weights is None:
            weights = points.z.new_full((points.count,), 1.0 / points.count)
        if not factors:
            return weights.sum().double()
        values = [
            torch.stack([self.activation(points.z, order) for order in orders]).prod(0)[:, index]
            for orders, index in factors
        ]
        labels = "abc"[: len(values)]
        first = values[0] * weights[:, None]
        terms = ",".join(f"s{label}" for label in labels)
        return torch.einsum(f"{terms}->{labels}", first, *values[1:]).double()


class _LowestChaos:
    """The linear and quadratic parts of a group of one or two labels, as functions of z.

    Args:
        pairs: Exact two-label moments of a smooth sigma.
        factors: The group.
    """

    def __init__(self, pairs: SmoothPairs, factors: list[Factor]) -> None:
        self.indices = [index for _, index in factors]
        self._K = pairs.K
        orders = [label for label, _ in factors]
        count = len(orders)
        steps = [tuple(int(i == j) for j in range(count)) for i in range(count)]
        self.linear = [self._mean(pairs, orders, step) for step in steps]
        self.quadratic = {
            (i, j): self._mean(pairs, orders, tuple(a + b for a, b in zip(steps[i], steps[j], strict=True))) / 2
            for i in range(count)
            for j in range(count)
        }

    def _mean(self, pairs: SmoothPairs, orders: list[Orders], times: tuple[int, ...]) -> Tensor:
        """<d^times prod f>, flat over the group, by Leibniz over the factors of a label."""
        terms_at = [_derivatives(label, time) for label, time in zip(orders, times, strict=True)]
        if len(orders) == 1:
            # A single label is a pair with nothing at the second one.
            values = [weight * pairs.single(word)[self.indices[0]] for word, weight in terms_at[0]]
            return torch.stack(values).sum(0)
        rows, columns = self.indices
        terms = [
            weight * other * pairs.explicit(word, second)[rows][:, columns].flatten()
            for word, weight in terms_at[0]
            for second, other in terms_at[1]
        ]
        return torch.stack(terms).sum(0)

    def values(self, z: Tensor) -> Tensor:
        """The removed part at the points, (S, n)."""
        columns = [z[:, index] for index in self.indices]
        shape = [len(index) for index in self.indices]
        linear = [value.reshape(shape).to(z.dtype) for value in self.linear]
        quadratic = {key: value.reshape(shape).to(z.dtype) for key, value in self.quadratic.items()}
        if len(columns) == 1:
            (first,) = columns
            return first * (linear[0] + quadratic[0, 0] * first) - self._constant().to(z.dtype)
        first, second = columns[0][:, :, None], columns[1][:, None, :]
        total = first * (linear[0] + quadratic[0, 0] * first + 2 * quadratic[0, 1] * second)
        total = total + second * (linear[1] + quadratic[1, 1] * second)
        return total.flatten(1) - self._constant().to(z.dtype)

    def covariance(self, other: "_LowestChaos") -> Tensor:
        """The exact covariance of the parts removed from two groups, (n, n')."""
        labels, others = range(len(self.indices)), range(len(other.indices))
        cross = {(i, k): self._K[self._labels(i)][:, other._labels(k)] for i in labels for k in others}
        total = self._K.new_zeros(len(self.linear[0]), len(other.linear[0]))
        for i, k in cross:
            total += self.linear[i][:, None] * other.linear[k] * cross[i, k]
            for j, m in cross:
                # Cov(z_i z_j, z_k z_m) = K_ik K_jm + K_im K_jk, equal once summed over k and m.
                total += 2 * self.quadratic[i, j][:, None] * other.quadratic[k, m] * cross[i, k] * cross[j, m]
        return total

    def _constant(self) -> Tensor:
        """The mean of the quadratic part, (n,)."""
        return torch.stack(
            [value * self._K[self._labels(i), self._labels(j)] for (i, j), value in self.quadratic.items()]
        ).sum(0)

    def _labels(self, label: int) -> Tensor:
        """The input at a label for every entry of the group, (n,)."""
        index = self.indices[label]
        if len(self.indices) == 1:
            return index
        if label == 0:
            return index.repeat_interleave(len(self.indices[1]))
        return index.repeat(len(self.indices[0]))


def exact_mean(pairs: TwoPointMoments, factors: Sequence[Factor]) -> Tensor:
    """The exact mean of a group of one or two labels, flat, of the functions almost everywhere."""
    if len(factors) == 1:
        orders, index = factors[0]
        return pairs.single(orders)[index]
    (first, rows), (second, columns) = factors
    return pairs.explicit(first, second)[rows][:, columns].flatten()


def products(columns: Sequence[Tensor]) -> Tensor:
    """Products over all entries of a group of labels, (S, n)."""
    total = columns[0]
    for column in columns[1:]:
        total = (total[:, :, None] * column[:, None, :]).flatten(1)
    return total


def products_in_rows(values: Sequence[Tensor], index: Tensor) -> Tensor:
    """Products f_a g_b of two labels in one row of an index (P, N), of functions (S, inputs): (S, P N N)."""
    first, second = (value[:, index] for value in values)
    return (first[:, :, :, None] * second[:, :, None, :]).flatten(1)


def _derivatives(orders: Orders, times: int) -> list[tuple[Orders, float]]:
    """d^times prod sigma^(p) as a sum of products with weights."""
    terms: dict[Orders, float] = {tuple(sorted(orders)): 1.0}
    for _ in range(times):
        following: dict[Orders, float] = {}
        for word, weight in terms.items():
            for slot in range(len(word)):
                raised = tuple(sorted((*word[:slot], word[slot] + 1, *word[slot + 1 :])))
                following[raised] = following.get(raised, 0.0) + weight
        terms = following
    return list(terms.items())
