"""Gram matrices of per-sample Jacobians that are kept as factors.

A layer o = W h has dz_{i;a}/dW = sum_t g_{i;a,t} h_{a,t}^T, with h its inputs (D numbers), g = dz/do (E numbers) and t
the T places of one sample at which the weight is used: pixels, tokens, times. Along theta + s v all of them are series
in s, and so is the Jacobian, J = J_0 + s J_1 + s^2 J_2: J_0 is the Jacobian, J_1 = d^2z . v, 2 J_2 = d^3z . v . v. A
Gram matrix of two orders (m, n) is J_m lambda J_n^T.

Rows are pairs (output i, sample a), outputs first. Of three ways the one with the fewest operations is taken:

    one place:  (g . g') * (a . a'), entry by entry, without forming J;
    explicit:   J formed for some columns at a time;
    mixed:      (a . a') between places, applied to g' and closed with g, without forming J.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

Orders = tuple[int, int]
Block = tuple[slice, slice]

BLOCK_BYTES = 4 * 2**20
"""Size of the buffer in which parts of a Jacobian are formed: reused, so that it stays in the cache."""

FORMED = 64
"""Least number of a layer's outputs that are taken at once where a Jacobian is formed: narrower products are slow."""

PerOutput = tuple[Tensor, ...]
"""One tensor for every output i."""

_MIXED = 1.4  # an operation of the mixed form costs this much more than one of the explicit form
_ALL = slice(None)
_ROWS = 160  # of symmetric products only blocks of so many rows on and below the diagonal are computed


@dataclass(frozen=True)
class OuterProductFactor:
    """J_m = sum_{p + q = m} sum_t g_p a_q^T of one weight, lambda left out.

    Args:
        weight: The parameter.
        inputs: a_q, (N, T, D) each, None for zero.
        gradients: g_p, for every output (N, T, E).
        bias: A parameter with J_m = sum_t g_m, or None.
        weights: (E, D), lambda of every number of the weight; None: it is one number, and left out.
        bias_weights: (E,), likewise of the bias.
    """

    weight: str
    inputs: tuple[Tensor | None, ...]
    gradients: tuple[PerOutput, ...]
    bias: str | None = None
    weights: Tensor | None = None
    bias_weights: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def size(self) -> tuple[int, int, int, int]:
        """C, N, T, E."""
        N, T, E = self.gradients[0][0].shape
        return len(self.gradients[0]), N, T, E

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors: inputs first, then the gradients of every order."""
        return [a for a in self.inputs if a is not None] + [part for g in self.gradients for part in g]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "OuterProductFactor":
        """Return the same factor with others in the places of ``tensors``."""
        others = iter(tensors)
        inputs = tuple(None if a is None else next(others) for a in self.inputs)
        return replace(self, inputs=inputs, gradients=tuple(tuple(next(others) for _ in g) for g in self.gradients))

    def rows(self, samples: slice) -> "OuterProductFactor":
        """Return the factor of some of the samples."""
        return self.with_tensors([tensor[samples] for tensor in self.tensors])

    def split(self, labels: Mapping[str, str]) -> "list[Factor]":
        """Return weight and bias apart if their labels differ."""
        if self.bias is None or labels.get(self.weight) == labels.get(self.bias):
            return [self]
        return [replace(self, bias=None), self.of_bias()]

    def summed_over_outputs(self) -> "list[Factor]":
        """Return factors of one output whose Gram matrices add up to the sum over i = j."""
        C, _, T, _ = self.size
        if T == 1:
            weights, biases = (
                None if own is None else torch.cat([own] * C) for own in (self.weights, self.bias_weights)
            )
            joined = tuple((torch.cat(g, 2),) for g in self.gradients)
            return [replace(self, gradients=joined, weights=weights, bias_weights=biases)]
        return [replace(self, gradients=tuple((g[i],) for g in self.gradients)) for i in range(C)]

    def formed(self, orders: Sequence[int]) -> list[Tensor]:
        """Return J_m of the weight itself, (C, N, E D) each."""
        C, N, _, E = self.size
        size = C * N * E * _depth(self)
        buffers = {order: self.gradients[0][0].new_empty(size) for order in orders}
        return list(_formed(self, buffers, slice(0, E)).values())

    def of_bias(self) -> "DenseFactor":
        """Return the factor of the bias alone."""
        assert self.bias is not None
        summed = tuple(torch.stack([part.sum(1) for part in g]) for g in self.gradients)
        return DenseFactor(self.bias, summed, self.bias_weights)

    def weighted(self, weights: Tensor | None, biases: Tensor | None) -> "OuterProductFactor":
        """Return the same factor with lambda of every number, flat, in the order in which it has them."""
        own = None if weights is None else weights.view(self.size[3], _depth(self))
        return replace(self, weights=own, bias_weights=biases)

    def vjp(self, u: Tensor, order: int) -> dict[str, Tensor]:
        """Return u . J_order for u (C, N), in some shape, by parameter."""
        own: dict[str, Tensor] = {}
        for p, q in _splits(order):
            a, constant = self.inputs[q], self.bias is not None and p == order  # what the bias is multiplied with
            if a is None and not constant:
                continue
            weighted = torch.zeros_like(self.gradients[p][0])
            for row, g in zip(u, self.gradients[p], strict=True):
                weighted.addcmul_(row[:, None, None], g)
            if a is not None:
                part = self._pulled_back(weighted, a)
                own[self.weight] = own[self.weight] + part if self.weight in own else part
            if self.bias is not None and constant:
                own[self.bias] = weighted.sum((0, 1))
        return own if self.weight in own else own | {self.weight: u.new_zeros(())}

    def _pulled_back(self, weighted: Tensor, a: Tensor) -> Tensor:
        return torch.einsum("nto,ntd->od", weighted, a)

    def overlap(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a . b between places, (N', T, T'), of one sample's inputs and those of N' samples."""
        return (b.reshape(-1, b.shape[2]) @ a.T).view(*b.shape[:2], len(a)).transpose(1, 2)

    def add_gram(
        self, out: Mapping[Orders, Tensor], columns: "Factor", lambdas: Mapping[str, float], symmetric: bool
    ) -> None:
        """Add J_m lambda J_n^T to ``out[m, n]``, (C, N, C', N') each, for every pair of orders in it.

        Args:
            out: What is added to, contiguous.
            columns: The factor of the columns, of the same parameters.
            lambdas: By parameter.
            symmetric: Rows and columns are the same samples: of m = n only blocks on and below the diagonal are
                computed, as ``mirror`` expects.
        """
        assert isinstance(columns, OuterProductFactor)
        elementwise = self.weights is not None or self.bias_weights is not None
        if self._one_place and self.size[2] == columns.size[2] == 1 and not elementwise:
            _add_one_place(out, self, columns, lambdas, symmetric)
            return
        if self.bias is not None:
            self.of_bias().add_gram(out, columns.of_bias(), lambdas, symmetric)
        scale = lambdas.get(self.weight, 0.0)
        if scale == 0:
            return
        if self.weights is not None or self._explicit_is_cheaper(columns, out):
            orders = sorted({order for pair in out for order in pair})
            for J_rows, J_columns, block in _explicit(self, columns, orders):
                weights = None if self.weights is None else self.weights[block].flatten()
                _add_products(out, J_rows, J_columns, scale, symmetric, weights)
        else:
            for pair, value in out.items():
                _add_mixed(value, self, columns, pair, scale, symmetric and pair[0] == pair[1])

    _one_place: ClassVar[bool] = True

    def _explicit_is_cheaper(self, columns: "OuterProductFactor", pairs: Collection[Orders]) -> bool:
        return _explicit_cost(self, columns, pairs) <= _MIXED * _mixed_cost(self, columns, pairs)


@dataclass(frozen=True)
class EmbeddingFactor(OuterProductFactor):
    """Factor of a table, whose inputs are token numbers (N, T) standing for one-hot vectors, and below 0 for none.

    Args:
        rows_of_table: Number of its rows.
    """

    rows_of_table: int = 0

    _one_place: ClassVar[bool] = False

    def _explicit_is_cheaper(self, columns: OuterProductFactor, pairs: Collection[Orders]) -> bool:
        return False

    def weighted(self, weights: Tensor | None, biases: Tensor | None) -> OuterProductFactor:
        """Return the same factor with lambda of every number: sqrt(lambda) of a token's row goes to its gradients."""
        if weights is None:
            return self
        tokens = self.inputs[0]
        assert tokens is not None
        roots = weights.sqrt().view(self.rows_of_table, -1)[tokens.clamp_min(0)]  # (N, T, E)
        return replace(self, gradients=tuple(tuple(part * roots for part in g) for g in self.gradients))

    def _pulled_back(self, weighted: Tensor, a: Tensor) -> Tensor:
        rows = weighted.new_zeros(self.rows_of_table, weighted.shape[2])
        return rows.index_add(0, a.flatten().clamp_min(0), (weighted * (a >= 0)[..., None]).flatten(0, 1))

    def overlap(self, a: Tensor, b: Tensor) -> Tensor:
        """Return where tokens are equal, (N', T, T'), of one sample's tokens and those of N' samples."""
        return ((a[None, :, None] == b[:, None, :]) & (a >= 0)[None, :, None]).to(self.gradients[0][0].dtype)


@dataclass(frozen=True)
class DenseFactor:
    """J_m itself, of one parameter.

    Args:
        weight: The parameter.
        jacobians: J_m, (C, N, P) each.
        weights: (P,), lambda of every number; None: it is one number, and left out.
    """

    weight: str
    jacobians: tuple[Tensor, ...]
    weights: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter, as a tuple."""
        return (self.weight,)

    @property
    def size(self) -> tuple[int, int]:
        """C, N."""
        return self.jacobians[0].shape[0], self.jacobians[0].shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return list(self.jacobians)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "DenseFactor":
        """Return the same factor with others in the places of ``tensors``."""
        return replace(self, jacobians=tuple(tensors))

    def rows(self, samples: slice) -> "DenseFactor":
        """Return the factor of some of the samples."""
        return self.with_tensors([J[:, samples] for J in self.jacobians])

    def split(self, labels: Mapping[str, str]) -> "list[Factor]":
        """Return the factor itself: it has one parameter."""
        return [self]

    def summed_over_outputs(self) -> "list[Factor]":
        """Return the factor with outputs as further columns, so that the Gram matrix is the sum over i = j."""
        flat = tuple(J.transpose(0, 1).flatten(1)[None] for J in self.jacobians)
        weights = None if self.weights is None else self.weights.repeat(self.size[0])
        return [replace(self, jacobians=flat, weights=weights)]

    def weighted(self, weights: Tensor | None, biases: Tensor | None) -> "DenseFactor":
        """Return the same factor with lambda of every number, flat."""
        return replace(self, weights=weights)

    def vjp(self, u: Tensor, order: int) -> dict[str, Tensor]:
        """Return u . J_order for u (C, N)."""
        return {self.weight: torch.einsum("cn,cnp->p", u, self.jacobians[order])}

    def add_gram(
        self, out: Mapping[Orders, Tensor], columns: "Factor", lambdas: Mapping[str, float], symmetric: bool
    ) -> None:
        """Add J_m lambda J_n^T to ``out[m, n]``; see ``OuterProductFactor.add_gram``."""
        assert isinstance(columns, DenseFactor)
        scale = lambdas.get(self.weight, 0.0)
        _add_products(out, self.jacobians, columns.jacobians, scale, symmetric, self.weights)


Factor = OuterProductFactor | DenseFactor
Jacobians = Sequence[Tensor] | Mapping[int, Tensor]


def mirror(out: Tensor) -> None:
    """Fill the upper triangle of a symmetric (C, N, C, N) from the lower one."""
    matrix = out.flatten(2).flatten(0, 1)
    for block, _ in _lower_blocks(len(matrix)):
        diagonal = matrix[block, block]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
        done = slice(0, block.start)
        matrix[done, block] = matrix[block, done].T


def _splits(order: int) -> list[tuple[int, int]]:
    return [(p, order - p) for p in range(order + 1)]


def _lower_blocks(size: int) -> Iterator[tuple[slice, slice]]:
    for start in range(0, size, _ROWS):
        stop = min(start + _ROWS, size)
        yield slice(start, stop), slice(0, stop)


def _add_products(
    out: Mapping[Orders, Tensor],
    rows: Jacobians,
    columns: Jacobians,
    scale: float,
    symmetric: bool,
    weights: Tensor | None = None,
) -> None:
    """Add matrix products of (C, N, P) Jacobians, with lambda of every number (P,) between them."""
    if scale == 0:
        return
    for (m, n), value in out.items():
        first, second = rows[m].flatten(0, 1), columns[n].flatten(0, 1).T
        if weights is not None:
            first = first * weights
        matrix = value.flatten(2).flatten(0, 1)
        if symmetric and m == n:
            for block, before in _lower_blocks(len(matrix)):
                matrix[block, before].addmm_(first[block], second[:, before], alpha=scale)
        else:
            matrix.addmm_(first, second, alpha=scale)


def _add_one_place(
    out: Mapping[Orders, Tensor],
    rows: OuterProductFactor,
    columns: OuterProductFactor,
    lambdas: Mapping[str, float],
    symmetric: bool,
) -> None:
    """Add, for T = 1, J_m J_n^T = sum (g_p . g_r) * (a_q . a_s) over p + q = m, r + s = n; the bias has a_0 = 1."""
    overlaps: dict[Orders, Tensor] = {}

    def overlap(q: int, s: int) -> Tensor | None:
        if (q, s) not in overlaps:
            a, b = rows.inputs[q], columns.inputs[s]
            if a is None or b is None:
                return None
            weight, bias = lambdas.get(rows.weight, 0.0), 0.0 if rows.bias is None else lambdas.get(rows.bias, 0.0)
            ones = a.new_full((), bias if q == s == 0 else 0.0)
            overlaps[q, s] = torch.addmm(ones, a[:, 0], b[:, 0].T, alpha=weight)
        return overlaps[q, s]

    products: dict[Orders, dict[Orders, list[Tensor]]] = {}  # (p, r): {(m, n): [a_q . a_s, ...]}
    for m, n in out:
        for p, q in _splits(m):
            for r, s in _splits(n):
                value = overlap(q, s)
                if value is not None:
                    products.setdefault((p, r), {}).setdefault((m, n), []).append(value)
    for (p, r), weights in products.items():
        g = torch.stack(rows.gradients[p])[:, :, 0]  # (C, N, E)
        h = g if rows is columns and p == r else torch.stack(columns.gradients[r])[:, :, 0]
        lower = symmetric and all(m == n for m, n in weights)
        for block, before, samples in _blocks(g.shape[0], g.shape[1], lower):
            first, second = g[block], h[before]
            product = (first.flatten(0, 1) @ second.flatten(0, 1).T).view(*first.shape[:2], *second.shape[:2])
            for pair, terms in weights.items():
                for term in terms:
                    out[pair][(*block, *before)].addcmul_(product, term[samples][None, :, None, :])


def _blocks(outputs: int, samples: int, lower: bool) -> Iterator[tuple[Block, Block, Block]]:
    """(outputs, samples) of rows, those of columns, (rows' samples, columns' samples)."""
    if outputs == 1:
        for start in range(0, samples, _ROWS):
            chunk = slice(start, min(start + _ROWS, samples))
            columns = slice(0, chunk.stop if lower else None)
            yield (_ALL, chunk), (_ALL, columns), (chunk, columns)
        return
    step = max(1, _ROWS // samples)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        yield (slice(start, stop), _ALL), (slice(0, stop if lower else None), _ALL), (_ALL, _ALL)


def _explicit_cost(rows: OuterProductFactor, columns: OuterProductFactor, pairs: Collection[Orders]) -> float:
    """Multiplications of the explicit form, for all pairs of orders."""
    C, N, T, E = rows.size
    D, size, other = _depth(rows), C * N, columns.size[0] * columns.size[1]
    orders = {order for pair in pairs for order in pair}
    formed = sum(order + 1 for order in orders) * T * D * E * (size if rows is columns else size + other)
    return formed + sum((0.5 if m == n and rows is columns else 1) * size * other * D * E for m, n in pairs)


def _mixed_cost(rows: OuterProductFactor, columns: OuterProductFactor, pairs: Collection[Orders]) -> float:
    """Multiplications of the mixed form, for all pairs of orders."""
    C, N, T, E = rows.size
    C2, N2, T2, _ = columns.size
    D, total = _depth(rows), 0.0
    for m, n in pairs:
        t, t2 = (m + 1) * T, (n + 1) * T2
        share = 0.5 if m == n and rows is columns else 1.0
        total += share * (N * t * N2 * t2 * D + N * N2 * C2 * t * t2 * E + C * N * C2 * N2 * t * E)
    return total


def _depth(factor: OuterProductFactor) -> int:
    return next(a.shape[2] for a in factor.inputs if a is not None)


def _explicit(
    rows: OuterProductFactor, columns: OuterProductFactor, orders: Sequence[int]
) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor], slice]]:
    """J_m of rows and of columns, (C, N, E_block D) each, for some of the layer's outputs at a time, and which."""
    sides = (rows,) if columns is rows else (rows, columns)
    D, E = _depth(rows), rows.size[3]
    widest = max(side.size[0] * side.size[1] for side in sides)
    step = min(E, max(FORMED, BLOCK_BYTES // (widest * D * rows.gradients[0][0].element_size())))
    buffers = [
        {order: side.gradients[0][0].new_empty(side.size[0] * side.size[1] * step * D) for order in orders}
        for side in sides
    ]
    for start in range(0, E, step):
        block = slice(start, min(start + step, E))
        formed = [_formed(side, buffer, block) for side, buffer in zip(sides, buffers, strict=True)]
        yield formed[0], formed[-1], block


def _formed(factor: OuterProductFactor, buffers: Mapping[int, Tensor], block: slice) -> dict[int, Tensor]:
    """J_m of the layer's outputs ``block``, written into the buffers."""
    C, N, _, _ = factor.size
    D, width = _depth(factor), block.stop - block.start
    jacobians = {}
    for order, buffer in buffers.items():
        J = buffer[: C * N * width * D].view(C, N, width, D)
        for i in range(C):
            begun = False
            for p, q in _splits(order):
                a = factor.inputs[q]
                if a is not None:
                    g = factor.gradients[p][i][:, :, block].mT
                    J[i].baddbmm_(g, a, beta=1 if begun else 0)
                    begun = True
        jacobians[order] = J.flatten(2)
    return jacobians


def _add_mixed(
    out: Tensor, rows: OuterProductFactor, columns: OuterProductFactor, pair: Orders, scale: float, lower: bool
) -> None:
    """One sample of the rows after the other; places of different orders stand side by side."""
    a, g = _side_by_side(rows, pair[0])
    b, h = _side_by_side(columns, pair[1])
    for n in range(len(g[0])):
        upto = n + 1 if lower else len(h[0])
        overlap = rows.overlap(a[n], b[:upto])  # (N', T, T')
        own = torch.stack([part[n].flatten() for part in g])  # (C, T E)
        for j, part in enumerate(h):
            value = own @ torch.bmm(overlap, part[:upto]).flatten(1).T  # (C, N')
            out[:, n, j, :upto].add_(value, alpha=scale)
            if lower:  # n' < n: with the other half of the pairs of outputs
                out[j, :n, :, n].add_(value[:, :n].T, alpha=scale)


def _side_by_side(factor: OuterProductFactor, order: int) -> tuple[Tensor, PerOutput]:
    """(N, T', D) or tokens (N, T'), and (N, T', E) for every output, with T' = (order + 1) T or less."""
    splits = [(p, q) for p, q in _splits(order) if factor.inputs[q] is not None]
    if len(splits) == 1:
        ((p, q),) = splits
        first = factor.inputs[q]
        assert first is not None
        return first, factor.gradients[p]
    a = [a for _, q in splits if (a := factor.inputs[q]) is not None]
    g = [factor.gradients[p] for p, _ in splits]
    return torch.cat(a, 1), tuple(torch.cat(parts, 1) for parts in zip(*g, strict=True))
