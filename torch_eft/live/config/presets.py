"""The instruments of an observer, by preset or by name.

``light`` measures what one visit shows: NTK and hidden kernels. ``standard`` adds the theory beside it. ``full`` adds
what costs more. An instrument whose question does not apply to a network says so on its page and measures nothing; what
does not fit into the budget is thinned (``budget.py``). At most 12 scalars of ``standard`` are in the group ``eft``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch_eft.live.instrument import Instrument
from torch_eft.live.instruments.expansion import ExpansionInstrument
from torch_eft.live.instruments.forecasts.instance import InstanceInstrument
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.live.instruments.interval import IntervalInstrument
from torch_eft.live.instruments.ntk import BatchNormInstrument, NTKInstrument, checked_outputs
from torch_eft.live.instruments.representation import RepresentationInstrument
from torch_eft.live.instruments.steps.dntk import DNTKInstrument
from torch_eft.live.instruments.steps.one_step import OneStepInstrument
from torch_eft.live.instruments.steps.preconditioned import PreconditionedInstrument
from torch_eft.live.instruments.taylor import TaylorInstrument
from torch_eft.live.instruments.trained_beside.replay import ReplayInstrument
from torch_eft.live.instruments.trained_beside.seeds import SeedsInstrument
from torch_eft.live.instruments.trained_beside.shadow import ShadowInstrument
from torch_eft.results.choices import check_choice
from torch_eft.theory.ensemble import MLPEnsemble, check_ensemble
from torch_eft.theory.gaussian.activations import ActivationLike, get_activation

Preset: TypeAlias = Literal["light", "standard", "full"]
PRESETS: tuple[Preset, ...] = ("light", "standard", "full")


@dataclass(frozen=True)
class Options:
    """A user's knowledge of the network, and the work that forecasts may take.

    Args:
        ensemble: C_b and C_W, if known.
        activation: The activation, where it is not a registered one.
        forecast_seconds: Work that each forecast may take before the first step, counted in seconds of one core.
        seeds: Networks of other seeds to train beside it; 0: none.
        outputs: Which outputs of the network the NTK is measured on, see ``NTKInstrument``.
        asked: Names of instruments that were asked for, whatever the preset.
    """

    ensemble: MLPEnsemble | None = None
    activation: ActivationLike | None = None
    forecast_seconds: float = 10.0
    seeds: int = 0
    outputs: str = "auto"
    asked: frozenset[str] = frozenset()


MAKERS: dict[str, Callable[[Options], Instrument]] = {
    # In the order in which they are asked: forecasts after what they are compared with. Of several predictions that
    # hold, the first one's level and validity count.
    "ntk": lambda options: NTKInstrument(options.outputs),
    "representation": lambda options: RepresentationInstrument(),
    "batch_norm": lambda options: BatchNormInstrument(),
    "interval": lambda options: IntervalInstrument(),
    "expansion": lambda options: ExpansionInstrument(),
    "taylor": lambda options: TaylorInstrument(),
    "dntk": lambda options: DNTKInstrument(),
    "one_step": lambda options: OneStepInstrument(),
    "preconditioned": lambda options: PreconditionedInstrument(),
    "theory": lambda options: TheoryInstrument(options.ensemble, options.activation, seconds=options.forecast_seconds),
    "instance": lambda options: InstanceInstrument(seconds=options.forecast_seconds),
    "shadow": lambda options: ShadowInstrument(),
    "replay": lambda options: ReplayInstrument(always="replay" in options.asked),
    "seeds": lambda options: SeedsInstrument(options.seeds or 4),
}
"""Every instrument by name; ``Instrument.cost`` is the smallest preset that includes it."""

OPT_IN: frozenset[str] = frozenset({"shadow", "seeds", "one_step", "preconditioned"})
"""Instruments that no preset includes; ``extra=`` asks for them."""


def chosen_instruments(
    preset: Preset | None,
    instruments: Sequence[str | Instrument] | None,
    extra: Sequence[str | Instrument],
    options: Options,
) -> list[Instrument]:
    """The instruments of a preset, or those given in its place, and those asked for besides.

    Args:
        preset: ``"light"``, ``"standard"`` or ``"full"``; None for ``"standard"``.
        instruments: Names or instruments in place of the preset's.
        extra: Names or instruments besides; a name that is there already is not added again.
        options: For the instruments that are made here.

    Returns:
        The instruments, in the order in which they are asked.

    Raises:
        ValueError: If the preset or a name is unknown, a preset stands beside ``instruments``, two instruments share a
            name, or ``forecast_seconds`` is not positive.
    """
    if preset is not None:
        check_choice("preset", preset, PRESETS)
        if instruments is not None:
            raise ValueError(
                f"preset: {preset!r} given beside instruments, which take the preset's place; give one of the two, or "
                "instruments beyond the preset's as extra=[..]"
            )
    preset = preset or "standard"
    seconds = options.forecast_seconds
    if not isinstance(seconds, int | float) or not seconds > 0:
        raise ValueError(f"forecast_seconds: {seconds!r} given; give a positive number of seconds")
    checked_outputs(options.outputs)
    if options.ensemble is not None:
        check_ensemble(options.ensemble)
    if options.activation is not None:
        get_activation(options.activation)  # a misspelled name is answered here
    for argument, asked in (("instruments", instruments or ()), ("extra", extra)):
        if isinstance(asked, str | Instrument):
            raise ValueError(f"{argument}: {asked!r} given; give a list, such as [{asked!r}]")
        for each in asked:
            if not isinstance(each, Instrument):
                check_choice(argument, each, MAKERS, "a torch_eft.live.Instrument")
    names = {each for each in extra if isinstance(each, str)} | ({"seeds"} if options.seeds else set())
    options = replace(options, asked=frozenset(names | {each for each in instruments or () if isinstance(each, str)}))
    own = [each for each in extra if isinstance(each, Instrument)]
    if instruments is not None and not instruments:
        raise ValueError("instruments: none given; name some, such as ['ntk'], or give None for the preset's")
    if instruments is None:
        rank = PRESETS.index(preset)
        made = {name: make(options) for name, make in MAKERS.items()}
        chosen = [
            instrument
            for name, instrument in made.items()
            if (name in names or (name not in OPT_IN and PRESETS.index(instrument.cost) <= rank))
            and name not in {each.name for each in own}  # one that is given takes the preset's place
        ]
    else:
        given = [MAKERS[each](options) if isinstance(each, str) else each for each in instruments]
        there = {instrument.name for instrument in given}
        chosen = given + [make(options) for name, make in MAKERS.items() if name in names - there]
    chosen += own
    every_name = [instrument.name for instrument in chosen]
    twice = next((name for name in every_name if every_name.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"instruments: two are named {twice!r}; give each instrument of an observer its own name")
    return chosen
