"""Jacobians formed number by number: the fallback for parameters and operations that are not recognized."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from torch_eft.measure.forward.checks import check_twice_differentiable
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.reverse_mode import gradients_along, pull_back
from torch_eft.measure.jacobian.gram import DenseFactor, Factor
from torch_eft.measure.jacobian.plan import sample_count, slice_of
from torch_eft.measure.jets.jet import coefficients_of, jet


def reverse_factors(
    network: IsolatedModel, inputs: Any, trainable: Sequence[str], direction: Mapping[str, Tensor], order: int
) -> list[Factor]:
    """Compute J_0 .. J_order of every parameter by reverse mode of reverse mode, for operations without jets.

    Args:
        network: The network.
        inputs: Some samples, where the network is.
        trainable: Names of the parameters.
        direction: What J is differentiated along.
        order: Of the last coefficient.

    Returns:
        One factor per parameter. torch raises a ``RuntimeError`` if an operation has no derivative of order + 1.
    """
    leaves = [network.params[name].detach().requires_grad_() for name in trainable]
    with Decomposed():
        outputs = network({**network.params, **dict(zip(trainable, leaves, strict=True))}, inputs)
        if order:
            check_twice_differentiable(outputs)
        v = [direction[name] for name in trainable]
        # A checkpoint runs its part of the forward again, and must find it written out as before.
        rows = [
            [[g.detach().flatten() for g in gradient] for gradient in gradients_along(value, leaves, v, order)]
            for value in outputs.T.flatten()
        ]
    return [
        DenseFactor(
            name,
            tuple(torch.stack([row[m][i] for row in rows]).unflatten(0, outputs.T.shape) for m in range(order + 1)),
        )
        for i, name in enumerate(trainable)
    ]


def fallback_factors(
    network: IsolatedModel,
    inputs: Any,
    names: Sequence[str],
    trainable: Sequence[str],
    direction: Mapping[str, Tensor] | None,
    order: int,
    looped: bool = False,
) -> list[Factor]:
    """Compute the Jacobian of some parameters, one sample at a time.

    Args:
        network: The network.
        inputs: Some samples, where the network is.
        names: The parameters wanted.
        trainable: All parameters that the direction moves.
        direction: What J is differentiated along; needed above order 0.
        order: Of the last coefficient.
        looped: Do without ``vmap``, at order 0.

    Returns:
        One factor per parameter.
    """
    if order == 0:
        rows = _first_order(network, inputs, names, looped)
        return [DenseFactor(name, (rows[name].reshape(*rows[name].shape[:2], -1).transpose(0, 1),)) for name in names]
    assert direction is not None
    jacobians: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(order + 1)] for name in names}
    for index in range(sample_count(inputs)):
        leaves = {name: network.params[name].detach().requires_grad_() for name in trainable}
        outputs = network({**network.params, **along(leaves, direction, order)}, slice_of(inputs, index, 1))
        for m, part in enumerate(coefficients_of(outputs, order)):
            for name, row in zip(names, _rows(part, [leaves[name] for name in names], outputs.shape[1]), strict=True):
                jacobians[name][m].append(row)
    return [DenseFactor(name, tuple(torch.stack(parts, 1) for parts in jacobians[name])) for name in names]


def _rows(part: Tensor | None, leaves: Sequence[Tensor], channels: int) -> list[Tensor]:
    """Return d part_i / d leaf, (C, P) each; ``part`` is (1, C)."""
    values = [leaves[0].new_zeros(())] * channels if part is None else part[0].unbind()
    gradients = [pull_back([value], [torch.ones_like(value)], leaves) for value in values]
    return [torch.stack(row).reshape(channels, -1) for row in zip(*gradients, strict=True)]


def _first_order(network: IsolatedModel, inputs: Any, names: Sequence[str], looped: bool) -> dict[str, Tensor]:
    """Return J_0, (N, C, *parameter) by name."""
    own = {name: network.params[name] for name in names}
    others = {name: value for name, value in network.params.items() if name not in own}

    def one_sample(params: dict[str, Tensor], sample: Any) -> Tensor:
        return network({**params, **others}, tree_map_only(Tensor, lambda tensor: tensor[None], sample))[0]

    axes = tree_map(lambda value: 0 if isinstance(value, Tensor) else None, inputs)
    if not looped:
        try:
            with _Batchable():
                return vmap(jacrev(one_sample), in_dims=(None, axes))(own, inputs)
        except (RuntimeError, NotImplementedError):  # an op without a batching rule: one sample at a time
            pass
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for index in range(sample_count(inputs)):
        leaves = {name: value.detach().requires_grad_() for name, value in own.items()}
        outputs = network({**others, **leaves}, slice_of(inputs, index, 1))
        for name, row in zip(names, _rows(outputs, list(leaves.values()), outputs.shape[1]), strict=True):
            rows[name].append(row)
    return {name: torch.stack(parts) for name, parts in rows.items()}


class _Batchable(TorchFunctionMode):
    """A context in which PReLU is a choice: vmap of its reverse mode takes samples for outputs (torch 2.13)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace ``prelu``; pass on everything else."""
        return (_prelu if func in (torch.prelu, torch.nn.functional.prelu) else func)(*args, **(kwargs or {}))


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    slope = weight.reshape(-1, *[1] * (input.ndim - 2)) if weight.numel() > 1 else weight.reshape(())
    return torch.where(input > 0, input, slope * input)


def along(leaves: Mapping[str, Tensor], direction: Mapping[str, Tensor], order: int) -> dict[str, Tensor]:
    """Return parameters as jets along ``direction``."""
    return {name: jet([leaf, direction[name], *[None] * (order - 1)]) for name, leaf in leaves.items()}
