"""What the numbers of an MLP mean: its warnings with their remedies, and the verdict in one line."""

import math
from dataclasses import dataclass

from torch_eft.diagnosis.derived.report import LayerDiagnosis, Phase
from torch_eft.diagnosis.derived.variants import Variant
from torch_eft.diagnosis.findings import (
    DEAD,
    FROZEN,
    LARGE,
    ORDER_ONE,
    PLATEAU,
    SIGNAL,
    Finding,
    plateau_words,
    spread_finding,
)
from torch_eft.diagnosis.text import percent
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.aspect_ratio import AspectRatio
from torch_eft.theory.estimates.plateau import plateau_steps

SMALL = f"{100 * math.sqrt(LARGE):.0f} %"
"""Standard deviation from seed to seed that is called small."""


@dataclass(frozen=True)
class Facts:
    """What a judgement rests on.

    Args:
        ensemble: The ensemble.
        ratio: Its aspect ratio.
        own: Its numbers, as beside the doubled ones.
        phase: Its phase.
        layers: Its layers.
        dead: Probability that a hidden layer is silent.
        plateau: kappa; None where nothing trains.
        plateau_critical: That at critical initialization; None where there is none.
    """

    ensemble: MLPEnsemble
    ratio: AspectRatio
    own: Variant
    phase: Phase
    layers: tuple[LayerDiagnosis, ...]
    dead: float
    plateau: float | None
    plateau_critical: float | None

    @property
    def suffers(self) -> bool:
        """Whether full-batch gradient descent takes long to start."""
        return self.plateau is not None and plateau_steps(self.plateau, self.ensemble) > PLATEAU

    def slowly(self, kappa: float) -> str:
        """How long it takes, in words."""
        return plateau_words(kappa, plateau_steps(kappa, self.ensemble))

    @property
    def spread(self) -> float:
        """The larger relative variance from seed to seed, of the output's variance and of the NTK."""
        return max(self.own.output_spread, self.own.ntk_spread) ** 2


def derived_findings(facts: Facts) -> tuple[Finding, ...]:
    """Return the warnings, the gravest first.

    Args:
        facts: The numbers.
    """
    shares = [row.share for row in facts.layers if row.share is not None]
    if not shares:
        return (Finding("nothing trains", "no parameter has a learning rate", "give learning rates"),)
    found = [_plateau(facts), _explosion(facts), _signal(facts), _dead(facts), _spread(facts), _frozen(facts, shares)]
    return tuple(finding for finding in found if finding is not None)


def derived_verdict(facts: Facts, findings: tuple[Finding, ...]) -> str:
    """Return one line: whether it trains, and how much networks of different seeds differ.

    Args:
        facts: The numbers.
        findings: Its warnings.
    """
    codes = {finding.code for finding in findings}
    size = facts.spread
    kind = "of order one" if size >= ORDER_ONE else "much" if size >= LARGE else "little"
    seeds = f"seeds differ {'by ' * (size >= ORDER_ONE)}{kind.removeprefix('of ')} ({percent(math.sqrt(size))})"
    if "nothing trains" in codes:
        return "nothing trains: no parameter has a learning rate"
    if "gradients vanish" in codes and facts.plateau is not None:
        return f"gradients vanish: {facts.slowly(facts.plateau)}"
    if "inputs" in codes and facts.plateau is not None:
        return f"inputs hardly differ: {facts.slowly(facts.plateau)}"
    if "gradients explode" in codes:
        return f"gradients explode with depth; {seeds}"
    if "too deep" in codes:
        return f"too deep for its width; {seeds}"
    trains = "trains, with warnings" if codes - {"edge", "spread"} else "trains"
    if not facts.ensemble.hidden_widths:
        return "trains: linear in its parameters"
    place = {"critical": "near criticality", "ordered": "below criticality", "chaotic": "above criticality"}[
        facts.phase
    ]
    return f"{trains}: {place if facts.ratio.critical else 'no critical point'}, {seeds}"


def _initialize(facts: Facts) -> tuple[str, str]:
    """The remedy for weights off criticality, in words and as code."""
    point = facts.ratio.critical
    if point is None or point.C_W is None or point.C_b is None:
        return "use an activation with a critical point, such as tanh, relu or gelu", ""
    words = f"initialize weights with variance {point.C_W:.4g} / n_in and biases with {point.C_b:.4g}"
    bias = f"nn.init.normal_(layer.bias, std={math.sqrt(point.C_b):.4g})" if point.C_b else "nn.init.zeros_(layer.bias)"
    return words, "\n".join(
        [
            "for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):",
            f"    nn.init.normal_(layer.weight, std=({point.C_W:.4g} / layer.in_features) ** 0.5)",
            f"    {bias}",
        ]
    )


def _plateau(facts: Facts) -> Finding | None:
    if not facts.suffers or facts.plateau is None:
        return None
    if facts.plateau_critical is not None and plateau_steps(facts.plateau_critical, facts.ensemble) > PLATEAU:
        message = (
            f"these inputs hardly differ: at critical initialization, too, {facts.slowly(facts.plateau_critical)}, at "
            "a quarter of the largest stable rate"
        )
        return Finding("inputs", message, "subtract the mean of the inputs", "x = x - x.mean(0)")
    words, line = _initialize(facts)
    if facts.plateau_critical is not None and line:
        steps = plateau_steps(facts.plateau_critical, facts.ensemble)
        words += f": {max(10.0, float(f'{steps:.1g}')):g} steps or what the task itself takes"
    message = (
        f"gradients vanish with depth: {facts.slowly(facts.plateau)}, at a quarter of the largest stable rate; what "
        f"tells inputs apart is {1 / facts.plateau:.1g} of the NTK's largest eigenvalue (Adam suffers less)"
    )
    return Finding("gradients vanish", message, words, line)


def _explosion(facts: Facts) -> Finding | None:
    if facts.phase != "chaotic":
        return None
    gain = facts.own.gradient_growth if facts.ratio.gradient_gain is None else facts.ratio.gradient_gain
    against = "those at layer L" if facts.ratio.gradient_gain is None else "those at criticality"
    message = f"gradients explode with depth: at layer 1 their squares are {gain:.3g} times {against}"
    return Finding("gradients explode", message, *_initialize(facts))


def _signal(facts: Facts) -> Finding | None:
    growth = facts.own.kernel_growth
    if 1 / SIGNAL <= growth <= SIGNAL:
        return None
    message = f"the signal changes its size: K^(L) / K^(1) = {growth:.3g}, outside 1/{SIGNAL:g} .. {SIGNAL:g}"
    return Finding("signal", message, *_initialize(facts))


def _dead(facts: Facts) -> Finding | None:
    if facts.dead < DEAD:
        return None
    n, count = min(facts.ensemble.hidden_widths), len(facts.ensemble.hidden_widths)
    wider = next(m for m in range(n, n + 64) if count * 2.0**-m < DEAD)
    return Finding(
        "dead network",
        f"a hidden layer is silent, its gradient zero, with probability {facts.dead:.2g} for a given input",
        f"hidden layers of {wider} neurons or more, or a leaky activation",
        "nn.LeakyReLU(0.1)",
    )


def _frozen(facts: Facts, shares: list[float]) -> Finding | None:
    """A layer that its learning rate keeps from training; where gradients vanish or explode, that is the cause."""
    if facts.phase != "critical" or min(shares) >= FROZEN / len(shares):
        return None
    layer = 1 + shares.index(min(shares))
    row = facts.layers[layer - 1]
    line = "" if row.lr_W is None else f"# of this layer's weights: lr = {row.lr_W:.3g} * eta"
    return Finding(
        "frozen layer",
        f"layer {layer} makes {100 * min(shares):.2g} % of the NTK, an equal part would be "
        f"{100 / len(shares):.2g} %: it practically does not train",
        "use the learning rates of the table in .details, which make the shares equal",
        line,
    )


def _spread(facts: Facts) -> Finding | None:
    own = facts.own
    name = f"output variance by {percent(own.output_spread)}, NTK by {percent(own.ntk_spread)}"
    return spread_finding(facts.spread, name, *_wider(facts), r=facts.ratio.r)


def _wider(facts: Facts) -> tuple[str, str]:
    """Widths, or a depth, at which seeds differ little.

    Relative variances fall as 1/n when all hidden widths grow together, and about linearly with depth; 0.18 at order
    1/n is at most e^0.18 - 1 = 0.197 at all orders.

    Returns:
        In words, and as code.
    """
    ensemble, hidden = facts.ensemble, facts.ensemble.hidden_widths
    if not hidden:
        return "", ""
    # Beyond order 1/n variances grow faster: their logarithm is what falls with the width.
    size = max(facts.ratio.epsilon, math.log1p(facts.own.ntk_spread**2))
    factor = math.ceil(size / 0.18 * 10 - 1e-9) / 10
    place = _narrowest(hidden)
    if place is not None:
        layer, others = place
        allowed = sum(1 / n for n in hidden) / factor - others
        if allowed > 0:
            needed = math.ceil(1 / allowed)
            widths = [n if index != layer else needed for index, n in enumerate(ensemble.widths)]
            words = (
                f"layer {layer} ({hidden[layer - 1]} neurons) makes most of it: {needed} there bring it below {SMALL}"
            )
            return words, f"widths = {_written(widths)}"
    wide = [math.ceil(factor * n) for n in hidden]
    shorter = int(ensemble.depth / factor)
    depth = f"; so does a depth of about {shorter}" if shorter >= 2 else ""
    words = f"hidden widths times {factor:.3g} bring it below {SMALL}{depth}"
    return words, f"widths = {_written([ensemble.widths[0], *wide, ensemble.widths[-1]])}"


def _narrowest(hidden: tuple[int, ...]) -> tuple[int, float] | None:
    """The one layer, l = 1 .. L-1, that makes more than half of sum 1/n, with the rest of the sum."""
    total, narrow = sum(1 / n for n in hidden), min(hidden)
    if len(hidden) < 2 or 1 / narrow <= total / 2:
        return None
    return 1 + hidden.index(narrow), total - 1 / narrow


def _written(widths: list[int]) -> str:
    """A list of widths as code, runs of equal ones short."""
    inner = widths[1:-1]
    if len(inner) > 3 and len(set(inner)) == 1:
        return f"[{widths[0]}, *[{inner[0]}] * {len(inner)}, {widths[-1]}]"
    return str(widths)
