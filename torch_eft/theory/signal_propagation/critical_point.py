"""Criticality: the (C_b, C_W) that keep the kernel and its gradients from exploding or vanishing.

Critical means chi_par = chi_perp = 1 at a fixed point K* of K -> gamma^2 K + C_b + C_W <s^2>_K (PDLT 5.1); gamma = 0 is
the plain MLP. With a skip connection 1 - gamma^2 multiplies the critical C_b, C_W and the coefficient a_1; only nu
changes in shape (``torch_eft.theory.signal_propagation.residual``). Three ways:

* scale-invariant (PDLT 5.2): linear on either side of 0; any K is a fixed point;
* K* = 0 (PDLT 5.3.3): s(0) = 0, s'(0) != 0, C_b = 0, C_W = 1 / s'(0)^2, attractive where K' = K + a_1 K^2 has a_1 < 0,
  a_1 = s'''/s' + (3/4) (s''/s')^2 at 0. With a kink at 0, means over both sides stand in the place of s'^2 etc., and
  <z^3>_{z>0} = sqrt(2/pi) K^{3/2} gives K' = K + a_1 K^{3/2}, a_1 = C_W sqrt(2/pi) [s's''], [] the jump at 0;
* half-stable K* > 0 (PDLT 5.3.4): <s s''>_{K*} = 0, C_W = 1 / <s'^2>, C_b = K* - C_W <s^2> >= 0; there
  K' - K* = (K - K*) + a_1 (K - K*)^2, which attracts from one side.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.presentation.repr import short_repr
from torch_eft.theory.gaussian.activations import Activation, ActivationLike, get_activation
from torch_eft.theory.signal_propagation.residual import vertex_growth
from torch_eft.theory.signal_propagation.susceptibility import (
    K_RANGE,
    FixedPoint,
    check_residual,
    curvature_of_variance,
    fixed_points,
    imbalance,
    log_grid,
    mean_power,
    power_mean,
    sign_changes,
    slope_squared,
)

_ZERO = 1e-12
"""Below it a value or derivative at 0 counts as zero."""


@dataclass(frozen=True)
class UnstablePoint:
    """A critical K* = 0 that repels: K' = K + a_1 K^2, a_1 > 0.

    Args:
        C_b: 0.
        C_W: Rescaled weight variance.
        K_star: 0.
        a_1: The coefficient.

    Example:
        >>> from torch_eft import theory
        >>> theory.UnstablePoint(C_b=0.0, C_W=4.0, K_star=0.0, a_1=0.5)
        UnstablePoint(C_b=0.0, C_W=4.0, K_star=0.0, a_1=0.5)
    """

    C_b: float
    C_W: float
    K_star: float
    a_1: float


@dataclass(frozen=True, repr=False)
class CriticalPoint:
    """A critical initialization, or the reason why there is none.

    Args:
        universality_class: ``"scale-invariant"``, ``"K*=0"``, ``"half-stable"`` or ``"no criticality"``.
        C_b: Critical bias variance; None without a critical point, as for everything below unless said.
        C_W: Critical rescaled weight variance.
        K_star: The fixed point; None also where every K is one.
        nu: Growth of the four-point vertex, V / (n K^2) ~ nu l / n (PDLT 5.4, A.3); for K* = 0 after K ~ l^(-1/power)
            has set in, otherwise exactly at the fixed point.
        a_1: Coefficient of K' - K* = (K - K*) + a_1 (K - K*)^(1 + power); 0 where every K is a fixed point.
        power: 1, or 1/2 where a kink at 0 makes the law non-analytic.
        p_perp: prod chi_perp ~ l^(-p_perp) as K -> K* = 0; None elsewhere.
        stability: ``"any K"``, ``"attractive"``, ``"attracts from above only"``, ``"attracts from below only"``,
            ``"marginal"`` (a_1 = 0 to rounding) or ``"none"``.
        relaxation_depth: 1 / (|a_1| K*), layers; None unless half-stable.
        other_fixed_points: Those of the kernel at the same (C_b, C_W).
        unstable_alternative: A repelling K* = 0, if the activation has one.
        residual: gamma of the skip connection; 0 is the plain MLP.
        reason: One sentence.

    Example:
        >>> from torch_eft import theory
        >>> point = theory.criticality("relu")
        >>> point.exists, point.universality_class, point.C_b, point.C_W, point.nu
        (True, 'scale-invariant', 0.0, 2.0, 5.0)
    """

    universality_class: str
    C_b: float | None
    C_W: float | None
    K_star: float | None
    nu: float | None
    a_1: float | None
    power: float | None
    p_perp: float | None
    stability: str
    relaxation_depth: float | None
    other_fixed_points: tuple[FixedPoint, ...]
    unstable_alternative: UnstablePoint | None
    residual: float
    reason: str

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def exists(self) -> bool:
        """True if there is a critical point."""
        return self.C_W is not None


def criticality(activation: ActivationLike, *, residual: float = 0.0) -> CriticalPoint:
    """The critical initialization of an activation, computed from its Gaussian expectations.

    Where several exist, an attractive K* = 0 is preferred, then the half-stable point of smallest K*.

    Raises ``QuadratureError`` if the activation has a kink it does not declare, structure too fine for the quadrature,
    or exponential growth.

    Args:
        activation: A name, an ``Activation`` or an elementwise function, smooth between its ``kinks``.
        residual: Strength gamma in [0, 1) of the skip connection, z' = gamma z + b + W s(z); 0 is the plain MLP.

    Returns:
        The critical point; where there is none (e.g. sigmoid, softplus) its class is ``"no criticality"``.

    Raises:
        ValueError: If the activation is unknown, jumps, or ``residual`` is out of range.

    Example:
        >>> from torch_eft import theory
        >>> point = theory.criticality("linear", residual=0.6)
        >>> point.universality_class, point.C_b, round(point.C_W, 12)
        ('scale-invariant', 0.0, 0.64)
    """
    activation, gamma = get_activation(activation), check_residual(residual)
    for kink in activation.kinks:
        if activation.jump(0, kink) != 0:
            raise ValueError(
                f"activation: {activation.name} jumps at {kink:g}, <s'^2> is infinite; give a continuous function"
            )
    slopes = activation.slopes or _slopes(activation)
    if slopes is not None:
        return _scale_invariant(slopes, gamma)
    grid = log_grid(K_RANGE, 61)
    signs = imbalance(activation, grid).sign()  # first of all: it refuses what is not smooth
    small = _small_kernel(activation, gamma)
    if isinstance(small, CriticalPoint):
        return small
    unstable, excluded = small
    return _half_stable(activation, gamma, grid, signs, unstable, excluded)


def _slopes(activation: Activation) -> tuple[float, float] | None:
    """The slopes of a function that is s_- z and s_+ z on either side of 0, to rounding."""
    z = log_grid(K_RANGE, 61)
    ratios = torch.stack([activation(-z) / -z, activation(z) / z])
    scale = ratios.abs().max()
    if 0 < float(scale) < math.inf and bool(((ratios - ratios[:, :1]).abs() <= _ZERO * scale).all()):
        return float(ratios[0, 0]), float(ratios[1, 0])
    return None


def _scale_invariant(slopes: tuple[float, float], gamma: float) -> CriticalPoint:
    activation = Activation("scale-invariant", lambda z: torch.where(z > 0, slopes[1] * z, slopes[0] * z), slopes)
    C_W = (1 - gamma**2) / mean_power(slopes, 2)
    return CriticalPoint(
        universality_class="scale-invariant",
        C_b=0.0,
        C_W=C_W,
        K_star=None,
        nu=vertex_growth(activation, C_W, 1.0, gamma),
        a_1=0.0,
        power=None,
        p_perp=None,
        stability="any K",
        relaxation_depth=None,
        other_fixed_points=(),
        unstable_alternative=None,
        residual=gamma,
        reason="homogeneous: chi_par = chi_perp at every K, and both are 1 where C_W times the mean squared slope is "
        "1 - gamma^2",
    )


def _small_kernel(activation: Activation, gamma: float) -> CriticalPoint | tuple[UnstablePoint | None, str]:
    """The critical point K* = 0 if there is an attractive one; else a repelling one, and the reason."""
    side = 1e-15 if 0.0 in activation.kinks else 0.0
    ends = torch.tensor([-side, side], dtype=torch.float64, device="cpu")
    s_0 = float(activation(torch.zeros_like(ends[0])))
    s_1, s_2, s_3 = (activation(ends, order) for order in (1, 2, 3))
    if abs(s_0) > _ZERO:
        return None, f"K* = 0 is excluded by s(0) = {s_0:.4g} != 0"
    if float(s_1.abs().max()) <= _ZERO:
        return None, "K* = 0 is excluded by s'(0) = 0"
    scale = float(1 / s_1.square().mean())
    jump = scale * math.sqrt(2 / math.pi) * float(s_1[1] * s_2[1] - s_1[0] * s_2[0])
    if abs(jump) > _ZERO:
        power, a, b = 0.5, jump, jump
    else:
        power = 1.0
        a = scale * float((0.75 * s_2.square() + s_1 * s_3).mean())
        b = scale * float((s_2.square() + s_1 * s_3).mean())
    C_W, a_1 = (1 - gamma**2) * scale, (1 - gamma**2) * a
    if a >= -_ZERO:
        return UnstablePoint(0.0, C_W, 0.0, a_1), f"K* = 0 at C_W = {C_W:.6g} repels (a_1 = {a_1:.4g})"
    slopes = float(s_1[0]), float(s_1[1])
    tangent = Activation("tangent", lambda z: torch.where(z > 0, slopes[1] * z, slopes[0] * z), slopes)
    law = "K^2" if power == 1.0 else "K^{3/2}"
    return CriticalPoint(
        universality_class="K*=0",
        C_b=0.0,
        C_W=C_W,
        K_star=0.0,
        # K falls as l^(-1/power); V/K^2 then grows as x' = x (1 - 2/l) + nu(tangent): a third of it.
        nu=vertex_growth(tangent, C_W, 1.0, gamma) / 3,
        a_1=a_1,
        power=power,
        p_perp=b / (a * power),
        stability="attractive",
        relaxation_depth=None,
        other_fixed_points=_other_fixed_points(activation, 0.0, C_W, 0.0, gamma),
        unstable_alternative=None,
        residual=gamma,
        reason=f"s(0) = 0, and K' = K + a_1 {law} with a_1 = {a_1:.4g} < 0 takes any small kernel to K* = 0",
    )


def _other_fixed_points(
    activation: Activation, C_b: float, C_W: float, K_star: float, gamma: float
) -> tuple[FixedPoint, ...]:
    points = fixed_points(activation, C_b, C_W, residual=gamma)
    return tuple(point for point in points if abs(point.K - K_star) > 1e-3 * K_star)


def _half_stable(
    activation: Activation, gamma: float, grid: Tensor, signs: Tensor, unstable: UnstablePoint | None, excluded: str
) -> CriticalPoint:
    where = f"for every K searched, {K_RANGE[0]:g} <= K <= {K_RANGE[1]:g}"
    roots = sign_changes(lambda K: imbalance(activation, K), grid, signs)
    reasons = []
    if not roots:
        relation = ">" if bool((signs > 0).any()) else "<" if bool((signs < 0).any()) else "="
        reasons.append(f"<s s''> {relation} 0, so chi_par {relation} chi_perp, {where}")
    for K_star in roots:
        place = torch.tensor(K_star, dtype=torch.float64, device="cpu")
        C_W = (1 - gamma**2) / float(slope_squared(activation, place))
        C_b = (1 - gamma**2) * K_star - C_W * float(power_mean(activation, place, 2))
        if C_b < 0:
            reasons.append(f"chi_par = chi_perp = 1 at K = {K_star:.4g} needs C_b = {C_b:.4g} < 0")
            continue
        a_1 = C_W * float(curvature_of_variance(activation, place)) / 2
        marginal = abs(a_1) * K_star < 1e-9
        stability = f"attracts from {'above' if a_1 < 0 else 'below'} only"
        return CriticalPoint(
            universality_class="half-stable",
            C_b=C_b,
            C_W=C_W,
            K_star=K_star,
            nu=vertex_growth(activation, C_W, K_star, gamma),
            a_1=a_1,
            power=1.0,
            p_perp=None,
            stability="marginal" if marginal else stability,
            relaxation_depth=None if marginal else 1 / (abs(a_1) * K_star),
            other_fixed_points=_other_fixed_points(activation, C_b, C_W, K_star, gamma),
            unstable_alternative=unstable,
            residual=gamma,
            reason=f"<s s''> = 0 at K* = {K_star:.6g}, where chi_par = chi_perp = 1 and K' - K* = (K - K*) + a_1 "
            f"(K - K*)^2 with a_1 = {a_1:.4g}; {excluded}",
        )
    return CriticalPoint(
        universality_class="no criticality",
        C_b=None,
        C_W=None,
        K_star=None,
        nu=None,
        a_1=None,
        power=None,
        p_perp=None,
        stability="none",
        relaxation_depth=None,
        other_fixed_points=(),
        unstable_alternative=unstable,
        residual=gamma,
        reason=f"{'; '.join(reasons)}; {excluded}",
    )
