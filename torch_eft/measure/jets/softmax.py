"""Rules for softmax, its logarithm and its norm, by the recursion that their differential equations give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.jets.names import builtins
from torch_eft.measure.jets.series import Series, primal, total


def _softmax_series(h: Series, dim: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """The series p = softmax(h) and the higher coefficients of L = logsumexp(h).

    p' = p (h' - L') with L' = sum_x p h', order by order: with H_j = j h_j,
    j L_j = sum_x sum_i H_i p_{j-i} and j p_j = sum_i (H_i - i L_i) p_{j-i}.
    """
    z = primal(h)
    p = [z.softmax(dim) if isinstance(dim, int) else (z - z.logsumexp(dim, keepdim=True)).exp()]
    L: list[Tensor | None] = [None]
    for order in range(1, len(h)):
        terms = [i * part * p[order - i] for i, part in enumerate(h[: order + 1]) if i and part is not None]
        weighed = total(terms)
        if weighed is None:
            weighed = torch.zeros_like(z)
        L.append(weighed.sum(dim, keepdim=True) / order)
        rest = total([i * part * p[order - i] for i, part in enumerate(L) if i and part is not None])
        assert rest is not None
        p.append((weighed - rest) / order)
    return p, L


def _softmax(h: Series, dim: int, dtype: torch.dtype | None = None) -> Series:
    return Series(_softmax_series(_cast(h, dtype), dim)[0])


def _log_softmax(h: Series, dim: int, dtype: torch.dtype | None = None) -> Series:
    h = _cast(h, dtype)
    _, L = _softmax_series(Series(h), dim)
    higher = [-log if part is None else part - log for part, log in zip(h[1:], L[1:], strict=True)]  # type: ignore[operator]
    return Series([primal(h).log_softmax(dim), *higher])


def _logsumexp(h: Series, dim: Any, keepdim: bool = False) -> Series:
    axes = [dim] if isinstance(dim, int) else list(dim)
    _, L = _softmax_series(h, dim if isinstance(dim, int) else axes)
    higher = [part if keepdim or part is None else part.squeeze(axes) for part in L[1:]]
    return Series([primal(h).logsumexp(axes, keepdim), *higher])


def _cast(h: Series, dtype: torch.dtype | None) -> Series:
    return h if dtype is None else Series(None if part is None else part.to(dtype) for part in h)


SOFTMAX_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(builtins("softmax special_softmax"), _softmax),
    **dict.fromkeys(builtins("log_softmax special_log_softmax"), _log_softmax),
    **dict.fromkeys(builtins("logsumexp special_logsumexp"), _logsumexp),
}
