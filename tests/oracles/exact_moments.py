"""Moments of a scale-invariant MLP's output at finite width, exactly: what order 1/n is compared with."""

import math

from torch import Tensor

from torch_eft.theory import MLPEnsemble
from torch_eft.theory.estimates.exact import scale_invariant_slopes
from torch_eft.theory.signal_propagation.susceptibility import mean_power


def exact_G_moment_ratio(ensemble: MLPEnsemble, power: int = 2, x: Tensor | None = None) -> float:
    """E[G^p] / E[G]^p exactly; G = E[z^2 | last hidden layer] is the output's variance in one network.

    For one input ``G' = C_b + (C_W / n) sum_j d_j^2 z_j^2`` with z_j ~ N(0, G), so that moments of G' are those of G
    times those of a sum of n independent d^2 g^2, g ~ N(0, 1). Without biases a product over hidden layers remains,

        E[G^2] / E[G]^2 = prod_l (1 + nu / n_l);    linear: E[G^p] / E[G]^p = prod_l prod_{k<p} (1 + 2k / n_l)

    (PDLT 3.3 for deep linear; Hanin & Nica 2018 for ReLU, as exp(5 sum_l 1/n_l)).

    Args:
        ensemble: The ensemble, with a scale-invariant activation.
        power: p, at most 100: beyond it (2p - 1)!! leaves the range of float64.
        x: One input, (1, n_0), or None: any input if C_b = 0, else one with |x|^2 = n_0.

    Returns:
        The ratio, >= 1.
    """
    slopes = scale_invariant_slopes(ensemble)
    A_2 = mean_power(slopes, 2)
    K = ensemble.C_b[0] + ensemble.C_W[0] * _size(ensemble, x)
    assert K > 0
    ratios = [1.0] * (power + 1)
    for index, n in enumerate(ensemble.hidden_widths, start=1):
        signal = ensemble.C_W[index] * A_2 * K
        K = ensemble.C_b[index] + signal
        share = signal / K
        moments = _sum_moments(slopes, n, power)
        scaled = [ratios[k] * moments[k] * share**k for k in range(power + 1)]
        ratios = [
            sum(math.comb(p, k) * (1 - share) ** (p - k) * scaled[k] for k in range(p + 1)) for p in range(power + 1)
        ]
    return ratios[power]


def exact_output_moment_ratio(ensemble: MLPEnsemble, power: int = 2, x: Tensor | None = None) -> float:
    """E[z^{2p}] / E[z^2]^p of an output exactly: (2p - 1)!! times that of G, as z given G is Gaussian.

    Args:
        ensemble: The ensemble, with a scale-invariant activation.
        power: p, at most 100: beyond it (2p - 1)!! leaves the range of float64.
        x: As in ``exact_G_moment_ratio``.

    Returns:
        The ratio; 3 prod_l (1 + nu / n_l) for p = 2 without biases.
    """
    return exact_G_moment_ratio(ensemble, power, x) * math.prod(range(1, 2 * power, 2))


def _sum_moments(slopes: tuple[float, float], n: int, highest: int) -> list[float]:
    """E[S^k] / E[S]^k, k = 0 .. highest, S the sum of n independent d^2 g^2, from the n-th power of their series."""
    scale = math.sqrt(mean_power(slopes, 2))
    base, gaussian = [1.0], 1.0
    for k in range(1, highest + 1):
        gaussian *= (2 * k - 1) / (n * k)  # (2k - 1)!! / (n^k k!)
        base.append(gaussian * mean_power((slopes[0] / scale, slopes[1] / scale), 2 * k))
    series = [1.0] + [0.0] * highest
    while n:  # by squaring: all terms are positive, so that nothing cancels
        if n % 2:
            series = _product(series, base)
        base, n = _product(base, base), n // 2
    return [math.factorial(k) * coefficient for k, coefficient in enumerate(series)]


def _product(a: list[float], b: list[float]) -> list[float]:
    return [sum(a[j] * b[k - j] for j in range(k + 1)) for k in range(len(a))]


def _size(ensemble: MLPEnsemble, x: Tensor | None) -> float:
    """|x|^2 / n_0 of one input."""
    return 1.0 if x is None else float(x.double().square().sum()) / ensemble.widths[0]
