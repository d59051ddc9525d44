"""The quadratic forms of the drift of the NTK and of hidden layers, out of the vertices and the dNTK's covariance.

Labels x and y run over probe points, g and d over training points. Of the 15 pairings of the six neurons of two dNTKs
each has its tensor (``PAIRINGS``); with outputs summed over, a pairing comes with a factor n_L for every loop that it
makes with the outputs that are equal.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.gaussian.points import MOST_QUADRATURE_LABELS
from torch_eft.theory.hidden_layers.statistics import HiddenStatistics, Observable, dividing_width
from torch_eft.theory.hierarchy.drift.law import DriftForms, FullKernelForms
from torch_eft.theory.initialization.evaluator import LabelSets, Vertices
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.training.infinite_width import FrozenModes

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

_ARRAYS = 1400
"""Single-precision arrays over x, y, g, d that are alive at once, about, in three layers."""


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
        return v.array(name, depth, labels)

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


@dataclass(frozen=True)
class AllForms:
    """The forms of everything that is forecast, those of probe pairs in the order of ``triu_indices``.

    Args:
        ntk: Of the NTK averaged over outputs.
        full: Of all pairs of outputs.
        diagonal: Of the mean of the diagonal over probe points: one form.
        hidden: Of the kernels of hidden layers.
        hidden_ntk: Of their NTKs.
    """

    ntk: DriftForms
    full: FullKernelForms
    diagonal: DriftForms
    hidden: dict[int, DriftForms]
    hidden_ntk: dict[int, DriftForms]


class FormReader:
    """Reads the forms of one training, tile by tile.

    Args:
        vertices: The vertices over all points.
        path: The modes of the frozen NTK.
        hidden_ntk: True for the NTKs of hidden layers.
        memory: Bytes allowed for arrays over x, y, g, d.
    """

    def __init__(self, vertices: VertexTiles, path: FrozenModes, hidden_ntk: bool, memory: int) -> None:
        self._vertices, self._path, self._hidden_ntk = vertices, path, hidden_ntk
        self._few = len(path.K) <= MOST_QUADRATURE_LABELS and not vertices.sampled
        self._entries = entries = max(1, memory // (4 * _ARRAYS))
        self._tile = min(256, max(1, math.isqrt(entries)))  # training labels on each side
        self._rows = max(1, math.isqrt(entries // min(self._tile, len(path.train)) ** 2))

    def replicas(self) -> list[AllForms]:
        """The forms, once for every independent sample; once where nothing is sampled."""
        path, probes = self._path, self._path.probes
        blocks = torch.arange(probes, device=path.K.device)
        pieces = [blocks] if self._rows >= probes else list(blocks.split(self._rows))
        totals: list[dict[Key, Tensor]] = []
        for i, first in enumerate(pieces):
            for second in pieces[i:]:
                for run, found in enumerate(self._rotated(first, second)):
                    if run == len(totals):
                        totals.append({})
                    self._put(totals[run], first, second, found)
        return [self._assembled(total) for total in totals]

    def joint(self, probe: Tensor) -> dict[Key, Tensor]:
        """Covariances of the eta of all pairs of some probe points, (pairs, pairs, modes, modes) for each observable.

        Args:
            probe: Their numbers, ascending; pairs are in the order of ``AllForms``.

        Returns:
            By observable and layer.
        """
        path, probes, U = self._path, len(probe), self._path.U
        points = torch.arange(len(path.K), device=path.K.device)
        rows, columns = torch.triu_indices(probes, probes, device=path.K.device)
        train, own = path.train, torch.arange(probes, device=path.K.device)
        size = max(1, math.isqrt(self._entries // (probes**2 * len(train) ** 2)))
        blocks = [own] if size >= probes else list(own.split(size))
        total: dict[Key, Tensor] = {}
        for i, first in enumerate(blocks):
            for second in blocks[i:]:
                wanted = {"x": probe[first], "y": probe[second], "p": probe, "q": probe, "g": train, "d": train}
                sets: LabelSets = dict.fromkeys(wanted, points) if self._few else wanted
                here = torch.isin(rows, first) & torch.isin(columns, second)
                one, other = rows[here] - first[0], columns[here] - second[0]
                for runs, v in enumerate(self._vertices.evaluators(sets), 1):
                    for key, array in read_joint(v, path.outputs, self._hidden_ntk):
                        block = array.expand([len(index) for index in sets.values()])
                        if self._few:
                            block = block[torch.meshgrid(*wanted.values(), indexing="ij")]
                        value = U.T @ block[one, other][:, rows, columns].double() @ U
                        if key not in total:
                            total[key] = value.new_zeros(len(rows), *value.shape[1:])
                        target = total[key]
                        target[here] += (value - target[here]) / runs
        return {key: (value + value.permute(1, 0, 3, 2)) / 2 for key, value in total.items()}  # up to sampling

    def _put(self, total: dict[Key, Tensor], first: Tensor, second: Tensor, found: dict[Key, Tensor]) -> None:
        """Put a block of probe pairs; every drift is symmetric in x and y."""
        probes, modes = self._path.probes, len(self._path.eigenvalues)
        for key, value in found.items():
            if key[0] == "diagonal":
                both = value.sum((0, 1))
                total[key] = total.get(key, 0.0) + (both if first is second else both + both.mT)
                continue
            if key not in total:
                total[key] = value.new_zeros(probes, probes, modes, modes)
            total[key][first[:, None], second[None, :]] = value

    def _rotated(self, first: Tensor, second: Tensor) -> Iterator[dict[Key, Tensor]]:
        """All tensors of one tile of probe pairs, training labels rotated to modes, run by run."""
        path, train, tile = self._path, self._path.train, self._tile
        pieces = [train] if tile >= len(train) else list(train.split(tile))
        totals: list[dict[Key, Tensor]] = []
        for g, rows in enumerate(pieces):
            for d in range(g, len(pieces)):
                columns = pieces[d]
                at, to = slice(g * tile, g * tile + len(rows)), slice(d * tile, d * tile + len(columns))
                sets, cut = self._sets(first, second, rows, columns)
                for run, v in enumerate(self._vertices.evaluators(sets)):
                    if run == len(totals):
                        totals.append({})
                    sizes = [len(index) for index in sets.values()]
                    for turned in (False, True) if d > g else (False,):
                        word = "xydg" if turned else "xygd"
                        for key, array in read_forms(v, word, path.outputs, self._hidden_ntk):
                            value = cut(array.expand(sizes))
                            if key not in totals[run]:
                                shape = (len(first), len(second), len(train), len(train))
                                totals[run][key] = value.new_zeros(shape)
                            if turned:
                                totals[run][key][:, :, to, at] = value.mT
                            else:
                                totals[run][key][:, :, at, to] = value
        U = path.U
        while totals:
            total = totals.pop(0)
            for key in total:
                total[key] = U.T.to(total[key]) @ total[key] @ U.to(total[key])
            yield total

    def _sets(
        self, first: Tensor, second: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[LabelSets, Callable[[Tensor], Tensor]]:
        """Label sets, and what cuts the block out of an array over them: a few points are integrated all together."""
        if not self._few:
            return {"x": first, "y": second, "g": rows, "d": columns}, lambda array: array
        everything = torch.arange(len(self._path.K), device=self._path.K.device)
        index = torch.meshgrid(first, second, rows, columns, indexing="ij")
        return dict.fromkeys("xygd", everything), lambda array: array[index]

    def _assembled(self, total: dict[Key, Tensor]) -> AllForms:
        ensemble, path = self._vertices.ensemble, self._path
        rows, columns = torch.triu_indices(path.probes, path.probes, device=path.K.device)
        depth, n, n_L = ensemble.depth, ensemble.widths[-2], path.outputs

        def pairs(key: Key) -> Tensor:
            return total[key][rows, columns].double()

        output = {name: pairs(("output", depth, name)) for observable, _, name in total if observable == "output"}
        C = output["alpha"] + output["beta"] + n_L * output["gamma"]
        A = n_L * output["Cpp"] + output["Cij"]
        B = n_L * output["Cqq"] + output["Sij"] + output["Sji"]
        X, X_full = output.pop("X"), output.pop("X_full")
        same = rows == columns
        C_diagonal, A_diagonal, B_diagonal = (part[same].mean(0, keepdim=True) for part in (C, A, B))
        X_diagonal = total["diagonal", depth, "X"].double()[None] / path.probes**2
        scale = 1.0 / (n * n_L)

        def hidden(observable: Observable, layer: int) -> DriftForms:
            Xi, Y, curve, Om = (pairs((observable, layer, name)) for name in ("Xi", "Y", "C", "X"))
            return DriftForms(1.0 / dividing_width(ensemble, layer, observable), Xi, curve / 2, Y, Om)

        layers: dict[str, dict[int, DriftForms]] = {"activations": {}, "ntk": {}}
        for observable in ("activations", "ntk"):
            for layer in sorted({key[1] for key in total if key[0] == observable}):
                layers[observable][layer] = hidden(observable, layer)
        return AllForms(
            DriftForms(scale, C, A, B, X),
            FullKernelForms(1.0 / n, **output, X=X_full),
            DriftForms(scale, C_diagonal, A_diagonal, B_diagonal, X_diagonal),
            layers["activations"],
            layers["ntk"],
        )


def mean_forms(replicas: list[AllForms]) -> AllForms:
    """The mean over independent samples."""
    if len(replicas) == 1:
        return replicas[0]

    def mean(parts: list) -> object:
        first = parts[0]
        if isinstance(first, Tensor):
            return torch.stack(parts).mean(0)
        if isinstance(first, dict):
            return {key: mean([part[key] for part in parts]) for key in first}
        if isinstance(first, float):
            return first
        return type(first)(**{name: mean([getattr(part, name) for part in parts]) for name in vars(first)})

    combined = mean(list(replicas))
    assert isinstance(combined, AllForms)
    return combined
