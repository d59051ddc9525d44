"""Three ways from inputs and gradients at T places to a Gram matrix of the Jacobian, or to the Jacobian itself."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from torch_eft.measure.jacobian.gram.dense import Orders
from torch_eft.measure.jacobian.gram.products import product, rows_at_once, takes_onednn

Block = tuple[slice, slice]
PerOutput = tuple[Tensor, ...]
"""One tensor for every output i."""

BLOCK_BYTES = 4 * 2**20
"""Size of the buffer in which parts of a Jacobian are formed on a CPU: reused, so that it stays in the cache."""

BLOCK_BYTES_ELSEWHERE = 64 * 2**20
"""The same on a GPU, which wants large products."""

FORMED = 64
"""Least number of a layer's outputs that are taken at once where a Jacobian is formed: narrower products are slow."""

_ALL = slice(None)
_FEW_PLACES = 64  # fewer, and the copies that put outputs side by side cost as much as the product
_WIDE, _WIDE_ONEDNN = 160, 640  # rows of a product that reach the full rate
_NUMBERS = 2**22  # in the copies


class Places(Protocol):
    """J_m = sum_{p + q = m} sum_t g_p a_q^T; see ``OuterProductFactor``."""

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """a_q, (N, T, D)."""

    @property
    def gradients(self) -> tuple[PerOutput, ...]:
        """g_p, for every output (N, T, E)."""

    @property
    def size(self) -> tuple[int, int, int, int]:
        """C, N, T, E."""

    def overlap(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a . b between places, (N', T, T')."""


def splits(order: int) -> list[Orders]:
    """Return all (p, q) with p + q = order."""
    return [(p, order - p) for p in range(order + 1)]


def depth(side: Places) -> int:
    """Return D."""
    return next(a.shape[2] for a in side.inputs if a is not None)


# ---- one place


def add_one_place(
    out: Mapping[Orders, Tensor],
    rows: Places,
    columns: Places,
    lambdas: tuple[float, float],
    symmetric: bool,
) -> None:
    """Add, for T = 1, J_m J_n^T = sum (g_p . g_r) * (a_q . a_s) over p + q = m, r + s = n; the bias has a_0 = 1.

    Args:
        out: ``{(m, n): (C, N, C', N')}``, what is added to.
        rows: Of the rows.
        columns: Of the columns.
        lambdas: Of the weight and of the bias.
        symmetric: See ``OuterProductFactor.add_gram``.
    """
    overlaps: dict[Orders, Tensor] = {}

    def overlap(q: int, s: int) -> Tensor | None:
        if (q, s) not in overlaps:
            a, b = rows.inputs[q], columns.inputs[s]
            if a is None or b is None:
                return None
            weight, bias = lambdas
            ones = a.new_full((), bias if q == s == 0 else 0.0)
            overlaps[q, s] = torch.addmm(ones, a[:, 0], b[:, 0].T, alpha=weight)
        return overlaps[q, s]

    products: dict[Orders, dict[Orders, list[Tensor]]] = {}  # (p, r): {(m, n): [a_q . a_s, ...]}
    for m, n in out:
        for p, q in splits(m):
            for r, s in splits(n):
                value = overlap(q, s)
                if value is not None:
                    products.setdefault((p, r), {}).setdefault((m, n), []).append(value)
    for (p, r), weights in products.items():
        g = torch.stack(rows.gradients[p])[:, :, 0]  # (C, N, E)
        h = g if rows is columns and p == r else torch.stack(columns.gradients[r])[:, :, 0]
        lower = symmetric and all(m == n for m, n in weights)
        for block, before, samples in _blocks(g, lower):
            first, second = g[block], h[before]
            value = product(first.flatten(0, 1), second.flatten(0, 1)).view(*first.shape[:2], *second.shape[:2])
            for pair, terms in weights.items():
                for term in terms:
                    out[pair][(*block, *before)].addcmul_(value, term[samples][None, :, None, :])


def _blocks(g: Tensor, lower: bool) -> Iterator[tuple[Block, Block, Block]]:
    """(outputs, samples) of rows, those of columns, (rows' samples, columns' samples)."""
    outputs, samples = g.shape[:2]
    rows = rows_at_once(g)
    if outputs == 1:
        for start in range(0, samples, rows):
            chunk = slice(start, min(start + rows, samples))
            columns = slice(0, chunk.stop if lower else None)
            yield (_ALL, chunk), (_ALL, columns), (chunk, columns)
        return
    step = max(1, rows // samples)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        yield (slice(start, stop), _ALL), (slice(0, stop if lower else None), _ALL), (_ALL, _ALL)


# ---- explicit


def explicit_cost(rows: Places, columns: Places, pairs: Collection[Orders]) -> float:
    """Return the multiplications of the explicit form, for all pairs of orders."""
    C, N, T, E = rows.size
    D, size, other = depth(rows), C * N, columns.size[0] * columns.size[1]
    orders = {order for pair in pairs for order in pair}
    formed = sum(order + 1 for order in orders) * T * D * E * (size if rows is columns else size + other)
    return formed + sum((0.5 if m == n and rows is columns else 1) * size * other * D * E for m, n in pairs)


def explicit(
    rows: Places, columns: Places, orders: Sequence[int]
) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor], slice]]:
    """J_m of rows and of columns, (C, N, E_block D) each, for some of the layer's outputs at a time, and which."""
    sides = (rows,) if columns is rows else (rows, columns)
    like = rows.gradients[0][0]
    D, E = depth(rows), rows.size[3]
    widest = max(side.size[0] * side.size[1] for side in sides)
    room = BLOCK_BYTES if like.device.type == "cpu" else BLOCK_BYTES_ELSEWHERE
    step = min(E, max(FORMED, room // (widest * D * like.element_size())))
    buffers = [{order: like.new_empty(side.size[0] * side.size[1] * step * D) for order in orders} for side in sides]
    for start in range(0, E, step):
        block = slice(start, min(start + step, E))
        formed = [_formed(side, buffer, block) for side, buffer in zip(sides, buffers, strict=True)]
        yield formed[0], formed[-1], block


def _formed(side: Places, buffers: Mapping[int, Tensor], block: slice) -> dict[int, Tensor]:
    """J_m of the layer's outputs ``block``, written into the buffers."""
    C, N, _, _ = side.size
    D, width = depth(side), block.stop - block.start
    jacobians = {}
    for order, buffer in buffers.items():
        J = buffer[: C * N * width * D].view(C, N, width, D)
        begun = False
        for p, q in splits(order):
            a = side.inputs[q]
            if a is not None:
                add_outer_products(J, [g[:, :, block] for g in side.gradients[p]], a, begun)
                begun = True
        jacobians[order] = J.flatten(2)
    return jacobians


def add_outer_products(J: Tensor, gradients: Sequence[Tensor], a: Tensor, begun: bool) -> None:
    """Add sum_t g a^T of every output to ``J``.

    Args:
        J: (C, N, E, D).
        gradients: (N, T, E) of every output.
        a: (N, T, D).
        begun: False to write over what ``J`` holds.
    """
    C, N, E, D = J.shape
    at_once = outputs_at_once(a, E)
    if at_once == 0:
        for i, g in enumerate(gradients):
            J[i].baddbmm_(g.mT, a, beta=1 if begun else 0)
        return
    for start in range(0, C, at_once):
        rows = J[start : start + at_once]
        g = torch.stack([part.mT for part in gradients[start : start + at_once]], 1).flatten(1, 2)  # (N, c E, T)
        if J.device.type != "cpu":
            values = torch.bmm(g, a).view(N, -1, E, D).transpose(0, 1)
            rows.add_(values) if begun else rows.copy_(values)
            continue
        for n in range(N):  # the result of all samples would not stay in the cache
            value = product(g[n], a[n].T).view(-1, E, D)
            rows[:, n].add_(value) if begun else rows[:, n].copy_(value)


def outputs_at_once(a: Tensor, width: int) -> int:
    """Return how many outputs of the network a product takes where a Jacobian is formed; 0: one, without a copy.

    Args:
        a: (N, T, D).
        width: E.
    """
    N, T, _ = a.shape
    room = _NUMBERS // max(1, N * T * width)
    if a.device.type != "cpu":
        return max(1, 16 * room)
    if T < _FEW_PLACES:
        return 0
    if takes_onednn(a):
        return max(1, min(_WIDE_ONEDNN // width, room))
    count = min(_WIDE // width, room)
    return count if count > 2 else 0


# ---- mixed


def mixed_cost(rows: Places, columns: Places, pairs: Collection[Orders]) -> float:
    """Return the multiplications of the mixed form, for all pairs of orders."""
    C, N, T, E = rows.size
    C2, N2, T2, _ = columns.size
    D, total = depth(rows), 0.0
    for m, n in pairs:
        t, t2 = (m + 1) * T, (n + 1) * T2
        share = 0.5 if m == n and rows is columns else 1.0
        total += share * (N * t * N2 * t2 * D + N * N2 * C2 * t * t2 * E + C * N * C2 * N2 * t * E)
    return total


def add_mixed(out: Tensor, rows: Places, columns: Places, pair: Orders, scale: float, lower: bool) -> None:
    """Add one pair of orders: one sample of the rows after the other, places of different orders side by side."""
    a, g = _side_by_side(rows, pair[0])
    b, h = _side_by_side(columns, pair[1])
    outputs, (samples, places, width) = len(h), h[0].shape
    step = max(1, _NUMBERS // (outputs * places * width))
    for start in range(0, samples, step):
        some = slice(start, start + step)
        stacked = torch.stack([part[some].mT for part in h], 1)  # (N', C', E, T')
        for n in range(start if lower else 0, len(g[0])):
            stop = min(n + 1, start + len(stacked)) if lower else start + len(stacked)
            count = stop - start
            overlap = rows.overlap(a[n], b[start:stop])  # (N', T, T')
            moved = torch.bmm(stacked[:count].flatten(1, 2), overlap.mT)  # (N', C' E, T)
            own = torch.stack([part[n].mT for part in g]).flatten(1)  # (C, E T)
            value = product(own, moved.view(count * outputs, -1)).view(len(g), count, outputs)
            out[:, n, :, start:stop].add_(value.mT, alpha=scale)
            if lower:  # n' < n: with the other half of the pairs of outputs
                before = min(n, stop)
                out[:, start:before, :, n].add_(value[:, : before - start].permute(2, 1, 0), alpha=scale)


def _side_by_side(side: Places, order: int) -> tuple[Tensor, PerOutput]:
    """(N, T', D) or tokens (N, T'), and (N, T', E) for every output, with T' = (order + 1) T or less."""
    pairs = [(p, q) for p, q in splits(order) if side.inputs[q] is not None]
    if len(pairs) == 1:
        ((p, q),) = pairs
        first = side.inputs[q]
        assert first is not None
        return first, side.gradients[p]
    a = [a for _, q in pairs if (a := side.inputs[q]) is not None]
    g = [side.gradients[p] for p, _ in pairs]
    return torch.cat(a, 1), tuple(torch.cat(parts, 1) for parts in zip(*g, strict=True))
