"""Jacobians that are kept as inputs and gradients at the places where a weight is used."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from torch_eft.measure.jacobian.gram.dense import DenseFactor, Orders, add_products
from torch_eft.measure.jacobian.gram.forms import (
    PerOutput,
    add_mixed,
    add_one_place,
    depth,
    explicit,
    explicit_cost,
    mixed_cost,
    splits,
)

_MIXED = 1.4  # an operation of the mixed form costs this much more than one of the explicit form


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

    def split(self, labels: Mapping[str, str]) -> "list[OuterProductFactor | DenseFactor]":
        """Return weight and bias apart if their labels differ."""
        if self.bias is None or labels.get(self.weight) == labels.get(self.bias):
            return [self]
        return [replace(self, bias=None), self.of_bias()]

    def summed_over_outputs(self) -> "list[OuterProductFactor | DenseFactor]":
        """Return factors of one output whose Gram matrices add up to the sum over i = j."""
        C, _, T, _ = self.size
        if T == 1:
            weights, biases = (
                None if own is None else torch.cat([own] * C) for own in (self.weights, self.bias_weights)
            )
            joined = tuple((torch.cat(g, 2),) for g in self.gradients)
            return [replace(self, gradients=joined, weights=weights, bias_weights=biases)]
        return [replace(self, gradients=tuple((g[i],) for g in self.gradients)) for i in range(C)]

    def of_bias(self) -> "DenseFactor":
        """Return the factor of the bias alone."""
        assert self.bias is not None
        summed = tuple(torch.stack([part.sum(1) for part in g]) for g in self.gradients)
        return DenseFactor(self.bias, summed, self.bias_weights)

    def weighted(self, weights: Tensor | None, biases: Tensor | None) -> "OuterProductFactor":
        """Return the same factor with lambda of every number, flat, in the order in which it has them."""
        own = None if weights is None else weights.view(self.size[3], depth(self))
        return replace(self, weights=own, bias_weights=biases)

    def vjp(self, u: Tensor, order: int) -> dict[str, Tensor]:
        """Return u . J_order for u (C, N), in some shape, by parameter."""
        own: dict[str, Tensor] = {}
        for p, q in splits(order):
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
        return weighted.flatten(0, 1).T @ a.flatten(0, 1)

    def overlap(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a . b between places, (N', T, T'), of one sample's inputs and those of N' samples."""
        return (b.reshape(-1, b.shape[2]) @ a.T).view(*b.shape[:2], len(a)).transpose(1, 2)

    def add_gram(
        self,
        out: Mapping[Orders, Tensor],
        columns: object,
        lambdas: Mapping[str, float],
        symmetric: bool,
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
            weight, bias = (0.0 if name is None else lambdas.get(name, 0.0) for name in (self.weight, self.bias))
            add_one_place(out, self, columns, (weight, bias), symmetric)
            return
        if self.bias is not None:
            self.of_bias().add_gram(out, columns.of_bias(), lambdas, symmetric)
        scale = lambdas.get(self.weight, 0.0)
        if scale == 0:
            return
        if self.weights is not None or self._explicit_is_cheaper(columns, out):
            orders = sorted({order for pair in out for order in pair})
            for J_rows, J_columns, block in explicit(self, columns, orders):
                weights = None if self.weights is None else self.weights[block].flatten()
                add_products(out, J_rows, J_columns, scale, symmetric, weights)
        else:
            for pair, value in out.items():
                add_mixed(value, self, columns, pair, scale, symmetric and pair[0] == pair[1])

    def multiplications(self) -> float:
        """Return how many the Gram matrix of J_0 with itself takes, roughly."""
        C, N, T, E = self.size
        if self._one_place and T == 1:
            return 0.5 * (C * N) ** 2 * E
        pairs: tuple[Orders, ...] = ((0, 0),)
        if self._explicit_is_cheaper(self, pairs):
            return explicit_cost(self, self, pairs)
        return mixed_cost(self, self, pairs)

    _one_place: ClassVar[bool] = True

    def _explicit_is_cheaper(self, columns: "OuterProductFactor", pairs: Collection[Orders]) -> bool:
        return explicit_cost(self, columns, pairs) <= _MIXED * mixed_cost(self, columns, pairs)


@dataclass(frozen=True)
class EmbeddingFactor(OuterProductFactor):
    """Factor of a table, whose inputs are token numbers (N, T) standing for one-hot vectors, and below 0 for none.

    Args:
        rows_of_table: Number of its rows.
    """

    rows_of_table: int = 0

    _one_place: ClassVar[bool] = False

    def multiplications(self) -> float:
        """Return how many the Gram matrix of J_0 with itself takes, roughly."""
        C, N, T, E = self.size
        return 0.5 * C * N * N * T * E * (T + C)

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
