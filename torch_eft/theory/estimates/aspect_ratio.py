"""The depth-to-width ratio r = L/n and the size of the finite-width fluctuations it causes.

epsilon = Var(G) / E[G]^2, G the variance of the output given the last hidden layer, controls the 1/n expansion;
``signal_propagation.regimes`` has its value b to order 1/n (nu r at criticality, PDLT 5.4). Beyond that order:

* piecewise linear s without biases, exactly: E[G^2]/E[G]^2 = prod_{hidden l} (1 + nu / n_l), as a layer's neurons are
  independent given the one before; at fixed r and n -> infinity epsilon = e^b - 1, lognormal. Elsewhere
  prod (1 + b_l), with b shared out as 1 / n_l, is an estimate; it is exact for one hidden layer.
* K* = 0, K -> K - c K^{1+d}: noise nu_0 dr and flow give dK/dr ~ -K^{1+d} + sqrt(nu_0) K dB; with the moments
  E[K^k] = r^{-k/d} (1 + c_{k1} r + c_{k2} r^2 + ..) solved order by order, epsilon = b + kappa b^2 + ..,
  kappa = (4-d)(5-d)/40: 3/10 for a smooth s (d = 1, epsilon = 2r/3 + 2r^2/15), 63/160 for one with a kink at 0
  (d = 1/2, ELU). d -> 0 gives back 1/2, the lognormal. For few layers b^2 is multiplied
  by 1 - sum_l (b_l / b)^2, as in the product.

The information that two groups of outputs, n_L in all, have of each other is, for z ~ N(0, G) (Laguerre expansion,
as PDLT appendix A), proportional to epsilon^2 - (20 + 3 n_L) / 6 epsilon^3, whatever the law of G. Its
maximum over r is at r* = 4 / ((20 + 3 n_L) nu) with epsilon = nu r, and with epsilon = nu r + kappa (nu r)^2 at
4 / ((20 + 3 n_L - 12 kappa) nu).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from torch_eft.results.presentation.repr import short_repr
from torch_eft.theory.ensemble import MLPEnsemble, check_ensemble, twice_as_deep, twice_as_wide
from torch_eft.theory.estimates.learning_rates import layer_gains
from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.quadrature import QuadratureError
from torch_eft.theory.signal_propagation.critical_point import CriticalPoint, criticality
from torch_eft.theory.signal_propagation.regimes import output_fluctuation, regime


@dataclass(frozen=True, repr=False)
class AspectRatio:
    """The depth-to-width ratio of an ensemble and what follows from it; ``print`` shows it in sentences.

    Args:
        depth: L.
        width: n, harmonic mean of the hidden widths; None without a hidden layer.
        r: L / n.
        inverse_widths: Sum over the L - 1 hidden layers of 1 / n_l, which is what epsilon really counts.
        epsilon: Var G / E[G]^2 of the output variance G over initializations, to order 1/n.
        regime: Its name, see ``regime``.
        epsilon_all_orders: Estimate of epsilon beyond order 1/n.
        truncation_error: The relative part that order 1/n leaves out: 1 - epsilon / epsilon_all_orders.
        estimate: Description of that estimate and the class it is for.
        spread: sqrt(epsilon), the relative standard deviation of G from seed to seed, to order 1/n.
        seeds: Networks needed to know the mean of G within 10 % (one standard error): 100 epsilon_all_orders.
        epsilon_twice_depth: epsilon with every hidden layer twice; None without a hidden layer or if not asked for.
        epsilon_twice_width: epsilon with hidden layers twice as wide; likewise.
        critical: The critical point of the activation, or None where there is none.
        criticality_reason: The reason why there is none; empty if there is one.
        gradient_gain: E|dz/dz^(1)|^2 of an output relative to the same network at critical initialization, at
            infinite width, mean over the inputs; None without a critical point.
        r_star: 4 / ((20 + 3 n_L) nu); None without a critical point.
        r_star_shifted: r* with epsilon taken to order r^2; None where that is not derived.
        caveats: Sentences on what r* does not mean.

    Example:
        >>> from torch_eft import theory
        >>> ratio = theory.aspect_ratio(theory.MLPEnsemble([3, 100, 100, 1], "relu", C_W=2.0))
        >>> ratio.at_criticality, ratio.r, round(ratio.epsilon, 9), round(ratio.epsilon_all_orders, 9)
        (True, 0.03, 0.1, 0.1025)
    """

    depth: int
    width: float | None
    r: float
    inverse_widths: float
    epsilon: float
    regime: str
    epsilon_all_orders: float
    truncation_error: float
    estimate: str
    spread: float
    seeds: float
    epsilon_twice_depth: float | None
    epsilon_twice_width: float | None
    critical: CriticalPoint | None
    criticality_reason: str
    gradient_gain: float | None
    r_star: float | None
    r_star_shifted: float | None
    caveats: tuple[str, ...]

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def at_criticality(self) -> bool:
        """True if squared gradients over the depth are within a factor of 2 of those at criticality."""
        return self.gradient_gain is not None and 0.5 <= self.gradient_gain <= 2

    def lines(self) -> list[str]:
        """The sentences that ``print`` shows, without the caveats."""
        width = "none" if self.width is None else f"{self.width:g}"
        lines = [
            f"depth L = {self.depth}, width n = {width}, aspect ratio r = L/n = {self.r:.4g}: {self.regime}",
            f"epsilon = Var G/E[G]^2 = {self.epsilon:.4g} at order 1/n (G: output variance), "
            f"{100 * self.truncation_error:.2g} % below {self.estimate}",
            f"from seed to seed G varies by {100 * self.spread:.2g} %; its mean to 10 % takes "
            f"{max(1, math.ceil(self.seeds * (1 - 1e-9))):.3g} network(s)",
        ]
        if self.epsilon_twice_depth is not None:
            lines.append(
                f"epsilon with twice the hidden layers: {self.epsilon_twice_depth:.3g}; "
                f"with twice the hidden widths: {self.epsilon_twice_width:.3g}"
            )
        if self.r_star is not None:
            shifted = "" if self.r_star_shifted is None else f", or {self.r_star_shifted:.3g} with epsilon to order r^2"
            assumed = "" if self.at_criticality else "; nu assumes criticality, this network is off it"
            lines.append(f"r* = {self.r_star:.3g}{shifted}: a heuristic scale, not a measured optimum{assumed}")
        return lines

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *(f"caveat: {sentence}" for sentence in self.caveats)])


def aspect_ratio(ensemble: MLPEnsemble, x: Tensor | None = None, *, doubled: bool = True) -> AspectRatio:
    """Judge the depth of an ensemble for its width: its fluctuations, and how well order 1/n describes them.

    Raises ``ValueError`` if ``x`` does not fit; ``QuadratureError`` if the activation is not smooth enough for
    quadrature.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0); without them, one input with |x|^2 = n_0.
        doubled: Whether to evaluate epsilon for twice the depth and the width, too.

    Returns:
        The aspect ratio. Numbers that need a critical point are None where the activation has none.

    Example:
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([3, 10, 10, 10, 10, 1], "relu", C_W=2.0)
        >>> ratio = theory.aspect_ratio(ensemble, doubled=False)
        >>> ratio.r, round(ratio.epsilon, 9), ratio.critical.C_W
        (0.5, 2.0, 2.0)
    """
    check_ensemble(ensemble)
    epsilon = output_fluctuation(ensemble, x)
    point, reason = _critical_point(ensemble.activation)
    gain = _gradient_gain(ensemble, x, point)
    on = gain is not None and 0.5 <= gain <= 2
    all_orders, estimate = _all_orders(ensemble, epsilon, point if on else None)
    r_star, shifted, caveats = _optimum(ensemble, point, on)
    hidden, r = ensemble.hidden_widths, ensemble.aspect_ratio
    inverse = sum(1 / n for n in hidden)
    return AspectRatio(
        depth=ensemble.depth,
        width=len(hidden) / inverse if hidden else None,
        r=r,
        inverse_widths=inverse,
        epsilon=epsilon,
        regime=regime(r, epsilon),
        epsilon_all_orders=all_orders,
        truncation_error=1 - epsilon / all_orders if all_orders > 0 else 0.0,
        estimate=estimate,
        spread=math.sqrt(epsilon),
        seeds=100 * all_orders,
        epsilon_twice_depth=output_fluctuation(twice_as_deep(ensemble), x) if hidden and doubled else None,
        epsilon_twice_width=output_fluctuation(twice_as_wide(ensemble), x) if hidden and doubled else None,
        critical=point,
        criticality_reason=reason,
        gradient_gain=gain,
        r_star=r_star,
        r_star_shifted=shifted,
        caveats=caveats,
    )


@lru_cache(maxsize=64)
def _critical_point(activation: Activation) -> tuple[CriticalPoint | None, str]:
    try:
        point = criticality(activation)
    except QuadratureError as error:
        return None, f"criticality unknown: {error}"
    if not point.exists:
        return None, f"{activation.name} has no critical initialization: {point.reason}"
    return point, ""


def _gradient_gain(ensemble: MLPEnsemble, x: Tensor | None, point: CriticalPoint | None) -> float | None:
    if point is None or point.C_b is None or point.C_W is None:
        return None
    critical = MLPEnsemble(ensemble.widths, ensemble.activation, C_b=point.C_b, C_W=point.C_W)
    return float(layer_gains(ensemble, x).J[0].mean() / layer_gains(critical, x).J[0].mean())


def _all_orders(ensemble: MLPEnsemble, b: float, point: CriticalPoint | None) -> tuple[float, str]:
    """An estimate of epsilon to all orders, and its description; ``point`` only for an ensemble at criticality."""
    hidden = ensemble.hidden_widths
    if len(hidden) < 2:
        return b, "the exact value of one hidden layer"
    weight = [1 / (n * sum(1 / m for m in hidden)) for n in hidden]
    if point is not None and point.universality_class == "K*=0":
        later = 1 - sum(w**2 for w in weight)
        return b + _kappa(point) * later * b**2, "the estimate to order r^2 of class K*=0"
    product = math.expm1(min(sum(math.log1p(b * w) for w in weight), 700.0))
    if ensemble.activation.slopes is not None and not any(ensemble.C_b[1:]):
        return product, "the exact product over layers (piecewise linear, no biases)"
    where = "for this class" if point is not None else "off criticality"
    return product, f"e^epsilon - 1 (for many layers), the scale-invariant class's value: {where} an estimate"


def _kappa(point: CriticalPoint) -> float:
    """The kappa in epsilon = b + kappa b^2, by the power d of the kernel's flow; d = 0 where every K is fixed."""
    d = point.power or 0.0
    return (4 - d) * (5 - d) / 40


def _optimum(
    ensemble: MLPEnsemble, point: CriticalPoint | None, on: bool
) -> tuple[float | None, float | None, tuple[str, ...]]:
    """r*, r* shifted by epsilon's second order, and the caveats."""
    if point is None or point.nu is None:
        return None, None, ()
    outputs, nu = ensemble.widths[-1], point.nu
    r_star = 4 / ((20 + 3 * outputs) * nu)
    derived = point.universality_class != "half-stable"
    shifted = 4 / ((20 + 3 * outputs - 12 * _kappa(point)) * nu) if derived else None
    second = f"r* to {shifted:.3g}" if shifted else "it, by an amount not derived for this class"
    caveats = [
        "r* is where the mutual information between outputs, expanded in 1/n and cut after two terms, is largest: the "
        "scale at which that expansion breaks (at r* the second term is 2/3 of the first), not a measured optimum",
        "the exact mutual information has no maximum: it grows with r",
        f"epsilon at order r^2 enters at the order that defines r*, and shifts {second}",
    ]
    if outputs == 1:
        caveats.append("with one output there are no two groups of outputs: n_L = 1 is a formal continuation")
    if not on:
        caveats.append(f"nu = {nu:.4g} assumes criticality; this network is off it, so that its epsilon is not nu r")
    return r_star, shifted, tuple(caveats)
