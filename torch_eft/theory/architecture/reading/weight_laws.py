"""Recognizes the distribution of weights or biases from their values.

Of Gaussian, uniform, truncated normal and orthogonal ones the theory knows what they change.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS, TRUNCATED_BOUND

SIGNIFICANCE = 1e-4
"""Probability with which each test rejects a distribution that is the true one."""

_DEVIATES = 3.8906
"""Standard normal deviate that is exceeded in absolute value with probability ``SIGNIFICANCE``."""

_FEWEST = 20
"""Numbers from which the transformation of the kurtosis holds (Anscombe and Glynn 1983)."""


@dataclass(frozen=True)
class WeightStatistics:
    """Statistics of one layer's weights (n_out, n_in) or biases (n_out,).

    Args:
        variance: Mean square.
        variance_error: Standard error of ``variance``, a single number taken as Gaussian; 0 for orthogonal weights,
            whose sum of squares is fixed.
        excess_kurtosis: <w^4> / <w^2>^2 - 3: 0 for Gaussian, -1.2 for uniform; 0 if all are zero.
        distribution: ``"gaussian"``, ``"uniform"``, ``"truncated normal"`` (cut at two standard deviations),
            ``"orthogonal"``, ``"constant"`` (all equal), ``"other"``, or ``"too few to tell"`` where Gaussian and
            uniform are both possible.
        largest: Largest absolute value.
    """

    variance: float
    variance_error: float
    excess_kurtosis: float
    distribution: str
    largest: float = 0.0


def weight_statistics(weight: Tensor) -> WeightStatistics:
    """Measure a layer's weights or biases and recognize their distribution at level ``SIGNIFICANCE``.

    Gaussian: the excess kurtosis, by the transformation to a normal deviate of Anscombe and Glynn 1983, whose leading
    order is the standard error sqrt(24 / N), and a mean of zero. Uniform: the excess kurtosis is -1.2 within
    1.147 / sqrt(N), and the largest |w| is the bound sqrt(3) sd within what N uniform numbers allow. Truncated normal:
    likewise, where Gaussian and uniform are excluded. Orthogonal:
    W W^T or W^T W is a multiple of 1 to rounding, far below the 1/sqrt(n) of independent weights.

    Args:
        weight: (n_out, n_in), or biases (n_out,).

    Returns:
        The statistics.
    """
    w = weight.detach().double()
    count = w.numel()
    squares = w.square()
    variance = float(squares.mean())
    if variance == 0 or not math.isfinite(variance):
        return WeightStatistics(variance, 0.0, 0.0, "constant" if variance == 0 else "other")
    excess = float(squares.square().mean()) / variance**2 - 3
    # With the excess kurtosis k, Var(w^2) = (k + 2) <w^2>^2.
    error = variance * math.sqrt(max(0.0, excess + 2 if count > 1 else 2.0) / count)
    largest = float(w.abs().max())
    if _is_orthogonal(weight, variance):
        return WeightStatistics(variance, 0.0, excess, "orthogonal", largest)
    if count > 1 and bool((w == w.flatten()[0]).all()):
        return WeightStatistics(variance, error, excess, "constant", largest)
    if count < _FEWEST:
        return WeightStatistics(variance, error, excess, "too few to tell", largest)
    centered = abs(float(w.mean())) < _DEVIATES * math.sqrt(variance / count)
    gaussian = centered and _may_be_gaussian(excess, count)
    uniform = centered and _may_be_uniform(excess, largest / math.sqrt(variance), count)
    kind = {(True, False): "gaussian", (False, True): "uniform", (True, True): "too few to tell"}.get(
        (gaussian, uniform)
    )
    if kind is None:
        kind = "truncated normal" if centered and _may_be_truncated(squares / variance, excess) else "other"
    return WeightStatistics(variance, error, excess, kind, largest)


def _is_orthogonal(weight: Tensor, variance: float) -> bool:
    if weight.ndim != 2 or min(weight.shape) < 2:
        return False
    w = weight.detach().double()
    if w.shape[0] > w.shape[1]:
        w = w.T
    largest = w.shape[1]
    gram = w @ w.T / (largest * variance)
    deviation = (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()
    # To rounding, and never nearer than a tenth of how far independent weights are from it.
    # Weights are usually drawn in float32, and may be wider now.
    rounding = max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
    return float(deviation) < min(32 * rounding, 0.1 / math.sqrt(largest))


def _may_be_gaussian(excess: float, n: int) -> bool:
    mean, variance = 3 * (n - 1) / (n + 1), 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    x = (excess + 3 - mean) / math.sqrt(variance)
    skewness = (
        6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9)) * math.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    )
    a = 6 + 8 / skewness * (2 / skewness + math.sqrt(1 + 4 / skewness**2))
    shape = 1 + x * math.sqrt(2 / (a - 4))
    if shape <= 0:  # below what the transformation reaches
        return False
    deviate = (1 - 2 / (9 * a) - ((1 - 2 / a) / shape) ** (1 / 3)) / math.sqrt(2 / (9 * a))
    return abs(deviate) < _DEVIATES


def _may_be_uniform(excess: float, largest: float, count: int) -> bool:
    """Standard errors for uniform numbers: 1.147 / sqrt(N) of the kurtosis, sd sqrt(0.2 / N) of the sd."""
    root = math.sqrt(count)
    bound = largest / math.sqrt(3) - 1
    shortfall = -math.log(SIGNIFICANCE) / count  # P(max |w| < (1 - e) bound) = (1 - e)^N
    spread = _DEVIATES * math.sqrt(0.2) / root
    return abs(excess + 1.2) < _DEVIATES * 1.147 / root and -spread - shortfall < bound < spread


def _may_be_truncated(squares: Tensor, excess: float) -> bool:
    """Of w^2 / <w^2>; the standard error of the kurtosis k, that of <w^4 - 2 k w^2>, is taken from the numbers."""
    count = squares.numel()
    error = float((squares.square() - 2 * (excess + 3) * squares).std()) / math.sqrt(count)
    bound = math.sqrt(float(squares.max())) / TRUNCATED_BOUND - 1
    spread = _DEVIATES * 0.5 * math.sqrt((EXCESS_KURTOSIS["truncated normal"] + 2) / count)
    # P(|w| > (1 - e) bound) = 0.226 e, from the density at the cut.
    shortfall = -math.log(SIGNIFICANCE) / (0.226 * count)
    near = abs(excess - EXCESS_KURTOSIS["truncated normal"]) < _DEVIATES * error
    return near and -spread - shortfall < bound < spread
