"""The spread of output and NTK from seed to seed, for networks of one ensemble and one input.

For each input by itself, the vertices follow scalar recursions (the single-input form of PDLT 4.3 and 8.2-8.3; all
labels equal). With z ~ N(0, K), g' = d<s^2>/dK, w = lambda_W s^2 + C_W Theta s'^2, w' = d<w>/dK at fixed Theta and
rho = n_l / n_{l-1},

    V' = C_W^2 [Var(s^2) + rho g'^2 V]                     F' = C_W^2 [Theta <s^2 s'^2> + rho g'^2 F]
    D' = C_W [Cov(s^2, w) + rho g' (w' V + C_W <s'^2> D)]  B' = C_W^2 [Theta^2 <s'^4> + rho <s'^2>^2 B]
    A' = Var(w) + rho [w'^2 V + 2 w' C_W <s'^2> D + C_W^2 <s'^2>^2 A],

from V = F = D = A = B = 0 in layer 1 (in F, <z s s'>/K = g' by Gaussian integration by parts). Scale-invariant
activations (ReLU ..) need no expansion: ``exact_statistics`` has the same numbers exactly at the ensemble's widths.

For networks of C outputs the vertices mean: Var H_ii = (A + 2B) / n, Cov(H_ii, H_jj) = A / n, n = n_{L-1}, so that
the mean over outputs has Var (1/C) sum_i H_ii = (A + 2B / C) / n.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.exact import exact_statistics
from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.quadrature import expectation
from torch_eft.theory.initialization.infinite_width import check_inputs
from torch_eft.theory.signal_propagation.regimes import EDGE, TOO_DEEP
from torch_eft.theory.signal_propagation.susceptibility import mean_power, power_mean, slope_of_variance, slope_squared


@dataclass(frozen=True)
class SingleInput:
    """The statistics of an output layer for each input by itself, (N,) each.

    Args:
        K: Kernel.
        Theta: NTK.
        V: V, like all below times n_{L-1}.
        D: D.
        F: F.
        A: A.
        B: B.
        exact: True if they hold exactly at these widths (scale-invariant activations), False if to order 1/n.
    """

    K: Tensor
    Theta: Tensor
    V: Tensor
    D: Tensor
    F: Tensor
    A: Tensor
    B: Tensor
    exact: bool


@dataclass(frozen=True, repr=False)
class SeedSpread:
    """The difference between networks at initialization, for one input, the mean over the inputs given.

    Args:
        output: Standard deviation of an output over initializations, in the output's units: sqrt(K).
        output_kurtosis: Excess kurtosis of an output, 3 Var G / E[G]^2: 0 is Gaussian.
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
    if ensemble.activation.slopes is not None and any(ensemble.activation.slopes):
        last = [exact_statistics(ensemble, row[None])[-1] for row in x]
        names = ("K", "Theta", "V", "D", "F", "A", "B")
        values = {name: torch.stack([getattr(one, name).flatten()[0] for one in last]) for name in names}
        return SingleInput(**values, exact=True)
    return _to_first_order(ensemble, x.square().sum(1) / ensemble.widths[0])


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

    alive = one.K > 0
    epsilon = torch.where(alive, one.V / n / torch.where(alive, one.K, 1.0).square(), 0.0).mean()
    return SeedSpread(
        output=float(one.K.mean().sqrt()),
        output_kurtosis=3 * float(epsilon),
        output_variance=math.sqrt(max(float(epsilon), 0.0)),
        ntk=relative(one.A + 2 * one.B),
        ntk_trace=relative(one.A + 2 * one.B / outputs),
        exact=one.exact,
        validity=_validity(ensemble, one.exact, relative(one.A + 2 * one.B) ** 2, float(epsilon)),
    )


def _to_first_order(ensemble: MLPEnsemble, size: Tensor) -> SingleInput:
    s = ensemble.activation
    K = ensemble.C_b[0] + ensemble.C_W[0] * size
    Theta = ensemble.lambda_b[0] + ensemble.lambda_W[0] * size
    V = D = F = A = B = torch.zeros_like(K)
    for index in range(1, ensemble.depth):
        rho = ensemble.widths[index] / ensemble.widths[index - 1] if index > 1 else 0.0
        C_W, lambda_W = ensemble.C_W[index], ensemble.lambda_W[index]
        s2, s4, d2, d4 = power_mean(s, K, 2), power_mean(s, K, 4), slope_squared(s, K), _slope_fourth(s, K)
        both, response, slope_response = _joint(s, K), slope_of_variance(s, K), _slope_response(s, K)
        w = lambda_W * s2 + C_W * Theta * d2
        w_K = lambda_W * response + C_W * Theta * slope_response
        cov = lambda_W * (s4 - s2**2) + C_W * Theta * (both - s2 * d2)
        var = lambda_W**2 * s4 + 2 * lambda_W * C_W * Theta * both + (C_W * Theta) ** 2 * d4 - w**2
        A = var + rho * (w_K**2 * V + 2 * w_K * C_W * d2 * D + (C_W * d2) ** 2 * A)
        D = C_W * (cov + rho * response * (w_K * V + C_W * d2 * D))
        B = C_W**2 * (Theta**2 * d4 + rho * d2**2 * B)
        F = C_W**2 * (Theta * both + rho * response**2 * F)
        V = C_W**2 * (s4 - s2**2 + rho * response**2 * V)
        Theta = ensemble.lambda_b[index] + lambda_W * s2 + C_W * d2 * Theta
        K = ensemble.C_b[index] + C_W * s2
    return SingleInput(K, Theta, V, D, F, A, B, exact=False)


def _slope_fourth(s: Activation, K: Tensor) -> Tensor:
    """<s'^4>."""
    if s.slopes is not None:
        return torch.full_like(K, mean_power(s.slopes, 4))
    return expectation(lambda z: s(z, 1) ** 4, K, s.kinks)


def _joint(s: Activation, K: Tensor) -> Tensor:
    """<s^2 s'^2>."""
    if s.slopes is not None:
        return mean_power(s.slopes, 4) * K
    return expectation(lambda z: (s(z) * s(z, 1)).square(), K, s.kinks)


def _slope_response(s: Activation, K: Tensor) -> Tensor:
    """d<s'^2>/dK = <s'^2 (z^2 - K)> / (2 K^2); its limit for K -> 0 is not needed, as D, V and w then vanish too."""
    if s.slopes is not None:
        return torch.zeros_like(K)
    # s'^2 minus its mean: for small K, the two terms would cancel to rounding.
    mean = slope_squared(s, K)
    safe = torch.where(K > 0, K, 1.0)
    value = expectation(lambda z: s(z, 1).square() * z.square(), K, s.kinks) - mean * K
    return torch.where(K > 0, value / (2 * safe**2), 0.0)


def _validity(ensemble: MLPEnsemble, exact: bool, ntk: float, epsilon: float) -> Validity:
    r = ensemble.aspect_ratio
    numbers = {"output_variance": epsilon, "ntk": ntk, "aspect_ratio": r}
    if exact:
        reason = "exact at these widths for Gaussian weights"
        if max(ntk, epsilon) >= 1:
            reason += "; but the spread is of order one: the law has a heavy tail, a few seeds will mostly show less"
        return Validity("valid", reason, numbers)
    size = f"order 1/n; relative variances: G {epsilon:.3g}, NTK {ntk:.3g}, r = {r:.3g}"
    if max(ntk, epsilon, r) >= TOO_DEEP:
        return Validity("invalid", f"{size}: not all small, so that these are of the right order at best", numbers)
    if max(ntk, epsilon) >= EDGE:
        return Validity("caution", f"{size}: expect errors of that relative size, mostly too low", numbers)
    return Validity("valid", size, numbers)
