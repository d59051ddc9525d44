"""Normalisations written out in operations whose derivatives are right at every order.

torch's fused layer norm, instance norm, batch norm with batch statistics and weight norm have first and second
derivatives by reverse mode; their third ones (and nested forward mode already at second order) are silently wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class WrittenOut(TorchFunctionMode):
    """A context in which fused normalisations are computed by elementary operations."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces the operations in ``_REPLACEMENTS``; everything else is passed on."""
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        value = replacement(*args, **kwargs) if replacement else None
        return func(*args, **kwargs) if value is None else value


def _normalised(
    x: Tensor, axes: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, shape: Sequence[int]
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over ``axes``, times weight plus bias, both brought to ``shape``."""
    axes = tuple(axes)
    centred = x - x.mean(axes, keepdim=True)
    value = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    if weight is not None:
        value = value * weight.reshape(shape)
    return value if bias is None else value + bias.reshape(shape)


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _normalised(x, range(-len(normalized_shape), 0), weight, bias, eps, normalized_shape)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """With batch statistics; None (as torch has it) where running ones are used or to be updated."""
    if running_mean is not None or not training:
        return None
    return _normalised(x, [0, *range(2, x.ndim)], weight, bias, eps, (-1, *[1] * (x.ndim - 2)))


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if running_mean is not None or not use_input_stats:
        return None
    return _normalised(x, range(2, x.ndim), weight, bias, eps, (-1, *[1] * (x.ndim - 2)))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
}
