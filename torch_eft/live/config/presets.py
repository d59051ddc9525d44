"""Which parts an observer is made of.

``light`` looks at what one visit shows: NTK and hidden kernels. ``standard`` adds the theory beside it. ``full`` adds
what costs more. A part whose question does not apply to a network says so on its page and measures nothing; what does
not fit into the budget is thinned (``budget.py``). At most 12 scalars of ``standard`` are in the group ``eft``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch_eft.live.part import Instrument
from torch_eft.live.parts.dntk import DNTKPart
from torch_eft.live.parts.forecasts.ensemble import EnsemblePart
from torch_eft.live.parts.forecasts.instance import InstancePart
from torch_eft.live.parts.interval import IntervalPart
from torch_eft.live.parts.ntk import NTKPart
from torch_eft.live.parts.representation import RepresentationPart
from torch_eft.live.parts.shadow import ShadowPart
from torch_eft.live.parts.taylor import TaylorPart
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import ActivationLike

Preset: TypeAlias = Literal["light", "standard", "full"]
PRESETS: tuple[Preset, ...] = ("light", "standard", "full")


@dataclass(frozen=True)
class Options:
    """What a user may have told about the network.

    Args:
        ensemble: C_b and C_W, if known.
        activation: The activation, where it is none of the registered ones.
        output_fn: Turns what the network returns into (N, C).
        forecast_seconds: Time that each forecast may take before the first step.
    """

    ensemble: MLPEnsemble | None = None
    activation: ActivationLike | None = None
    output_fn: OutputFn | None = None
    forecast_seconds: float = 3.0


MAKERS: dict[str, Callable[[Options], Instrument]] = {
    # In the order in which they are asked; of several that hold, the first gives level and validity.
    "ntk": lambda options: NTKPart(),
    "representation": lambda options: RepresentationPart(output_fn=options.output_fn),
    "theory": lambda options: EnsemblePart(
        options.ensemble, options.activation, options.output_fn, seconds=options.forecast_seconds
    ),
    "instance": lambda options: InstancePart(options.output_fn, seconds=options.forecast_seconds),
    "interval": lambda options: IntervalPart(options.output_fn),
    "taylor": lambda options: TaylorPart(options.output_fn),
    "dntk": lambda options: DNTKPart(options.output_fn),
    "shadow": lambda options: ShadowPart(options.output_fn),
}
"""Every part by name; ``Part.cost`` is the smallest preset that has it."""

OPT_IN: frozenset[str] = frozenset({"shadow"})
"""Parts that no preset has; ``also=`` asks for them."""


def parts_of(preset: Preset, also: Sequence[str], options: Options) -> list[Instrument]:
    """The parts of a preset and those asked for besides.

    Raises:
        ValueError: If the preset or a part is unknown, or ``forecast_seconds`` is not positive.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} given; give one of {', '.join(map(repr, PRESETS))}")
    if not options.forecast_seconds > 0:
        raise ValueError(f"forecast_seconds: {options.forecast_seconds} given; give a positive number of seconds")
    unknown = [name for name in also if name not in MAKERS]
    if unknown:
        raise ValueError(f"also: {unknown[0]!r} is no part; there are {', '.join(MAKERS)}")
    parts = {name: make(options) for name, make in MAKERS.items()}
    rank = PRESETS.index(preset)
    return [
        part
        for name, part in parts.items()
        if name in also or (name not in OPT_IN and PRESETS.index(part.cost) <= rank)
    ]
