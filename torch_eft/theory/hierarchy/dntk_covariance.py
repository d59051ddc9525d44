"""What the laws take at every label: the vertices, and the covariances of the dNTK and of hidden layers.

Labels x and y run over probe points, g and d over training points. Of the 15 pairings of the six neurons of two dNTKs
each has its tensor (``PAIRINGS``); with outputs summed over, a pairing comes with a factor n_L for every loop that it
makes with the outputs that are equal.
"""

import itertools
from collections.abc import Iterator

from torch import Tensor

from torch_eft.theory.hidden_layers.statistics import HiddenStatistics, Observable
from torch_eft.theory.initialization.evaluator import Vertices
from torch_eft.theory.initialization.vertex_tiles import single_neuron_part

Pairing = tuple[tuple[int, int], ...]
Key = tuple[str, int, str]
"""Observable (``"output"``, ``"diagonal"``, ``"activations"``, ``"ntk"``), layer, tensor."""

PAIRINGS: dict[Pairing, tuple[str, str]] = {
    ((0, 3), (1, 4), (2, 5)): ("X3a", "012345"),
    ((0, 3), (1, 5), (2, 4)): ("X3a", "012354"),
    ((0, 4), (1, 3), (2, 5)): ("X3b", "012345"),
    ((0, 5), (1, 3), (2, 4)): ("X3b", "012354"),
    ((0, 4), (1, 5), (2, 3)): ("X3b", "021345"),
    ((0, 5), (1, 4), (2, 3)): ("X3b", "021354"),
    ((0, 1), (3, 4), (2, 5)): ("XQQ", "012345"),
    ((0, 1), (3, 5), (2, 4)): ("XQQ", "012354"),
    ((0, 2), (3, 4), (1, 5)): ("XQQ", "021345"),
    ((0, 2), (3, 5), (1, 4)): ("XQQ", "021354"),
    ((1, 2), (4, 5), (0, 3)): ("XPP", "012345"),
    ((1, 2), (3, 4), (0, 5)): ("XPQ", "012345"),
    ((1, 2), (3, 5), (0, 4)): ("XPQ", "012354"),
    ((0, 1), (4, 5), (2, 3)): ("XPQ", "345012"),
    ((0, 2), (4, 5), (1, 3)): ("XPQ", "345021"),
}
"""The tensor of each pairing and the order in which it takes the labels."""

TRACES: Pairing = ((0, 1), (3, 4), (2, 5))
"""Equal outputs where both NTKs are averaged over outputs."""
_STRAIGHT: Pairing = ((0, 3), (1, 4), (2, 5))
_CROSSED: Pairing = ((0, 4), (1, 3), (2, 5))


def dntk_covariance(v: Vertices, layer: int, word: str, equal: Pairing, outputs: int) -> Tensor:
    """n^2 Cov(dH_{i0 i1 i2;012}, dH_{i3 i4 i5;345}) summed over outputs of which some are equal, for one i2 = i5.

    Args:
        v: The evaluator.
        layer: l.
        word: Six labels.
        equal: Slots whose outputs are equal.
        outputs: n_l.

    Returns:
        A broadcast array.
    """
    total = v.zero()
    for pairing, (name, order) in PAIRINGS.items():
        labels = "".join(word[int(slot)] for slot in order)
        total = total + float(outputs) ** (_loops(pairing + equal) - 1) * v.array(name, layer, labels)
    return total


def _loops(links: Pairing) -> int:
    """Connected parts of the six slots."""
    part = list(range(6))
    for first, second in links:
        part = [part[first] if at == part[second] else at for at in part]
    return len(set(part))


class _HiddenCovariance:
    """Covariance of the derivatives of a hidden layer's kernel or NTK along the outputs' gradients.

    chi_c = D dg_ab . J_c, D the width that divides the observable: Cov(chi_{ab;c}, chi_{ab;d}), starting as Xi does
    and carried from layer to layer by W averaged over the layer above.

    Args:
        statistics: Xi of the same observable.
        v: The evaluator.
        observable: ``"activations"`` or ``"ntk"``.
    """

    def __init__(self, statistics: HiddenStatistics, v: Vertices, observable: Observable) -> None:
        self._statistics, self._v, self._observable = statistics, v, observable
        self._memo: dict[tuple[int, int, str], Tensor] = {}

    def array(self, layer: int, m: int, word: str) -> Tensor:
        """The covariance of hidden layer l with outputs at layer m, labels a, b, c and a', b', d."""
        key = (layer, m, word)
        if key not in self._memo:
            self._memo[key] = self._start(m, word) if m == self._first(layer) else self._step(layer, m - 1, word)
        return self._memo[key]

    def _first(self, layer: int) -> int:
        return layer if self._observable == "ntk" else layer + 1

    def _start(self, m: int, word: str) -> Tensor:
        a, b, c, a2, b2, d = word
        ntk = self._observable == "ntk"
        total = self._v.zero()
        for first in (a + b, b + a):
            for second in (a2 + b2, b2 + a2):
                total = total + self._v.array("XQQ" if ntk else "XUU", m, first + c + second + d)
        return total if ntk else total / self._v.C_W(m - 1) ** 2

    def _step(self, layer: int, m: int, word: str) -> Tensor:
        v = self._v
        a, b, c, a2, b2, d = word

        def one(label: str) -> Tensor:
            return self._statistics.array("Xi", layer, m, a + b + c + label)

        def other(label: str) -> Tensor:
            return self._statistics.array("Xi", layer, m, a2 + b2 + d + label)

        total = v.M(m, 1, 1, c, d) * self.array(layer, m, word)
        total = total + v.response(m, 1, 1, 2, 0, c, d) * one(c) * other(c)
        total = total + v.response(m, 1, 1, 0, 2, c, d) * one(d) * other(d)
        total = total + v.response(m, 1, 1, 1, 1, c, d) * (one(c) * other(d) + one(d) * other(c))
        return v.C_W(m) * total


def read_forms(v: Vertices, word: str, outputs: int, hidden_ntk: bool) -> Iterator[tuple[Key, Tensor]]:
    """Everything that the laws take, on the labels x, y, c, d of ``word``, as broadcast arrays."""
    x, y, c, d = word
    depth = v.ensemble.depth

    def at(name: str, labels: str) -> Tensor:
        value = v.array(name, depth, labels)
        # Of one output all pairings are equal: what its weights add if they are not Gaussian is a part of P, R and S.
        return value + single_neuron_part(v, name, depth, labels) if outputs == 1 else value

    parts = {
        "alpha": at("P", word) + at("Q", y + c + x + d),
        "beta": at("P", y + x + c + d) + at("Q", x + c + y + d),
        "gamma": at("Q", word) + at("Q", y + x + c + d),
        "Cpp": at("R", word) / 2 + at("R", y + x + c + d) / 2 + at("S", word),
        "Cqq": at("T", word) + at("T", y + x + c + d),
        "Cij": at("R", x + c + y + d) + at("R", y + d + x + c) + at("T", x + c + y + d) + at("U", x + c + y + d),
        "Sij": at("S", x + c + y + d) + at("U", y + d + c + x),
        "Sji": at("U", x + d + c + y) + at("S", y + c + x + d),
    }
    straight, turned = x + y, y + x
    ways = [(first, second) for first in (straight, turned) for second in (straight, turned)]

    def summed(equal: Pairing, first: str, second: str) -> Tensor:
        return dntk_covariance(v, depth, first + c + second + d, equal, outputs)

    parts["X"] = sum((summed(TRACES, *way) for way in ways), v.zero())
    parts["X_full"] = sum(
        (summed(_STRAIGHT if first == second else _CROSSED, first, second) for first, second in ways), v.zero()
    )
    for name, value in parts.items():
        yield ("output", depth, name), value
    yield ("diagonal", depth, "X"), 4 * summed(TRACES, x + x, y + y)
    for observable in _observables(hidden_ntk):
        statistics = HiddenStatistics(v, observable)
        covariance = _HiddenCovariance(statistics, v, observable)
        for layer in range(2 if observable == "ntk" else 1, depth):
            for name in ("Xi", "Y", "C"):
                yield (observable, layer, name), statistics.array(name, layer, depth, word)
            yield (observable, layer, "X"), covariance.array(layer, depth, x + y + c + x + y + d)


def read_joint(v: Vertices, outputs: int, hidden_ntk: bool) -> Iterator[tuple[Key, Tensor]]:
    """Covariances of the eta of two probe pairs, labels x, y and p, q, with training labels g and d."""
    depth = v.ensemble.depth
    ways = itertools.product(("xyg", "yxg"), ("pqd", "qpd"))
    values = (dntk_covariance(v, depth, first + second, TRACES, outputs) for first, second in ways)
    yield ("output", depth, "X"), sum(values, v.zero())
    for observable in _observables(hidden_ntk):
        covariance = _HiddenCovariance(HiddenStatistics(v, observable), v, observable)
        for layer in range(2 if observable == "ntk" else 1, depth):
            yield (observable, layer, "X"), covariance.array(layer, depth, "xygpqd")


def _observables(hidden_ntk: bool) -> tuple[Observable, ...]:
    return ("activations", "ntk") if hidden_ntk else ("activations",)
