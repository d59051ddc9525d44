"""The diagnosis of an MLP, derived from its architecture."""

import math
from dataclasses import replace

from torch import Tensor

from torch_eft.diagnosis.derived.judgement import Facts, derived_findings, derived_verdict
from torch_eft.diagnosis.derived.rates import Step, in_units, learning_rate_finding, stability
from torch_eft.diagnosis.derived.report import Diagnosis, LayerDiagnosis, Phase
from torch_eft.diagnosis.derived.variants import Variant, few, variant
from torch_eft.diagnosis.findings import advice
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
from torch_eft.theory.estimates.plateau import plateau_ratio
from torch_eft.theory.estimates.seed_spread import seed_spread
from torch_eft.theory.gaussian.quadrature import QuadratureError
from torch_eft.theory.signal_propagation.preactivations import (
    first_preactivations,
    input_moments,
    next_preactivations,
)
from torch_eft.theory.signal_propagation.regimes import first_order_validity, infinite_width_validity

_COMPARED = 64
"""Inputs on which this network and the doubled ones are compared: Theta takes the square of their number."""


def derived_diagnosis(ensemble: MLPEnsemble, x: Tensor | None = None, step: Step = Step()) -> Diagnosis:  # noqa: B008
    """Diagnose an ensemble, given or read off a network.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, ...), flattened here; without them, one input with |x|^2 = n_0.
        step: The optimizer and the loss.

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
    bound = largest_learning_rate(ensemble, inputs, reduction="mean")
    count = (1 if inputs is None else len(inputs)) * ensemble.widths[-1]
    eta = in_units(bound, step, count) if math.isfinite(bound) else None
    phase = _phase(ratio, own.gradient_growth)
    facts = Facts(
        ensemble=ensemble,
        ratio=ratio,
        own=own,
        phase=phase,
        layers=rows,
        dead=0.0 if ensemble.activation.slopes in (None, (0.0, 0.0)) else dead_probability(ensemble),
        plateau=plateau_ratio(ensemble, some),
        plateau_critical=_critical_plateau(ensemble, some, ratio),
    )
    findings = derived_findings(facts)
    if (fast := learning_rate_finding(eta, step)) is not None:
        findings = (fast, *findings)
    point = ratio.critical
    return Diagnosis(
        network=str(ensemble),
        phase=phase,
        verdict=derived_verdict(facts, findings),
        criticality=_criticality(ratio, phase, own.gradient_growth),
        warnings=findings,
        advice=advice(findings),
        recommended=None if point is None or point.C_b is None or point.C_W is None else (point.C_b, point.C_W),
        kernel_growth=own.kernel_growth,
        gradient_growth=own.gradient_growth,
        aspect_ratio=ratio,
        spread=spread,
        drift=drift,
        dead=facts.dead,
        variants=_variants(ensemble, some, own, step, count),
        layers=rows,
        remarks=ensemble.remarks,
        inputs=None if inputs is None else len(inputs),
        largest_learning_rate=eta,
        stability=stability(eta, step, None if inputs is None else len(inputs)),
        plateau=facts.plateau,
        validity=infinite_width_validity(ensemble, inputs),
        first_order=first_order_validity(ensemble, inputs),
        ensemble=ensemble,
        mean_square=1.0 if inputs is None else float(inputs.square().mean()),
    )


def _critical_plateau(ensemble: MLPEnsemble, x: Tensor | None, ratio: AspectRatio) -> float | None:
    point = ratio.critical
    if point is None or point.C_b is None or point.C_W is None or not ensemble.hidden_widths:
        return None
    critical = MLPEnsemble(
        ensemble.widths,
        ensemble.activation,
        C_b=point.C_b,
        C_W=point.C_W,
        lambda_b=ensemble.lambda_b,
        lambda_W=ensemble.lambda_W,
    )
    return plateau_ratio(critical, x)


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


def _variants(ensemble: MLPEnsemble, x: Tensor | None, own: Variant, step: Step, count: int) -> tuple[Variant, ...]:
    if not ensemble.hidden_widths:
        return ()
    found = [own]
    for name, changed in (("twice as deep", twice_as_deep(ensemble)), ("twice as wide", twice_as_wide(ensemble))):
        try:
            found.append(variant(name, changed, x))
        except (ValueError, OverflowError):  # a chaotic network twice as deep may leave float64
            continue
    return tuple(
        one
        if one.largest_learning_rate is None
        else replace(one, largest_learning_rate=in_units(one.largest_learning_rate, step, count))
        for one in found
    )


def _layers(ensemble: MLPEnsemble, gains: LayerGains, x: Tensor | None) -> tuple[LayerDiagnosis, ...]:
    biases, weights = layer_shares(ensemble, x)
    Theta = float((biases + weights).sum())
    equal = _equal_shares(ensemble, x, float(biases.sum()), float(weights.sum()))
    chi_par, chi_perp = _susceptibilities(ensemble, x)
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


def _susceptibilities(ensemble: MLPEnsemble, x: Tensor | None) -> tuple[list[float], list[float]]:
    """chi_par and chi_perp of layers 2 .. L, means over the inputs."""
    chi_par, chi_perp = [], []
    z = first_preactivations(ensemble, *input_moments(ensemble, x))
    for layer in range(2, ensemble.depth + 1):
        C_W = ensemble.C_W[layer - 1]
        chi_par.append(C_W * float(z.response().mean()))
        chi_perp.append(C_W * float(z.slope_power(2).mean()))
        z = next_preactivations(ensemble, z, layer)
    return chi_par, chi_perp


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


def _criticality(ratio: AspectRatio, phase: Phase, growth: float) -> str:
    point, gain = ratio.critical, ratio.gradient_gain
    if point is None or gain is None:
        return f"{ratio.criticality_reason}; squared gradients at layer 1 are {growth:.3g} times those at layer L"
    size = (
        f"squared gradients at layer 1 are {gain:.3g} times the critical ones (C_b = {point.C_b:.4g}, "
        f"C_W = {point.C_W:.4g}, {point.universality_class})"
    )
    if phase == "critical":
        return f"critical within a factor of 2: {size}"
    return f"{'subcritical (ordered)' if phase == 'ordered' else 'supercritical (chaotic)'}: {size}"
