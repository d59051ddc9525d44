"""The real run's optimizer, once more for a shadow's parameters."""

import copy
import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def twin_optimizer(
    optimizer: Optimizer,
    leaves: Mapping[str, Sequence[Tensor]],
    live: Sequence[tuple[str, weakref.ref[Any]]],
    theta_0: Mapping[str, Tensor],
) -> Optimizer:
    """The same type of optimizer with the same groups; its state is copied for the first of a parameter's leaves.

    Args:
        optimizer: Of the real run.
        leaves: ``{name: leaves}`` in the place of each parameter.
        live: Names and parameters of the real network.
        theta_0: The point of expansion, to which a state must belong.

    Raises:
        ValueError: If it holds trainable parameters of something else, or its state is of another moment.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper
    names = {id(p): name for name, ref in live if (p := ref()) is not None}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        options = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        own: list[Tensor] = []
        for parameter in group["params"]:
            if id(parameter) in names:
                own += leaves[names[id(parameter)]]
            elif parameter.requires_grad:
                raise ValueError(
                    f"optimizer: a parameter {tuple(parameter.shape)} in it is none of the network that this shadow is "
                    "of; give the optimizer of that network, which trains nothing else"
                )
        if own:
            groups.append({**options, "params": own})
    if not groups:
        raise ValueError("optimizer: it holds no trainable parameter of the network that this shadow is of")
    known = inspect.signature(type(optimizer)).parameters
    twin = type(optimizer)(groups, **{key: value for key, value in optimizer.defaults.items() if key in known})
    for parameter, state in optimizer.state.items():
        if state and id(parameter) in names:
            name = names[id(parameter)]
            if not torch.equal(parameter.detach().to(theta_0[name]), theta_0[name]):
                raise ValueError(
                    f"optimizer: it has a state (momentum) and {name!r} is no longer at theta_0; make the shadow and "
                    "its optimizer at the same moment"
                )
            first, *others = leaves[name]
            twin.state[first] = {key: _copied(value, first) for key, value in state.items()}
            for other in others:
                twin.state[other] = {key: _zero(value, other) for key, value in state.items()}
    return twin


def _copied(value: Any, leaf: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(leaf.dtype if value.shape == leaf.shape else value.dtype)
    return copy.deepcopy(value)


def _zero(value: Any, leaf: Tensor) -> Any:
    return torch.zeros_like(leaf) if isinstance(value, Tensor) and value.shape == leaf.shape else copy.deepcopy(value)
