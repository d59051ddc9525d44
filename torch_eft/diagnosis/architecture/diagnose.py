"""The diagnosis of convolutions, skips and norms, derived from the graph of their layers."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from torch_eft.diagnosis.architecture.report import ArchitectureDiagnosis, Population
from torch_eft.diagnosis.derived.rates import Step, in_units, learning_rate_finding, stability
from torch_eft.diagnosis.findings import (
    FROZEN,
    LARGE,
    ORDER_ONE,
    PLATEAU,
    Finding,
    advice,
    plateau_words,
    spread_finding,
)
from torch_eft.diagnosis.measured.report import MeasuredDiagnosis
from torch_eft.diagnosis.text import percent
from torch_eft.measure.kernels.products import ntk_eigenpairs
from torch_eft.theory.architecture.closed import obstacle
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.architecture.statistics import ArchitectureStatistics, architecture_statistics
from torch_eft.theory.estimates.layer_profile import Profile, layer_profile
from torch_eft.theory.estimates.plateau import kernel_plateau, plateau_steps

GROWTH = 10.0
"""Growth or decay of squared gradients over the depth that is worth a warning, as of a measured network."""

_INPUTS, _SPREAD = 4, 2
"""On as many inputs layers are followed, and the spread is found; on 2 and 1 from ``_FEW_POSITIONS`` on."""

_FEW_POSITIONS, _POSITIONS = 64, 400
"""Positions (pixels, tokens) up to which all takes a second or two of one core, and up to which some ten seconds."""


def architecture_diagnosis(
    model: nn.Module,
    architecture: Architecture,
    x: Tensor,
    step: Step = Step(),  # noqa: B008
    measure: Callable[[], MeasuredDiagnosis] | None = None,
) -> ArchitectureDiagnosis:
    """Diagnose a network by the graph of its layers.

    Args:
        model: The module, for its name and what has to be measured on it.
        architecture: As it was read.
        x: Inputs, (N, ...).
        step: The optimizer and the loss.
        measure: Measures networks drawn beside it; None leaves that out.

    Returns:
        The diagnosis, with its text.

    Raises:
        ValueError: If ``x`` does not fit, or the signal leaves float64.
    """
    positions = max(math.prod(sizes) for sizes in architecture.positions)
    if positions > _POSITIONS:
        raise ValueError(
            f"its spread at {positions} positions takes a minute and more (theory.architecture_statistics derives it)"
        )
    few, count = (_INPUTS, _SPREAD) if positions <= _FEW_POSITIONS else (2, 1)
    profile = layer_profile(architecture, x[:few])
    found = architecture_statistics(architecture, x[:count])
    if not bool(profile.Theta.isfinite().all()):
        raise ValueError("the NTK of this network leaves float64")
    largest = float(ntk_eigenpairs(model, x, 1, tolerance=1e-3).values[0])
    numbers = len(x) * architecture.output
    eta = in_units(numbers / largest, step, numbers) if largest > 0 else None
    hidden = profile.layers[:-1]
    populations = tuple(
        Population(name, n, found.shares[name])
        for name, n in zip(found.shares, architecture.hidden.values(), strict=True)
    )
    equal = len(x) < 2 or bool((x[:few] == x[:1]).all())
    plateau = None if equal else kernel_plateau(profile.Theta)
    growth = None
    if len(hidden) > 1 and hidden[-1].gradient > 0:
        growth = hidden[0].gradient / hidden[-1].gradient
    findings = _findings(profile, found, populations, growth, plateau)
    if (fast := learning_rate_finding(eta, step)) is not None:
        findings = (fast, *findings)
    return ArchitectureDiagnosis(
        network=f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
        verdict=_verdict(found, findings, growth, plateau),
        gradients=_gradients(growth, len(hidden)),
        warnings=findings,
        advice=advice(findings),
        layers=profile.layers,
        streams=profile.streams,
        populations=populations,
        gradient_growth=growth,
        kernel_growth=_kernel_growth(profile),
        r=len(populations) * sum(each.share / each.neurons for each in populations),
        epsilon=found.epsilon,
        ntk_spread=found.ntk_trace_relative_sd,
        ntk_spread_error=float(found.error["ntk_trace_relative_sd"]),
        lambda_max=largest,
        largest_learning_rate=eta,
        stability=stability(eta, step, len(x)),
        plateau=plateau,
        validity=found.validity,
        remarks=_remarks(model, few, count, len(x), architecture),
        inputs=len(x),
        measured=None if measure is None else measure(),
    )


def _kernel_growth(profile: Profile) -> float | None:
    """K at the last hidden layer, or at the end of its stream, over that at the first."""
    hidden = profile.layers[:-1]
    if len(hidden) < 2 or not hidden[0].K > 0:
        return None
    return profile.last_kernel / hidden[0].K


def _gradients(growth: float | None, layers: int) -> str:
    if growth is None:
        return "without depth: one hidden layer or none"
    kind = "keep their size" if 1 / GROWTH <= growth <= GROWTH else "shrink" if growth < 1 else "grow"
    return (
        f"gradients {kind} over the depth: their squares at the first layer are {growth:.3g} times those at the last "
        f"hidden one, {layers} layers"
    )


def _verdict(
    found: ArchitectureStatistics, findings: tuple[Finding, ...], growth: float | None, plateau: float | None
) -> str:
    codes = {finding.code for finding in findings}
    if "gradients vanish" in codes and plateau is not None:
        return f"gradients vanish: {plateau_words(plateau, plateau_steps(plateau))}"
    if "gradients explode" in codes:
        return "gradients explode with depth"
    size = max(found.epsilon, found.ntk_trace_relative_sd**2)
    how = "by order one" if size >= ORDER_ONE else "much" if size >= LARGE else "little"
    seeds = f"seeds differ {how} ({percent(math.sqrt(max(0.0, size)))})"
    if "too deep" in codes:
        return f"too deep for its width, {seeds}"
    trains = "trains, with warnings" if codes - {"edge", "spread"} else "trains"
    if growth is not None and growth < 1 / GROWTH:
        return f"{trains}, its last layers most: squared gradients shrink to {growth:.2g} at the first, {seeds}"
    return f"{trains}: gradients pass its depth, {seeds}"


def _findings(
    profile: Profile,
    found: ArchitectureStatistics,
    populations: tuple[Population, ...],
    growth: float | None,
    plateau: float | None,
) -> tuple[Finding, ...]:
    findings = [
        _plateau(profile, plateau),
        _explosion(profile, growth),
        _spread(profile, found, populations),
        _frozen(profile, growth),
    ]
    return tuple(finding for finding in findings if finding is not None)


def _plateau(profile: Profile, plateau: float | None) -> Finding | None:
    if plateau is None or plateau_steps(plateau) <= PLATEAU:
        return None
    slowly = plateau_words(plateau, plateau_steps(plateau))
    message = f"gradients vanish: {slowly} at a quarter of the largest stable rate (from the NTK)"
    return Finding("gradients vanish", message, _blockwise(profile, small=True))


def _explosion(profile: Profile, growth: float | None) -> Finding | None:
    if growth is None or growth <= GROWTH or any(stream.normed for stream in profile.streams):
        return None  # of a pre-norm stream the growth is a power of K's, and harmless
    message = f"gradients explode: their squares grow {growth:.3g}-fold from the last hidden layer to the first"
    return Finding("gradients explode", message, _blockwise(profile, small=False))


def _blockwise(profile: Profile, small: bool) -> str:
    hidden = profile.layers[:-1]
    steps = [a.gradient / b.gradient for a, b in zip(hidden, hidden[1:], strict=False) if b.gradient > 0]
    words = f"{'larger' if small else 'smaller'} initial weights"
    if steps:
        index = (min if small else max)(range(len(steps)), key=lambda i: steps[i])
        words += f", most of all in {hidden[index + 1].name!r} (chi = {steps[index]:.2g} there)"
    missing = ["residual connections"] * (not profile.streams)
    return ", or ".join([words, *missing])


def _spread(profile: Profile, found: ArchitectureStatistics, populations: tuple[Population, ...]) -> Finding | None:
    ntk = found.ntk_trace_relative_sd**2
    size = max(found.epsilon, ntk)
    name = f"NTK by {percent(math.sqrt(ntk))}, output variance by {percent(math.sqrt(max(0.0, found.epsilon)))}"
    remedy = ""
    if populations:
        most = max(populations, key=lambda each: each.share)
        factor = max(1.1, math.log1p(size) / (0.9 * math.log1p(LARGE)))
        stream = next((stream for stream in profile.streams if stream.name == most.name), None)
        fewer = "fewer layers" if not profile.streams else "fewer blocks"
        fewer += f" than {stream.blocks} there" if stream is not None and stream.blocks > 1 else ""
        remedy = (
            f"about {factor:.2g} times the neurons (channels), or {fewer}; {most.name} makes {percent(most.share)} "
            f"of the spread with {most.neurons}"
        )
    return spread_finding(size, name, remedy)


def _frozen(profile: Profile, growth: float | None) -> Finding | None:
    alive = [layer for layer in profile.layers if layer.share > 0]
    if not alive or (growth is not None and growth < 1 / GROWTH):
        return None  # all of them shrink with depth, and train as long as no plateau is found
    least = min(alive, key=lambda layer: layer.share)
    if least.share >= FROZEN / len(profile.layers):
        return None
    return Finding(
        "frozen layer",
        f"{least.name!r} makes {100 * least.share:.2g} % of the NTK, an equal part would be "
        f"{100 / len(profile.layers):.2g} %: it practically does not train",
        f"give {least.name!r} a larger learning rate, or larger initial weights after it",
    )


def _remarks(model: nn.Module, few: int, count: int, number: int, architecture: Architecture) -> tuple[str, ...]:
    remarks = []
    if count < number:
        remarks.append(f"layers on the first {min(few, number)} inputs, the spread on the first {count}")
    if (reason := obstacle(architecture)) is not None:
        remarks.append(f"kernels of some populations by drawn neurons, not in closed form: {reason}")
    if not all(p.requires_grad for p in model.parameters()):
        remarks.append("frozen parameters take no part in the NTK")
    return tuple(remarks)
