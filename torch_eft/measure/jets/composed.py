"""Operations in terms of others that have rules: ordinary code for tensors, run on jets."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_eft.measure.jets.names import builtins
from torch_eft.measure.jets.series import NoJetRuleError


def _addmm(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _scaled(input, beta) + _scaled(a @ b, alpha)


def _addr(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _scaled(input, beta) + _scaled(torch.outer(a, b), alpha)


def _addbmm(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _scaled(input, beta) + _scaled((a @ b).sum(0), alpha)


def _addcmul(input: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return input + _scaled(a * b, value)


def _addcdiv(input: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return input + _scaled(a / b, value)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _lerp(input: Tensor, end: Tensor, weight: Any) -> Tensor:
    return input + weight * (end - input)


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    value = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return value if bias is None else value + bias


def _mish(input: Tensor) -> Tensor:
    return input * torch.tanh(F.softplus(input, threshold=40))


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if train and p > 0:
        raise NoJetRuleError("it is random in training; use evaluation mode")
    return input


def _variance_and_mean(input: Tensor, dim: Any, correction: float, keepdim: bool) -> tuple[Tensor, Tensor]:
    axes = list(range(input.ndim)) if dim is None or dim == () else [dim] if isinstance(dim, int) else list(dim)
    mean = input.mean(axes, keepdim=True)
    count = math.prod(input.shape[axis] for axis in axes)
    variance = (input - mean).square().sum(axes, keepdim=True) / (count - correction)
    return (variance, mean) if keepdim else (variance.squeeze(axes), mean.squeeze(axes))


def _moments(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The signatures of var: (x, unbiased), (x, dim, unbiased, keepdim), (x, dim, *, correction, keepdim)."""
    input, *rest = args
    options = dict(kwargs)
    if rest and isinstance(rest[0], bool):
        options["unbiased"] = rest.pop(0)
    options |= dict(zip(("dim", "unbiased", "keepdim"), rest, strict=False))
    correction = options.get("correction")
    if correction is None:
        correction = 1 if options.get("unbiased", True) else 0
    return _variance_and_mean(input, options.get("dim"), correction, options.get("keepdim", False))


def _var(*args: Any, **kwargs: Any) -> Tensor:
    return _moments(*args, **kwargs)[0]


def _std(*args: Any, **kwargs: Any) -> Tensor:
    return _moments(*args, **kwargs)[0].sqrt()


def _std_mean(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    variance, mean = _moments(*args, **kwargs)
    return variance.sqrt(), mean


def _vector_norm(
    input: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    x = input if dtype is None else input.to(dtype)
    axes = list(range(x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if ord == 2:
        return x.square().sum(axes, keepdim=keepdim).sqrt()
    if ord == math.inf:
        return x.abs().amax(axes, keepdim=keepdim)
    if ord == 1:
        return x.abs().sum(axes, keepdim=keepdim)
    if ord <= 0:
        raise NoJetRuleError(f"the norm of order {ord} has no series")
    return x.abs().pow(ord).sum(axes, keepdim=keepdim).pow(1 / ord)


def _norm(
    input: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    if ord is not None and (isinstance(ord, str) or (input.ndim != 1 and not isinstance(dim, int))):
        raise NoJetRuleError("of matrices only the Frobenius norm has a rule")
    return _vector_norm(input, 2 if ord is None else ord, dim, keepdim, dtype=dtype)


def _at_least(x: Tensor, eps: float) -> Tensor:
    """A guard against division by zero, which does not count as a kink of the network."""
    return torch.where(x.detach() > eps, x, eps)


def _normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    return input / _at_least(_vector_norm(input, p, dim, True), eps)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    norms = [_at_least(_vector_norm(x, 2, dim), eps) for x in (x1, x2)]
    return (x1 * x2).sum(dim) / (norms[0] * norms[1])


def _softsign(input: Tensor) -> Tensor:
    """Softsign by the sign instead of the absolute value: its slope does not jump."""
    return input / (1 + input * input.detach().sign())


def _prod(input: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = input if dtype is None else input.to(dtype)
    x, axis = (x.flatten(), 0) if dim is None else (x, dim)
    result, *factors = x.unbind(axis)
    for factor in factors:
        result = result * factor
    return result.unsqueeze(axis) if keepdim else result


COMPOSED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.normalize: _normalize,
    F.softsign: _softsign,
    Tensor.norm: torch.functional.norm,
    Tensor.__iter__: lambda x: iter(x.unbind(0)),
}
"""Function of torch -> the same in other operations."""

for _names, _function in (
    ("addmm addmv baddbmm", _addmm),
    ("addr", _addr),
    ("addbmm", _addbmm),
    ("addcmul", _addcmul),
    ("addcdiv", _addcdiv),
    ("lerp", _lerp),
    ("bilinear", _bilinear),
    ("mish", _mish),
    ("dropout alpha_dropout feature_dropout feature_alpha_dropout", _dropout),
    ("var", _var),
    ("std", _std),
    ("var_mean", _moments),
    ("std_mean", _std_mean),
    ("linalg_vector_norm", _vector_norm),
    ("linalg_norm", _norm),
    ("cosine_similarity", _cosine_similarity),
    ("prod", _prod),
):
    COMPOSED.update(dict.fromkeys(builtins(_names), _function))
