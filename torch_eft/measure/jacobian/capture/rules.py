"""Which operations are recorded, and how: a rule returns None for a use of a parameter that it does not know."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_eft.measure.jacobian.capture.recorder import RULES, Capture, fresh, rule_for
from torch_eft.measure.jacobian.capture.slopes import gelu, silu
from torch_eft.measure.jets.jet import Jet, coefficients_of, jet, with_numbers_of


@rule_for(F.linear)
def _linear(capture: Capture, func: Any, input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    w, b = capture.name(weight), capture.name(bias)
    if (w is None and b is None) or weight.ndim != 2:
        return None
    output = func(input, fresh(weight) if w else weight, fresh(bias) if b else bias)
    if w is None:
        return capture.record("scale", None, b, output, output, shape=bias.shape)
    return capture.record("linear", w, b, input, output)


@rule_for(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(capture: Capture, func: Any, input: Any, weight: Any) -> Tensor | None:
    w = capture.name(weight)
    if w is None or weight.ndim != 2 or capture.name(input) is not None:
        return None
    return capture.record("linear", w, None, input, func(input, fresh(weight)), transposed=True)


@rule_for(torch.addmm)
def _addmm(capture: Capture, func: Any, bias: Any, input: Any, weight: Any) -> Tensor | None:
    w, b = capture.name(weight), capture.name(bias)
    if w is None or bias.ndim != 1 or capture.name(input) is not None:
        return None
    output = func(fresh(bias) if b else bias, input, fresh(weight))
    return capture.record("linear", w, b, input, output, transposed=True)


def _convolution(
    capture: Capture,
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    w, b = capture.name(weight), capture.name(bias)
    if w is None or input.ndim != weight.ndim:
        return None
    output = func(input, fresh(weight), fresh(bias) if b else bias, stride, padding, dilation, groups)
    options = dict(kernel=weight.shape[2:], stride=stride, padding=padding, dilation=dilation, groups=groups)
    return capture.record("convolution", w, b, input, output, **options)


def _transposed(
    capture: Capture,
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor | None:
    w, b = capture.name(weight), capture.name(bias)
    if w is None or input.ndim != weight.ndim:
        return None
    # The bias apart: the weight's Jacobian needs the gradient in windows, the bias's does not.
    output = func(input, fresh(weight), None if b else bias, stride, padding, output_padding, groups, dilation)
    options = dict(kernel=weight.shape[2:], stride=stride, padding=padding, dilation=dilation, groups=groups)
    output = capture.record("transposed convolution", w, None, input, output, **options)
    if b is None:
        return output
    shape = (-1, *[1] * (weight.ndim - 2))
    output = output + fresh(bias).reshape(shape)
    return capture.record("scale", None, b, output, output, shape=bias.reshape(shape).shape)


for _dimension in ("1d", "2d", "3d"):
    RULES[getattr(torch, f"conv{_dimension}")] = _convolution
    RULES[getattr(F, f"conv{_dimension}")] = _convolution
    RULES[getattr(torch, f"conv_transpose{_dimension}")] = _transposed
    RULES[getattr(F, f"conv_transpose{_dimension}")] = _transposed


@rule_for(torch.embedding)
def _embedding(
    capture: Capture,
    func: Any,
    weight: Any,
    indices: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    w = capture.name(weight)
    if w is None or scale_grad_by_freq:
        return None
    table, tokens = fresh(weight), indices
    if padding_idx >= 0:  # torch holds this row constant
        tokens = torch.where(indices == padding_idx, -1, indices)
        if isinstance(table, Jet):
            first, *others = table.coefficients
            kept = torch.arange(len(weight), device=weight.device)[:, None] != padding_idx
            table = jet([first, *(part if part is None else part * kept for part in others)])
    return capture.record("embedding", w, None, tokens, func(table, indices), rows=len(weight))


def _scaled(
    capture: Capture,
    normalized: Any,
    weight: Any,
    bias: Any,
    shape: Sequence[int],
    fused: Callable[[Any], None] | None = None,
) -> Tensor:
    """Return normalized * weight + bias, both brought to ``shape``; ``fused`` puts other numbers into the result."""
    w, b = capture.name(weight), capture.name(bias)
    shape = (bias if weight is None else weight).reshape(shape).shape
    output = normalized
    if weight is not None:
        output = output * (fresh(weight) if w else weight).reshape(shape)
    if bias is not None:
        output = output + (fresh(bias) if b else bias).reshape(shape)
    if fused is not None:
        fused(output)
    return capture.record("scale", w, b, normalized, output, shape=shape)


def _numbers_of(func: Callable[..., Any], *args: Any) -> Callable[[Any], None]:
    """Return what puts a fused operation's numbers into the result of its parts."""
    return lambda output: with_numbers_of(output, func, *args)


@rule_for(torch.layer_norm)
def _layer_norm(
    capture: Capture,
    func: Any,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor | None:
    if capture.name(weight) is None and capture.name(bias) is None:
        return None
    plain = func(input, normalized_shape, None, None, eps)
    fused = _numbers_of(func, input, normalized_shape, weight, bias, eps)
    return _scaled(capture, plain, weight, bias, tuple(normalized_shape), fused)


@rule_for(torch.rms_norm)
def _rms_norm(
    capture: Capture, func: Any, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor | None:
    if capture.name(weight) is None:
        return None
    fused = _numbers_of(func, input, normalized_shape, weight, eps)
    return _scaled(capture, func(input, normalized_shape, None, eps), weight, None, tuple(normalized_shape), fused)


@rule_for(torch.group_norm)
def _group_norm(
    capture: Capture,
    func: Any,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor | None:
    if capture.name(weight) is None and capture.name(bias) is None:
        return None
    fused = _numbers_of(func, input, num_groups, weight, bias, eps)
    return _scaled(capture, func(input, num_groups, None, None, eps), weight, bias, _channels(input), fused)


def _channel_norm(
    capture: Capture, func: Any, input: Any, weight: Any, bias: Any, mean: Any, variance: Any, *others: Any
) -> Tensor | None:
    if capture.name(weight) is None and capture.name(bias) is None:
        return None
    updates = mean is not None and bool(others and others[0])  # running statistics, once
    fused = None if updates else _numbers_of(func, input, weight, bias, mean, variance, *others)
    if func is torch.batch_norm and type(input) is Tensor and mean is not None and not others[0]:
        shape = _channels(input)  # its backward pass is a product, torch's own takes several times as long
        plain = (input - mean.reshape(shape)) * (variance + others[2]).rsqrt().reshape(shape)
    else:
        plain = func(input, None, None, mean, variance, *others)
    return _scaled(capture, plain, weight, bias, _channels(input), fused)


RULES[torch.batch_norm] = RULES[torch.instance_norm] = _channel_norm


@rule_for(torch.prelu, F.prelu)
def _prelu(capture: Capture, func: Any, input: Any, weight: Any) -> Tensor | None:
    w = capture.name(weight)
    if w is None:
        return None
    below = -torch.relu(-input)
    shape = _channels(input) if weight.numel() > 1 else tuple([1] * input.ndim)
    return torch.relu(input) + _scaled(capture, below, weight, None, shape)


@rule_for(Tensor.reshape, torch.reshape, Tensor.view, Tensor.unsqueeze, torch.unsqueeze, Tensor.__getitem__)
def _reshaped(capture: Capture, func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """A gain or shift is often brought to the shape of what it meets, such as (C, 1, 1)."""
    name = capture.name(input)
    if name is None:
        return None
    output = func(input, *args, **kwargs)
    before, after = (coefficients_of(x, 0)[0] for x in (input, output))
    assert before is not None and after is not None
    if after._is_view() and after.numel() == before.numel() and before.is_contiguous() and after.is_contiguous():
        capture.note_shape(name, output)
    return output


@rule_for(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(capture: Capture, func: Any, input: Any, other: Any, *, alpha: float = 1) -> Tensor | None:
    for x, parameter in ((input, other), (other, input)):
        b = capture.stretched(parameter)
        if b is not None and alpha == 1 and _broadcasts(parameter, x):
            return capture.record("scale", None, b, x, x + fresh(parameter), shape=parameter.shape)
    return None


@rule_for(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(capture: Capture, func: Any, input: Any, other: Any) -> Tensor | None:
    for x, parameter in ((input, other), (other, input)):
        w = capture.stretched(parameter)
        if w is not None and _broadcasts(parameter, x):
            return capture.record("scale", w, None, x, x * fresh(parameter), shape=parameter.shape)
    return None


@rule_for(Tensor.expand)
def _expand(capture: Capture, func: Any, input: Any, *sizes: Any) -> Tensor | None:
    b = capture.name(input)
    if b is None:
        return None
    output = func(fresh(input), *sizes)
    return capture.record("scale", None, b, output, output, shape=input.shape)


def _broadcasts(parameter: Tensor, x: Any) -> bool:
    """Return whether ``parameter`` is stretched to the shape of ``x``, and not the other way round."""
    return (
        isinstance(x, Tensor) and x.is_floating_point() and torch.broadcast_shapes(parameter.shape, x.shape) == x.shape
    )


def _channels(x: Tensor) -> tuple[int, ...]:
    return (-1, *[1] * (x.ndim - 2))


_MANY = 2**12
"""Numbers from which an activation's slope is worth keeping."""


@rule_for(F.gelu)
def _gelu(capture: Capture, func: Any, input: Any, *, approximate: str = "none") -> Tensor | None:
    return gelu(input, approximate) if _has_many(input) else None


@rule_for(F.silu, torch._C._nn.silu)
def _silu(capture: Capture, func: Any, input: Any, inplace: bool = False) -> Tensor | None:
    return silu(input) if _has_many(input) and not inplace else None


def _has_many(x: Any) -> bool:
    return type(x) is Tensor and x.requires_grad and x.numel() >= _MANY
