"""Jacobians of a weight that is a table and a matrix: tokens go in by it, and their probabilities come out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_eft.measure.jacobian.gram.dense import Orders
from torch_eft.measure.jacobian.gram.forms import splits
from torch_eft.measure.jacobian.gram.outer import EmbeddingFactor, OuterProductFactor


@dataclass(frozen=True)
class TiedFactor:
    """J_m of a weight that is used as a table and, at other places, as a matrix; the sum of both.

    Args:
        matrix: Its uses as a matrix (E, D).
        table: Its uses as a table of E rows.
        weights: (E, D), lambda of every number; None: it is one number, and left out.
    """

    matrix: OuterProductFactor
    table: EmbeddingFactor
    weights: Tensor | None = None

    @property
    def weight(self) -> str:
        """The parameter."""
        return self.matrix.weight

    @property
    def names(self) -> tuple[str, ...]:
        """The parameter, as a tuple."""
        return (self.weight,)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return self.matrix.tensors + self.table.tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> "TiedFactor":
        """Return the same factor with others in the places of ``tensors``."""
        first = len(self.matrix.tensors)
        table = self.table.with_tensors(tensors[first:])
        assert isinstance(table, EmbeddingFactor)
        return replace(self, matrix=self.matrix.with_tensors(tensors[:first]), table=table)

    def rows(self, samples: slice) -> "TiedFactor":
        """Return the factor of some of the samples."""
        return self.with_tensors([tensor[samples] for tensor in self.tensors])

    def split(self, labels: Mapping[str, str]) -> "list[TiedFactor]":
        """Return the factor itself: it has one parameter."""
        return [self]

    def summed_over_outputs(self) -> "list[TiedFactor]":
        """Return factors of one output whose Gram matrices add up to the sum over i = j."""
        both = self.matrix.gradients, self.table.gradients
        rows = [[tuple((g[i],) for g in part) for part in both] for i in range(self.matrix.size[0])]
        return [
            replace(self, matrix=replace(self.matrix, gradients=g), table=replace(self.table, gradients=e))
            for g, e in rows
        ]

    def weighted(self, weights: Tensor | None, biases: Tensor | None) -> "TiedFactor":
        """Return the same factor with lambda of every number, flat."""
        return replace(self, weights=None if weights is None else weights.view(self.matrix.size[3], -1))

    def vjp(self, u: Tensor, order: int) -> dict[str, Tensor]:
        """Return u . J_order for u (C, N)."""
        return {self.weight: self.matrix.vjp(u, order)[self.weight] + self.table.vjp(u, order)[self.weight]}

    def add_gram(
        self,
        out: Mapping[Orders, Tensor],
        columns: object,
        lambdas: Mapping[str, float],
        symmetric: bool,
    ) -> None:
        """Add J_m lambda J_n^T to ``out[m, n]``; see ``OuterProductFactor.add_gram``."""
        assert isinstance(columns, TiedFactor)
        flat = None if self.weights is None else self.weights.flatten()
        for own, other in ((self.matrix, columns.matrix), (self.table, columns.table)):
            first = own.weighted(flat, None)
            first.add_gram(out, first if other is own else other.weighted(flat, None), lambdas, symmetric)
        scale = lambdas.get(self.weight, 0.0)
        for (m, n), value in out.items():
            value.add_(_between(self, columns, m, n), alpha=scale)
            value.add_(_between(columns, self, n, m).permute(2, 3, 0, 1), alpha=scale)


def _between(rows: TiedFactor, columns: TiedFactor, m: int, n: int) -> Tensor:
    """J_m of the rows' matrix times lambda J_n^T of the columns' table, (C, N, C', N')."""
    # At a token of the table only one row of the matrix counts: sum over places t, s of g_t[token_s] (h_t . e_s).
    tokens = columns.table.inputs[0]
    assert tokens is not None
    known = tokens.clamp_min(0)
    e = torch.stack(columns.table.gradients[n], 1) * (tokens >= 0)[:, None, :, None]  # (N', C', S, D)
    if rows.weights is not None:
        e = e * rows.weights[known][:, None]
    C, N, _, _ = rows.matrix.size
    result = e.new_zeros(C, N, e.shape[1], e.shape[0])
    for b, own in enumerate(e):
        for p, q in splits(m):
            h = rows.matrix.inputs[q]
            if h is not None:
                overlap = (h[:, None] @ own.mT).flatten(2).mT  # (N, T S, C')
                g = torch.stack([part[:, :, known[b]] for part in rows.matrix.gradients[p]], 1)  # (N, C, T, S)
                result[..., b] += (g.flatten(2) @ overlap).transpose(0, 1)
    return result
