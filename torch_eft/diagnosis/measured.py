"""The diagnosis of a network that the theory does not cover: what can be measured, and labeled so."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.diagnosis.findings import FROZEN, Finding, advice, depth_finding
from torch_eft.diagnosis.measured_report import Block, MeasuredDiagnosis
from torch_eft.measure.ensembles.reinitialized_networks import (
    OneNetwork,
    ReinitializedNetworks,
    log_variance,
    reinitialized_networks,
)
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.kernels.products import ntk_eigenpairs
from torch_eft.measure.network.batch_norm import batch_norms, with_batch_statistics
from torch_eft.measure.representations.bottlenecks import Bottleneck

GROWTH = 10.0
"""Growth or decay of squared gradients over the bottlenecks that is worth a warning: a tolerance of ours."""

_INPUTS = 4
"""On as many inputs everything but the step size is measured."""


def measured_diagnosis(
    model: nn.Module,
    x: Any,
    reason: str,
    output_fn: OutputFn | None = None,
    num_networks: int = 16,
    initialize: Callable[[nn.Module], Any] | None = None,
) -> MeasuredDiagnosis:
    """Measure a network, in evaluation mode, and ``num_networks`` others of its kind.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        reason: Why the theory does not cover it.
        output_fn: Turns what the module returns into (N, C).
        num_networks: Networks to draw anew; 0 measures this one alone.
        initialize: Draws the parameters of the module it is given, in place; None uses ``reset_parameters`` or an
            ``_init_weights`` of the module, if the network given could be one of its draws.

    Returns:
        The measurements, with their text.

    Raises:
        ValueError: If the forward rejects ``x``, the output is not (N, C) or ``num_networks`` is negative.
    """
    probe = as_probe(x)
    few = tree_map_only(Tensor, lambda tensor: tensor[:_INPUTS], probe.inputs)
    shares: dict[str, float] = {}
    largest, eta = None, None
    norms, unsettled = batch_norms(model, unused=True), ""
    with isolated(model, output_fn) as network:
        normed = with_batch_statistics(network, probe, norms)
        try:
            pairs = ntk_eigenpairs(normed, probe, 1, tolerance=1e-3)
        except ValueError as error:
            if not norms:
                raise
            normed, norms, unsettled = network, (), str(error)
            pairs = ntk_eigenpairs(normed, probe, 1, tolerance=1e-3)
        options: dict[str, Any] = {"num_networks": num_networks, "initialize": initialize}
        found = reinitialized_networks(network, few, statistics_of=probe if norms else None, **options)
        if found.ntk_refusal is None:
            kernels = ntk(normed, few, trace=True, per="layer")
            parts = {name: float(H.diagonal().mean()) for name, H in kernels.items()}
            total = sum(parts.values())
            shares = {name: part / total for name, part in parts.items()} if total > 0 else {}
    if float(pairs.values[0]) > 0:
        largest = float(pairs.values[0])
        eta = probe.size * found.own.outputs.shape[1] / largest
    networks = found.drawn or [found.own]
    blocks = _blocks(networks)
    growth, signal, dead = _growth(networks)
    traces = [float(one.trace.mean()) for one in found.drawn if one.trace is not None]
    log_ntk, log_ntk_error = log_variance(traces)
    epsilon_ntk = math.expm1(log_ntk) if math.isfinite(log_ntk) else None
    epsilon_features = _features(found.drawn)
    findings = _findings(growth, (dead, len(networks)), epsilon_ntk, epsilon_features, shares)
    return MeasuredDiagnosis(
        network=f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
        reason=reason,
        verdict=_verdict(growth, len(blocks), len(found.drawn)),
        warnings=findings,
        advice=advice(findings),
        blocks=blocks,
        gradient_growth=growth,
        signal_growth=signal,
        num_networks=len(found.drawn),
        output_scale=float(torch.stack([one.outputs for one in networks]).square().mean().sqrt()),
        output_spread=_output_spread(found.drawn),
        ntk_log_variance=log_ntk if math.isfinite(log_ntk) else None,
        epsilon_ntk=epsilon_ntk,
        epsilon_ntk_error=None if epsilon_ntk is None else math.exp(log_ntk) * log_ntk_error,
        epsilon_features=epsilon_features,
        shares=shares,
        lambda_max=largest,
        largest_learning_rate=eta,
        remarks=_remarks(model, found, num_networks, probe.size if norms else 0, unsettled),
        inputs=probe.size,
    )


def _blocks(networks: list[OneNetwork]) -> tuple[Block, ...]:
    found = []
    places = networks[0].bottlenecks
    for index, place in enumerate(places):
        here = [one.bottlenecks[index] for one in networks]
        chi, error = None, None
        if index + 1 < len(places):
            after = [one.bottlenecks[index + 1] for one in networks]
            ratios = [a.averaged * a.gradient / b.gradient for a, b in zip(here, after, strict=True) if b.gradient > 0]
            chi = statistics.fmean(ratios) if ratios else None
            error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 2 else None
        variance = statistics.fmean(one.variance for one in here)
        gradient = statistics.fmean(one.gradient for one in here)
        found.append(Block(place.name, place.kind, place.features, variance, gradient, chi, error))
    return tuple(found)


def _growth(networks: list[OneNetwork]) -> tuple[float | None, float | None, int]:
    """Return geometric means of the growth of squared gradients and of the signal, and the number of dead networks.

    Averaging over positions, which divides gradients by their number at any depth, is left out of the growth.
    """
    if len(networks[0].bottlenecks) < 2:
        return None, None, 0
    ends = [(one.bottlenecks[0], one.bottlenecks[-1]) for one in networks]
    alive = [
        one.bottlenecks for one in networks if one.bottlenecks[0].gradient > 0 and one.bottlenecks[-1].gradient > 0
    ]
    gradients = _geometric([_averaged(chain) * chain[0].gradient / chain[-1].gradient for chain in alive])
    signals = [last.variance / first.variance for first, last in ends if first.variance > 0 and last.variance > 0]
    return gradients if alive else 0.0, _geometric(signals), len(ends) - len(alive)


def _averaged(chain: list[Bottleneck]) -> float:
    return math.prod(place.averaged for place in chain)


def _geometric(ratios: list[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None


def _features(networks: list[OneNetwork]) -> float | None:
    """From what enters the last place; each input by itself, then averaged."""
    entering = [one.bottlenecks[-1].entering for one in networks if one.bottlenecks]
    values = [value for value in entering if value is not None]
    if len(values) < 3 or len(values) < len(networks):
        return None
    variances = [log_variance([float(value[a]) for value in values])[0] for a in range(len(values[0]))]
    return math.expm1(statistics.fmean(variances)) if all(map(math.isfinite, variances)) else None


def _output_spread(networks: list[OneNetwork]) -> float | None:
    if len(networks) < 3:
        return None
    return float(torch.stack([one.outputs for one in networks]).var(0).mean().sqrt())


def _verdict(growth: float | None, places: int, seeds: int) -> str:
    if growth is None:
        return "measured: no chain of layers that everything passes was found; growth over depth is unknown"
    kind = "neither vanish nor explode" if 1 / GROWTH <= growth <= GROWTH else "vanish" if growth < 1 else "explode"
    per = growth ** (1 / (places - 1))
    of = f"over {seeds} seeds" if seeds else "in this network alone"
    return (
        f"measured {of}: gradients {kind} with depth: their squares at the first place are {growth:.3g} times those at "
        f"the last, {per:.3g} a block, {places} places"
    )


def _findings(
    growth: float | None,
    dead: tuple[int, int],
    epsilon_ntk: float | None,
    epsilon_features: float | None,
    shares: dict[str, float],
) -> tuple[Finding, ...]:
    found: list[Finding] = []
    if growth is not None and not 1 / GROWTH <= growth <= GROWTH:
        small = growth < 1
        found.append(
            Finding(
                "gradients vanish" if small else "gradients explode",
                f"measured: squared gradients change {growth:.3g}-fold from the last place to the first, outside "
                f"1/{GROWTH:g} .. {GROWTH:g}",
                f"{'larger' if small else 'smaller'} initial weights in the blocks whose chi is "
                f"{'below' if small else 'above'} 1, or normalization with residual connections",
            )
        )
    if dead[0]:
        message = f"measured: in {dead[0]} of {dead[1]} networks no gradient reaches the first place"
        found.append(Finding("dead network", message, "use wider layers, or a leaky activation"))
    known = [value for value in (epsilon_ntk, epsilon_features) if value is not None]
    if known:
        size = max(known)
        deep = depth_finding(size, f"measured effective epsilon {size:.3g}", "fewer or wider blocks")
        if deep is not None:
            found.append(deep)
    if shares and min(shares.values()) < FROZEN / len(shares):
        name = min(shares, key=lambda key: shares[key])
        found.append(
            Finding(
                "frozen layer",
                f"measured: {name!r} makes {100 * shares[name]:.2g} % of the NTK, an equal part would be "
                f"{100 / len(shares):.2g} %: it practically does not train",
                f"give {name!r} a larger learning rate, or larger initial weights after it",
            )
        )
    return tuple(found)


def _remarks(
    model: nn.Module, found: ReinitializedNetworks, num_networks: int, size: int, unsettled: str
) -> tuple[str, ...]:
    remarks = []
    if found.refusal is not None:
        remarks.append(f"no other seeds were drawn, so that there is no spread: {found.refusal}")
    elif not num_networks:
        remarks.append("num_networks = 0: this network alone was measured, there is no spread")
    averaged = statistics.fmean(_averaged(one.bottlenecks) for one in found.drawn or [found.own])
    if averaged > 2:
        remarks.append(
            f"averaging over positions divides squared gradients by another {averaged:.3g}, whatever the depth: it is "
            "not counted in chi and in what is said of depth"
        )
    if found.ntk_refusal is not None:
        remarks.append(f"the NTK itself was not measured: {found.ntk_refusal}")
    if size:
        remarks.append(
            f"BatchNorm in evaluation mode, with the statistics of the {size} inputs given at the parameters of each "
            "network: it has no running statistics yet"
        )
    elif any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        why = f", as those of the inputs given cannot be measured with: {unsettled}" if unsettled else ""
        remarks.append(f"BatchNorm in evaluation mode normalizes with its running statistics{why}")
    if not all(p.requires_grad for p in model.parameters()):
        remarks.append("frozen parameters take no part in the NTK")
    return tuple(remarks)
