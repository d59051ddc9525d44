"""Exact results at finite width, with nothing expanded in 1/n: the yardstick for the theory's truncation at order 1/n.

With Gaussian weights the moments of scale-invariant activations (linear, ReLU, leaky ReLU, |z|) close at finite width,
because a neuron's slope is independent of everything it multiplies: flipping the sign of all of neuron i's incoming
parameters flips z_i and H_ij, j != i, and nothing else, so that the slopes d_i = sigma'(z_i) are independent of
z_i z_j H_ij, z_i^2, H_ii, H_ij^2, ..., and of one another. Only two numbers of the activation enter second moments,

    A_2 = <d^2>,    kappa = <d^4> / <d^2>^2 = (nu + 1) / 3:    nu = 2 (linear), 5 (ReLU).

Sources: Roberts, Yaida, Hanin, arXiv:2106.10165 (PDLT; deep linear in chapter 3); Hanin & Nica 2018
(arXiv:1812.05994) and 2020 (arXiv:1909.05989).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.initialization.infinite_width import check_inputs
from torch_eft.theory.initialization.statistics import LayerStatistics
from torch_eft.theory.signal_propagation.susceptibility import mean_power


@dataclass(frozen=True)
class ExactSingleInput:
    """Second moments of an output layer for each input by itself, (N,) each, exact at the ensemble's widths.

    Args:
        K: E[z_i^2].
        Theta: E[H_ii].
        GG: E[z_i^2 z_j^2], i != j, which is E[G^2].
        zzzz: E[z_i^4].
        HH: E[H_ii^2].
        HH_apart: E[H_ii H_jj].
        HH_crossed: E[H_ij^2].
        zzHH: E[z_i^2 H_ii].
        zzHH_apart: E[z_i^2 H_jj].
        zzHH_crossed: E[z_i z_j H_ij].
    """

    K: Tensor
    Theta: Tensor
    GG: Tensor
    zzzz: Tensor
    HH: Tensor
    HH_apart: Tensor
    HH_crossed: Tensor
    zzHH: Tensor
    zzHH_apart: Tensor
    zzHH_crossed: Tensor


def dead_probability(ensemble: MLPEnsemble) -> float:
    """Probability that all neurons of some hidden layer are at sigma = 0, for a given non-zero input.

    ``1 - prod_l (1 - 2^{-n_l})`` for ReLU (signs are independent), 0 where no slope is zero. Without biases the output
    is then zero; with them it is constant around the input.

    Raises ``ValueError`` if the activation is not scale-invariant.

    Args:
        ensemble: The ensemble, with a scale-invariant activation.

    Returns:
        The probability.

    Example:
        >>> from torch_eft import theory
        >>> theory.dead_probability(theory.MLPEnsemble([3, 1, 1], "relu"))
        0.5
    """
    if 0.0 not in scale_invariant_slopes(ensemble):
        return 0.0
    return -math.expm1(sum(math.log1p(-(2.0**-n)) for n in ensemble.hidden_widths))


def exact_statistics(ensemble: MLPEnsemble, x: Tensor) -> list[LayerStatistics]:
    """K, Theta, V, A, B, D, F at every layer, exactly at the ensemble's widths; fields as in ``initial_statistics``.

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
        ensemble: The ensemble: linear, or scale-invariant with a single input.
        x: Inputs, (N, n_0); N = 1 unless the activation is linear.

    Returns:
        One ``LayerStatistics`` per layer, float64, with P .. U None; memory grows like 10 N^4 numbers per layer.

    Raises:
        ValueError: If the activation is not scale-invariant, or is not linear and N > 1, or ``x`` does not fit.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([1, 8, 8, 1], "relu", C_W=2.0)
        >>> last = theory.exact_statistics(ensemble, torch.ones(1, 1))[-1]
        >>> round(1 + float(last.V / last.K**2) / 8, 9)  # E[G^2] / E[G]^2 = (1 + 5/8)^2
        2.640625
    """
    x = check_inputs("x", x, ensemble)
    slopes = scale_invariant_slopes(ensemble)
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


def exact_single_input(ensemble: MLPEnsemble, size: Tensor, quartic: Tensor) -> ExactSingleInput:
    """The moments of one input for weights and biases of any symmetric law, as long as they are independent.

    The sign of a neuron's incoming parameters is as independent of all else as for Gaussian ones. The law enters by
    the fourth moment of one neuron: 3 E[G^2] + k4_b C_b^2 + k4_W (C_W / n)^2 sum_j E[s_j^4], and likewise that of H_ii.

    Args:
        ensemble: The ensemble, scale-invariant.
        size: (N,), |x|^2 / n_0.
        quartic: (N,), sum_k x_k^4 / n_0^2.

    Returns:
        The moments.

    Raises:
        ValueError: If the activation is not scale-invariant, or weights are orthogonal.
    """
    slopes = scale_invariant_slopes(ensemble)
    if "orthogonal" in ensemble.weight_law:
        raise ValueError("ensemble: orthogonal weights are not independent; exact moments need independent ones")
    A_2, A_4 = mean_power(slopes, 2), mean_power(slopes, 4)
    k4_W = [EXCESS_KURTOSIS[law] for law in ensemble.weight_law]
    k4_b = [EXCESS_KURTOSIS[law] * C_b**2 for law, C_b in zip(ensemble.bias_law, ensemble.C_b, strict=True)]
    K = ensemble.C_b[0] + ensemble.C_W[0] * size
    Theta = ensemble.lambda_b[0] + ensemble.lambda_W[0] * size
    GG, zzzz = K**2, 3 * K**2 + k4_b[0] + k4_W[0] * ensemble.C_W[0] ** 2 * quartic
    HH = HH_apart = Theta**2
    zzHH = zzHH_apart = K * Theta
    HH_crossed = zzHH_crossed = torch.zeros_like(K)
    for index in range(1, ensemble.depth):
        n, C_b, lambda_b = ensemble.widths[index], ensemble.C_b[index], ensemble.lambda_b[index]
        c, lam, pairs = ensemble.C_W[index] / n, ensemble.lambda_W[index] / n, n * (n - 1) * A_2**2
        # Of S = sum_j s_j^2 and X = sum_j s_j'^2 H_jj over this layer, and of sums over two of its neurons.
        S, X = n * A_2 * K, n * A_2 * Theta
        SS, SX, XX = n * A_4 * zzzz + pairs * GG, n * A_4 * zzHH + pairs * zzHH_apart, n * A_4 * HH + pairs * HH_apart
        HH_all, sHs_all = n * A_4 * HH + pairs * HH_crossed, n * A_4 * zzHH + pairs * zzHH_crossed
        four_z, four_H, four_mixed = n * A_4 * zzzz, n * A_4 * HH, n * A_4 * zzHH
        GG = C_b**2 + 2 * C_b * c * S + c**2 * SS
        zzzz = 3 * GG + k4_b[index] + k4_W[index] * c**2 * four_z
        HH_crossed, zzHH_crossed = c**2 * HH_all, c**2 * sHs_all
        HH_apart = lambda_b**2 + 2 * lambda_b * lam * S + lam**2 * SS
        HH_apart = HH_apart + 2 * c * (lambda_b * X + lam * SX) + c**2 * XX
        HH = HH_apart + c**2 * (2 * HH_all + k4_W[index] * four_H)
        zzHH_apart = C_b * (lambda_b + lam * S + c * X) + c * (lambda_b * S + lam * SS + c * SX)
        zzHH = zzHH_apart + c**2 * (2 * sHs_all + k4_W[index] * four_mixed)
        K, Theta = C_b + c * S, lambda_b + lam * S + c * X
    return ExactSingleInput(K, Theta, GG, zzzz, HH, HH_apart, HH_crossed, zzHH, zzHH_apart, zzHH_crossed)


def _summed(n: int, kappa: float, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Cov(tr X_12, tr Y_34) and E sum_ij X_ij;12 Y_ij;34 over a layer, each per n A_2^2 (``exact_statistics``)."""
    separate = torch.einsum("ab,cd->abcd", x, y) + a
    crossed = b + b.transpose(2, 3)
    return n * a + (kappa - 1) * separate + kappa * crossed, (n - 1) * b + kappa * (separate + crossed)


def _layer(
    layer: int, K: Tensor, Theta: Tensor, V: Tensor, D: Tensor, F: Tensor, A: Tensor, B: Tensor
) -> LayerStatistics:
    zero = torch.zeros_like(K)
    exact = Validity("valid", "exact at these widths for Gaussian weights")
    return LayerStatistics(layer, K, Theta, G1=zero, Theta1=zero, V=V, D=D, F=F, A=A, B=B, validity=exact)


def scale_invariant_slopes(ensemble: MLPEnsemble) -> tuple[float, float]:
    """Look up the slopes of a scale-invariant activation that is not zero.

    Returns:
        (negative, positive).

    Raises:
        ValueError: If the activation is another one.
    """
    slopes = ensemble.activation.slopes
    if slopes is None or not any(slopes):
        raise ValueError(
            f"ensemble: activation {ensemble.activation.name} given; exact finite-width results need a "
            "scale-invariant activation that is not zero (linear, relu, leaky_relu, abs); use initial_statistics, to "
            "order 1/n"
        )
    return slopes
