"""Exact results at finite width, with nothing expanded in 1/n: the yardstick for the theory's truncation at order 1/n.

Two-slope activations (linear, ReLU, leaky ReLU, |z|) and Gaussian weights close at finite width, because a neuron's
slope is independent of everything it multiplies: flipping the sign of all of neuron i's incoming parameters flips z_i
and H_ij, j != i, and nothing else, so that the slopes d_i = sigma'(z_i) are independent of z_i z_j H_ij, z_i^2, H_ii,
H_ij^2, ..., and of one another. Only two numbers of the activation enter second moments,

    A_2 = <d^2>,    kappa = <d^4> / <d^2>^2 = (nu + 1) / 3:    nu = 2 (linear), 5 (ReLU).

Sources: Roberts, Yaida, Hanin, arXiv:2106.10165 (PDLT; deep linear in chapter 3); Hanin & Nica 2018
(arXiv:1812.05994) and 2020 (arXiv:1909.05989); Lewkowycz et al. 2020 (arXiv:2003.02218).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import check_inputs
from torch_eft.theory.initialization.statistics import LayerStatistics
from torch_eft.theory.signal_propagation.susceptibility import mean_power

_HIGHEST_POWER = 100
"""Beyond it (2p - 1)!! leaves the range of float64."""


def exact_G_moment_ratio(ensemble: MLPEnsemble, power: int = 2, x: Tensor | None = None) -> float:
    """E[G^p] / E[G]^p exactly; G = E[z^2 | last hidden layer] is the output's variance in one network.

    For one input ``G' = C_b + (C_W / n) sum_j d_j^2 z_j^2`` with z_j ~ N(0, G), so that moments of G' are those of G
    times those of a sum of n independent d^2 g^2, g ~ N(0, 1). Without biases a product over hidden layers remains,

        E[G^2] / E[G]^2 = prod_l (1 + nu / n_l);    linear: E[G^p] / E[G]^p = prod_l prod_{k<p} (1 + 2k / n_l)

    (PDLT 3.3 for deep linear; Hanin & Nica 2018 for ReLU, as exp(5 sum_l 1/n_l)).

    Args:
        ensemble: The ensemble, with a two-slope activation.
        power: p, 1 .. 100.
        x: One input, (1, n_0), or None: any input if C_b = 0, else one with |x|^2 = n_0.

    Returns:
        The ratio, >= 1.

    Raises:
        ValueError: If the activation has not two slopes, ``power`` is out of range, or ``x`` is not one input of
            non-zero variance.
    """
    _check_power(power)
    slopes = _slopes(ensemble)
    A_2 = mean_power(slopes, 2)
    K = ensemble.C_b[0] + ensemble.C_W[0] * _size(ensemble, x)
    if not K > 0:
        raise ValueError("x: zero given and C_b = 0 in layer 1: G vanishes; give an input that is not zero")
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
        ensemble: The ensemble, with a two-slope activation.
        power: p, 1 .. 100.
        x: As in ``exact_G_moment_ratio``.

    Returns:
        The ratio; 3 prod_l (1 + nu / n_l) for p = 2 without biases.

    Raises:
        ValueError: As in ``exact_G_moment_ratio``.
    """
    return exact_G_moment_ratio(ensemble, power, x) * math.prod(range(1, 2 * power, 2))


def dead_probability(ensemble: MLPEnsemble) -> float:
    """Probability that some hidden layer is silent, all neurons at sigma = 0, for a given input not zero.

    ``1 - prod_l (1 - 2^{-n_l})`` for ReLU (signs are independent), 0 where no slope is zero. Without biases the output
    is then zero; with them it is constant around the input.

    Args:
        ensemble: The ensemble, with a two-slope activation.

    Returns:
        The probability.

    Raises:
        ValueError: If the activation has not two slopes.
    """
    if 0.0 not in _slopes(ensemble):
        return 0.0
    return -math.expm1(sum(math.log1p(-(2.0**-n)) for n in ensemble.hidden_widths))


def exact_statistics(ensemble: MLPEnsemble, x: Tensor) -> list[LayerStatistics]:
    """K, Theta, V, A, B, D, F at every layer, exactly at the ensemble's widths: to be read like ``initial_statistics``.

    The index structure of the vertices is exact, too (Gaussian weights), so that these are full second moments, e.g.
    E[H_11 H_22] = Theta^2 + A / n, E[H_12^2] = B / n and E[H_11^2] = Theta^2 + (A + 2B) / n for one input, n = n_{l-1}.
    K and Theta are exact as they stand: G1 = Theta1 = 0.

    Derivation. For X, Y out of z z and H, with means x, y (K, Theta), write
        E[X_{ij;12} Y_{kl;34}] = d_ij d_kl (x_12 y_34 + a_1234) + d_ik d_jl b_1234 + d_il d_jk b_1243.
    Times slopes and summed over a layer's n neurons, per n A_2^2,
        Cov(tr X_12, tr Y_34)    ->  n a + (kappa - 1) (x y + a) + kappa (b_1234 + b_1243)
        E sum_ij X_ij;12 Y_ij;34 ->  (n - 1) b_1234 + kappa (x y + a + b_1234 + b_1243),
    and Wick's theorem for the next layer's weights turns the first into its V, D, A, the second into its F, B, through
    G = C_b + C_W tr(z z) / n and h = lambda_b + (lambda_W tr(z z) + C_W tr H) / n. To order 1/n, this is PDLT 4.3 and
    8.2; deep linear V is PDLT 3.3.

    Args:
        ensemble: The ensemble: linear, or with two slopes and a single input.
        x: Inputs, (N, n_0); N = 1 unless the activation is linear.

    Returns:
        One ``LayerStatistics`` a layer, float64, with P .. U None; memory grows like 10 N^4 numbers a layer.

    Raises:
        ValueError: If the activation has not two slopes, or is not linear and N > 1, or ``x`` does not fit.
    """
    x = check_inputs("x", x, ensemble)
    slopes = _slopes(ensemble)
    if slopes[0] != slopes[1] and len(x) > 1:
        raise ValueError(
            f"x: {len(x)} inputs given; finite-width results for several inputs are closed for linear activations "
            f"only, not for {ensemble.activation.name}; give one input, (1, {ensemble.widths[0]})"
        )
    A_2 = mean_power(slopes, 2)
    kappa = mean_power(slopes, 4) / A_2**2
    gram = x @ x.T / ensemble.widths[0]
    K = ensemble.C_b[0] + ensemble.C_W[0] * gram
    Theta = ensemble.lambda_b[0] + ensemble.lambda_W[0] * gram
    V = D = F = A = B = K.new_zeros([len(x)] * 4)
    layers = [_layer(1, K, Theta, V, D, F, A, B)]
    for index in range(1, ensemble.depth):
        n, n_before = ensemble.widths[index], ensemble.widths[index - 1]
        C_W, lambda_W = ensemble.C_W[index] * A_2, ensemble.lambda_W[index] * A_2
        KK, V_crossed = torch.einsum("ac,bd->abcd", K, K), V.transpose(1, 2)
        zz, _ = _summed(n, kappa, K, K, V / n_before, KK + V_crossed / n_before)
        zH, zH_crossed = _summed(n, kappa, K, Theta, D / n_before, F.transpose(1, 2) / n_before)
        HH, HH_crossed = _summed(n, kappa, Theta, Theta, A / n_before, B.transpose(1, 2) / n_before)
        V, D, F = C_W**2 * zz, C_W * (lambda_W * zz + C_W * zH), C_W**2 * zH_crossed.transpose(1, 2)
        A = lambda_W**2 * zz + lambda_W * C_W * (zH + zH.permute(2, 3, 0, 1)) + C_W**2 * HH
        B = C_W**2 * HH_crossed.transpose(1, 2)
        Theta = ensemble.lambda_b[index] + lambda_W * K + C_W * Theta
        K = ensemble.C_b[index] + C_W * K
        layers.append(_layer(index + 1, K, Theta, V, D, F, A, B))
    return layers


class LinearDifferentials(NamedTuple):
    """H, dH, ddI and ddII of f = u.v / sqrt(n), each of the shape of f."""

    H: Tensor
    dH: Tensor
    ddI: Tensor
    ddII: Tensor


def two_layer_linear_differentials(f: Tensor, lam: Tensor, width: int) -> LinearDifferentials:
    """The differentials of f = u.v / sqrt(n) on the input x = 1, with the learning-rate tensor 1 for u and v.

    f has second derivatives d_{u_j} d_{v_j} f = 1/sqrt(n) only, so H = lam = (|u|^2 + |v|^2) / n, dH = 2f / n, ddI = 0,
    ddII = lam / n. It is the MLP 1-n-1 with C_W = lambda_W = 1 and no biases, W^(1) = u, W^(2) = v / sqrt(n).

    Args:
        f: Outputs, any shape.
        lam: NTKs, the same shape.
        width: n.

    Returns:
        H, dH, ddI, ddII.

    Raises:
        ValueError: If ``width`` is not a positive integer.
    """
    _check_width(width)
    return LinearDifferentials(lam, 2 * f / width, torch.zeros_like(f), lam / width)


def two_layer_linear_map(
    f: Tensor, lam: Tensor, learning_rate: float, width: int, steps: int, target: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradient descent on (1/2) (f - y)^2 for f = u.v / sqrt(n), exactly, in the two variables it closes in.

    With e = f - y, ``f' = f - eta lam e + eta^2 f e^2 / n``, ``lam' = lam + (eta e / n) (eta lam e - 4 f)``: for y = 0
    the catapult map of Lewkowycz et al. 2020 (f converges for eta lam < 2, mostly also up to about 4, then to a
    smaller lam). Both follow from the expansion in eta, which ends: f at eta^2 dH, lam at eta^2 ddII.

    Args:
        f: Outputs at the start, any shape.
        lam: NTKs at the start, (|u|^2 + |v|^2) / n, the same shape; 2 |f| / sqrt(n) <= lam.
        learning_rate: eta > 0.
        width: n.
        steps: T >= 0.
        target: y.

    Returns:
        f and lam, each (T + 1, ...), entry 0 the start.

    Raises:
        ValueError: If a number is out of range.
    """
    _check_width(width)
    if steps < 0 or not learning_rate > 0:
        raise ValueError(f"steps: {steps}, learning_rate: {learning_rate:g} given; need steps >= 0, learning_rate > 0")
    outputs, ntks = [f], [lam]
    for _ in range(steps):
        H, dH, _, ddII = two_layer_linear_differentials(f, lam, width)
        step = learning_rate * (f - target)
        f, lam = f - step * H + step**2 * dH / 2, lam - 2 * step * dH + step**2 * ddII
        outputs.append(f)
        ntks.append(lam)
    return torch.stack(outputs), torch.stack(ntks)


def _summed(n: int, kappa: float, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Cov(tr X_12, tr Y_34) and E sum_ij X_ij;12 Y_ij;34 over a layer, each per n A_2^2 (``exact_statistics``)."""
    separate = torch.einsum("ab,cd->abcd", x, y) + a
    crossed = b + b.transpose(2, 3)
    return n * a + (kappa - 1) * separate + kappa * crossed, (n - 1) * b + kappa * (separate + crossed)


def _layer(
    layer: int, K: Tensor, Theta: Tensor, V: Tensor, D: Tensor, F: Tensor, A: Tensor, B: Tensor
) -> LayerStatistics:
    zero = torch.zeros_like(K)
    return LayerStatistics(layer, K, Theta, G1=zero, Theta1=zero, V=V, D=D, F=F, A=A, B=B)


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


def _slopes(ensemble: MLPEnsemble) -> tuple[float, float]:
    slopes = ensemble.activation.slopes
    if slopes is None or not any(slopes):
        raise ValueError(
            f"ensemble: activation {ensemble.activation.name} given; exact finite-width results need a two-slope "
            "activation that is not zero (linear, relu, leaky_relu, abs); use initial_statistics, to order 1/n"
        )
    return slopes


def _size(ensemble: MLPEnsemble, x: Tensor | None) -> float:
    """|x|^2 / n_0."""
    if x is None:
        return 1.0
    x = check_inputs("x", x, ensemble)
    if len(x) > 1:
        raise ValueError(f"x: {len(x)} inputs given; moments of G are for one input, (1, {ensemble.widths[0]})")
    return float(x.square().sum()) / ensemble.widths[0]


def _check_power(power: int) -> None:
    if not isinstance(power, int) or not 1 <= power <= _HIGHEST_POWER:
        raise ValueError(f"power: {power} given; give a whole number, 1 .. {_HIGHEST_POWER}")


def _check_width(width: int) -> None:
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width: {width} given; give a positive integer")
