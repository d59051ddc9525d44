"""Linear maps between labels (sample, position): what a convolution, a pooling or a flattened read-out does to them.

A layer z'_{i;x} = b_i + sum_{j,d} W_{ijd} sum_y P^d_{xy} h_{j;y} has one label map P^d, d = 1 .. k, for every weight
between two neurons: the shifts of a convolution, the positions of a flattened read-out. Two labels that share a weight
share d, so that kernels go through the average over d of both maps together,

    Av[X](x, x') = (1/k) sum_d sum_{y y'} P^d_{xy} P^d_{x'y'} X(y, y').

All maps here are products over the axes of positions (height, width), so that Av is one small matrix product an axis.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelMaps:
    """Label maps that are products over the axes of positions.

    Args:
        axes: For every axis (k_axis, out, in): the k_axis matrices of its maps; none for data without positions.
    """

    axes: tuple[Tensor, ...] = ()

    @property
    def count(self) -> int:
        """k, the number of weights between two neurons."""
        return math.prod(axis.shape[0] for axis in self.axes)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Positions an axis before the map."""
        return tuple(axis.shape[2] for axis in self.axes)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Positions an axis after it."""
        return tuple(axis.shape[1] for axis in self.axes)

    def sum_pairs(self, X: Tensor) -> Tensor:
        """Return sum_d P^d X P^d^T, k times Av.

        Args:
            X: (..., P, P), positions of all axes in one.

        Returns:
            (..., P', P').
        """
        return self._through(X, self.inputs, self.outputs, transposed=False)

    def average(self, X: Tensor) -> Tensor:
        """Return Av[X], (..., P', P')."""
        return self.sum_pairs(X) / self.count

    def average_adjoint(self, G: Tensor) -> Tensor:
        """Return Av^T[G] = (1/k) sum_d P^d^T G P^d, (..., P, P)."""
        return self._through(G, self.outputs, self.inputs, transposed=True) / self.count

    def _through(self, X: Tensor, before: tuple[int, ...], after: tuple[int, ...], transposed: bool) -> Tensor:
        lead = X.shape[:-2]
        X = X.reshape(-1, *before, *before)
        number = len(self.axes)
        for place, maps in enumerate(self.axes):
            pair = (1 + place, 1 + number + place)
            X = X.movedim(pair, (-2, -1))
            X = _both_sides(X, maps.to(X), transposed).movedim((-2, -1), pair)
        size = math.prod(after)
        return X.reshape(*lead, size, size)

    def on_labels(self, h: Tensor) -> Tensor:
        """Return the maps of values, (..., P) -> (k, ..., P')."""
        lead = h.shape[:-1]
        h = h.reshape(1, -1, *self.inputs)
        for place, maps in enumerate(self.axes):
            moved = torch.einsum("doi,k...i->kd...o", maps.to(h), h.movedim(2 + place, -1))
            h = moved.flatten(0, 1).movedim(-1, 2 + place)
        return h.reshape(self.count, *lead, math.prod(self.outputs))

    def adjoint_on_labels(self, g: Tensor) -> Tensor:
        """Return the transpose of a single map on values, (..., P') -> (..., P)."""
        lead = g.shape[:-1]
        g = g.reshape(-1, *self.outputs)
        for place, maps in enumerate(self.axes):
            g = torch.einsum("oi,...o->...i", maps[0].to(g), g.movedim(1 + place, -1)).movedim(-1, 1 + place)
        return g.reshape(*lead, math.prod(self.inputs))


def _both_sides(X: Tensor, maps: Tensor, transposed: bool) -> Tensor:
    """sum_d A_d X A_d^T, or with A_d^T for A_d."""
    count, out, size = maps.shape
    if count == 1 and out == size and bool((maps[0] == torch.eye(size, dtype=maps.dtype, device=maps.device)).all()):
        return X
    if count == size > 1 and out == 1:  # a flattened axis: the same position on both sides
        if transposed:
            return X * torch.eye(size, dtype=X.dtype, device=X.device)
        return X.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    maps = maps.mT if transposed else maps
    total = maps[0] @ X @ maps[0].mT
    for one in maps[1:]:
        total = total + one @ X @ one.mT
    return total


def identity_maps(sizes: Sequence[int]) -> LabelMaps:
    """Return the maps of a layer that acts on every position alike."""
    return LabelMaps(tuple(torch.eye(size, dtype=torch.float64, device="cpu")[None] for size in sizes))


def convolution_axis(
    size: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
    circular: bool = False,
) -> Tensor:
    """Return the shifts of a convolution along one axis, (kernel, out, size); zeros where it reads padding.

    Args:
        size: Positions before it.
        kernel: Its length.
        stride: Its step.
        padding: Positions added in front and behind.
        dilation: Distance of what it reads.
        circular: Whether the padding repeats the signal, or is zero.
    """
    out = (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    maps = torch.zeros(kernel, out, size, dtype=torch.float64, device="cpu")
    for d in range(kernel):
        for o in range(out):
            place = o * stride + d * dilation - padding[0]
            if circular:
                place %= size
            if 0 <= place < size:
                maps[d, o, place] = 1.0
    return maps


def flatten_axis(size: int) -> Tensor:
    """Return the maps of a read-out that has a weight for every position, (size, 1, size)."""
    return torch.eye(size, dtype=torch.float64, device="cpu")[:, None]


def window_axis(
    size: int, kernel: int, *, stride: int, padding: int = 0, count_padding: bool = True, ceil: bool = False
) -> Tensor:
    """Return averaging over windows along one axis, (1, out, size), as ``avg_pool`` has it."""
    out = (size + 2 * padding - kernel + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (out - 1) * stride >= size + padding:  # the last window must start inside
        out -= 1
    rows = torch.zeros(out, size, dtype=torch.float64, device="cpu")
    for o in range(out):
        start = o * stride - padding
        end = min(start + kernel, size + padding)
        inside = range(max(start, 0), min(end, size))
        rows[o, inside.start : inside.stop] = 1 / (end - start if count_padding else len(inside))
    return rows[None]


def adaptive_axis(size: int, out: int) -> Tensor:
    """Return averaging to a given number of positions along one axis, (1, out, size)."""
    rows = torch.zeros(out, size, dtype=torch.float64, device="cpu")
    for o in range(out):
        start, end = o * size // out, -(-(o + 1) * size // out)
        rows[o, start:end] = 1 / (end - start)
    return rows[None]
