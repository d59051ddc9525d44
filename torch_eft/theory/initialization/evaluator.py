"""The lazy evaluator of all 1/n statistics: every tensor is a function of layer and labels, computed when asked for.

A *label* is a letter that names an axis and runs over a set of inputs; ``array("V", l, "aabb")`` is V_(aa)(bb) at layer
l for all a and b. Every recursion is elementwise in its labels, so arrays are broadcast arrays with one axis per label,
in the order of ``label_sets``; labels that do not occur have length 1. What is asked for is reduced by the tensor's
symmetries and by exchanging labels of one set, computed once, and kept. The recursions themselves are in ``kernels``
and ``differentials``: this file knows labels, moments and memory only.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.four_point_moments import FourPointMoments
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.gaussian.scale_invariant import Orders
from torch_eft.theory.gaussian.two_point_moments import Kinks, TwoPointMoments
from torch_eft.theory.signal_propagation.preactivations import haar_share

Recursion = Callable[["Vertices", int, str], Tensor]

LabelSets = Mapping[str, Tensor]
"""``{label: index of inputs}``. Labels that share one tensor object run over one set, and what is symmetric between
them is computed once; equal but distinct tensors give the same values, computed label by label."""

SYMMETRIES: dict[str, tuple[tuple[int, ...], ...]] = {
    # Permutations of the printed slots that leave the tensor unchanged (generators).
    "V": ((1, 0, 2, 3), (2, 3, 0, 1)),
    "A": ((1, 0, 2, 3), (2, 3, 0, 1)),
    "D": ((1, 0, 2, 3), (0, 1, 3, 2)),
    "B": ((1, 0, 3, 2), (2, 3, 0, 1)),
    "F": ((2, 3, 0, 1),),
    "P": ((0, 2, 1, 3),),
    "Q": (),
    "R": ((0, 1, 3, 2),),
    "S": ((1, 0, 3, 2),),
    "T": ((2, 3, 0, 1),),
    "U": ((2, 3, 0, 1),),
    "G1": ((1, 0),),
    "Theta1": ((1, 0),),
}

FLUCTUATIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "X3a": ((0, 2, 1, 3, 5, 4), (3, 4, 5, 0, 1, 2)),
    "X3b": ((3, 4, 5, 0, 1, 2),),
    "XQQ": ((3, 4, 5, 0, 1, 2),),
    "XPQ": ((0, 2, 1, 3, 4, 5),),
    "XPP": ((0, 2, 1, 3, 4, 5), (0, 1, 2, 3, 5, 4), (3, 4, 5, 0, 1, 2)),
    "XUU": ((3, 4, 5, 0, 1, 2),),
    "XUQ": (),
    "XUP": ((0, 1, 2, 3, 5, 4),),
}
"""The same for the statistics with six labels, of order 1/n^2: the covariance of the dNTK."""

SINGLE_NEURON: dict[str, tuple[tuple[int, ...], ...]] = {
    "E_zzzz": ((1, 0, 2, 3), (1, 2, 3, 0)),
    "E_zzH": ((1, 0, 2, 3), (0, 1, 3, 2)),
    "E_HH": ((1, 0, 2, 3), (2, 3, 0, 1)),
    "E_dHz": ((0, 2, 1, 3),),
    "E_ddI": ((0, 2, 1, 3), (0, 1, 3, 2)),
    "E_ddII": ((1, 0, 3, 2),),
}
"""The same for what weights that are not Gaussian add where all four neurons are one."""

_ALL_SYMMETRIES = SYMMETRIES | FLUCTUATIONS | SINGLE_NEURON


class VertexSource(Protocol):
    """Anything that gives vertices for printed labels, as broadcast arrays with one axis per label."""

    def array(self, name: str, layer: int, labels: str) -> Tensor:
        """The vertex ``name`` at ``layer``."""
        ...


def printed_labels(name: str) -> str:
    """Labels for the slots of a statistic in its printed order: two, four or six."""
    return "ab" if name in ("G1", "Theta1") else "abcdef" if name in FLUCTUATIONS else "abcd"


def full_tensor(source: VertexSource, name: str, layer: int, count: int) -> Tensor:
    """A statistic on all inputs, from a source whose labels a, b, .. run over all of them; (count,) * 2, 4 or 6."""
    labels = printed_labels(name)
    array = source.array(name, layer, labels)
    return array.reshape(array.shape[: len(labels)]).expand([count] * len(labels))


def divergent(ensemble: MLPEnsemble, kinks: Kinks) -> tuple[str, ...]:
    """Names of the vertices without a value: ddNTK statistics contain squared delta functions where sigma' jumps.

    For sigma smoothed on a scale 1/beta they grow linearly with beta: the expansion of the ddNTK does not exist.

    Returns:
        The names, none for ``kinks="autograd"``.
    """
    activation = ensemble.activation
    if kinks == "autograd" or not activation.kinked or not any(activation.jump(1, kink) for kink in activation.kinks):
        return ()
    return ("R", "S", "T", "U")


class Vertices:
    """Statistics on sets of labels; every vertex at layer l multiplies 1/n_{l-1}, those with six labels its square.

    Args:
        ensemble: The ensemble.
        K: K^(1) .. K^(L) on all inputs, (N, N) each.
        Theta: Theta^(1) .. Theta^(L), likewise.
        pairs: Two-label moments at layers 1 .. L-1.
        moments: The moments with three to six labels at layers 1 .. L-1, made when first asked for.
        label_sets: The inputs that each label runs over; the axes in their order.
        recursions: ``{name: recursion}``.
        kinks: The meaning of explicit derivatives at a kink of sigma.
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        K: list[Tensor],
        Theta: list[Tensor],
        pairs: list[TwoPointMoments],
        moments: Callable[[int], FourPointMoments],
        label_sets: LabelSets,
        recursions: Mapping[str, Recursion],
        kinks: Kinks = "autograd",
    ) -> None:
        self.ensemble = ensemble
        self.label_sets = dict(label_sets)
        self.axes = {label: axis for axis, label in enumerate(label_sets)}
        numbers: dict[int, int] = {}  # of the sets: labels of one tensor object share one
        self._set = {label: numbers.setdefault(id(index), self.axes[label]) for label, index in label_sets.items()}
        activation = ensemble.activation
        # False where explicit second derivatives, which multiply H's, are zero almost everywhere.
        self.curved = activation.slopes is None or (activation.kinked and kinks == "distributional")
        self.divergent = divergent(ensemble, kinks)
        self._K, self._Theta, self._pairs = K, Theta, pairs
        self._moments_of, self._recursions = moments, recursions
        self._four: dict[int, FourPointMoments] = {}
        self._memo: dict[tuple[str, int, str], Tensor] = {}
        self._moments: dict[tuple, Tensor] = {}
        self._reductions: dict[tuple[str, str], tuple[str, list[int]]] = {}

    # ---- hyperparameters of the step from layer m to m + 1

    def C_W(self, m: int) -> float:
        """C_W of layer m + 1."""
        return self.ensemble.C_W[m]

    def lambda_W(self, m: int) -> float:
        """lambda_W of layer m + 1."""
        return self.ensemble.lambda_W[m]

    def excess_kurtosis(self, m: int) -> float:
        """<w^4> / <w^2>^2 - 3 of one weight of layer m + 1; 0 for Gaussian and for orthogonal ones."""
        return EXCESS_KURTOSIS[self.ensemble.weight_law[m]]

    def haar_share(self, m: int) -> float:
        """Zeta of layer m + 1: n_in / max(n_in, n_out) of orthogonal weights, 0 of independent ones."""
        return haar_share(self.ensemble, m + 1)

    def width_ratio(self, m: int) -> float:
        """R = n_m / n_{m-1}, which turns 1/n_{m-1} of layer m into 1/n_m of layer m + 1."""
        return self.ensemble.widths[m] / self.ensemble.widths[m - 1]

    # ---- read by the recursions

    def array(self, name: str, layer: int, labels: str) -> Tensor:
        """The vertex ``name`` at ``layer`` for the printed ``labels``; a broadcast array, one axis per label."""
        if layer == 1:  # the law of one neuron is known as a whole there, and its NTK is constant
            return self._first_V(labels) if name == "V" and self.haar_share(0) else self.zero()
        if name in self.divergent:
            return self.zero() + math.nan
        if (name, labels) not in self._reductions:
            self._reductions[name, labels] = self._reduced(name, labels)
        canonical, axes = self._reductions[name, labels]
        key = (name, layer, canonical)
        if key not in self._memo:
            self._memo[key] = self._recursions[name](self, layer, canonical)
        return self._memo[key].permute(axes)

    def _first_V(self, labels: str) -> Tensor:
        """V of the first layer: neurons of orthogonal weights are Gaussian, but not independent."""
        a, b, c, d = labels
        K, C_b = self._K[0], self.ensemble.C_b[0]
        pairs = [self._placed(K - C_b, i, j) for i, j in ((a, c), (b, d), (a, d), (b, c))]
        return -self.haar_share(0) * (pairs[0] * pairs[1] + pairs[2] * pairs[3])

    def zero(self) -> Tensor:
        """Zero, as a broadcast array."""
        return self._K[0].new_zeros([1] * len(self.axes))

    def Theta(self, m: int, a: str, b: str) -> Tensor:
        """Theta^(m)_ab."""
        return self._placed(self._Theta[m - 1], a, b)

    def K(self, m: int, a: str, b: str) -> Tensor:
        """K^(m)_ab."""
        return self._placed(self._K[m - 1], a, b)

    def M(self, m: int, p: int, q: int, a: str, b: str) -> Tensor:
        """M_pq(ab) at layer m, derivatives as the network's own Taylor coefficients have them."""
        return self._placed(self._pairs[m - 1].explicit((p,), (q,)), a, b)

    def response(self, m: int, p: int, q: int, i: int, j: int, a: str, b: str) -> Tensor:
        """<d_a^i d_b^j sigma^(p)_a sigma^(q)_b> at layer m: M_{p+i, q+j} unless sigma has a kink."""
        return self._placed(self._pairs[m - 1].response(p, q, i, j), a, b)

    def moment(self, m: int, orders: tuple[int, ...], labels: str) -> Tensor:
        """<prod sigma^(p)> at layer m, e.g. m_pquv = <sigma^(p) sigma^(q) sigma^(u) sigma^(v)>; up to six labels."""
        slopes = self.ensemble.activation.slopes
        if slopes is not None and slopes[0] == slopes[1]:  # sigma' is a number
            if max(orders, default=0) >= 2:
                return self.zero()
            if 1 in orders:
                rest = "".join(label for label, order in zip(labels, orders, strict=True) if order == 0)
                return slopes[0] ** orders.count(1) * self.moment(m, (0,) * len(rest), rest)
            if not orders:
                return self.zero() + 1.0
        at_label: dict[str, Orders] = {}
        for order, label in zip(orders, labels, strict=True):
            at_label[label] = tuple(sorted((*at_label.get(label, ()), order)))
        # Any permutation is the same moment: compute it once for each (set, orders).
        distinct = sorted(at_label, key=lambda label: (self._set[label], at_label[label], label))
        key = (m, *((self._set[label], at_label[label]) for label in distinct))
        if key not in self._moments:
            self._moments[key] = self._moment(m, [(at_label[label], self.label_sets[label]) for label in distinct])
        return self._broadcast(self._moments[key], distinct)

    def _moment(self, m: int, factors: list[tuple[Orders, Tensor]]) -> Tensor:
        pairs = self._pairs[m - 1]
        if len(factors) == 1:
            orders, index = factors[0]
            return pairs.single(orders)[index]
        if len(factors) == 2:
            (first, rows), (second, columns) = factors
            return pairs.explicit(first, second)[rows][:, columns]
        if m not in self._four:
            self._four[m] = self._moments_of(m)
        return self._four[m].moment(factors)

    # ---- labels

    def _placed(self, matrix: Tensor, a: str, b: str) -> Tensor:
        if a == b:
            return self._broadcast(matrix.diagonal()[self.label_sets[a]], [a])
        return self._broadcast(matrix[self.label_sets[a]][:, self.label_sets[b]], [a, b])

    def _broadcast(self, array: Tensor, labels: list[str]) -> Tensor:
        order = sorted(range(len(labels)), key=lambda index: self.axes[labels[index]])
        shape = [1] * len(self.axes)
        for index in order:
            shape[self.axes[labels[index]]] = array.shape[index]
        return array.permute(order).reshape(shape)

    def _reduced(self, name: str, labels: str) -> tuple[str, list[int]]:
        """The canonical labels of the same tensor, and the axes of its array in the order of the labels asked for."""
        canonical, renaming = min(self._canonical(image) for image in images(name, labels))
        renamed = dict(renaming)
        rest = [label for label in self.axes if label not in renamed.values()]
        unused = [label for label in self.axes if label not in renamed]
        renamed |= dict(zip(unused, rest, strict=True))
        return canonical, [self.axes[renamed[label]] for label in self.axes]

    def _canonical(self, labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Labels of each set renamed in the order of first appearance, and the renaming."""
        free: dict[int, list[str]] = {}
        for label, number in self._set.items():
            free.setdefault(number, []).append(label)
        renaming: dict[str, str] = {}
        for label in labels:
            if label not in renaming:
                renaming[label] = free[self._set[label]].pop(0)
        return "".join(renaming[label] for label in labels), tuple(renaming.items())


@lru_cache(maxsize=4096)
def images(name: str, labels: str) -> frozenset[str]:
    """All label strings that the symmetries of ``name`` make equal to ``labels``."""
    known, new = {labels}, [labels]
    while new:
        word = new.pop()
        for permutation in _ALL_SYMMETRIES[name]:
            image = "".join(word[slot] for slot in permutation)
            if image not in known:
                known.add(image)
                new.append(image)
    return frozenset(known)
