"""Truncated Taylor series h(s) = h_0 + h_1 s + ... + h_k s^k with tensors as coefficients, and their arithmetic.

A coefficient that is exactly zero is None, and costs nothing.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor


class Series(tuple[Tensor | None, ...]):
    """The coefficients (h_0, ..., h_k); h_0 is never None."""

    __slots__ = ()


def primal(h: Series) -> Tensor:
    """The coefficient h_0."""
    value = h[0]
    assert value is not None
    return value


class NoJetRuleError(NotImplementedError):
    """An operation has no rule for Taylor series.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> from torch_eft.measure.jets.jet import lift
        >>> try:
        ...     torch.linalg.inv(lift(torch.eye(2), torch.ones(2, 2), 1))
        ... except measure.NoJetRuleError as error:
        ...     print(error)
        torch.linalg.inv: it has no rule for Taylor series
    """


Factor: TypeAlias = Series | Tensor | float
"""A series or a constant."""


def coefficient(x: Any, order: int) -> Any:
    """The coefficient of a series; a constant has itself at order 0, else None."""
    return x[order] if isinstance(x, Series) else (x if order == 0 else None)


def length(*values: Any) -> int:
    """Number of coefficients k + 1 of the first series among ``values``."""
    return next(len(value) for value in values if isinstance(value, Series))


def total(terms: Sequence[Tensor]) -> Tensor | None:
    """Their sum; None if there are none."""
    result = None
    for term in terms:
        result = term if result is None else result + term
    return result


def product(f: Callable[..., Tensor], *factors: Factor) -> Series:
    """Apply an f that is linear in each factor: o_j = sum over i_1 + i_2 + ... = j of f(a_{i_1}, b_{i_2}, ...)."""
    count = length(*factors)
    if len(factors) == 2:  # the usual case, without the search
        a, b = factors
        if not isinstance(b, Series):
            return Series(None if part is None else f(part, b) for part in a)  # type: ignore[union-attr]
        if not isinstance(a, Series):
            return Series(None if part is None else f(a, part) for part in b)
        return Series(total(_pairs(f, a, b, j)) for j in range(count))
    orders = [[i for i in range(count) if coefficient(factor, i) is not None] for factor in factors]
    terms: list[list[Tensor]] = [[] for _ in range(count)]
    for chosen in itertools.product(*orders):
        if sum(chosen) < count:
            parts = [coefficient(factor, i) for factor, i in zip(factors, chosen, strict=True)]
            terms[sum(chosen)].append(f(*parts))
    return Series(total(entry) for entry in terms)


def _pairs(f: Callable[..., Tensor], a: Series, b: Series, order: int) -> list[Tensor]:
    pairs = [(a[i], b[order - i]) for i in range(order + 1)]
    return [f(left, right) for left, right in pairs if left is not None and right is not None]


def quotient(a: Factor, b: Factor) -> Series:
    """From a = q b: q_j = (a_j - sum_{i=1..j} b_i q_{j-i}) / b_0."""
    if not isinstance(b, Series):
        return Series(None if part is None else part / b for part in a)  # type: ignore[union-attr]
    quotients: list[Any] = []
    for order in range(len(b)):
        pairs = [(part, quotients[order - i]) for i, part in enumerate(b[: order + 1]) if i > 0]
        terms = [-part * other for part, other in pairs if part is not None and other is not None]
        first = coefficient(a, order)
        rest = total(terms if first is None else [first, *terms])
        quotients.append(None if rest is None else rest / primal(b))
    return Series(quotients)


def composed(h: Series, derivatives: Sequence[Any]) -> Series:
    """Compose sigma(h(s)) elementwise, given sigma and its derivatives at h_0 (Faa di Bruno).

    o_1 = s' h_1,   o_2 = s' h_2 + s'' h_1^2 / 2,   o_3 = s' h_3 + s'' h_1 h_2 + s''' h_1^3 / 6

    Args:
        h: The series.
        derivatives: A tensor, then tensors or numbers; None, or what is missing at the end, is zero.

    Returns:
        The series of sigma(h(s)).
    """
    value, first, second, third = (*derivatives, None, None, None)[:4]
    _, h1, h2, _ = (*h, None, None, None)[:4]
    outputs: list[Tensor | None] = [value, *[None if first is None or part is None else first * part for part in h[1:]]]
    if h1 is not None and len(h) > 2 and (second is not None or third is not None):
        half = h1 * h1 * 0.5
        if second is not None:
            outputs[2] = _plus(outputs[2], second * half)
        if len(h) > 3:
            if second is not None and h2 is not None:
                outputs[3] = _plus(outputs[3], second * (h1 * h2))
            if third is not None:
                outputs[3] = _plus(outputs[3], third * (half * h1 * (1 / 3)))
    return Series(outputs)


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def selected(mask: Tensor, a: Factor, b: Factor) -> Series:
    """Entries of a where ``mask``, else b."""
    result = []
    for order in range(length(a, b)):
        left, right = coefficient(a, order), coefficient(b, order)
        zero = left is None and right is None
        result.append(
            None if zero else torch.where(mask, 0.0 if left is None else left, 0.0 if right is None else right)
        )
    return Series(result)


_watching: ContextVar[tuple[list[str], ...]] = ContextVar("watching", default=())


@contextmanager
def watch_kinks() -> Iterator[list[str]]:
    """Collect the names of the kinked operations (ReLU, a maximum, a comparison ...) that series meet.

    Across a kink a Taylor series says nothing: its second and higher terms are derivatives almost everywhere.

    Yields:
        The names, each once, in the order in which they are met.
    """
    names: list[str] = []
    token = _watching.set((*_watching.get(), names))
    try:
        yield names
    finally:
        _watching.reset(token)


def note_kink(name: str) -> None:
    """Record for all watchers that a series has met the kinked operation ``name``."""
    for names in _watching.get():
        if name not in names:
            names.append(name)
