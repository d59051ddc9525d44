"""Jacobians formed number by number: the fallback for parameters and operations that are not recognized."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.checks import check_twice_differentiable
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.jacobian.gram import DenseFactor, Factor
from torch_eft.measure.jacobian.plan import sample_count, slice_of
from torch_eft.measure.jets.jet import coefficients_of, jet


def reverse_factors(
    network: IsolatedModel, inputs: Any, moving: Sequence[str], direction: Mapping[str, Tensor], order: int
) -> list[Factor]:
    """J_0 .. J_order of every parameter by reverse mode of reverse mode, for operations that jets do not know.

    Raises:
        RuntimeError: If an operation has no derivative of order + 1.
    """
    leaves = [network.params[name].detach().requires_grad_() for name in moving]
    with Decomposed():
        outputs = network({**network.params, **dict(zip(moving, leaves, strict=True))}, inputs)
        if order:
            check_twice_differentiable(outputs)
        along = [direction[name] for name in moving]
        # A checkpoint runs its part of the forward again, and must find it written out as before.
        rows = [[_reverse_series(value, leaves, along, order) for value in row] for row in outputs]
    return [
        DenseFactor(
            name,
            tuple(
                torch.stack([torch.stack([row[i][m][index] for row in rows]) for i in range(outputs.shape[1])])
                for m in range(order + 1)
            ),
        )
        for index, name in enumerate(moving)
    ]


def _reverse_series(value: Tensor, leaves: Sequence[Tensor], along: Sequence[Tensor], order: int) -> list[list[Tensor]]:
    """Of one number, for every m the flattened rows of J_m, parameter by parameter."""
    found = []
    for m in range(order + 1):
        if value.requires_grad:
            gradients = torch.autograd.grad(
                value,
                leaves,
                create_graph=m < order,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
        found.append([g.detach().flatten() for g in gradients])
        # J_m = (J_{m-1} . v)' / m
        value = torch.stack([(g * v).sum() for g, v in zip(gradients, along, strict=True)]).sum() / (m + 1)
    return found


def fallback_factors(
    network: IsolatedModel,
    inputs: Any,
    names: Sequence[str],
    moving: Sequence[str],
    direction: Mapping[str, Tensor] | None,
    order: int,
) -> list[Factor]:
    """The Jacobian of some parameters, one sample at a time."""
    if order == 0:
        rows = _first_order(network, inputs, names)
        return [DenseFactor(name, (rows[name].flatten(2).transpose(0, 1),)) for name in names]
    assert direction is not None
    found: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(order + 1)] for name in names}
    for index in range(sample_count(inputs)):
        leaves = {name: network.params[name].detach().requires_grad_() for name in moving}
        outputs = network({**network.params, **along(leaves, direction, order)}, slice_of(inputs, index, 1))
        for m, part in enumerate(coefficients_of(outputs, order)):
            for name, row in zip(names, _rows(part, [leaves[name] for name in names], outputs.shape[1]), strict=True):
                found[name][m].append(row)
    return [DenseFactor(name, tuple(torch.stack(parts, 1) for parts in found[name])) for name in names]


def _rows(part: Tensor | None, leaves: Sequence[Tensor], channels: int) -> list[Tensor]:
    """D part_i / d leaf, (C, P) each; ``part`` is (1, C)."""
    if part is None or not part.requires_grad:
        return [leaf.new_zeros(channels, leaf.numel()) for leaf in leaves]
    gradients = [
        torch.autograd.grad(part[0, i], leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for i in range(channels)
    ]
    return [torch.stack(row).flatten(1) for row in zip(*gradients, strict=True)]


def _first_order(network: IsolatedModel, inputs: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """(N, C, *parameter) by name."""
    moving = {name: network.params[name] for name in names}
    still = {name: value for name, value in network.params.items() if name not in moving}

    def one_sample(params: dict[str, Tensor], sample: Any) -> Tensor:
        return network({**params, **still}, tree_map_only(Tensor, lambda tensor: tensor[None], sample))[0]

    try:
        return vmap(jacrev(one_sample), in_dims=(None, 0))(moving, inputs)
    except (RuntimeError, NotImplementedError):  # an op without a batching rule: one sample at a time
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for index in range(sample_count(inputs)):
            leaves = {name: value.detach().requires_grad_() for name, value in moving.items()}
            outputs = network({**still, **leaves}, slice_of(inputs, index, 1))
            for name, row in zip(names, _rows(outputs, list(leaves.values()), outputs.shape[1]), strict=True):
                rows[name].append(row)
        return {name: torch.stack(parts) for name, parts in rows.items()}


def along(leaves: Mapping[str, Tensor], direction: Mapping[str, Tensor], order: int) -> dict[str, Tensor]:
    """Parameters as jets along ``direction``."""
    return {name: jet([leaf, direction[name], *[None] * (order - 1)]) for name, leaf in leaves.items()}
