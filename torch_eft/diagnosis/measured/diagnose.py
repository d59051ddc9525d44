"""The diagnosis of a network that the theory does not cover: what can be measured, and labeled so."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

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
from torch_eft.diagnosis.measured.report import Block, MeasuredDiagnosis
from torch_eft.diagnosis.text import percent
from torch_eft.measure.ensembles.reinitialized_networks import (
    OneNetwork,
    ReinitializedNetworks,
    log_variance,
    reinitialized_networks,
)
from torch_eft.measure.forward.isolation import Model, isolated
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.kernels.products import ntk_eigenpairs
from torch_eft.measure.network.batch_norm import batch_norms, with_batch_statistics
from torch_eft.measure.representations.bottlenecks import Bottleneck
from torch_eft.theory.estimates.plateau import kernel_plateau, plateau_steps

GROWTH = 10.0
"""Growth or decay of squared gradients over the bottlenecks that is worth a warning: a tolerance of ours."""

STEEP = 0.02
"""Squared gradients across one block below which that block stands out, instead of the depth as a whole."""

_INPUTS = 4
"""On as many inputs everything but the step size is measured."""


def measured_diagnosis(
    model: Model,
    x: Any,
    reason: str,
    output_fn: OutputFn | None = None,
    num_networks: int = 16,
    initialize: Callable[[nn.Module], Any] | None = None,
    step: Step = Step(),  # noqa: B008
) -> MeasuredDiagnosis:
    """Measure a network, in evaluation mode, and ``num_networks`` others of its kind.

    Args:
        model: Any module, or one that is isolated.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        reason: Why the theory does not cover it.
        output_fn: Turns what the module returns into (N, C).
        num_networks: Networks to draw anew; 0 measures this one alone.
        initialize: Draws the parameters of the module it is given, in place; None uses ``reset_parameters`` or an
            ``_init_weights`` of the module, if the network given could be one of its draws.
        step: The optimizer and the loss.

    Returns:
        The measurements, with their text.

    Raises:
        ValueError: If the forward rejects ``x``, the output is not (N, C) or ``num_networks`` is negative.
    """
    probe = as_probe(x)
    few = tree_map_only(Tensor, lambda tensor: tensor[:_INPUTS], probe.inputs)
    shares: dict[str, float] = {}
    largest, eta, plateau = None, None, None
    unsettled = ""
    with isolated(model, output_fn) as network:
        module = network.origin
        norms = batch_norms(module, unused=True)
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
            equal = all(bool((leaf == leaf[:1]).all()) for leaf in tree_leaves(few) if isinstance(leaf, Tensor))
            plateau = None if equal else kernel_plateau(torch.stack([H.double() for H in kernels.values()]).sum(0))
            parts = {name: float(H.diagonal().mean()) for name, H in kernels.items()}
            total = sum(parts.values())
            shares = {name: part / total for name, part in parts.items()} if total > 0 else {}
    if float(pairs.values[0]) > 0:
        largest = float(pairs.values[0])
        numbers = probe.size * found.own.outputs.shape[1]
        eta = in_units(numbers / largest, step, numbers)
    networks = found.drawn or [found.own]
    blocks = _blocks(networks)
    growth, signal, dead = _growth(networks)
    traces = [float(one.trace.mean()) for one in found.drawn if one.trace is not None]
    log_ntk, log_ntk_error = log_variance(traces)
    epsilon_ntk = math.expm1(log_ntk) if math.isfinite(log_ntk) else None
    epsilon_features = _features(found.drawn)
    facts = _Facts(module, blocks, growth, plateau, (dead, len(networks)), epsilon_ntk, epsilon_features, shares)
    findings = _findings(facts)
    if (fast := learning_rate_finding(eta, step)) is not None:
        findings = (fast, *findings)
    return MeasuredDiagnosis(
        network=f"{type(module).__name__}, {sum(p.numel() for p in module.parameters()):,} parameters",
        reason=reason,
        verdict=_verdict(facts, findings),
        gradients=_gradients(growth, len(blocks), len(found.drawn)),
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
        stability=stability(eta, step, probe.size),
        plateau=plateau,
        remarks=(
            *_remarks(module, found, num_networks, probe.size if norms else 0, unsettled),
            *_silent_branches(shares, dead),
        ),
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


def _gradients(growth: float | None, places: int, seeds: int) -> str:
    if growth is None:
        return "measured: no chain of layers that everything passes was found; growth over depth is unknown"
    kind = "keep their size" if 1 / GROWTH <= growth <= GROWTH else "shrink" if growth < 1 else "grow"
    per = growth ** (1 / (places - 1))
    of = f"over {seeds} seeds" if seeds else "in this network alone"
    return (
        f"measured {of}: gradients {kind} over the depth: their squares at the first place are {growth:.3g} times "
        f"those at the last, {per:.3g} a block, {places} places"
    )


@dataclass(frozen=True)
class _Facts:
    model: nn.Module
    blocks: tuple[Block, ...]
    growth: float | None
    plateau: float | None
    dead: tuple[int, int]
    epsilon_ntk: float | None
    epsilon_features: float | None
    shares: dict[str, float]

    @property
    def suffers(self) -> bool:
        """Whether full-batch gradient descent takes long to start."""
        return self.plateau is not None and plateau_steps(self.plateau) > PLATEAU

    @property
    def slowly(self) -> str:
        """How long it takes, in words."""
        return "" if self.plateau is None else plateau_words(self.plateau, plateau_steps(self.plateau))

    @property
    def spread(self) -> float | None:
        known = [value for value in (self.epsilon_ntk, self.epsilon_features) if value is not None]
        return max(known, default=None)

    @property
    def normalized(self) -> bool:
        """Whether it has a normalization."""
        return any("Norm" in type(part).__name__ for part in self.model.modules())

    def is_norm(self, name: str) -> bool:
        """Whether a layer is a normalization, whose few parameters have a small part of the NTK by right."""
        return "Norm" in type(dict(self.model.named_modules()).get(name)).__name__

    @property
    def rescaled(self) -> bool:
        """Whether BatchNorm undoes the size of weights, so that sizes of gradients in front of it say nothing."""
        return any("BatchNorm" in type(part).__name__ for part in self.model.modules())

    @property
    def residual(self) -> bool:
        """Whether a block that everything passes holds layers that not everything passes: a way around them."""
        names = {block.name for block in self.blocks}
        for block in self.blocks:
            part = self.model.get_submodule(block.name.partition(":")[0])
            inner = [name for name, module in part.named_modules() if name and not list(module.children())]
            weighted = [name for name in inner if any(True for _ in part.get_submodule(name).parameters())]
            if len(weighted) > 1 and any(f"{block.name}.{name}" not in names for name in weighted):
                return True
        return False


def _verdict(facts: _Facts, findings: tuple[Finding, ...]) -> str:
    codes = {finding.code for finding in findings}
    if "dead network" in codes and facts.growth == 0:
        return "dead: no gradient reaches the first layers"
    if "gradients vanish" in codes:
        return f"gradients vanish: {facts.slowly}"
    if "gradients explode" in codes:
        return "gradients explode with depth"
    seeds = ""
    if facts.spread is not None:
        size = facts.spread
        how = "by order one" if size >= ORDER_ONE else "much" if size >= LARGE else "little"
        seeds = f", seeds differ {how} ({percent(math.sqrt(size))})"
    if "too deep" in codes:
        return f"too deep for its width{seeds}"
    unknown = " (depth unknown: no chain of layers was found)" if facts.growth is None else ""
    if facts.rescaled and facts.growth is not None and facts.growth > GROWTH:
        unknown = " (gradients over its depth are not judged: BatchNorm)"
    trains = "trains, with warnings" if codes - {"edge", "spread"} else "trains"
    return f"{trains}: gradients pass its depth{seeds}" if not unknown else f"{trains}{seeds}{unknown}"


def _findings(facts: _Facts) -> tuple[Finding, ...]:
    found = [_plateau(facts), _explosion(facts), _dead(facts), _spread(facts), _frozen(facts)]
    return tuple(finding for finding in found if finding is not None)


def _plateau(facts: _Facts) -> Finding | None:
    if not facts.suffers or facts.dead[0] == facts.dead[1]:
        return None
    message = f"gradients vanish: {facts.slowly} at a quarter of the largest stable rate (from the NTK)"
    return Finding("gradients vanish", message, _blockwise(facts, small=True))


def _explosion(facts: _Facts) -> Finding | None:
    if facts.growth is None or facts.growth <= GROWTH or facts.rescaled:
        return None
    message = f"gradients explode: their squares grow {facts.growth:.3g}-fold from the last place to the first"
    return Finding("gradients explode", message, _blockwise(facts, small=False))


def _blockwise(facts: _Facts, small: bool) -> str:
    """Which blocks to initialize anew, and what the network does not have yet."""
    known = [block for block in facts.blocks if block.chi is not None]
    words = f"{'larger' if small else 'smaller'} initial weights"
    if known:
        index = (min if small else max)(range(len(known)), key=lambda i: known[i].chi or 0.0)
        after = facts.blocks[index + 1]
        words += f", most of all in {after.name!r} (chi = {known[index].chi:.2g} from {known[index].name!r} to it)"
    missing = ["a normalization"] * (not facts.normalized) + ["residual connections"] * (not facts.residual)
    return ", or ".join([words, *missing])


def _dead(facts: _Facts) -> Finding | None:
    if not facts.dead[0]:
        return None
    message = f"in {facts.dead[0]} of {facts.dead[1]} networks no gradient reaches the first place"
    return Finding("dead network", message, "use wider layers, or a leaky activation", "nn.LeakyReLU(0.1)")


def _spread(facts: _Facts) -> Finding | None:
    if facts.spread is None:
        return None
    parts = [("NTK", facts.epsilon_ntk), ("output variance", facts.epsilon_features)]
    name = ", ".join(f"{part} by {percent(math.sqrt(value))}" for part, value in parts if value is not None)
    factor = max(1.1, math.log1p(facts.spread) / 0.18)
    remedy = f"about {factor:.2g} times the width, or fewer blocks"
    if facts.blocks:
        narrow = min(facts.blocks[:-1] or facts.blocks, key=lambda block: block.features)
        remedy += f"; the narrowest place is {narrow.name!r} ({narrow.features:g} features)"
    return spread_finding(facts.spread, name, remedy)


def _frozen(facts: _Facts) -> Finding | None:
    """A layer that hardly trains; one that gets no gradient at all at the start is a remark, not a fault."""
    alive = {name: share for name, share in facts.shares.items() if share > 0 and not facts.is_norm(name)}
    if not alive or min(alive.values()) >= FROZEN / len(facts.shares):
        return None
    if facts.growth is not None and STEEP ** max(1, len(facts.blocks) - 1) < facts.growth < 1 / GROWTH:
        return None  # all of them shrink with depth, and train as long as no plateau is found
    name = min(alive, key=lambda key: alive[key])
    return Finding(
        "frozen layer",
        f"{name!r} makes {100 * alive[name]:.2g} % of the NTK, an equal part would be "
        f"{100 / len(facts.shares):.2g} %: it practically does not train",
        f"give {name!r} a larger learning rate, or larger initial weights after it",
    )


def _silent_branches(shares: dict[str, float], dead: int) -> tuple[str, ...]:
    silent = [name for name, share in shares.items() if share == 0]
    if not silent or dead or len(silent) == len(shares):
        return ()
    names = ", ".join(map(repr, silent[:3])) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
    return (f"no gradient at the start reaches {names}: what follows is zero, as in LoRA or zero-initialized branches",)


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
    if any("BatchNorm" in type(part).__name__ for part in model.modules()):
        remarks.append(
            "BatchNorm undoes the size of the weights in front of it, while gradients there grow as these weights "
            "shrink: growth of gradients over the depth is not judged"
        )
    if not all(p.requires_grad for p in model.parameters()):
        remarks.append("frozen parameters take no part in the NTK")
    return tuple(remarks)
