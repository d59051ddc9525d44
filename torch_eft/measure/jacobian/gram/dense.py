"""Jacobians that are kept as they are, and Gram matrices of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_eft.measure.jacobian.gram.products import add_product, lower_blocks

Orders = tuple[int, int]
Jacobians = Sequence[Tensor] | Mapping[int, Tensor]


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

    def split(self, labels: Mapping[str, str]) -> "list[DenseFactor]":
        """Return the factor itself: it has one parameter."""
        return [self]

    def summed_over_outputs(self) -> "list[DenseFactor]":
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
        self, out: Mapping[Orders, Tensor], columns: object, lambdas: Mapping[str, float], symmetric: bool
    ) -> None:
        """Add J_m lambda J_n^T to ``out[m, n]``; see ``OuterProductFactor.add_gram``."""
        assert isinstance(columns, DenseFactor)
        scale = lambdas.get(self.weight, 0.0)
        add_products(out, self.jacobians, columns.jacobians, scale, symmetric, self.weights)


def mirror(out: Tensor) -> None:
    """Fill the upper triangle of a symmetric (C, N, C, N) from the lower one."""
    matrix = out.flatten(2).flatten(0, 1)
    for block, _ in lower_blocks(matrix):
        diagonal = matrix[block, block]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
        done = slice(0, block.start)
        matrix[done, block] = matrix[block, done].T


def add_products(
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
        first, second = rows[m].flatten(0, 1), columns[n].flatten(0, 1)
        if weights is not None:
            first = first * weights
        matrix = value.flatten(2).flatten(0, 1)
        if symmetric and m == n:
            for block, before in lower_blocks(matrix):
                add_product(matrix[block, before], first[block], second[before], scale)
        else:
            add_product(matrix, first, second, scale)
