"""Rules for operations that are not smooth: derivatives almost everywhere, chosen by the primal value.

Each rule notes the kink for ``watch_kinks``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_eft.measure.jets.names import builtins
from torch_eft.measure.jets.series import (
    Factor,
    NoJetRuleError,
    Series,
    coefficient,
    composed,
    length,
    note_kink,
    primal,
    product,
    selected,
    total,
)

KINKED_RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Function of torch -> the same with ``Series`` in place of some tensors."""

_SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _piecewise_linear(slope: Callable[..., Tensor], func: Callable[..., Any], h: Any, *args: Any, **kwargs: Any) -> Any:
    """Functions whose derivative ``slope`` is constant on either side of a kink."""
    if not isinstance(h, Series) or any(isinstance(value, Series) for value in (*args, *kwargs.values())):
        raise NoJetRuleError("only the first argument may depend on the series")
    note_kink(func.__name__)
    z = primal(h)
    return composed(h, [func(z, *args, **kwargs), slope(z.detach(), *args, **kwargs).to(z.dtype)])


def _leaky(z: Tensor, negative_slope: float = 0.01) -> Tensor:
    return _either(z, 1.0, negative_slope)


def _either(z: Tensor, right: float, left: float) -> Tensor:
    """``right`` above 0, else ``left``, in the dtype of z: ``torch.where`` makes float32 of two numbers."""
    return torch.where(z > 0, z.new_full((), right), z.new_full((), left))


def _rrelu(z: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None) -> Any:
    if training:
        raise NoJetRuleError("it draws random slopes in training")
    return _either(z, 1.0, (lower + upper) / 2)


_SLOPES: dict[str, Callable[..., Tensor]] = {
    "relu": lambda z: z > 0,
    "relu6": lambda z: (z > 0) & (z < 6),
    "leaky_relu": _leaky,
    "rrelu": _rrelu,
    "hardtanh": lambda z, min_val=-1.0, max_val=1.0: (z > min_val) & (z < max_val),
    "hardsigmoid": lambda z: ((z > -3) & (z < 3)).to(z.dtype) / 6,
    "abs absolute": lambda z: z.sign(),
    "threshold": lambda z, threshold, value: z > threshold,
    "hardshrink": lambda z, lambd=0.5: z.abs() > lambd,
    "softshrink": lambda z, lambd=0.5: z.abs() > lambd,
}


def _clamp(h: Factor, min: Any = None, max: Any = None) -> Series:
    if not isinstance(h, Series) or isinstance(min, Series) or isinstance(max, Series):
        for bound, choice in ((min, _maximum), (max, _minimum)):
            h = h if bound is None else choice(h, bound)
        return h  # type: ignore[return-value]
    z = primal(h).detach()
    inside = torch.ones_like(z, dtype=torch.bool)
    inside = inside if min is None else inside & (z >= min)
    inside = inside if max is None else inside & (z <= max)
    note_kink("clamp")
    return composed(h, [torch.clamp(primal(h), min, max), inside.to(z.dtype)])


def _clamp_min(h: Factor, min: Any) -> Series:
    return _clamp(h, min)


def _clamp_max(h: Factor, max: Any) -> Series:
    return _clamp(h, None, max)


def _hardswish(h: Series) -> Series:
    note_kink("hardswish")
    z = primal(h)
    inside = ((z > -3) & (z < 3)).detach()
    return composed(h, [F.hardswish(z), torch.where(inside, z / 3 + 0.5, (z > 0).to(z.dtype)), inside.to(z.dtype) / 3])


def _exponential_unit(name: str, alpha: float, scale: float, rate: float, h: Series) -> Series:
    """Scale z above 0, scale alpha (exp(rate z) - 1) below; the slope jumps unless alpha rate = 1."""
    if alpha * rate != 1:
        note_kink(name)
    z = primal(h)
    above = z.detach() > 0
    low = z.clamp_max(0.0)
    value = torch.where(above, scale * z, scale * alpha * (rate * low).expm1())
    decay = scale * alpha * (rate * low).exp()
    slopes = [torch.where(above, scale if m == 1 else 0.0, decay * rate**m) for m in range(1, len(h))]
    return composed(h, [value, *slopes])


def _elu(h: Series, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Series:
    return _exponential_unit("elu", alpha, scale, input_scale, h)


def _selu(h: Series) -> Series:
    return _exponential_unit("selu", *_SELU, 1.0, h)


def _celu(h: Series, alpha: float = 1.0) -> Series:
    return _exponential_unit("celu", alpha, 1.0, 1 / alpha, h)


def _prelu(h: Factor, weight: Factor) -> Series:
    note_kink("prelu")
    z, w = coefficient(h, 0), coefficient(weight, 0)
    shape = (1, -1, *[1] * (z.ndim - 2)) if w.numel() > 1 else (1,) * max(1, z.ndim)
    low = product(lambda a, b: a * b.reshape(shape), h, weight)
    return selected(z.detach() > 0, h, low)


def _steps(func: Callable[..., Any], h: Series, *args: Any, **kwargs: Any) -> Series:
    """Functions that are constant on either side of a jump."""
    note_kink(func.__name__)
    return Series([func(h[0], *args, **kwargs), *[None] * (len(h) - 1)])


def _maximum(a: Factor, b: Factor) -> Series:
    note_kink("maximum")
    return _chosen(coefficient(a, 0) - coefficient(b, 0), a, b)


def _minimum(a: Factor, b: Factor) -> Series:
    note_kink("minimum")
    return _chosen(coefficient(b, 0) - coefficient(a, 0), a, b)


def _chosen(excess: Tensor, a: Factor, b: Factor) -> Series:
    """The argument that is larger by ``excess``; where that is 0, half of each, as in torch's derivative."""
    share = torch.heaviside(excess.detach(), excess.new_full((), 0.5))
    result: list[Tensor | None] = []
    for order in range(length(a, b)):
        pairs = ((coefficient(a, order), share), (coefficient(b, order), 1 - share))
        result.append(total([part * weight for part, weight in pairs if part is not None]))
    return Series(result)


def _extreme(func: Callable[..., Any], pairwise: Callable[..., Series], h: Any, *args: Any, **kwargs: Any) -> Any:
    """Maximum and minimum in their three forms: of all entries, of two tensors, along an axis (with indices)."""
    other = kwargs.get("other", args[0] if args else None)
    if isinstance(other, Series | Tensor):
        return pairwise(h, other)
    note_kink(func.__name__)
    if not args and not kwargs:
        return _extreme_over_axes(func, h)
    dim = kwargs["dim"] if "dim" in kwargs else args[0]
    keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    result = func(h[0], dim, keepdim)
    return type(result)([_picked(h, result.values, result.indices, dim, keepdim), result.indices])


def _picked(h: Series, values: Tensor, indices: Tensor, dim: int, keepdim: bool) -> Series:
    at = indices if keepdim else indices.unsqueeze(dim)
    picked = [None if part is None else part.gather(dim, at) for part in h[1:]]
    return Series([values, *[part if keepdim or part is None else part.squeeze(dim) for part in picked]])


def _extreme_over_axes(func: Callable[..., Any], h: Series, dim: Any = (), keepdim: bool = False) -> Series:
    note_kink(func.__name__)
    z = primal(h)
    axes = [dim] if isinstance(dim, int) else list(dim) or list(range(z.ndim))
    values = (z.amax if "max" in func.__name__ else z.amin)(axes, keepdim=True)
    share = (z == values).to(z.dtype).detach()
    share = share / share.sum(axes, keepdim=True)
    parts = [values, *[None if part is None else (part * share).sum(axes, keepdim=True) for part in h[1:]]]
    return Series(part if keepdim or part is None or not axes else part.squeeze(axes) for part in parts)


def _sorted(func: Callable[..., Any], h: Series, *args: Any, **kwargs: Any) -> Any:
    """Sorting and the k largest; the axis comes after k in the latter."""
    note_kink(func.__name__)
    result = func(h[0], *args, **kwargs)
    place = 1 if func.__name__ == "topk" else 0
    dim = kwargs.get("dim", args[place] if len(args) > place else -1)
    return type(result)([_picked(h, result.values, result.indices, dim, True), result.indices])


def _max_pool(func: Callable[..., Any], h: Series, *args: Any, **kwargs: Any) -> Any:
    """Max pooling over 1, 2 or 3 spatial axes, with or without returned indices."""
    note_kink(func.__name__.removesuffix("_with_indices"))
    axes = int(func.__name__.removesuffix("_with_indices")[-2])
    with_indices = _WITH_INDICES.get(func.__name__, func)
    values, indices = with_indices(h[0], *args, **kwargs)
    flat = indices.flatten(-axes)
    higher = [None if p is None else p.flatten(-axes).gather(-1, flat).view_as(values) for p in h[1:]]
    series = Series([values, *higher])
    return series if with_indices is not func else (series, indices)


_WITH_INDICES: dict[str, Callable[..., Any]] = {
    "max_pool1d": torch.max_pool1d_with_indices,
    "max_pool2d": torch._C._nn.max_pool2d_with_indices,
    "max_pool3d": torch._C._nn.max_pool3d_with_indices,
}


def _names(names: str) -> Sequence[Callable[..., Any]]:
    return list(builtins(names))


def _register() -> None:
    rules = KINKED_RULES
    for names, slope in _SLOPES.items():
        rules.update({func: functools.partial(_piecewise_linear, slope, func) for func in _names(names)})
    for names, rule in (
        ("clamp clip", _clamp),
        ("clamp_min", _clamp_min),
        ("clamp_max", _clamp_max),
        ("hardswish", _hardswish),
        ("elu", _elu),
        ("selu", _selu),
        ("celu", _celu),
        ("prelu", _prelu),
        ("maximum fmax", _maximum),
        ("minimum fmin", _minimum),
    ):
        rules.update(dict.fromkeys(_names(names), rule))
    for names, of_func in (
        ("sign sgn floor ceil round trunc", _steps),
        ("amax amin", _extreme_over_axes),
        ("sort topk", _sorted),
        (
            "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
            "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
            _max_pool,
        ),
    ):
        rules.update({func: functools.partial(of_func, func) for func in _names(names)})
    for name, pairwise in (("max", _maximum), ("min", _minimum)):
        rules.update({func: functools.partial(_extreme, func, pairwise) for func in _names(name)})


_register()
