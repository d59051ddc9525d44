"""Moments with three and more labels of one neuron whose law is not Gaussian: sums over the values of its bias.

Each value of the bias gives a Gaussian neuron with a moved sigma (``pairs``), whose moments are those of the Gaussian
theory. The fourth cumulant of the first layer's weights adds the moment under the weight of its Hermite polynomial,

    (1/24) c sum_k [ (v_k u)^4 - 6 |v_k|^2 (v_k u)^2 + 3 |v_k|^4 ],   v_k u = x_k g^+ u,  |v_k|^2 = x_k g^+ x_k.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.four_point_moments import Factor, FourPointMoments, products, products_in_rows
from torch_eft.theory.gaussian.points import (
    GridPoints,
    Points,
    nodes_of,
    quadrature_spacings,
    sample_points,
    square_root,
)
from torch_eft.theory.gaussian.scale_invariant import Orders
from torch_eft.theory.gaussian.two_point_moments import TwoPointMoments
from torch_eft.theory.initialization.neuron.pairs import MixedPairs, Piece, Quartic

AnyPoints = Points | GridPoints

_ROWS, _PAIRED_ROWS = 2**16, 2**12
_MOST_NODES = 2**21
"""Nodes of the rules for all values of a bias, beyond which moments are sampled."""
_SMALLEST = 1e-10
"""Eigenvalues of g below this, relative to the largest, carry no input to rounding of the points."""


class MixedMoments:
    """Moments over all values of the bias; the interface of ``four_point_moments.FourPointMoments``.

    Args:
        pairs: The two-label moments, which know the law.
        points: Points of N(0, g) for a piece: the piece's number.
        gaussian: The moments of a piece over its points.
    """

    def __init__(
        self,
        pairs: MixedPairs,
        points: Callable[[int], AnyPoints],
        gaussian: Callable[[Piece, AnyPoints], FourPointMoments],
    ) -> None:
        self._pairs = pairs
        self._parts: list[tuple[float, Any]] = []
        for number, piece in enumerate(pairs.pieces):
            some = points(number)
            self._parts.append((piece.probability, gaussian(piece, some)))
            if pairs.quartic is not None:
                self._parts.append((piece.probability, _FourthOrder(piece.activation, some, pairs.g, pairs.quartic)))

    def moment(self, factors: Sequence[Factor]) -> Tensor:
        """<prod f>, one axis per factor."""
        if self._pairs.odd(tuple(order for orders, _ in factors for order in orders)):
            return self._pairs.g.new_zeros([len(index) for _, index in factors])
        values = [probability * part.moment(factors) for probability, part in self._parts]
        return torch.stack([value.double() for value in values]).sum(0).to(values[0].dtype)

    @property
    def pairable(self) -> bool:
        """True: ``paired`` has them."""
        return True

    def paired(self, left: tuple[Orders, Orders], right: tuple[Orders, Orders], index: Tensor) -> Tensor:
        """<f_a g_b h_c k_d>, see ``SummedMoments.paired``."""
        if self._pairs.odd(tuple(order for orders in (*left, *right) for order in orders)):
            shape = (len(index), index.shape[1], index.shape[1])
            return self._pairs.g.new_zeros(*shape, *shape)
        values = [probability * part.paired(left, right, index) for probability, part in self._parts]
        return torch.stack(values).sum(0)


def neuron_spacings(
    activation: Activation, K: Sequence[Tensor], pairs: Sequence[TwoPointMoments]
) -> list[list[list[float]]] | None:
    """Spacings of a product rule for every layer and every value of the bias; None if one of them has none.

    Args:
        activation: sigma.
        K: K^(1) .. of the layers of ``pairs``, (N, N) each.
        pairs: Two-label moments.

    Returns:
        Layer by layer, value by value, one number per eigendirection.
    """
    layers = []
    for kernel, pair in zip(K, pairs, strict=False):
        rules = (
            [quadrature_spacings(piece.activation, pair.g) for piece in pair.pieces]
            if isinstance(pair, MixedPairs)
            else [quadrature_spacings(activation, kernel)]
        )
        known = [rule for rule in rules if rule is not None]
        if len(known) < len(rules) or (len(known) > 1 and sum(map(nodes_of, known)) > _MOST_NODES):
            return None
        layers.append(known)
    return layers


def piece_sample(pairs: TwoPointMoments, covariance: Tensor, num_samples: int, seed: int, piece: int) -> Points:
    """The share of a sample that one value of the bias gets, at least what its covariance needs.

    Args:
        pairs: Two-label moments of the layer.
        covariance: Of u, (N, N).
        num_samples: Sample size of all values.
        seed: Seed of the layer's sample.
        piece: Number of the value.

    Returns:
        The points.
    """
    if not isinstance(pairs, MixedPairs):
        return sample_points(covariance, num_samples, seed)
    least = 4 * square_root(covariance)[1].shape[1] if num_samples > 2 * len(covariance) else 0
    return sample_points(covariance, max(num_samples // len(pairs.pieces), least), seed + _NEXT_PIECE * piece)


_NEXT_PIECE = 10**6


class _FourthOrder:
    """What the fourth cumulant of u adds to a moment.

    Args:
        activation: sigma, moved by the bias.
        points: Of N(0, g).
        g: (N, N).
        quartic: The cumulant.
    """

    def __init__(self, activation: Activation, points: AnyPoints, g: Tensor, quartic: Quartic) -> None:
        self._activation, self._points, self._coefficient = activation, points, quartic.coefficient
        self._v = torch.linalg.pinv(g, rtol=_SMALLEST, hermitian=True) @ quartic.x
        self._squares = (quartic.x * self._v).sum(0)

    def moment(self, factors: Sequence[Factor]) -> Tensor:
        """Its part of <prod f>, one axis per factor."""
        half = (len(factors) + 1) // 2
        left, right = factors[:half], factors[half:]
        total: Tensor | float = 0.0
        for z, weight in self._weighted():
            first, second = (products(self._columns(side, z)) for side in (left, right))
            total = total + ((first * weight[:, None]).T @ second).double()
        assert isinstance(total, Tensor)
        return total.reshape([len(index) for _, index in factors])

    def paired(self, left: tuple[Orders, Orders], right: tuple[Orders, Orders], index: Tensor) -> Tensor:
        """Its part of <f_a g_b h_c k_d>, see ``SummedMoments.paired``."""
        shape = (len(index), index.shape[1], index.shape[1])
        total = index.new_zeros(math.prod(shape), math.prod(shape), dtype=torch.float64)
        for z, weight in self._weighted(_PAIRED_ROWS):
            first, second = (products_in_rows([self._product(z, one) for one in side], index) for side in (left, right))
            total += ((first * weight[:, None]).T @ second).double()
        return total.reshape(*shape, *shape)

    def _weighted(self, rows: int = _ROWS) -> Iterator[tuple[Tensor, Tensor]]:
        v, squares = (part.to(next(self._points.chunks(1))[0].dtype) for part in (self._v, self._squares))
        for z, given in self._points.chunks(rows):
            along = (z @ v).square()
            hermite = (along * (along - 6 * squares)).sum(1) + 3 * squares.square().sum()
            weight = hermite * (self._coefficient / 24)
            yield z, weight / self._points.count if given is None else weight * given

    def _columns(self, factors: Sequence[Factor], z: Tensor) -> list[Tensor]:
        known: dict[Orders, Tensor] = {}
        for orders, _ in factors:
            if orders not in known:
                known[orders] = self._product(z, orders)
        return [known[orders][:, index] for orders, index in factors]

    def _product(self, z: Tensor, orders: Orders) -> Tensor:
        return torch.stack([self._activation(z, order) for order in orders]).prod(0)
