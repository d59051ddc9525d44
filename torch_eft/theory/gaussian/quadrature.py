"""Gaussian expectations of one label, <f(z)> for z ~ N(0, K).

For an analytic f that grows slower than the Gaussian decays, the trapezoid rule converges exponentially in the step.
The step is determined, not assumed: it is halved until neither halving it again nor widening the range changes the
result.
Between kinks f is smooth, and Gauss-Legendre panels that end at them converge as fast.
"""

import math
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

from torch_eft.results.progress.work import worked

RELATIVE_ERROR = 1e-12
"""Bound on the error of a quadrature moment, relative to sqrt(<f_a^2> <f_b^2>)."""

_HALF_RANGES = (12.0, 16.0)
_FINEST_STEP = 1.0 / 512.0


class QuadratureError(ValueError):
    """The function is not smooth enough, or grows too fast, for quadrature to reach its error bound.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> shifted = theory.MLPEnsemble([3, 5, 1], lambda z: torch.relu(z - 0.3))
        >>> try:
        ...     theory.output_fluctuation(shifted)
        ... except theory.QuadratureError:
        ...     print("declare the kink")
        declare the kink
    """


def expectation(function: Callable[[Tensor], Tensor], K: Tensor, kinks: tuple[float, ...] = ()) -> Tensor:
    """``<f(z)>`` for z ~ N(0, K), elementwise in ``K``.

    Raises ``QuadratureError`` if halving the step or widening the range changes the result.

    Args:
        function: f, elementwise, smooth but for ``kinks``.
        K: Variances >= 0, any shape, float64.
        kinks: Where f or a derivative of it jumps. Delta functions of f there are not included.

    Returns:
        Same shape as ``K``.
    """
    deviation = K.reshape(-1, 1).sqrt()
    if kinks:
        return _between_kinks(function, deviation, kinks).reshape(K.shape)
    u, weight = resolved_grid([function], deviation, getattr(function, "__name__", "the integrand"))
    worked(2 * deviation.numel() * u.numel())
    return (function(deviation * u) @ weight).reshape(K.shape)


def gauss_legendre(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss-Legendre rule on [-1, 1], in the dtype and on the device of ``like``."""
    nodes, weights = numpy.polynomial.legendre.leggauss(count)
    return like.new_tensor(nodes), like.new_tensor(weights)


def panel_grid(deviation: Tensor, kinks: tuple[float, ...], pieces: int) -> tuple[Tensor, Tensor]:
    """A rule for integrals over z ~ N(0, K) of what is smooth between kinks.

    Args:
        deviation: sqrt(K), (..., 1).
        kinks: Where the integrand jumps.
        pieces: Number of equal pieces into which the stretch from kink to kink is cut.

    Returns:
        Nodes u = z / sqrt(K) and their weights with the Gaussian density, both (..., nodes).
    """
    bound = _HALF_RANGES[0]
    places = torch.tensor(sorted(kinks), dtype=deviation.dtype, device=deviation.device)
    # At variance 0 everything happens at z = 0: any split will do.
    inner = torch.where(deviation > 0, places / torch.where(deviation > 0, deviation, 1.0), 0.0).clamp(-bound, bound)
    edges = torch.cat([torch.full_like(deviation, -bound), inner, torch.full_like(deviation, bound)], -1)
    # Pieces rather than a rule of high order, whose weights lose digits next to the kink.
    nodes, weights = gauss_legendre(48, deviation)
    half = ((edges[..., 1:] - edges[..., :-1]) / (2 * pieces))[..., None, None]
    centers = edges[..., :-1, None, None] + half * (2 * torch.arange(pieces).to(deviation)[:, None] + 1)
    u = centers + half * nodes
    weight = torch.exp(-u.square() / 2) * half * weights / math.sqrt(2 * math.pi)
    return u.flatten(-3), weight.flatten(-3)


def _between_kinks(function: Callable[[Tensor], Tensor], deviation: Tensor, kinks: tuple[float, ...]) -> Tensor:
    """The panels from kink to kink, cut into more and more pieces until the result settles."""
    before = None
    for pieces in (1, 2, 4, 8, 16, 32, 64):
        u, weight = panel_grid(deviation, kinks, pieces)
        values = function(deviation * u) * weight
        total, size = values.sum(-1), values.abs().sum(-1)
        if before is not None and bool(((total - before).abs() <= 0.1 * RELATIVE_ERROR * size).all()):
            return total
        before = total
    raise QuadratureError(
        f"activation: the Gaussian integral between the kinks at {', '.join(f'{k:g}' for k in kinks)} does not settle "
        f"to {RELATIVE_ERROR:g}; the function must be smooth between them"
    )


def _grid(step: float, half_range: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes u and weights phi(u) du of the trapezoid rule for u ~ N(0, 1)."""
    count = math.ceil(half_range / step)
    u = torch.arange(-count, count + 1, dtype=torch.float64, device=like.device) * step
    return u, torch.exp(-u.square() / 2) * (step / math.sqrt(2 * math.pi))


def resolved_grid(functions: list[Callable[[Tensor], Tensor]], deviation: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Refine a grid until the mean of every function, at every deviation, no longer depends on step and range."""
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
