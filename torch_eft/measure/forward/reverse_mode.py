"""Reverse mode over reverse mode: gradients of gradients, with zeros where nothing depends on a parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    return torch.autograd.grad(
        dependent, leaves, fixed, retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True
    )


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
