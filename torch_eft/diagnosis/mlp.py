"""The diagnosis of an MLP, derived from its architecture."""

import math
from typing import Literal

from torch import Tensor

from torch_eft.diagnosis.derived_report import Diagnosis, LayerDiagnosis, Phase
from torch_eft.diagnosis.findings import DEAD, FROZEN, SIGNAL, Finding, advice, depth_finding
from torch_eft.diagnosis.variants import Variant, few, variant
from torch_eft.theory.ensemble import MLPEnsemble, twice_as_deep, twice_as_wide
from torch_eft.theory.estimates.aspect_ratio import AspectRatio, aspect_ratio
from torch_eft.theory.estimates.exact import dead_probability
from torch_eft.theory.estimates.expected_drift import expected_drift
from torch_eft.theory.estimates.learning_rates import (
    LayerGains,
    LearningRateShares,
    equivalence_learning_rates,
    largest_learning_rate,
    layer_gains,
    layer_shares,
)
from torch_eft.theory.estimates.seed_spread import seed_spread
from torch_eft.theory.gaussian.quadrature import QuadratureError
from torch_eft.theory.signal_propagation.regimes import EDGE, first_order_validity, infinite_width_validity
from torch_eft.theory.signal_propagation.susceptibility import slope_of_variance, slope_squared

_COMPARED = 64
"""Inputs on which this network and the doubled ones are compared: Theta takes the square of their number."""


def derived_diagnosis(ensemble: MLPEnsemble, x: Tensor | None = None) -> Diagnosis:
    """Diagnose an ensemble, given or read off a network.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, ...), flattened here; without them, one input with |x|^2 = n_0.

    Returns:
        The diagnosis, with its text.

    Raises:
        QuadratureError: If no quadrature resolves the activation.
        ValueError: If ``x`` does not fit, or the signal leaves float64.
    """
    inputs = None if x is None else x.detach().flatten(1).double()
    gains = _gains(ensemble, inputs)
    ratio = aspect_ratio(ensemble, inputs)
    rows = _layers(ensemble, gains, inputs)
    spread = seed_spread(ensemble, few(inputs))
    drift = expected_drift(ensemble, None if inputs is None else inputs[:1])
    some = None if inputs is None else inputs[:_COMPARED]
    own = variant("this network", ensemble, some, ratio, spread, drift)
    eta = largest_learning_rate(ensemble, inputs, reduction="mean")
    phase = _phase(ratio, own.gradient_growth)
    dead = 0.0 if ensemble.activation.slopes in (None, (0.0, 0.0)) else dead_probability(ensemble)
    findings = _findings(ensemble, ratio, own, phase, rows, dead)
    point = ratio.critical
    return Diagnosis(
        network=str(ensemble),
        phase=phase,
        verdict=_verdict(ratio, phase, own.gradient_growth),
        warnings=findings,
        advice=advice(findings),
        recommended=None if point is None or point.C_b is None or point.C_W is None else (point.C_b, point.C_W),
        kernel_growth=own.kernel_growth,
        gradient_growth=own.gradient_growth,
        aspect_ratio=ratio,
        spread=spread,
        drift=drift,
        dead=dead,
        variants=_variants(ensemble, some, own),
        layers=rows,
        remarks=ensemble.remarks,
        inputs=None if inputs is None else len(inputs),
        largest_learning_rate=eta if math.isfinite(eta) else None,
        validity=infinite_width_validity(ensemble, inputs),
        first_order=first_order_validity(ensemble, inputs),
    )


def _gains(ensemble: MLPEnsemble, x: Tensor | None) -> LayerGains:
    try:
        gains = layer_gains(ensemble, x)
    except QuadratureError as error:
        size = 1.0 if x is None else float(x.square().mean(1).max())
        raise QuadratureError(
            f"{error}. The kernel may simply be too large: |x|^2 / n_0 is up to {size:.3g} and C_W up to "
            f"{max(ensemble.C_W):.3g}; scale the inputs to 1 or use smaller weights"
        ) from error
    # Squares of K and of J are taken later.
    for name, values in (("kernel K", gains.K), ("squared gradient", gains.J)):
        for layer, value in enumerate(values.amax(1).tolist(), 1):
            if not value < 1e120:
                raise ValueError(
                    f"ensemble: the {name} at layer {layer} of {ensemble} is {value:.3g}, beyond what float64 can "
                    "square; use smaller C_W, fewer layers or smaller inputs"
                )
    return gains


def _variants(ensemble: MLPEnsemble, x: Tensor | None, own: Variant) -> tuple[Variant, ...]:
    if not ensemble.hidden_widths:
        return ()
    found = [own]
    for name, changed in (("twice as deep", twice_as_deep(ensemble)), ("twice as wide", twice_as_wide(ensemble))):
        try:
            found.append(variant(name, changed, x))
        except (ValueError, OverflowError):  # a chaotic network twice as deep may leave float64
            continue
    return tuple(found)


def _layers(ensemble: MLPEnsemble, gains: LayerGains, x: Tensor | None) -> tuple[LayerDiagnosis, ...]:
    biases, weights = layer_shares(ensemble, x)
    Theta = float((biases + weights).sum())
    equal = _equal_shares(ensemble, x, float(biases.sum()), float(weights.sum()))
    C_W = gains.K.new_tensor(ensemble.C_W[1:])[:, None]
    before = gains.K[:-1]
    chi_par = (C_W * slope_of_variance(ensemble.activation, before)).mean(1).tolist()
    chi_perp = (C_W * slope_squared(ensemble.activation, before)).mean(1).tolist()
    errors = ensemble.errors or {}
    return tuple(
        LayerDiagnosis(
            layer=index + 1,
            C_b=ensemble.C_b[index],
            C_W=ensemble.C_W[index],
            C_b_error=errors["C_b"][index] if "C_b" in errors else None,
            C_W_error=errors["C_W"][index] if "C_W" in errors else None,
            K=float(gains.K[index].mean()),
            chi_par=chi_par[index - 1] if index else None,
            chi_perp=chi_perp[index - 1] if index else None,
            share=float(biases[index] + weights[index]) / Theta if Theta > 0 else None,
            lr_b=None if equal is None else equal.lr_b[index],
            lr_W=None if equal is None else equal.lr_W[index],
        )
        for index in range(ensemble.depth)
    )


def _equal_shares(ensemble: MLPEnsemble, x: Tensor | None, total_b: float, total_W: float) -> LearningRateShares | None:
    if total_b + total_W == 0:
        return None
    try:
        return equivalence_learning_rates(ensemble, x, total_b=total_b, total_W=total_W)
    except ValueError:  # far from criticality no gradient is left, in float64, in the first layers
        return None


def _phase(ratio: AspectRatio, growth: float) -> Phase:
    gain = growth if ratio.gradient_gain is None else ratio.gradient_gain
    return "ordered" if gain < 0.5 else "chaotic" if gain > 2 else "critical"


def _verdict(ratio: AspectRatio, phase: Phase, growth: float) -> str:
    point, gain = ratio.critical, ratio.gradient_gain
    if point is None or gain is None:
        return f"{ratio.criticality_reason}; squared gradients at layer 1 are {growth:.3g} times those at layer L"
    size = (
        f"squared gradients at layer 1 are {gain:.3g} times the critical ones (C_b = {point.C_b:.4g}, "
        f"C_W = {point.C_W:.4g})"
    )
    if phase == "critical":
        return f"critical within a factor of 2: {size}"
    kind = (
        "subcritical (ordered), gradients vanish"
        if phase == "ordered"
        else "supercritical (chaotic), gradients explode"
    )
    return f"{kind} with depth: {size}"


def _findings(
    ensemble: MLPEnsemble,
    ratio: AspectRatio,
    own: Variant,
    phase: Phase,
    rows: tuple[LayerDiagnosis, ...],
    dead: float,
) -> tuple[Finding, ...]:
    found: list[Finding] = []
    point = ratio.critical
    remedy = ""
    if point is not None:
        remedy = f"initialize weights with variance {point.C_W:.4g} / n_in and biases with {point.C_b:.4g}"
    if point is None and ensemble.hidden_widths:
        found.append(Finding("no criticality", ratio.criticality_reason, "use an activation with a critical point"))
    if phase != "critical":
        name: Literal["gradients vanish", "gradients explode"]
        name = "gradients vanish" if phase == "ordered" else "gradients explode"
        gain = own.gradient_growth if ratio.gradient_gain is None else ratio.gradient_gain
        against = "those at layer L" if ratio.gradient_gain is None else "those at criticality"
        found.append(Finding(name, f"{name}: at layer 1 their squares are {gain:.3g} times {against}", remedy))
    if not 1 / SIGNAL <= own.kernel_growth <= SIGNAL:
        found.append(
            Finding(
                "signal",
                f"the signal changes its size: K^(L) / K^(1) = {own.kernel_growth:.3g}, outside 1/{SIGNAL:g} .. "
                f"{SIGNAL:g}",
                remedy,
            )
        )
    epsilon = max(ratio.epsilon, ratio.epsilon_all_orders)
    name_of = f"epsilon = {epsilon:.3g}" if epsilon >= ratio.r else f"r = L/n = {ratio.r:.3g}"
    deep = depth_finding(max(epsilon, ratio.r), name_of, _narrower(ratio))
    if deep is not None:
        found.append(deep)
    if dead >= DEAD:
        found.append(
            Finding(
                "dead network",
                f"a hidden layer is silent, its gradient zero, with probability {dead:.2g} for a given input",
                "use wider layers, or a leaky activation",
            )
        )
    shares = [row.share for row in rows if row.share is not None]
    if not shares:
        found.append(Finding("nothing trains", "no parameter has a learning rate", "give learning rates"))
    elif min(shares) < FROZEN / len(shares):
        layer = 1 + shares.index(min(shares))
        found.append(
            Finding(
                "frozen layer",
                f"layer {layer} makes {100 * min(shares):.2g} % of the NTK, an equal part would be "
                f"{100 / len(shares):.2g} %: it practically does not train",
                remedy if phase != "critical" else "use the table's learning rates",
            )
        )
    return tuple(found)


def _narrower(ratio: AspectRatio) -> str:
    """Return advice on width and depth.

    At order 1/n both r and epsilon fall as 1/n when all hidden widths grow together, and about linearly with depth.
    epsilon = 0.18 at order 1/n is at most e^0.18 - 1 = 0.197 at all orders.
    """
    factor = math.ceil(max(ratio.r / EDGE, ratio.epsilon / 0.18) * 10 + 1e-9) / 10
    shorter = int(ratio.depth / factor)
    depth = f"; so does a depth of about L = {shorter}" if shorter >= 2 else ""
    return f"too deep for its width: hidden widths times {factor:.3g} bring r and epsilon below {EDGE:g}{depth}"
