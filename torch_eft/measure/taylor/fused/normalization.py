"""Normalization of jets about constant parameters, as one node of autograd's graph; BatchNorm as in training.

With c = x - mean and u = variance + eps, y = c u^(-1/2). Orders of the variance are v_j = sum_i <c_i c_{j-i}>, those of
r = u^(-1/2) and of its slope s = -r / (2 u) follow by their differential equations, and y_j = sum_i c_i r_{j-i}.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from torch_eft.measure.jets.jet import Jet, coefficients_of, jet


def group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *cudnn: Any
) -> Tensor | None:
    """``torch.group_norm`` of a jet; None where it is none with constant h_0."""
    if not _lasting(input):
        return None
    value = normalized(input.reshape(input.shape[0], num_groups, -1), [-1], eps)
    return None if value is None else _affine(value.reshape(input.shape), weight, bias, _channels(input))


def layer_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *cudnn: Any
) -> Tensor | None:
    """``torch.layer_norm``, likewise."""
    value = normalized(input, [*range(-len(normalized_shape), 0)], eps) if _lasting(input) else None
    return None if value is None else _affine(value, weight, bias, normalized_shape)


def _lasting(x: Any) -> bool:
    return isinstance(x, Jet) and not x.primal.requires_grad and any(part is not None for part in x.coefficients[1:])


def _channels(x: Tensor) -> tuple[int, ...]:
    return (-1, *[1] * (x.ndim - 2))


def _affine(value: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Value times weight plus bias: jets about constants, or constants."""
    if weight is None and bias is None:
        return value
    order = value.order if isinstance(value, Jet) else 0
    y = coefficients_of(value, order)
    given = ((None,) * (order + 1) if part is None else coefficients_of(part, order) for part in (weight, bias))
    w, b = ([None if part is None else part.reshape(shape) for part in parts] for parts in given)
    if any(part is not None for part in (*w[2:], *b[2:])) or (w[0] is None and weight is not None):
        value = value if weight is None else value * weight.reshape(shape)
        return value if bias is None else value + bias.reshape(shape)
    assert y[0] is not None
    first = y[0] if w[0] is None else y[0] * w[0]
    first = first if b[0] is None else first + b[0]
    higher = _Affine.apply(y[0], w[0], w[1], b[1], *y[1:])
    return jet((first, *higher))


class _Affine(torch.autograd.Function):
    """o_j = y_j w_0 + y_{j-1} w_1, and b_1 at j = 1; everything but y_0 and w_0 may be None."""

    @staticmethod
    def forward(
        ctx: Any, y0: Tensor, w0: Tensor | None, w1: Tensor | None, b1: Tensor | None, *higher: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y = (y0, *higher)
        ctx.save_for_backward(w0, w1, *y)
        ctx.of_bias = None if b1 is None else b1.shape
        outputs: list[Tensor | None] = []
        for j, part in enumerate(higher, start=1):
            value = None if part is None else part if w0 is None else part * w0
            before = y[j - 1]
            if w1 is not None and before is not None:
                value = before * w1 if value is None else torch.addcmul(value, before, w1)
            if j == 1 and b1 is not None:
                value = b1.expand_as(y0).clone() if value is None else value + b1
            outputs.append(value.clone() if value is part and value is not None else value)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        w0, w1, *y = ctx.saved_tensors
        G = (None, *gradients, None)
        of_y: list[Tensor | None] = []
        for m in range(1, len(y)):
            here, after, value = G[m], G[m + 1], None
            if ctx.needs_input_grad[3 + m]:
                value = here if here is None or w0 is None else here * w0
                if after is not None and w1 is not None:
                    value = after * w1 if value is None else torch.addcmul(value, after, w1)
            of_y.append(value)
        of_w = of_b = None
        if ctx.needs_input_grad[2]:
            for j in range(1, len(y)):
                part, before = G[j], y[j - 1]
                if part is not None and before is not None:
                    term = (part * before).sum_to_size(w1.shape)
                    of_w = term if of_w is None else of_w + term
        if ctx.needs_input_grad[3] and G[1] is not None:
            of_b = G[1].sum_to_size(ctx.of_bias)
        return None, None, of_w, of_b, *of_y


def normalized(x: Jet, axes: Sequence[int], eps: float) -> Jet | None:
    """(x - mean) / sqrt(variance + eps) over ``axes`` of a jet with constant h_0; None if it is another one."""
    if x.primal.requires_grad or x.coefficients[1] is None:
        return None
    axes = tuple(axes)
    c0 = x.primal - x.primal.mean(axes, keepdim=True)
    u0 = c0.square().mean(axes, keepdim=True) + eps
    return jet((c0 * u0.rsqrt(), *_Normalized.apply(axes, c0, u0, *x.coefficients[1:])))


class _Normalized(torch.autograd.Function):
    """The higher orders of y, of those of x (of which any but the first may be None); formulas at the top.

    With gradients G_j of y_j, those of c_m are sum_{j >= m} (G_j r_{j-m} + 2/n g_j c_{j-m}), where g_j, of v_j, come
    through r: g_m = sum_{j >= m} s_{j-m} sum_{i >= j} <G_i c_{i-j}> n. The mean is taken off at the end.
    """

    @staticmethod
    def forward(ctx: Any, axes: tuple[int, ...], c0: Tensor, u0: Tensor, *higher: Tensor | None) -> tuple[Tensor, ...]:
        c = [c0, *(None if part is None else part - part.mean(axes, keepdim=True) for part in higher)]
        v: list[Tensor] = [u0]
        for j in range(1, len(c)):
            terms = []
            for i in range((j + 2) // 2):
                left, right = c[i], c[j - i]
                if left is not None and right is not None:
                    term = (left * right).mean(axes, keepdim=True)
                    terms.append(term if 2 * i == j else 2 * term)
            v.append(sum(terms[1:], terms[0]) if terms else torch.zeros_like(u0))
        r = [u0.rsqrt()]
        for j in range(1, len(c)):
            parts = [(-0.5 * i - (j - i)) * v[i] * r[j - i] for i in range(1, j + 1)]
            r.append(sum(parts[1:], parts[0]) / (j * u0))
        present = [part is not None for part in c]
        ctx.axes, ctx.present, ctx.count = axes, present, c0.numel() // u0.numel()
        ctx.save_for_backward(*(part for part in c if part is not None), *v, *r)
        outputs = []
        for j in range(1, len(c)):
            value = c0 * r[j]
            for i in range(1, j + 1):
                part = c[i]
                if part is not None:
                    value.addcmul_(part, r[j - i])
            outputs.append(value)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        axes, size, saved = ctx.axes, len(ctx.present), list(ctx.saved_tensors)
        known = iter(saved[: sum(ctx.present)])
        c = [next(known) if there else None for there in ctx.present]
        v, r = saved[-2 * size : -size], saved[-size:]
        s: list[Tensor] = []
        for j in range(size):
            rest = -0.5 * r[j]
            for i in range(1, j + 1):
                rest = rest - v[i] * s[j - i]
            s.append(rest / v[0])
        G = (None, *gradients)
        of_r: list[Tensor] = []
        for m in range(1, size):
            value = torch.zeros_like(v[0])
            for j in range(m, size):
                left, right = G[j], c[j - m]
                if left is not None and right is not None:
                    value = value + (left * right).sum(axes, keepdim=True)
            of_r.append(value)
        of_x: list[Tensor | None] = []
        of_v = [
            sum((of_r[j - 1] * s[j - m] for j in range(m, size)), torch.zeros_like(v[0])) * (2 / ctx.count)
            for m in range(1, size)
        ]
        for m in range(1, size):
            total = None
            for j in range(m, size) if ctx.needs_input_grad[2 + m] else ():
                for left, right in ((G[j], r[j - m]), (c[j - m], of_v[j - 1])):
                    if left is not None:
                        total = left * right if total is None else total.addcmul_(left, right)
            of_x.append(None if total is None else total.sub_(total.mean(axes, keepdim=True)))
        return None, None, None, *of_x


class BatchStatistics(TorchFunctionMode):
    """A context in which BatchNorm in training mode normalizes with the statistics of the first rows, and keeps none.

    Args:
        rows: How many; None: all, as in training.
    """

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Write BatchNorm out, and pass on everything else."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.batch_norm:
            value = _batch_norm(self.rows, *args, **kwargs)
            return func(*args, **kwargs) if value is None else value
        return func(*args, **kwargs)


def _batch_norm(
    rows: int | None,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not training:
        return None
    axes, shape = [0, *range(2, input.ndim)], _channels(input)
    if rows is None and _lasting(input):
        fused = normalized(input, axes, eps)  # type: ignore[arg-type]
        if fused is not None:
            return _affine(fused, weight, bias, shape)
    centered = input - (input if rows is None else input[:rows]).mean(axes, keepdim=True)
    variance = (centered if rows is None else centered[:rows]).square().mean(axes, keepdim=True)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.reshape(shape)
    value = centered * scale
    return value if bias is None else value + bias.reshape(shape)
