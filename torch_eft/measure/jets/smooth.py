"""Rules for smooth functions: elementwise ones by their derivatives, softmax by its differential equation.

Every derivative is written in differentiable operations of the point z = h_0.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_eft.measure.jets.names import builtins
from torch_eft.measure.jets.series import Factor, NoJetRuleError, Series, composed, primal, product, quotient, total

Derivatives: TypeAlias = list[Any]
"""A tensor sigma(z), then its derivatives as tensors or numbers; a shorter list goes on with zeros."""


def _exp(z: Tensor, order: int) -> Derivatives:
    return [z.exp()] * 4


def _exp2(z: Tensor, order: int) -> Derivatives:
    value, c = torch.exp2(z), math.log(2)
    return [value, *[value * c**m for m in range(1, order + 1)]]


def _expm1(z: Tensor, order: int) -> Derivatives:
    return [z.expm1(), *[z.exp()] * 3]


def _logarithm(function: Callable[[Tensor], Tensor], scale: float = 1.0, shift: float = 0.0) -> Any:
    """Derivatives of scale * log(shift + z), computed by ``function``."""

    def derivatives(z: Tensor, order: int) -> Derivatives:
        r = 1 / (z + shift if shift else z)
        slope = r * scale if scale != 1.0 else r
        return [function(z), slope, *([-slope * r, 2 * slope * r * r] if order > 1 else [])]

    return derivatives


def _power(exponent: float) -> Any:
    """Derivatives of z^p; the factor of a vanished derivative is left out, as z may be 0."""

    def derivatives(z: Tensor, order: int) -> Derivatives:
        values: Derivatives = [z.pow(exponent)]
        factor = 1.0
        for m in range(order):
            factor *= exponent - m
            if factor == 0:
                break
            power = exponent - m - 1
            values.append(factor if power == 0 else factor * z.pow(power))
        return values

    return derivatives


def _sqrt(z: Tensor, order: int) -> Derivatives:
    value, r = z.sqrt(), None
    slope = 0.5 / value
    if order > 1:
        r = 1 / z
    return [value, slope, *([] if r is None else [-0.5 * slope * r, 0.75 * slope * r * r])]


def _rsqrt(z: Tensor, order: int) -> Derivatives:
    value, r = z.rsqrt(), 1 / z
    slope = -0.5 * value * r
    return [value, slope, *([-1.5 * slope * r, 3.75 * slope * r * r] if order > 1 else [])]


def _reciprocal(z: Tensor, order: int) -> Derivatives:
    r = 1 / z
    return [r, -r * r, *([2 * r**3, -6 * r**4] if order > 1 else [])]


def _sin(z: Tensor, order: int) -> Derivatives:
    s, c = z.sin(), z.cos()
    return [s, c, -s, -c]


def _cos(z: Tensor, order: int) -> Derivatives:
    s, c = z.sin(), z.cos()
    return [c, -s, -c, s]


def _tan(z: Tensor, order: int) -> Derivatives:
    t = z.tan()
    slope = 1 + t * t
    return [t, slope, *([2 * t * slope, slope * (2 + 6 * t * t)] if order > 1 else [])]


def _sinh(z: Tensor, order: int) -> Derivatives:
    s, c = z.sinh(), z.cosh()
    return [s, c, s, c]


def _cosh(z: Tensor, order: int) -> Derivatives:
    s, c = z.sinh(), z.cosh()
    return [c, s, c, s]


def _tanh(z: Tensor, order: int) -> Derivatives:
    t = z.tanh()
    slope = 1 - t * t
    return [t, slope, *([-2 * t * slope] if order > 1 else []), *([slope * (4 - 6 * slope)] if order > 2 else [])]


def _inverse(function: Callable[[Tensor], Tensor], sign: float, a: float, b: float) -> Any:
    """Derivatives of functions with sigma' = sign / sqrt(q), q = a + b z^2: sigma'' = -b z sigma' / q."""

    def derivatives(z: Tensor, order: int) -> Derivatives:
        q = a + b * z * z
        slope = sign * q.rsqrt()
        higher = [-b * z * slope / q, b * (2 * b * z * z - a) * slope / (q * q)] if order > 1 else []
        return [function(z), slope, *higher]

    return derivatives


def _atan(z: Tensor, order: int) -> Derivatives:
    slope = 1 / (1 + z * z)
    return [z.atan(), slope, *([-2 * z * slope**2, (6 * z * z - 2) * slope**3] if order > 1 else [])]


def _atanh(z: Tensor, order: int) -> Derivatives:
    slope = 1 / (1 - z * z)
    return [z.atanh(), slope, *([2 * z * slope**2, (6 * z * z + 2) * slope**3] if order > 1 else [])]


def _error_function(function: Callable[[Tensor], Tensor], sign: float) -> Any:
    def derivatives(z: Tensor, order: int) -> Derivatives:
        slope = sign * 2 / math.sqrt(math.pi) * (-z * z).exp()
        return [function(z), slope, *([-2 * z * slope, (4 * z * z - 2) * slope] if order > 1 else [])]

    return derivatives


def _logistic(z: Tensor, order: int) -> Derivatives:
    s = z.sigmoid()
    slope = s * (1 - s)
    second = [slope * (1 - 2 * s)] if order > 1 else []
    return [s, slope, *second, *([slope * (1 - 6 * slope)] if order > 2 else [])]


def _gated(gate: Derivatives, z: Tensor, value: Tensor) -> Derivatives:
    """Derivatives of z g(z): the m-th one is m g^(m-1) + z g^(m)."""
    return [value, gate[0] + z * gate[1]] + [m * gate[m - 1] + z * gate[m] for m in range(2, len(gate))]


def _silu(z: Tensor, order: int) -> Derivatives:
    return _gated(_logistic(z, order), z, torch.nn.functional.silu(z))


def _log_sigmoid(z: Tensor, order: int) -> Derivatives:
    s, c = z.sigmoid(), (-z).sigmoid()
    second = [-s * c] if order > 1 else []
    return [torch.nn.functional.logsigmoid(z), c, *second, *([s * c * (s - c)] if order > 2 else [])]


def gelu(z: Tensor, order: int) -> Derivatives:
    """Derivatives of z Phi(z): Phi + z phi, (2 - z^2) phi, (z^3 - 4 z) phi, with normal distribution and density."""
    density = (-0.5 * z * z).exp() * (1 / math.sqrt(2 * math.pi))
    slope = 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density
    higher = [(2 - z * z) * density] if order > 1 else []
    return [torch.nn.functional.gelu(z), slope, *higher, *([(z * z - 4) * z * density] if order > 2 else [])]


SMOOTH: dict[str, Callable[[Tensor, int], Derivatives]] = {
    "exp": _exp,
    "exp2": _exp2,
    "expm1": _expm1,
    "log": _logarithm(torch.log),
    "log2": _logarithm(torch.log2, 1 / math.log(2)),
    "log10": _logarithm(torch.log10, 1 / math.log(10)),
    "log1p": _logarithm(torch.log1p, shift=1.0),
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    "square": _power(2),
    "sin": _sin,
    "cos": _cos,
    "tan": _tan,
    "sinh": _sinh,
    "cosh": _cosh,
    "tanh": _tanh,
    "asin arcsin": _inverse(torch.asin, 1, 1, -1),
    "acos arccos": _inverse(torch.acos, -1, 1, -1),
    "asinh arcsinh": _inverse(torch.asinh, 1, 1, 1),
    "acosh arccosh": _inverse(torch.acosh, 1, -1, 1),
    "atan arctan": _atan,
    "atanh arctanh": _atanh,
    "erf special_erf": _error_function(torch.erf, 1),
    "erfc special_erfc": _error_function(torch.erfc, -1),
    "sigmoid special_expit": _logistic,
    "silu": _silu,
    "log_sigmoid": _log_sigmoid,
}


def _elementwise(derivatives: Callable[[Tensor, int], Derivatives]) -> Callable[[Series], Series]:
    return lambda h: composed(h, derivatives(primal(h), len(h) - 1))


def _gelu_of_either_form(h: Series, approximate: str = "none") -> Series:
    if approximate == "none":
        return composed(h, gelu(primal(h), len(h) - 1))
    # z logistic(2 u) with u = sqrt(2 / pi) (z + 0.044715 z^3)
    c, z = 2 * math.sqrt(2 / math.pi), primal(h)
    inner = [c * (z + 0.044715 * z**3), c * (1 + 0.134145 * z * z), c * 0.26829 * z, c * 0.26829]
    gate = composed(h, inner)
    return product(torch.mul, h, composed(gate, _logistic(primal(gate), len(h) - 1)))


def _softplus(h: Series, beta: float = 1, threshold: float = 20) -> Series:
    """log(1 + exp(beta z)) / beta, linear above the threshold as torch has it."""
    z, order = primal(h), len(h) - 1
    high = z * beta > threshold
    values: Derivatives = [torch.nn.functional.softplus(z, beta, threshold)]
    for m, value in enumerate(_logistic(z * beta, order)[:order]):
        values.append(torch.where(high, 1.0 if m == 0 else 0.0, value * beta**m))
    return composed(h, values)


def _pow(base: Factor, exponent: Factor) -> Series:
    if isinstance(exponent, Series):
        log = _log(base)
        power = product(torch.mul, exponent, log)
        return composed(power, _exp(primal(power), len(power) - 1))
    if not isinstance(base, Series) or (isinstance(exponent, Tensor) and exponent.ndim > 0):
        raise NoJetRuleError("only a number is a constant exponent")
    return composed(base, _power(float(exponent))(primal(base), len(base) - 1))


def _log(base: Factor) -> Factor:
    """The logarithm of a series or of a constant."""
    if isinstance(base, Series):
        return composed(base, SMOOTH["log"](primal(base), len(base) - 1))
    return base.log() if isinstance(base, Tensor) else math.log(base)


def _divide(a: Factor, b: Factor, *, rounding_mode: str | None = None) -> Series:
    if rounding_mode is not None:
        raise NoJetRuleError("a rounded quotient has no series")
    return quotient(a, b)


def _softmax_series(h: Series, dim: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Compute the series p = softmax(h) and the higher coefficients of L = logsumexp(h).

    p' = p (h' - L') with L' = sum_x p h', order by order: with H_j = j h_j,
    j L_j = sum_x sum_i H_i p_{j-i} and j p_j = sum_i (H_i - i L_i) p_{j-i}.

    Args:
        h: The series.
        dim: The axis, or several.

    Returns:
        The coefficients of p, and those of L with None at order 0.
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


SMOOTH_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    func: _elementwise(derivatives) for names, derivatives in SMOOTH.items() for func in builtins(names)
}
for _names, _rule in (
    ("gelu", _gelu_of_either_form),
    ("softplus", _softplus),
    ("pow __pow__", _pow),
    ("__rpow__", lambda exponent, base: _pow(base, exponent)),
    ("div divide true_divide __truediv__", _divide),
    ("__rdiv__ __rtruediv__", lambda b, a: quotient(a, b)),
    ("softmax special_softmax", _softmax),
    ("log_softmax special_log_softmax", _log_softmax),
    ("logsumexp special_logsumexp", _logsumexp),
):
    SMOOTH_RULES.update(dict.fromkeys(builtins(_names), _rule))
