"""Activations that keep their slope: their backward pass, taken once an output, is a product then."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Sloped(torch.autograd.Function):
    """A value with its slope, both known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable  # the slope of the slope is not known
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None


def gelu(x: Tensor, approximate: str) -> Tensor:
    """Return torch's own GELU, with its slope."""
    with torch.no_grad():
        value = torch.ops.aten.gelu(x, approximate=approximate)
        slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)
    result: Tensor = _Sloped.apply(x, value, slope)
    return result


def silu(x: Tensor) -> Tensor:
    """Return torch's own SiLU, with its slope."""
    with torch.no_grad():
        value, slope = torch.ops.aten.silu(x), torch.ops.aten.silu_backward(torch.ones_like(x), x)
    result: Tensor = _Sloped.apply(x, value, slope)
    return result
