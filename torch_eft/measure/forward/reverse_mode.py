"""Reverse mode, once and over itself: gradients of gradients, with zeros where nothing depends on a parameter."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.isolation.live import live

_log = logging.getLogger("torch_eft")


def pull_back(
    values: Sequence[Tensor], weights: Sequence[Tensor], leaves: Sequence[Tensor], keep: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradient of ``sum values . weights`` with the weights held fixed.

    Args:
        values: Functions of the leaves.
        weights: One of the same shape for every value.
        leaves: What is differentiated with respect to.
        keep: Make the gradient differentiable in turn, also with respect to the weights.

    Returns:
        One tensor per leaf.
    """
    pairs = [pair for pair in zip(values, weights, strict=True) if pair[0].requires_grad]
    if not pairs or not leaves:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    dependent, fixed = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(
        dependent, leaves, fixed, retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True
    )
    return tuple(gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients)


def gradients_along(
    value: Tensor, leaves: Sequence[Tensor], direction: Sequence[Tensor], order: int
) -> list[tuple[Tensor, ...]]:
    """Return the Taylor coefficients along ``direction`` of the gradient of one number.

    Args:
        value: 0-d.
        leaves: What is differentiated with respect to.
        direction: One tensor per leaf; not looked at for order 0.
        order: Of the last coefficient.

    Returns:
        For every m up to ``order`` one tensor per leaf: J_m = (J_{m-1} . v)' / m.
    """
    coefficients = []
    for m in range(order + 1):
        gradient = pull_back([value], [torch.ones_like(value)], leaves, keep=m < order)
        coefficients.append(gradient)
        if m < order:
            value = torch.stack([(g * v).sum() for g, v in zip(gradient, direction, strict=True)]).sum() / (m + 1)
    return coefficients


def ordinary_gradients(
    network: IsolatedModel, inputs: Any, weights: Tensor, names: Sequence[str], block: int
) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Return outputs and the gradient of ``sum weights . outputs`` by one ordinary forward and backward pass.

    At the module's own parameters it is the module itself that runs (``live``), unless its forward writes to tensors of
    the training, fails or rounds more coarsely than its copy: then, and at other parameters, the copy runs.

    Args:
        network: The network.
        inputs: All samples, where the network is.
        weights: (C, N).
        names: The parameters wanted.
        block: The number of samples of one pass.

    Returns:
        (N, C), ``{name: gradient}``, and whether the module itself ran.
    """
    own = dict(network.origin.named_parameters())
    if network.at_own_parameters and network.isolation.rounding <= torch.finfo(weights.dtype).eps:
        try:
            with live(network) as run:
                return *_in_blocks(run, inputs, weights, {name: own[name] for name in names}, block), True
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            _log.info("torch_eft: the module itself does not run (%s: %s); its copy does", type(error).__name__, error)
    leaves = {name: network.params[name].detach().requires_grad_() for name in names}
    return *_in_blocks(partial(network, {**network.params, **leaves}), inputs, weights, leaves, block), False


def _in_blocks(
    run: Callable[[Any], Tensor], inputs: Any, weights: Tensor, leaves: Mapping[str, Tensor], block: int
) -> tuple[Tensor, dict[str, Tensor]]:
    outputs: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for start in range(0, weights.shape[1], block):
        rows = slice(start, start + block)
        z = run(tree_map_only(Tensor, partial(_rows, rows=rows), inputs))
        outputs.append(z.detach())
        if z.requires_grad:
            gradients = torch.autograd.grad((z * weights[:, rows].T).sum(), list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
                    sums[name] = sums[name] + dense if name in sums else dense
    return torch.cat(outputs), {
        name: sums[name] if name in sums else torch.zeros_like(leaf) for name, leaf in leaves.items()
    }


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[rows].clone()
