"""Rules for operations that are linear in one argument, or in each of several."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.jets.names import builtins
from torch_eft.measure.jets.series import (
    Factor,
    NoJetRuleError,
    Series,
    coefficient,
    length,
    primal,
    product,
    selected,
    total,
)

Rule = Callable[..., Any]
_VF: Any = torch._VF
LINEAR_RULES: dict[Callable[..., Any], Rule] = {}
"""Function of torch -> the same with ``Series`` in place of some tensors."""

_VIEWS = (
    "view reshape flatten unflatten ravel transpose swapaxes swapdims permute movedim moveaxis t T mT H mH adjoint "
    "unsqueeze squeeze expand broadcast_to chunk split split_with_sizes tensor_split unbind select narrow diagonal "
    "unfold __getitem__ contiguous real to float double half bfloat16 type cpu cuda"
)
_LIKE_ANOTHER = "view_as reshape_as expand_as type_as"
_LINEAR = (
    "sum mean cumsum repeat tile repeat_interleave roll flip fliplr flipud rot90 tril triu diag diag_embed trace "
    "clone neg negative positive index_select gather take take_along_dim masked_select pixel_shuffle pixel_unshuffle "
    "channel_shuffle avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "im2col col2im upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d embedding grid_sampler"
)
_BILINEAR = "mul multiply matmul __matmul__ mm bmm mv dot vdot inner outer ger kron"
_WITH_BIAS = "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
_JOINED = "cat concat concatenate stack hstack vstack dstack column_stack"

VIEWS = frozenset(builtins(_VIEWS + " " + _LIKE_ANOTHER))
"""Operations that may return another view of their argument."""

_VIEWING = frozenset(builtins("view view_as unflatten"))
"""Operations that always return one."""


def _linear(func: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Series) or any(isinstance(value, Series) for value in (*args, *kwargs.values())):
        raise NoJetRuleError("only the first argument may depend on the series")
    first = func(x[0], *args, **kwargs)
    if first is x[0]:  # contiguous, to: nothing to be done
        return x
    if func in _VIEWING and not all(part is None or part.is_contiguous() for part in x[1:]):
        # Higher coefficients may be expanded or transposed where h_0 is not.
        x = Series(part if part is None else part.contiguous() for part in x)
    if isinstance(first, tuple | list):
        rows = [[None] * len(first) if part is None else func(part, *args, **kwargs) for part in x[1:]]
        return tuple(Series(parts) for parts in zip(first, *rows, strict=True))
    if not isinstance(first, Tensor):
        return first
    return Series([first, *[None if part is None else func(part, *args, **kwargs) for part in x[1:]]])


def _like_another(func: Callable[..., Any], x: Series, other: Any) -> Any:
    return _linear(func, x, coefficient(other, 0))


def _bilinear(func: Callable[..., Any], a: Factor, b: Factor) -> Series:
    return product(func, a, b)


def _with_bias(func: Callable[..., Any], x: Factor, weight: Factor, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Add each order's bias in the first product of that order, as the fused operation does."""
    outputs: list[Tensor | None] = []
    for order in range(length(x, weight, bias)):
        pairs = [(coefficient(x, i), coefficient(weight, order - i)) for i in range(order + 1)]
        pairs = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
        shift = coefficient(bias, order)
        terms = [func(*pair, shift if index == 0 else None, *args, **kwargs) for index, pair in enumerate(pairs)]
        if not pairs and shift is not None:
            terms = [shift.reshape(-1, *[1] * _spatial_axes(func))]
        outputs.append(total(terms))
    return Series(outputs)


def _spatial_axes(func: Callable[..., Any]) -> int:
    return 0 if func.__name__ == "linear" else int(func.__name__[-2])  # conv2d has 2


def _joined(func: Callable[..., Any], tensors: Sequence[Factor], *args: Any, **kwargs: Any) -> Series:
    primals = [coefficient(value, 0) for value in tensors]
    joined = [func(primals, *args, **kwargs)]
    for order in range(1, length(*tensors)):
        parts = [coefficient(value, order) for value in tensors]
        if all(part is None for part in parts):
            joined.append(None)
            continue
        parts = [torch.zeros_like(p) if part is None else part for p, part in zip(primals, parts, strict=True)]
        joined.append(func(parts, *args, **kwargs))
    return Series(joined)


def _einsum(equation: str, *operands: Any, **kwargs: Any) -> Series:
    if len(operands) == 1 and isinstance(operands[0], list | tuple) and not isinstance(operands[0], Series):
        operands = tuple(operands[0])
    return product(lambda *parts: _VF.einsum(equation, parts, **kwargs), *operands)


def _tensordot(a: Factor, b: Factor, dims_self: Sequence[int], dims_other: Sequence[int]) -> Series:
    return product(lambda x, y: _VF.tensordot(x, y, dims_self, dims_other), a, b)


def _sum(sign: float, a: Factor, b: Factor, *, alpha: float = 1) -> Series:
    """The sum a + sign alpha b."""
    scale = sign * alpha
    sums = []
    for order in range(length(a, b)):
        left, right = coefficient(a, order), coefficient(b, order)
        if right is not None and scale != 1:
            right = -right if scale == -1 else right * scale
        sums.append(right if left is None else left if right is None else left + right)
    return Series(sums)


def _where(condition: Tensor, *choices: Factor) -> Series:
    if isinstance(condition, Series) or len(choices) != 2:
        raise NoJetRuleError("the condition must be constant, and both choices given")
    return selected(condition, *choices)


def _method_where(x: Factor, condition: Tensor, other: Factor) -> Series:
    return _where(condition, x, other)


def _masked_fill(x: Factor, mask: Tensor, value: Factor) -> Series:
    if isinstance(mask, Series):
        raise NoJetRuleError("the mask must be constant")
    if isinstance(value, Series) or not isinstance(x, Series):
        return selected(mask, value, x)
    return Series(None if h is None else h.masked_fill(mask, value if j == 0 else 0.0) for j, h in enumerate(x))


def _pad(x: Series, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Series:
    fill = [value, *[None] * len(x)]
    parts = enumerate(x)
    return Series(None if h is None else torch._C._nn.pad(h, pad, mode, fill[order]) for order, h in parts)


def _diff(x: Series, n: int = 1, dim: int = -1, prepend: None = None, append: None = None) -> Series:
    if prepend is not None or append is not None:
        raise NoJetRuleError("prepend and append have no rule")
    return Series(None if part is None else part.diff(n, dim) for part in x)


def _constant_pad(x: Series, pad: Sequence[int], value: float = 0) -> Series:
    return _pad(x, pad, "constant", value)


def _embedding_bag(weight: Series, *args: Any, **kwargs: Any) -> Any:
    values = [*args, *kwargs.values()]
    mode = args[3] if len(args) > 3 else kwargs.get("mode", 0)
    if mode == 2 or any(isinstance(value, Series) for value in values):
        raise NoJetRuleError("only sums and means of an embedding have a rule")
    first, *rest = torch.embedding_bag(primal(weight), *args, **kwargs)
    higher = [None if part is None else torch.embedding_bag(part, *args, **kwargs)[0] for part in weight[1:]]
    return (Series([first, *higher]), *rest)


def _index_add(func: Callable[..., Any], x: Factor, dim: int, index: Tensor, source: Factor, **kwargs: Any) -> Series:
    """Operations that are linear in both arguments at once."""
    results = []
    zero_x, zero_source = (torch.zeros_like(coefficient(value, 0)) for value in (x, source))
    for order in range(length(x, source)):
        a, b = coefficient(x, order), coefficient(source, order)
        given = (zero_x if a is None else a, dim, index, zero_source if b is None else b)
        results.append(None if a is None and b is None else func(*given, **kwargs))
    return Series(results)


def _register() -> None:
    for names, rule in (
        (_VIEWS + " " + _LINEAR, _linear),
        (_LIKE_ANOTHER, _like_another),
        (_BILINEAR, _bilinear),
        (_WITH_BIAS, _with_bias),
        (_JOINED, _joined),
        ("index_add scatter_add", _index_add),
    ):
        LINEAR_RULES.update({func: functools.partial(rule, func) for func in builtins(names)})
    for names, other in (
        ("add __add__ __radd__", functools.partial(_sum, 1)),
        ("sub subtract __sub__", functools.partial(_sum, -1)),
        ("rsub __rsub__", lambda a, b, *, alpha=1: _sum(-1, b, a, alpha=alpha)),
        ("__rmatmul__", lambda b, a: product(torch.matmul, a, b)),
        ("masked_fill", _masked_fill),
        ("pad", _pad),
        ("diff", _diff),
        ("constant_pad_nd", _constant_pad),
        ("embedding_bag", _embedding_bag),
        ("einsum", _einsum),
        ("tensordot", _tensordot),
    ):
        LINEAR_RULES.update(dict.fromkeys(builtins(names), other))
    LINEAR_RULES.update({torch.where: _where, Tensor.where: _method_where})


_register()
