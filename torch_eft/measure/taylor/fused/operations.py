"""Linear layers and smooth activations of jets about constant parameters, each as one node of autograd's graph.

Where h_0 takes no gradient, as in a Taylor model's forward, the backward passes are short, and sums of products are
formed in place. Other operations go by the rules of ``jets``, with the same result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from torch_eft.measure.jets.jet import Jet, coefficients_of, jet
from torch_eft.measure.jets.names import builtins
from torch_eft.measure.jets.smooth import SMOOTH, gelu
from torch_eft.measure.taylor.fused.normalization import group_norm, layer_norm


class Fused(TorchFunctionMode):
    """A context in which a network on jets is evaluated for its first derivatives."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Fuse linear layers and smooth activations, and pass on everything else."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            value = _linear(*args, **kwargs)
            return func(*args, **kwargs) if value is None else value
        norm = _NORMS.get(func)
        if norm is not None:
            normed = norm(*args, **kwargs)
            return func(*args, **kwargs) if normed is None else normed
        derivatives = _SMOOTH.get(func)
        if derivatives is not None and len(args) == 1 and kwargs.get("approximate", "none") == "none":
            value = _activation(derivatives, args[0])
            return func(*args, **kwargs) if value is None else value
        return func(*args, **kwargs)


_NORMS: dict[Any, Callable[..., Tensor | None]] = {
    torch.nn.functional.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    torch.nn.functional.group_norm: group_norm,
    torch.group_norm: group_norm,
}
_SMOOTH = {func: derivatives for names, derivatives in SMOOTH.items() for func in builtins(names)}
_SMOOTH |= dict.fromkeys(builtins("gelu"), gelu)


def _activation(derivatives: Callable[[Tensor, int], list[Any]], h: Any) -> Jet | None:
    if not isinstance(h, Jet) or h.order < 2 or h.primal.requires_grad or h.coefficients[1] is None:
        return None
    values = derivatives(h.primal, h.order)
    if len(values) <= h.order or not all(isinstance(part, Tensor) for part in values):
        return None
    if h.order == 2:
        return jet((values[0], *_Activation.apply(values[1], values[2], None, *h.coefficients[1:], None)))
    return jet((values[0], *_Activation.apply(*values[1:4], *h.coefficients[1:])))


class _Activation(torch.autograd.Function):
    """o_1 = s' h_1,  o_2 = s' h_2 + s'' h_1^2 / 2,  o_3 = s' h_3 + s'' h_1 h_2 + s''' h_1^3 / 6; h_2, h_3 may be None.

    At order 2 there is no o_3. With a = s'' h_1 and c = s'' h_2 + s''' h_1^2 / 2 the gradients are
    g_1 = s' G_1 + a G_2 + c G_3,  g_2 = s' G_2 + a G_3,  g_3 = s' G_3.
    """

    @staticmethod
    def forward(
        ctx: Any, s1: Tensor, s2: Tensor, s3: Tensor | None, h1: Tensor, h2: Tensor | None, h3: Tensor | None
    ) -> tuple[Tensor, ...]:
        a = s2 * h1
        second = (a * h1).mul_(0.5) if h2 is None else (s1 * h2).addcmul_(a, h1, value=0.5)
        if s3 is None:
            ctx.save_for_backward(s1, a, None)
            return s1 * h1, second
        e = (s3 * h1).mul_(h1)
        if h2 is None:
            c = e * 0.5
            third = e.mul_(h1).mul_(1 / 6)
        else:
            t = s2 * h2
            c = torch.add(t, e, alpha=0.5)
            third = t.add_(e, alpha=1 / 6).mul_(h1)
        if h3 is not None:
            third.addcmul_(s1, h3)
        ctx.save_for_backward(s1, a, c)
        return s1 * h1, second, third

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first: Tensor, second: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
        s1, a, c = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        g1 = (s1 * first).addcmul_(a, second) if needed[0] else None
        g2 = s1 * second if needed[1] else None
        for third in rest:  # order 3
            g1 = None if g1 is None else g1.addcmul_(c, third)
            g2 = None if g2 is None else g2.addcmul_(a, third)
        return None, None, None, g1, g2, s1 * rest[0] if needed[2] else None


def _linear(x: Any, weight: Any, bias: Any = None) -> Jet | None:
    given = [value for value in (x, weight, bias) if isinstance(value, Tensor)]
    orders = {value.order for value in given if isinstance(value, Jet)}
    if len(orders) != 1 or any((value.primal if isinstance(value, Jet) else value).requires_grad for value in given):
        return None
    order = orders.pop()
    h, w, b = (
        coefficients_of(value, order) if isinstance(value, Tensor) else (None,) * (order + 1)
        for value in (x, weight, bias)
    )
    assert h[0] is not None and w[0] is not None
    if w[0].ndim != 2:
        return None
    first = torch.nn.functional.linear(h[0], w[0], b[0])
    rows = [None if part is None else part.reshape(-1, part.shape[-1]) for part in h]
    higher = _Linear.apply(order, *rows, *w, *b[1:])
    return jet((first, *(None if part is None else part.view(first.shape) for part in higher)))


class _Linear(torch.autograd.Function):
    """o_j = sum_i h_{j-i} W_i^T + b_j of order j > 0, with constant h_0 and W_0; any coefficient may be None.

    The gradients are those of h_m: sum_j G_j W_{j-m}, of W_i: sum_j G_j^T h_{j-i}, of b_j: the sum of G_j's rows.
    """

    @staticmethod
    def forward(ctx: Any, order: int, *parts: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.order = order
        h, w, b = parts[: order + 1], parts[order + 1 : 2 * order + 2], (None, *parts[2 * order + 2 :])
        ctx.save_for_backward(*h, *w)
        outputs: list[Tensor | None] = []
        for j in range(1, order + 1):
            value = None
            for left, right in _pairs(h, w[j::-1]):
                if value is not None:
                    value.addmm_(left, right.t())
                else:
                    shift = b[j]
                    value = left @ right.t() if shift is None else torch.addmm(shift, left, right.t())
            shift = b[j]
            if value is None and shift is not None:
                rows = next(part for part in h if part is not None)
                value = shift.expand(len(rows), -1).clone()
            outputs.append(value)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        order = ctx.order
        h, w = ctx.saved_tensors[: order + 1], ctx.saved_tensors[order + 1 :]
        G = (None, *gradients)
        needed = ctx.needs_input_grad[1:]
        of_h = [_summed(_pairs(G[m:], w)) if needed[m] else None for m in range(order + 1)]
        transposed = [None if part is None else part.t() for part in G]
        of_w = [_summed(_pairs(transposed[i:], h)) if needed[order + 1 + i] else None for i in range(order + 1)]
        of_b = [
            part.sum(0) if part is not None and needed[2 * order + 1 + j] else None for j, part in enumerate(G) if j
        ]
        return (None, *of_h, *of_w, *of_b)


def _pairs(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    return [(x, y) for x, y in zip(a, b, strict=False) if x is not None and y is not None]


def _summed(pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The sum of their matrix products."""
    value = None
    for left, right in pairs:
        value = left @ right if value is None else value.addmm_(left, right)
    return value
