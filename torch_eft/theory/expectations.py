"""Gaussian expectations of one label, <f(z)> for z ~ N(0, K), by the trapezoid rule.

For an analytic f that grows slower than the Gaussian decays, the rule converges exponentially in the step. The step is
found, not assumed: it is halved until neither halving it again nor widening the range changes the result.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

RELATIVE_ERROR = 1e-12
"""Bound on the error of a quadrature moment, relative to sqrt(<f_a^2> <f_b^2>)."""

_HALF_RANGES = (12.0, 16.0)
_FINEST_STEP = 1.0 / 512.0


class QuadratureError(ValueError):
    """The function is not smooth enough, or grows too fast, for quadrature to reach its error bound."""


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
    u, weight = resolved_grid([function], deviation, getattr(function, "__name__", "the integrand"))
    return (function(deviation * u) @ weight).reshape(K.shape)


def _grid(step: float, half_range: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes u and weights phi(u) du of the trapezoid rule for u ~ N(0, 1)."""
    count = math.ceil(half_range / step)
    u = torch.arange(-count, count + 1, dtype=torch.float64, device=like.device) * step
    return u, torch.exp(-u.square() / 2) * (step / math.sqrt(2 * math.pi))


def resolved_grid(functions: list[Callable[[Tensor], Tensor]], deviation: Tensor, name: str) -> tuple[Tensor, Tensor]:
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
