"""Vertices of chains with a flattened read-out: the two labels of a Kronecker delta are always at one position.

A flattened read-out ties both labels of a delta to one position, and a convolution takes labels at one position from
labels at one position: the tensors close on N^4 P^2 numbers, [p, q, ..] with p the position of the first pair of
printed slots (``pairs_of``) and q that of the second, in the place of (N P)^4. Their sources hold kernels between p and
q: K and Theta are kept at all labels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torch_eft.theory.architecture.chains.chain import Chain, pairs_of
from torch_eft.theory.gaussian.four_point_moments import FourPointMoments, SummedMoments
from torch_eft.theory.gaussian.scale_invariant import Orders, ScaleInvariantMoments
from torch_eft.theory.gaussian.two_point_moments import Kinks, TwoPointMoments
from torch_eft.theory.initialization.estimators import RECURSIONS
from torch_eft.theory.initialization.evaluator import SINGLE_NEURON, Vertices
from torch_eft.theory.initialization.neuron.moments import MixedMoments
from torch_eft.theory.initialization.neuron.pairs import as_gaussian


class PairedStep(Vertices):
    """The step from layer m to m + 1, as ``vertices.WholeStep``.

    Args:
        chain: The chain.
        layers: Its kernels.
        moments: Of each layer.
        before: The step before it; None for the first.
        kinks: The meaning of explicit derivatives at a kink.
    """

    def __init__(
        self,
        chain: Chain,
        layers: tuple[list[Tensor], list[Tensor], list[TwoPointMoments]],
        moments: Callable[[int], FourPointMoments],
        before: "PairedStep | None",
        kinks: Kinks,
    ) -> None:
        self._m: int = 1 if before is None else before._m + 1
        K, Theta, pairs = layers
        self._samples, self._positions = chain.samples, chain.labels(self._m) // chain.samples
        samples, positions = (torch.arange(size, device=K[0].device) for size in (self._samples, self._positions))
        sets = dict.fromkeys("pq", positions) | dict.fromkeys("abcd", samples)
        gaussian = [as_gaussian(pair) for pair in pairs]
        super().__init__(chain.ensemble, K, Theta, gaussian, moments, sets, RECURSIONS, kinks)
        self._chain, self._before = chain, before
        self._at: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """The vertex behind the layer, [p, q, slots as printed], of two labels [p, a, b]."""
        if name not in self._tensors:
            whole, layer = len(pairs_of(name)) == 2, self._chain.layers[self._m]
            labels = "abcd" if whole else "ab"
            self._at = {labels[slot]: at for pair, at in zip(pairs_of(name), "pq", strict=False) for slot in pair}
            array = self._recursions[name](self, self._m + 1, labels).double()
            N, P = self._samples, self._positions
            value = array.expand([P, P, N, N, N, N]) if whole else array.expand([P, 1, N, N, 1, 1])[:, 0, :, :, 0, 0]
            maps = layer.matrices.to(value)
            if name in SINGLE_NEURON:
                value = torch.einsum("kxp,kyq,pqabcd->xyabcd", maps, maps, value) / layer.count**2
            elif whole:
                mean = maps.mean(0)
                value = torch.einsum("xp,yq,pqabcd->xyabcd", mean, mean, value)
            else:
                value = torch.einsum("xp,pab->xab", maps.mean(0), value)
            self._tensors[name] = value
        return self._tensors[name]

    def array(self, name: str, layer: int, labels: str) -> Tensor:
        """The vertex ``name`` at layer m for the printed ``labels``, each at its position."""
        if self._before is None:
            return self.zero()
        places = "".join(self._at[labels[first]] for first, _ in pairs_of(name))
        letters = sorted({*places, *labels})
        value = torch.einsum(f"{places}{labels}->{''.join(letters)}", self._before.tensor(name))
        return self._broadcast(value, letters)

    def moment(self, m: int, orders: tuple[int, ...], labels: str) -> Tensor:
        """<prod sigma^(p)> at layer m of four labels, two at a position."""
        slopes = self.ensemble.activation.slopes
        if slopes is not None and slopes[0] == slopes[1]:  # sigma' is a number
            if max(orders) >= 2:
                return self.zero()
            rest = [label for label, order in zip(labels, orders, strict=True) if order == 0]
            factor = slopes[0] ** orders.count(1)
            if not rest:
                return self.zero() + factor
            if len(rest) == 2:
                return factor * self.M(m, 0, 0, *rest)
        groups: dict[str, list[str]] = {"p": [], "q": []}
        for label in labels:
            groups[self._at[label]].append(label)
        order_of = dict(zip(labels, orders, strict=True))
        left, right = groups["p"], groups["q"]
        key = (m, tuple(left), tuple(right), orders, labels)
        if key not in self._moments:
            pair_orders = [((order_of[one],), (order_of[other],)) for one, other in (left, right)]
            self._moments[key] = self._paired(m, *pair_orders)
        return self._broadcast(self._moments[key], ["p", *left, "q", *right])

    def _paired(self, m: int, left: tuple[Orders, Orders], right: tuple[Orders, Orders]) -> Tensor:
        """(P, N, N, P, N, N)."""
        if m not in self._four:
            self._four[m] = self._moments_of(m)
        moments, N, P = self._four[m], self._samples, self._positions
        index = torch.arange(N * P, device=self._K[0].device).reshape(N, P).T
        if isinstance(moments, ScaleInvariantMoments | SummedMoments | MixedMoments) and moments.pairable:
            return moments.paired(left, right, index)
        value = self._K[0].new_empty(P, N, N, P, N, N)
        for p in range(P):
            for q in range(P):
                factors = [*((order, index[p]) for order in left), *((order, index[q]) for order in right)]
                value[p, :, :, q] = moments.moment(factors)
        return value

    def _placed(self, matrix: Tensor, a: str, b: str) -> Tensor:
        blocks = matrix.reshape(self._samples, self._positions, self._samples, self._positions)
        first, second = self._at[a], self._at[b]
        if a == b:
            return self._broadcast(matrix.diagonal().reshape(blocks.shape[:2]), [a, first])
        if first == second:
            return self._broadcast(blocks.diagonal(dim1=1, dim2=3), [a, b, first])
        return self._broadcast(blocks, [a, first, b, second])
