"""What is to be measured in one visit, for all parts together."""

import warnings
from collections.abc import Sequence

from torch import nn

from torch_eft.live.part import Instrument, MeasurementWarning
from torch_eft.measure.forward.output import output
from torch_eft.measure.forward.probe import OutputFn, Probe
from torch_eft.measure.kernels.ntk import too_large
from torch_eft.measure.network.snapshot import Plan


def plan_of(
    parts: Sequence[Instrument], model: nn.Module, probe: Probe, output_fn: OutputFn | None, name: str
) -> tuple[Plan, list[int]]:
    """The parts' plans in one, and [N, C]; an NTK that does not fit into memory is left out, with a warning.

    Raises:
        ValueError: If the model cannot be measured on the probe, or a part's arguments do not fit it.
    """
    samples, outputs = output(model, probe, output_fn).shape
    for part in parts:
        part.check(model, probe, outputs)
    plans = [part.plan(outputs, samples) for part in parts]
    ntk, trace = any(plan.ntk for plan in plans), any(plan.ntk_trace for plan in plans)
    refusal = too_large(model, probe, trace=trace, output_fn=output_fn) if ntk else None
    if refusal is not None:
        warnings.warn(f"{name} will not measure the NTK: {refusal}", MeasurementWarning, stacklevel=3)
    plan = Plan(
        ntk=ntk and refusal is None,
        ntk_trace=trace,
        hidden=any(plan.hidden for plan in plans),
        layers=next((plan.layers for plan in plans if plan.layers is not None), None),
    )
    return plan, [samples, outputs]
