"""Gaussian expectations of one and two activations, the moments M_00 and M_11 of the recursions.

For z ~ N(0, K) with two labels a, b, the moment of order p is
``<s^(p)(z_a) s^(p)(z_b)>_K`` (PDLT 4.2; notation M_pp). Three routes, chosen by the activation:

* sigma with two slopes (linear, ReLU, leaky ReLU): the arc-cosine closed form (Cho & Saul 2009);
* erf (Williams 1996) and sin: closed forms;
* every other smooth function: Mehler's expansion in Hermite polynomials (Mehler 1866)

      <f(z_a) g(z_b)> = sum_k f_k(K_aa) g_k(K_bb) rho^k,    f_k(K) = <f(sqrt(K) u) he_k(u)>_{u ~ N(0,1)},

  he_k orthonormal, rho = K_ab / sqrt(K_aa K_bb). The coefficients are one-dimensional
  integrals, done by the trapezoid rule, which converges exponentially for analytic f. By
  Cauchy-Schwarz the tail for any pair is at most sqrt(tail_a tail_b), where
  tail_a = <f(z_a)^2> - sum_{k kept} f_k(K_aa)^2 is known: the truncation error is bounded,
  not guessed. K is never inverted, so repeated and parallel inputs are ordinary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_eft.theory.activations import Activation

RELATIVE_ERROR = 1e-12
"""Bound on the error of a quadrature moment, relative to sqrt(<f_a^2> <f_b^2>)."""

_MAX_TERMS = 20000
_HALF_RANGES = (12.0, 16.0)
_FINEST_STEP = 1.0 / 512.0
_ROUNDING_ANGLE = 8 * torch.finfo(torch.float64).eps


class QuadratureError(ValueError):
    """The function is not smooth enough, or grows too fast, for quadrature to reach its error bound."""


def moment_matrix(activation: Activation, K: Tensor, order: int = 0) -> Tensor:
    """The matrix ``<s^(p)(z_a) s^(p)(z_b)>_K`` for p = ``order``.

    Args:
        activation: The activation sigma.
        K: Kernel, (N, N), float64, positive semidefinite (singular is fine).
        order: 0 for M_00, 1 for M_11.

    Returns:
        (N, N), symmetric, on the device of ``K``.

    Raises:
        QuadratureError: If the function is not smooth enough for the error bound.
    """
    if activation.slopes is not None:
        return _two_slope_moment(activation.slopes, K, order)
    closed_form = _CLOSED_FORMS.get((activation.name, order))
    if closed_form is not None:
        return closed_form(K)
    return _mehler_moment(lambda z: activation(z, order), K, f"{activation.name}, derivative {order}")


def expectation(function: Callable[[Tensor], Tensor], K: Tensor) -> Tensor:
    """``<f(z)>`` for z ~ N(0, K), elementwise in ``K``, by the trapezoid rule.

    Args:
        function: f, elementwise, smooth.
        K: Variances >= 0, any shape, float64.

    Returns:
        Same shape as ``K``.

    Raises:
        QuadratureError: If halving the step or widening the range changes the result.
    """
    deviation = K.reshape(-1, 1).sqrt()
    u, weight = _resolved_grid([function], deviation, getattr(function, "__name__", "the integrand"))
    return (function(deviation * u) @ weight).reshape(K.shape)


def _correlation(K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rho, sqrt(1 - rho^2), sqrt(K_aa K_bb)); angles below rounding are exactly 0 or pi."""
    variance = K.diagonal()
    scale = torch.outer(variance, variance).sqrt()
    rho = torch.where(scale > 0, K / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1.0, 1.0)
    # 1 - rho^2 below rounding: the two inputs are (anti)parallel as far as K can tell, and asin is steep there.
    sine_squared = (1.0 - rho) * (1.0 + rho)
    parallel = sine_squared < _ROUNDING_ANGLE
    rho = torch.where(parallel & (scale > 0), rho.sign(), rho)
    return rho, torch.where(parallel, 0.0, sine_squared).sqrt(), scale


def _two_slope_moment(slopes: tuple[float, float], K: Tensor, order: int) -> Tensor:
    """Arc-cosine closed forms; sigma = g z + h |z| and <|z_a||z_b|> = (2/pi) scale (sin + rho asin rho)."""
    even, odd = (slopes[1] - slopes[0]) / 2, (slopes[1] + slopes[0]) / 2
    rho, sine, scale = _correlation(K)
    if order == 0:
        return odd**2 * K + even**2 * (2 / math.pi) * scale * (sine + rho * rho.asin())
    if order == 1:
        return odd**2 + even**2 * (2 / math.pi) * rho.asin()
    raise ValueError(f"order: {order} given; moments of two-slope activations are here for 0 and 1")


def _erf_moment(K: Tensor) -> Tensor:
    root = (1 + 2 * K.diagonal()).sqrt()
    return (2 / math.pi) * (2 * K / torch.outer(root, root)).asin()


def _erf_slope_moment(K: Tensor) -> Tensor:
    stretched = 1 + 2 * K.diagonal()
    return (4 / math.pi) / (torch.outer(stretched, stretched) - 4 * K.square()).sqrt()


def _sin_moment(K: Tensor) -> Tensor:
    mean = (K.diagonal()[:, None] + K.diagonal()[None, :]) / 2
    return ((K - mean).exp() - (-K - mean).exp()) / 2


def _sin_slope_moment(K: Tensor) -> Tensor:
    mean = (K.diagonal()[:, None] + K.diagonal()[None, :]) / 2
    return ((K - mean).exp() + (-K - mean).exp()) / 2


_CLOSED_FORMS: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {
    ("erf", 0): _erf_moment,
    ("erf", 1): _erf_slope_moment,
    ("sin", 0): _sin_moment,
    ("sin", 1): _sin_slope_moment,
}


def _mehler_moment(function: Callable[[Tensor], Tensor], K: Tensor, name: str) -> Tensor:
    rho, _, _ = _correlation(K)
    coefficients = _hermite_coefficients(function, K.diagonal(), name)
    moment = torch.zeros_like(K)
    for column in reversed(coefficients.unbind(1)):  # Horner's rule in rho
        moment = torch.addcmul(torch.outer(column, column), moment, rho)
    return moment


def _hermite_coefficients(function: Callable[[Tensor], Tensor], variance: Tensor, name: str) -> Tensor:
    """f_k(K_aa), (N, number of terms kept), enough terms for RELATIVE_ERROR on every pair."""
    deviation = variance[:, None].sqrt()
    u, weight = _resolved_grid([function, lambda z: function(z).square()], deviation, name)
    values = function(deviation * u) * weight.sqrt()
    total = values.square().sum(1)
    # Orthonormal Hermite functions on the grid: stable upward recurrence, unlike the bare polynomials.
    before, current = torch.zeros_like(weight), weight.sqrt()
    columns, remainder = [], total.clone()
    for k in range(_MAX_TERMS):
        column = values @ current
        columns.append(column)
        remainder = remainder - column.square()
        # Check now and then only: reading a tensor's value waits for the device.
        if k % 16 == 15 and bool((remainder <= RELATIVE_ERROR * total).all()):
            return torch.stack(columns, 1)
        before, current = current, (u * current - math.sqrt(k) * before) / math.sqrt(k + 1)
    raise QuadratureError(
        f"activation: the Hermite series of {name} does not converge to {RELATIVE_ERROR:g} within {_MAX_TERMS} terms "
        f"(variance up to {float(variance.max()):.3g}); the function must be smooth, and inputs scaled so "
        "that the variance is not far above 1"
    )


def _grid(step: float, half_range: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes u and weights phi(u) du of the trapezoid rule for u ~ N(0, 1)."""
    count = math.ceil(half_range / step)
    u = torch.arange(-count, count + 1, dtype=torch.float64, device=like.device) * step
    return u, torch.exp(-u.square() / 2) * (step / math.sqrt(2 * math.pi))


def _resolved_grid(functions: list[Callable[[Tensor], Tensor]], deviation: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """A grid on which the mean of every function, at every deviation, no longer depends on step and range."""
    step = 0.25
    while step >= _FINEST_STEP:
        means = []
        for trial_step, half_range in ((step, _HALF_RANGES[0]), (step / 2, _HALF_RANGES[1])):
            u, weight = _grid(trial_step, half_range, deviation)
            z = deviation * u
            values = [function(z) for function in functions]
            if not all(bool(torch.isfinite(value).all()) for value in values):
                raise QuadratureError(f"activation: {name} is not finite on |z| <= {float(z.abs().max()):.3g}")
            means.append([(value @ weight, value.abs() @ weight) for value in values])
        if all(
            bool(((fine - coarse).abs() <= 0.1 * RELATIVE_ERROR * size).all())
            for (coarse, _), (fine, size) in zip(means[0], means[1], strict=True)
        ):
            # The Hermite functions of high order need the finer of the two grids that agree.
            return _grid(step / 2, _HALF_RANGES[1], deviation)
        step /= 2
    raise QuadratureError(
        f"activation: the Gaussian integral of {name} does not settle to {RELATIVE_ERROR:g} (variance up to "
        f"{float(deviation.max()) ** 2:.3g}); the function must be smooth and grow slower than exp(z^2 / (2 K))"
    )
