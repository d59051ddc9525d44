"""The lazy evaluator of all 1/n statistics: every tensor is a function of layer and labels, computed when asked for.

A *letter* names an axis, a set of inputs; ``array("V", l, "aabb")`` is V_(aa)(bb) at layer l for all a and b. Every
recursion is elementwise in its letters, so arrays are broadcast arrays with one axis a letter, in the order
of ``sets``; letters that do not occur have length 1. What is asked for is reduced by the tensor's symmetries
and by exchanging letters of one set, computed once, and kept. The recursions themselves are in
``kernel``, ``ntk`` and ``differentials``: this file only knows labels, moments and memory.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.four_point_moments import FourPointMoments
from torch_eft.theory.gaussian.scale_invariant import Orders
from torch_eft.theory.gaussian.two_point_moments import Kinks, TwoPointMoments

Recursion = Callable[["Vertices", int, str], Tensor]

SYMMETRIES: dict[str, tuple[tuple[int, ...], ...]] = {
    # Permutations of the four printed slots that leave the tensor unchanged (generators).
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


def divergent(ensemble: MLPEnsemble, kinks: Kinks) -> tuple[str, ...]:
    """The vertices without a value: ddNTK statistics contain delta functions squared where sigma' jumps.

    For sigma smoothed on a scale 1/beta they grow linearly with beta: the expansion of the ddNTK does not exist.
    """
    activation = ensemble.activation
    if kinks == "autograd" or not activation.kinked or not any(activation.jump(1, kink) for kink in activation.kinks):
        return ()
    return ("R", "S", "T", "U")


class Vertices:
    """Statistics at order 1/n on sets of labels; every vertex at layer l multiplies 1/n_{l-1}.

    Args:
        ensemble: The ensemble.
        K: K^(1) .. K^(L) on all inputs, (N, N) each.
        Theta: Theta^(1) .. Theta^(L), likewise.
        pairs: Two-label moments at layers 1 .. L-1.
        moments: The moments with three and four labels at layers 1 .. L-1, made when first asked for.
        sets: ``{letter: index of inputs}``, the axes in their order; letters that share one tensor object
            stand for the same set.
        recursions: ``{name: recursion}``.
        kinks: What explicit derivatives are at a kink of sigma.
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        K: list[Tensor],
        Theta: list[Tensor],
        pairs: list[TwoPointMoments],
        moments: Callable[[int], FourPointMoments],
        sets: Mapping[str, Tensor],
        recursions: Mapping[str, Recursion],
        kinks: Kinks = "autograd",
    ) -> None:
        self.ensemble = ensemble
        self.sets = dict(sets)
        self.axes = {letter: axis for axis, letter in enumerate(sets)}
        activation = ensemble.activation
        # Whether explicit second derivatives, which multiply H's, are anything but zero almost everywhere.
        self.curved = activation.slopes is None or (activation.kinked and kinks == "distributional")
        self.divergent = divergent(ensemble, kinks)
        self._K, self._Theta, self._pairs = K, Theta, pairs
        self._moments_of, self._recursions = moments, recursions
        self._four: dict[int, FourPointMoments] = {}
        self._memo: dict[tuple[str, int, str], Tensor] = {}
        self._moments: dict[tuple, Tensor] = {}

    # ---- hyperparameters of the step from layer m to m + 1

    def C_W(self, m: int) -> float:
        """C_W of layer m + 1."""
        return self.ensemble.C_W[m]

    def lambda_W(self, m: int) -> float:
        """lambda_W of layer m + 1."""
        return self.ensemble.lambda_W[m]

    def width_ratio(self, m: int) -> float:
        """R = n_m / n_{m-1}, which turns 1/n_{m-1} of layer m into 1/n_m of layer m + 1."""
        return self.ensemble.widths[m] / self.ensemble.widths[m - 1]

    # ---- what recursions ask for

    def array(self, name: str, layer: int, letters: str) -> Tensor:
        """The vertex ``name`` at ``layer`` for the printed ``letters``; a broadcast array, one axis a letter."""
        if layer == 1:
            return self.zero()  # layer 1 is exactly Gaussian, its NTK is constant
        if name in self.divergent:
            return self.zero() + math.nan
        canonical, renaming = min(self._canonical(image) for image in self._images(name, letters))
        key = (name, layer, canonical)
        if key not in self._memo:
            self._memo[key] = self._recursions[name](self, layer, canonical)
        return self._renamed(self._memo[key], dict(renaming))

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

    def four(self, m: int, orders: tuple[int, int, int, int], letters: str) -> Tensor:
        """m_pquv(letters) = <sigma^(p) sigma^(q) sigma^(u) sigma^(v)> at layer m."""
        at_label: dict[str, Orders] = {}
        for order, letter in zip(orders, letters, strict=True):
            at_label[letter] = tuple(sorted((*at_label.get(letter, ()), order)))
        # Any permutation is the same moment: compute it once for each (set, orders).
        distinct = sorted(at_label, key=lambda letter: (self._set(letter), at_label[letter], letter))
        key = (m, *((self._set(letter), at_label[letter]) for letter in distinct))
        if key not in self._moments:
            self._moments[key] = self._moment(m, [(at_label[letter], self.sets[letter]) for letter in distinct])
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

    def _set(self, letter: str) -> int:
        """Letters of one set share a number."""
        return next(number for number, other in enumerate(self.sets) if self.sets[other] is self.sets[letter])

    def _placed(self, matrix: Tensor, a: str, b: str) -> Tensor:
        if a == b:
            return self._broadcast(matrix.diagonal()[self.sets[a]], [a])
        return self._broadcast(matrix[self.sets[a]][:, self.sets[b]], [a, b])

    def _broadcast(self, array: Tensor, letters: list[str]) -> Tensor:
        order = sorted(range(len(letters)), key=lambda index: self.axes[letters[index]])
        shape = [1] * len(self.axes)
        for index in order:
            shape[self.axes[letters[index]]] = array.shape[index]
        return array.permute(order).reshape(shape)

    def _images(self, name: str, letters: str) -> set[str]:
        """All letter strings that the symmetries of ``name`` make equal to ``letters``."""
        images, new = {letters}, [letters]
        while new:
            word = new.pop()
            for permutation in SYMMETRIES[name]:
                image = "".join(word[slot] for slot in permutation)
                if image not in images:
                    images.add(image)
                    new.append(image)
        return images

    def _canonical(self, letters: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        """Letters of each set renamed in the order of first appearance, and the renaming."""
        free: dict[int, list[str]] = {}
        for letter in self.sets:
            free.setdefault(self._set(letter), []).append(letter)
        renaming: dict[str, str] = {}
        for letter in letters:
            if letter not in renaming:
                renaming[letter] = free[self._set(letter)].pop(0)
        return "".join(renaming[letter] for letter in letters), tuple(renaming.items())

    def _renamed(self, array: Tensor, renaming: dict[str, str]) -> Tensor:
        """The array of canonical letters as one of the letters that were asked for."""
        rest = [letter for letter in self.sets if letter not in renaming.values()]
        unused = [letter for letter in self.sets if letter not in renaming]
        full = renaming | dict(zip(unused, rest, strict=True))
        return array.permute([self.axes[full[letter]] for letter in self.sets])
