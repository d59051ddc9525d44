"""The spread of output and NTK from seed to seed, for networks of one ensemble and one input.

For each input by itself, the vertices follow scalar recursions (the single-input form of PDLT 4.3-4.4 and 8.2-8.3; all
labels equal). With < . > the law of a preactivation of layer l (``preactivations``), g' = d<s^2>/dg, w = lambda_W s^2 +
C_W Theta s'^2, w' = d<w>/dg at fixed Theta, m = <s^2> and rho = n_l / n_{l-1},

    V' = C_W^2 [<s^4> - m^2 + rho g'^2 V]                  F' = C_W^2 [Theta <s^2 s'^2> + rho g'^2 F]
    D' = C_W [Cov(s^2, w) + rho g' (w' V + C_W <s'^2> D)]  B' = C_W^2 [Theta^2 <s'^4> + rho <s'^2>^2 B]
    A' = Var(w) + rho [w'^2 V + 2 w' C_W <s'^2> D + C_W^2 <s'^2>^2 A],
    G1' = C_W rho [g' G1 + (3 V + E) / 6 d^2<s^2>/dg^2],

from V = F = D = A = B = G1 = 0 in layer 1 (in F, <z s s'>/K = g' by Gaussian integration by parts). Weights with the
excess kurtosis k4 add to single neurons E = k4 C_W^2 <s^4> (zzzz) and E_HH = k4 C_W^2 <s'^4> Theta^2 (HH), a bias k4
C_b^2 at order 0. Orthogonal weights (zeta as in ``regimes``): V' - 2 zeta C_W^2 m^2, F' - zeta C_W^2 m <s'^2> Theta, B'
- zeta C_W^2 <s'^2>^2 Theta^2, and V = -2 zeta (C_W x.x / n_0)^2 in layer 1. Scale-invariant activations (ReLU ..) need
no expansion: ``exact_statistics`` and ``exact_single_input`` have the same numbers exactly at the ensemble's widths.

For networks of C outputs the vertices mean: Var H_ii = (A + 2B + E_HH) / n, Cov(H_ii, H_jj) = A / n, n = n_{L-1}, so
that the mean over outputs has Var (1/C) sum_i H_ii = (A + (2B + E_HH) / C) / n.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.exact import ExactSingleInput, exact_single_input, exact_statistics
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.initialization.infinite_width import check_inputs
from torch_eft.theory.signal_propagation.preactivations import (
    first_preactivations,
    haar_share,
    input_moments,
    next_preactivations,
)
from torch_eft.theory.signal_propagation.regimes import EDGE, TOO_DEEP


@dataclass(frozen=True)
class SingleInput:
    """The statistics of an output layer for each input by itself, (N,) each.

    Args:
        K: Kernel.
        Theta: NTK.
        V: V, like all below but ``bias`` times n_{L-1}.
        D: D.
        F: F.
        A: A.
        B: B.
        G: Var G, G the variance of an output given the last hidden layer: V but for orthogonal weights.
        G1: E[z^2] - K.
        E_zzzz: What weights that are not Gaussian add to the fourth cumulant of one output.
        E_HH: What they add to the variance of its NTK.
        bias: What a bias that is not Gaussian adds to the fourth cumulant of one output, at any width.
        exact: True if they hold exactly at these widths (scale-invariant activations), False if to order 1/n.
    """

    K: Tensor
    Theta: Tensor
    V: Tensor
    D: Tensor
    F: Tensor
    A: Tensor
    B: Tensor
    G: Tensor
    G1: Tensor
    E_zzzz: Tensor
    E_HH: Tensor
    bias: Tensor
    exact: bool


@dataclass(frozen=True, repr=False)
class SeedSpread:
    """The difference between networks at initialization, for one input, the mean over the inputs given.

    Args:
        output: Standard deviation of an output over initializations, in the output's units: the root of K + G1 / n,
            or of K e^{G1 / (n K)} where G1 < 0, the same to order 1/n, which stays positive (at K* = 0 it gives
            1 - r/3 + r^2/18, the truth is r^2/15).
        output_kurtosis: Excess kurtosis of an output: 0 is Gaussian; 3 Var G / E[G]^2 for Gaussian weights and biases.
        output_variance: Relative standard deviation of G, the output's variance given the last hidden layer.
        ntk: Relative standard deviation of H_ii, the NTK of one output.
        ntk_trace: The same of its mean over the outputs, (1/C) sum_i H_ii.
        exact: True if these hold exactly at finite width (scale-invariant activations), False if to order 1/n.
        validity: Of the numbers; its ``numbers`` are the relative variances of G and of the NTK, and r.

    Example:
        >>> from torch_eft import theory
        >>> spread = theory.seed_spread(theory.MLPEnsemble([3, 50, 1], "relu", C_W=2.0))
        >>> spread.exact, round(spread.output_variance**2, 9)  # 5 / n
        (True, 0.1)
    """

    output: float
    output_kurtosis: float
    output_variance: float
    ntk: float
    ntk_trace: float
    exact: bool
    validity: Validity

    def __repr__(self) -> str:
        return short_repr(self)


def single_input_statistics(ensemble: MLPEnsemble, x: Tensor | None = None) -> SingleInput:
    """K, Theta and V, D, F, A, B of the output layer, input by input.

    Raises ``ValueError`` if ``x`` does not fit; ``QuadratureError`` if the activation is not smooth enough for
    quadrature.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0); without them, one input with |x|^2 = n_0.

    Returns:
        The statistics, float64: exact for scale-invariant activations, to order 1/n for others.
    """
    if x is None:
        x = torch.ones(1, ensemble.widths[0], dtype=torch.float64, device="cpu")
    x = check_inputs("x", x, ensemble)
    scale_invariant = ensemble.activation.slopes is not None and any(ensemble.activation.slopes)
    if not scale_invariant or "orthogonal" in ensemble.weight_law:
        return _to_first_order(ensemble, *input_moments(ensemble, x))
    if not ensemble.gaussian:
        return _as_vertices(ensemble, exact_single_input(ensemble, *input_moments(ensemble, x)))
    last = [exact_statistics(ensemble, row[None])[-1] for row in x]
    names = ("K", "Theta", "V", "D", "F", "A", "B")
    values = {name: torch.stack([getattr(one, name).flatten()[0] for one in last]) for name in names}
    zero = torch.zeros_like(values["K"])
    return SingleInput(**values, G=values["V"], G1=zero, E_zzzz=zero, E_HH=zero, bias=zero, exact=True)


def seed_spread(ensemble: MLPEnsemble, x: Tensor | None = None) -> SeedSpread:
    """The expected spread from seed to seed at initialization.

    Raises ``QuadratureError`` if the activation is not smooth enough for quadrature.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0); without them, one input with |x|^2 = n_0.

    Returns:
        The spread; 0 for the NTK where nothing trains or without a hidden layer.

    Raises:
        ValueError: If ``x`` does not fit, or a relative variance leaves float64.

    Example:
        >>> from torch_eft import theory
        >>> theory.seed_spread(theory.MLPEnsemble([3, 500, 500, 1], "tanh")).validity.flag
        'valid'
    """
    one = single_input_statistics(ensemble, x)
    if not all(bool(value.isfinite().all()) for value in (one.K, one.Theta, one.V, one.A, one.B)):
        raise ValueError(
            f"ensemble: the spread of {ensemble} from seed to seed is beyond float64; use fewer or wider layers"
        )
    n, outputs = ensemble.widths[-2], ensemble.widths[-1]
    positive = one.Theta > 0

    def relative(variance: Tensor) -> float:
        ratio = torch.where(positive, variance / n / torch.where(positive, one.Theta, 1.0).square(), 0.0)
        return float(ratio.clamp_min(0.0).mean().sqrt())

    alive, H = one.K > 0, 2 * one.B + one.E_HH
    K = torch.where(alive, one.K, 1.0)
    epsilon = float(torch.where(alive, one.G / n / K.square(), 0.0).mean())
    kurtosis = torch.where(alive, ((3 * one.V + one.E_zzzz) / n + one.bias) / K.square(), 0.0)
    return SeedSpread(
        output=math.sqrt(float(torch.where(one.G1 < 0, one.K * (one.G1 / n / K).exp(), one.K + one.G1 / n).mean())),
        output_kurtosis=float(kurtosis.mean()),
        output_variance=math.sqrt(max(epsilon, 0.0)),
        ntk=relative(one.A + H),
        ntk_trace=relative(one.A + H / outputs),
        exact=one.exact,
        validity=_validity(ensemble, one.exact, relative(one.A + H) ** 2, epsilon),
    )


def _to_first_order(ensemble: MLPEnsemble, size: Tensor, quartic: Tensor) -> SingleInput:
    z = first_preactivations(ensemble, size, quartic)
    Theta = ensemble.lambda_b[0] + ensemble.lambda_W[0] * size
    D = F = A = B = G1 = E = E_HH = torch.zeros_like(size)
    V = G = -2 * haar_share(ensemble, 1) * (ensemble.C_W[0] * size) ** 2
    for index in range(1, ensemble.depth):
        rho = ensemble.widths[index] / ensemble.widths[index - 1]
        C_W, lambda_W = ensemble.C_W[index], ensemble.lambda_W[index]
        k4, zeta = EXCESS_KURTOSIS[ensemble.weight_law[index]], haar_share(ensemble, index + 1)
        s2, s4, d2, d4 = z.variance, z.fourth_power(), z.slope_power(2), z.slope_power(4)
        both, response, slope_response = z.joint(), z.response(), z.slope_response()
        w = lambda_W * s2 + C_W * Theta * d2
        w_K = lambda_W * response + C_W * Theta * slope_response
        cov = lambda_W * (s4 - s2**2) + C_W * Theta * (both - s2 * d2)
        var = lambda_W**2 * s4 + 2 * lambda_W * C_W * Theta * both + (C_W * Theta) ** 2 * d4 - w**2
        G1 = C_W * rho * (response * G1 + (3 * V + E) / 6 * z.curvature())
        A = var + rho * (w_K**2 * V + 2 * w_K * C_W * d2 * D + (C_W * d2) ** 2 * A)
        D = C_W * (cov + rho * response * (w_K * V + C_W * d2 * D))
        B = C_W**2 * (Theta**2 * d4 + rho * d2**2 * B - zeta * (d2 * Theta) ** 2)
        F = C_W**2 * (Theta * both + rho * response**2 * F - zeta * s2 * d2 * Theta)
        G = C_W**2 * (s4 - s2**2 + rho * response**2 * V)
        V = G - 2 * zeta * (C_W * s2) ** 2
        E, E_HH = k4 * C_W**2 * s4, k4 * C_W**2 * d4 * Theta**2
        Theta = ensemble.lambda_b[index] + lambda_W * s2 + C_W * d2 * Theta
        z = next_preactivations(ensemble, z, index + 1)
    if ensemble.depth == 1:
        V = G = torch.zeros_like(V)
        E = E if z.cumulant is None else ensemble.widths[0] * z.cumulant
    bias = torch.full_like(size, z.bias_cumulant)
    return SingleInput(z.K, Theta, V, D, F, A, B, G, G1, E, E_HH, bias, exact=False)


def _as_vertices(ensemble: MLPEnsemble, one: ExactSingleInput) -> SingleInput:
    """Exact moments in the form of vertices, times n_{L-1}."""
    n = ensemble.widths[-2]
    bias = EXCESS_KURTOSIS[ensemble.bias_law[-1]] * ensemble.C_b[-1] ** 2
    V = n * (one.GG - one.K**2)
    return SingleInput(
        K=one.K,
        Theta=one.Theta,
        V=V,
        D=n * (one.zzHH_apart - one.K * one.Theta),
        F=n * one.zzHH_crossed,
        A=n * (one.HH_apart - one.Theta**2),
        B=n * one.HH_crossed,
        G=V,
        G1=torch.zeros_like(V),
        E_zzzz=n * (one.zzzz - 3 * one.GG - bias),
        E_HH=n * (one.HH - one.HH_apart - 2 * one.HH_crossed),
        bias=torch.full_like(V, bias),
        exact=True,
    )


def _validity(ensemble: MLPEnsemble, exact: bool, ntk: float, epsilon: float) -> Validity:
    r = ensemble.aspect_ratio
    numbers = {"output_variance": epsilon, "ntk": ntk, "aspect_ratio": r}
    if exact:
        reason = "exact at these widths"
        if max(ntk, epsilon) >= TOO_DEEP:
            reason += (
                "; but the spread is of order one: the law has a heavy tail, and hundreds of seeds mostly show less"
            )
            return Validity("caution", reason, numbers)
        return Validity("valid", reason, numbers)
    size = f"order 1/n; relative variances: G {epsilon:.3g}, NTK {ntk:.3g}, r = {r:.3g}"
    # Not by r: where memory of the first layers fades, corrections are of order 1/n at any depth.
    if max(ntk, epsilon) >= TOO_DEEP:
        return Validity("invalid", f"{size}: not all small, so that these are of the right order at best", numbers)
    if max(ntk, epsilon) >= EDGE:
        return Validity("caution", f"{size}: expect errors of that relative size, mostly too low", numbers)
    return Validity("valid", size, numbers)
