"""One vertex on chosen sets of inputs, or tile by tile over all of them, where the full tensors do not fit."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice
from torch_eft.results.presentation.repr import short_repr
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.two_point_moments import Kinks
from torch_eft.theory.initialization.estimators import RECURSIONS, Replicas, check_statistics, vertex_replicas
from torch_eft.theory.initialization.evaluator import LabelSets, Vertices, printed_labels
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width


@dataclass(frozen=True, repr=False)
class VertexBlock:
    """One vertex on sets of labels.

    Args:
        value: The block, float64, one axis per different label.
        error: Standard error of its entries (rms), 0 where moments are exact or integrated by one rule.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> theory.VertexBlock(torch.zeros(3, 4), 0.5)
        VertexBlock(
          value: (3, 4) float32
          error: 0.5
        )
    """

    value: Tensor
    error: float

    def __repr__(self) -> str:
        return short_repr(self)


@dataclass(frozen=True, repr=False)
class VertexTile(VertexBlock):
    """A tile of a vertex with four or six labels: all entries whose first two printed labels are in it.

    Args:
        value: (rows, columns, N, N), float64; of six labels (rows, columns, N, N, N, N).
        error: Standard error of its entries (rms), 0 where moments are exact or integrated by one rule.
        rows: Slice of the first printed label.
        columns: Slice of the second.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> theory.VertexTile(torch.zeros(2, 2, 4, 4), 0.0, slice(0, 2), slice(2, 4)).columns
        slice(2, 4, None)
    """

    rows: slice
    columns: slice


def vertex_block(
    ensemble: MLPEnsemble,
    x: Tensor,
    *,
    name: str,
    labels: str,
    label_sets: LabelSets,
    layer: int | None = None,
    num_samples: int = 4096,
    num_replicas: int = 2,
    seed: int = 0,
    kinks: Kinks = "autograd",
    check_validity: bool = True,
) -> VertexBlock:
    """One vertex on sets of labels, e.g. R on (probe, probe, train, train).

    Args:
        ensemble: The ensemble.
        x: All inputs, (N, n_0).
        name: One of G1, V, Theta1, A, B, D, F, P, Q, R, S, T, U, X3a, X3b, XQQ, XPQ, XPP, XUU, XUQ, XUP.
        labels: A letter for each printed label of the vertex, e.g. ``"xygd"``; a letter that occurs twice is one label.
        label_sets: ``{letter: index into x}``. Pass one tensor object for letters that run over one set: what is
            symmetric between them is then computed once.
        layer: l; None means the output layer L.
        num_samples: Sample size in all.
        num_replicas: Independent samples, at least 2, to estimate the error.
        seed: Seed; the global random state is left alone.
        kinks: See ``initial_statistics``.
        check_validity: Whether to refuse r >= 1.

    Returns:
        The block, axes in the order of ``label_sets``, and its standard error.

    Raises:
        ValueError: If a name or letter is unknown, ``x`` does not fit, or the expansion does not cover the ensemble
            or the inputs.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, probe, train = torch.eye(3), torch.tensor([0]), torch.tensor([1, 2])
        >>> ensemble = theory.MLPEnsemble([3, 50, 50, 1], "linear")
        >>> sets = {"x": probe, "g": train, "d": train}
        >>> theory.vertex_block(ensemble, x, name="V", labels="xxgd", label_sets=sets).value.shape
        torch.Size([1, 2, 2])
    """
    x, layer = _checked(ensemble, x, name, layer)
    check_statistics(ensemble, x, [name], kinks, check_validity)
    slots = len(printed_labels(name))
    if len(labels) != slots or not set(labels) <= set(label_sets):
        lacking = next((f"{label!r} has no label set" for label in labels if label not in label_sets), "")
        count = f"{name} has {slots} labels, {len(labels)} given" if len(labels) != slots else lacking
        raise ValueError(f"labels: {labels!r} given; {count}. label_sets holds {', '.join(map(repr, label_sets))}")
    for label, index in label_sets.items():
        if len(index) and not -len(x) <= int(index.min()) <= int(index.max()) < len(x):
            raise ValueError(f"label_sets: {label!r} holds indices outside 0 .. {len(x) - 1}, the inputs x")
    replicas = vertex_replicas(
        ensemble, *infinite_width(ensemble, x, kinks), label_sets, num_samples, num_replicas, seed, kinks
    )
    return VertexBlock(*_combined(replicas, name, layer, labels, label_sets))


def vertex_tiles(
    ensemble: MLPEnsemble,
    x: Tensor,
    *,
    name: str,
    tile: int = 8,
    layer: int | None = None,
    num_samples: int = 4096,
    num_replicas: int = 2,
    seed: int = 0,
    kinks: Kinks = "autograd",
    check_validity: bool = True,
) -> Iterator[VertexTile]:
    """A vertex with four or six labels over all inputs, in tiles of its first two; memory is that of one tile.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0).
        name: One of V, A, B, D, F, P, Q, R, S, T, U, X3a, X3b, XQQ, XPQ, XPP, XUU, XUQ, XUP.
        tile: Labels per side.
        layer: l; None means the output layer L.
        num_samples: Sample size, see ``vertex_block``.
        num_replicas: Likewise.
        seed: Seed, the same for all tiles: they fit together as parts of one tensor.
        kinks: See ``initial_statistics``.
        check_validity: Whether to refuse r >= 1.

    Yields:
        The tiles, row by row.

    Raises:
        ValueError: As in ``vertex_block``.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([3, 50, 50, 1], "linear")
        >>> [tile.value.shape[:2] for tile in theory.vertex_tiles(ensemble, torch.eye(3), name="V", tile=2)][:2]
        [torch.Size([2, 2]), torch.Size([2, 1])]
    """
    x, layer = _checked(ensemble, x, name, layer)
    check_statistics(ensemble, x, [name], kinks, check_validity)
    labels = {4: "xygd", 6: "xyabgd"}.get(len(printed_labels(name)))
    if labels is None:
        raise ValueError(f"name: {name!r} given; tiles are for the vertices with four and more labels")
    infinite = infinite_width(ensemble, x, kinks)
    everything = torch.arange(len(x), device=x.device)
    for row in range(0, len(x), tile):
        for column in range(0, len(x), tile):
            rows, columns = slice(row, min(row + tile, len(x))), slice(column, min(column + tile, len(x)))
            sets = dict.fromkeys(labels, everything) | {"x": everything[rows], "y": everything[columns]}
            replicas = vertex_replicas(ensemble, *infinite, sets, num_samples, num_replicas, seed, kinks)
            yield VertexTile(*_combined(replicas, name, layer, labels, sets), rows, columns)


def _checked(ensemble: MLPEnsemble, x: Tensor, name: str, layer: int | None) -> tuple[Tensor, int]:
    check_choice("name", name, RECURSIONS)
    layer = ensemble.depth if layer is None else layer
    if not 1 <= layer <= ensemble.depth:
        raise ValueError(f"layer: {layer} given; the layers are 1 .. {ensemble.depth}")
    return check_inputs("x", x, ensemble), layer


def _combined(
    replicas: Replicas[Vertices], name: str, layer: int, labels: str, label_sets: LabelSets
) -> tuple[Tensor, float]:
    full = [len(index) if label in labels else 1 for label, index in label_sets.items()]
    shape = [size for size, label in zip(full, label_sets, strict=True) if label in labels]

    def read(vertices: Vertices) -> list[tuple[str, Tensor]]:
        return [(name, vertices.array(name, layer, labels).expand(full).reshape(shape))]

    return replicas.combined(read)[name]
