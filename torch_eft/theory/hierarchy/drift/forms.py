"""The quadratic forms of the drift of the NTK and of hidden layers, read tile by tile and rotated to modes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_eft.theory.gaussian.points import MOST_QUADRATURE_LABELS
from torch_eft.theory.hidden_layers.statistics import Observable, dividing_width
from torch_eft.theory.hierarchy.dntk_covariance import Key, read_forms, read_joint
from torch_eft.theory.hierarchy.drift.law import DriftForms, FullKernelForms
from torch_eft.theory.initialization.evaluator import LabelSets
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.training.infinite_width import FrozenModes

_ARRAYS = 1400
"""Single-precision arrays over x, y, g, d that are alive at once, about, in three layers."""


@dataclass(frozen=True)
class AllForms:
    """The forms of everything that is forecast, those of probe pairs in the order of ``triu_indices``.

    Args:
        ntk: Of the NTK averaged over outputs.
        full: Of all pairs of outputs.
        diagonal: Of the mean of the diagonal over probe points, or the share in it of some pairs: one form.
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
        """The forms of all pairs, once for every independent sample; once where nothing is sampled."""
        blocks = list(self.blocks())
        places = torch.cat([place for place, _ in blocks]).argsort()
        return [_joined([runs[i] for _, runs in blocks], places) for i in range(len(blocks[0][1]))]

    def blocks(self, pairs: int | None = None) -> Iterator[tuple[Tensor, list[AllForms]]]:
        """The forms of some pairs at a time, each with its share of the mean of the diagonal.

        Args:
            pairs: At most so many, where they are more than one; None: as many as fit into a tile.

        Yields:
            Places of the pairs among all, and their forms, once for every independent sample.
        """
        probes, device = self._path.probes, self._path.K.device
        size = self._rows if pairs is None else max(1, min(self._rows, math.isqrt(pairs)))
        pieces = torch.arange(probes, device=device).split(min(size, probes))
        number = torch.zeros(probes, probes, dtype=torch.long, device=device)
        rows, columns = torch.triu_indices(probes, probes, device=device)
        number[rows, columns] = torch.arange(len(rows), device=device)
        for i, first in enumerate(pieces):
            for second in pieces[i:]:
                x, y = torch.meshgrid(first, second, indexing="ij")
                here = (x <= y).nonzero(as_tuple=True)
                runs = [self._assembled(found, here, first, second) for found in self._rotated(first, second)]
                yield number[x[here], y[here]], runs

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

    def _assembled(self, total: dict[Key, Tensor], here: tuple[Tensor, ...], first: Tensor, second: Tensor) -> AllForms:
        """The forms of the pairs of one tile; every drift is symmetric in x and y."""
        ensemble, path = self._vertices.ensemble, self._path
        depth, n, n_L = ensemble.depth, ensemble.widths[-2], path.outputs

        def pairs(key: Key) -> Tensor:
            return total[key][here].double()

        output = {name: pairs(("output", depth, name)) for observable, _, name in total if observable == "output"}
        C = output["alpha"] + output["beta"] + n_L * output["gamma"]
        A = n_L * output["Cpp"] + output["Cij"]
        B = n_L * output["Cqq"] + output["Sij"] + output["Sji"]
        X, X_full = output.pop("X"), output.pop("X_full")
        same = first[here[0]] == second[here[1]]
        C_diagonal, A_diagonal, B_diagonal = (part[same].sum(0, keepdim=True) / path.probes for part in (C, A, B))
        X_diagonal = total["diagonal", depth, "X"].double().sum((0, 1))[None] / path.probes**2
        if first is not second:
            X_diagonal = X_diagonal + X_diagonal.mT
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


def _joined(parts: list[AllForms], places: Tensor) -> AllForms:
    """The forms of all pairs out of those of some, put into their order."""
    if len(parts) == 1:
        return parts[0]

    def joined(forms: list) -> Any:
        names = [name for name, value in vars(forms[0]).items() if isinstance(value, Tensor)]
        whole = {name: torch.cat([getattr(form, name) for form in forms])[places] for name in names}
        return replace(forms[0], **whole)

    diagonal = parts[0].diagonal
    for part in parts[1:]:
        diagonal = diagonal + part.diagonal
    return AllForms(
        joined([part.ntk for part in parts]),
        joined([part.full for part in parts]),
        diagonal,
        {layer: joined([part.hidden[layer] for part in parts]) for layer in parts[0].hidden},
        {layer: joined([part.hidden_ntk[layer] for part in parts]) for layer in parts[0].hidden_ntk},
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
