"""Copies the real run's optimizer for the parameters of a Taylor model."""

import copy
import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_eft.measure.kernels.optimizers import plain_optimizer


def optimizer_copy(
    optimizer: Optimizer,
    leaves: Mapping[str, Sequence[Tensor]],
    originals: Sequence[tuple[str, weakref.ref[Any]]],
    theta_0: Mapping[str, Tensor],
) -> Optimizer:
    """Make an optimizer of the same type with the same groups; the first leaf of a parameter takes over its state.

    Args:
        optimizer: The optimizer of the real run.
        leaves: ``{name: leaves}`` that replace each parameter.
        originals: Names and parameters of the real network.
        theta_0: The point of expansion, to which a state must belong.

    Returns:
        The new optimizer.

    Raises:
        ValueError: If it holds trainable parameters of something else, or its state belongs to another moment.
    """
    optimizer = plain_optimizer(optimizer)
    names = {id(p): name for name, ref in originals if (p := ref()) is not None}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        options = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        own: list[Tensor] = []
        for parameter in group["params"]:
            if id(parameter) in names:
                own += leaves[names[id(parameter)]]
            elif parameter.requires_grad:
                raise ValueError(
                    f"optimizer: a parameter {tuple(parameter.shape)} in it does not belong to the network of this "
                    "copy, or was frozen when that was made; give the optimizer of that network alone"
                )
        if own:
            groups.append({**options, "params": own})
    if not groups:
        raise ValueError("optimizer: it holds no trainable parameter of the network of this Taylor model")
    kind = type(optimizer)
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizer: {kind.__name__} computes gradients itself, by the loop's closure, in which a copy would train "
            "the network; use one that takes its steps from gradients"
        )
    known = inspect.signature(kind).parameters
    try:
        copied = kind(groups, **{key: value for key, value in optimizer.defaults.items() if key in known})
    except TypeError as error:
        raise ValueError(
            f"optimizer: {kind.__name__} cannot be made anew from its param_groups and defaults ({error}); keep "
            "arguments of its constructor in defaults, as torch.optim does"
        ) from None
    for parameter, state in optimizer.state.items():
        if state and id(parameter) in names:
            name = names[id(parameter)]
            if not torch.equal(parameter.detach().to(theta_0[name]), theta_0[name]):
                raise ValueError(
                    f"optimizer: it has a state (momentum) and {name!r} is no longer at theta_0; make the Taylor "
                    "model and its optimizer at the same moment"
                )
            first, *others = leaves[name]
            copied.state[first] = {key: _copied(value, first) for key, value in state.items()}
            for other in others:
                copied.state[other] = {key: _zero(value, other) for key, value in state.items()}
    return copied


def same_options(own_optimizer: Optimizer, optimizer: Optimizer) -> None:
    """Take over the learning rates (and all else) in force for the coming step.

    Args:
        own_optimizer: The copy.
        optimizer: The real one.
    """
    inner = plain_optimizer(optimizer)
    groups = [group for group in inner.param_groups if any(p.requires_grad for p in group["params"])]
    for own, group in zip(own_optimizer.param_groups, groups, strict=False):
        own.update({key: value for key, value in group.items() if key not in ("params", "param_names")})


def _copied(value: Any, leaf: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(leaf.dtype if value.shape == leaf.shape else value.dtype)
    return copy.deepcopy(value)


def _zero(value: Any, leaf: Tensor) -> Any:
    return torch.zeros_like(leaf) if isinstance(value, Tensor) and value.shape == leaf.shape else copy.deepcopy(value)
