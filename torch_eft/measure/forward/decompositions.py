"""Writes fused operations out in elementary ones, whose derivatives are right at every order.

torch's fused layer norm, instance norm and batch norm with batch statistics have first and second derivatives by
reverse mode; their third ones (and nested forward mode already at second order) are silently wrong, and so is weight
norm's second.
Fused attention and recurrent cells have no second derivative at all. Written out, they also show the linear maps that
they consist of to modes that watch the operations of a network.
"""

import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_eft.measure.forward.recurrent import CELLS, gru, lstm, rnn_relu, rnn_tanh


class Decomposed(TorchFunctionMode):
    """A context in which the operations of ``WRITTEN_OUT`` are computed by elementary operations."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace operations of ``WRITTEN_OUT``, also inside torch's own Python functions; pass on everything else."""
        kwargs = kwargs or {}
        replacement = WRITTEN_OUT.get(func)
        if replacement is not None:
            value = replacement(*args, **kwargs)
            return func(*args, **kwargs) if value is None else value
        body = without_dispatch(func)
        if body is None:
            return func(*args, **kwargs)
        with self:
            return body(*args, **kwargs)


@functools.cache
def without_dispatch(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """Copy a Python function of torch without the step in which it hands itself over as a whole.

    ``F.multi_head_attention_forward`` and its like ask ``has_torch_function`` first and then reach a mode, or a
    subclass of tensors, as one operation. In the copy that answer is no: its body runs, and the operations inside are
    handed over one by one.

    Args:
        func: Any function.

    Returns:
        The copy, or None for builtins and for functions that do not hand themselves over.
    """
    if not isinstance(func, types.FunctionType) or func.__module__ == "torch._tensor":
        return None  # methods of torch._tensor hand their builtin over under their own name: that would never end
    handing_over = [name for name in func.__globals__ if name.startswith("has_torch_function")]
    # boolean_dispatch (F.max_pool2d and others) chooses between two functions, each of which hands over.
    chooses = func.__globals__.get("__name__") == "torch._jit_internal"
    if not handing_over and not chooses:
        return None
    cells = [_undispatched_cell(cell) for cell in func.__closure__ or ()]
    names = _undispatched_globals(func) if handing_over else func.__globals__
    copy = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, tuple(cells))
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


_GLOBALS: dict[int, dict[str, Any]] = {}


def _undispatched_globals(func: types.FunctionType) -> dict[str, Any]:
    """The globals of ``func`` with every ``has_torch_function...`` answering no; one copy per module."""
    names = _GLOBALS.get(id(func.__globals__))
    if names is None:
        names = dict(func.__globals__)
        names |= {name: _no for name in names if name.startswith("has_torch_function")}
        _GLOBALS[id(func.__globals__)] = names
    return names


def _undispatched_cell(cell: types.CellType) -> types.CellType:
    body = without_dispatch(cell.cell_contents) if isinstance(cell.cell_contents, types.FunctionType) else None
    return cell if body is None else types.CellType(body)


def _no(*args: Any) -> bool:
    return False


def _normalized(
    x: Tensor, axes: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, shape: Sequence[int]
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over ``axes``, times weight plus bias, both brought to ``shape``."""
    axes = tuple(axes)
    centered = x - x.mean(axes, keepdim=True)
    value = centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()
    return _affine(value, weight, bias, shape)


def _affine(value: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weight is not None:
        value = value * weight.reshape(shape)
    return value if bias is None else value + bias.reshape(shape)


def _per_channel(x: Tensor) -> tuple[int, ...]:
    return (-1, *[1] * (x.ndim - 2))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _normalized(input, range(-len(normalized_shape), 0), weight, bias, eps, normalized_shape)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    value = input * (input.square().mean(axes, keepdim=True) + eps).rsqrt()
    return _affine(value, weight, None, normalized_shape)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    value = _normalized(grouped, [-1], None, None, eps, ()).reshape(input.shape)
    return _affine(value, weight, bias, _per_channel(input))


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor | None:
    """An affine map by the running statistics, or with those of the batch; None where it would update the former."""
    shape = _per_channel(input)
    if not training:
        if running_mean is None or running_var is None:
            return None
        # Folded first: the entries of the batch are many, those of the channels are few.
        scale = (running_var + eps).rsqrt() if weight is None else weight * (running_var + eps).rsqrt()
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        return input * scale.reshape(shape) + shift.reshape(shape)
    if running_mean is not None:
        return None
    return _normalized(input, [0, *range(2, input.ndim)], weight, bias, eps, shape)


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor | None:
    if not use_input_stats:
        return _batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)
    if running_mean is not None:
        return None
    return _normalized(input, range(2, input.ndim), weight, bias, eps, _per_channel(input))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = tuple(range(v.ndim)) if dim == -1 else tuple(axis for axis in range(v.ndim) if axis != dim)
    return v * (g / v.square().sum(axes, keepdim=dim != -1).sqrt())


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """softmax(scale Q K^T + mask) V as ``F.scaled_dot_product_attention`` computes it; None with dropout."""
    if dropout_p > 0:
        return None
    if enable_gqa:
        key, value = _repeated(key, query), _repeated(value, query)
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return scores.softmax(-1) @ value
    # A row that sees nothing would be 0/0. torch returns zeros for it; its derivatives must be zeros, too.
    constant = attn_mask.detach()
    blind = (constant.logical_not() if constant.dtype == torch.bool else constant == -math.inf).all(-1, keepdim=True)
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill((attn_mask | blind).logical_not(), -math.inf)
    else:
        scores = scores + attn_mask.masked_fill(blind, 0.0)
    return scores.softmax(-1).masked_fill(blind, 0.0) @ value


def _repeated(heads: Tensor, query: Tensor) -> Tensor:
    return heads.repeat_interleave(query.shape[-3] // heads.shape[-3], -3)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor | None:
    """Piecewise linear; torch's own has no second derivative, not even 0."""
    return None if inplace else (input + 3).clamp(0, 6) / 6


WRITTEN_OUT: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.layer_norm: _layer_norm,
    torch.rms_norm: _rms_norm,
    torch.group_norm: _group_norm,
    torch.batch_norm: _batch_norm,
    torch.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
    torch.nn.functional.hardsigmoid: _hardsigmoid,
    torch._C._nn.glu: _glu,
    torch._C._nn.scaled_dot_product_attention: _attention,
    torch.lstm: lstm,
    torch.gru: gru,
    torch.rnn_tanh: rnn_tanh,
    torch.rnn_relu: rnn_relu,
    **CELLS,
}
"""Builtin function of torch -> its decomposition, which returns None where it cannot be written out."""

NORMS = frozenset([torch.layer_norm, torch.rms_norm, torch.group_norm, torch.batch_norm, torch.instance_norm])
"""Those of them that round otherwise than their decompositions."""
