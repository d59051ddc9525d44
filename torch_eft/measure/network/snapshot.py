"""Everything that is measured of a network at one moment, in one isolated visit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.representations.hidden_kernels import hidden_kernels


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        ntk: The NTK.
        ntk_trace: Its average over outputs only, (N, N).
        hidden: The kernels of hidden layers.
        layers: Their names; None picks them as ``hidden_kernels`` does.
    """

    ntk: bool = False
    ntk_trace: bool = False
    hidden: bool = False
    layers: Sequence[str] | None = None


@dataclass(frozen=True)
class Snapshot:
    """A network on its probe at one moment.

    Args:
        output: (N, C).
        ntk: (N, N, C, C) or (N, N), or None if not asked for.
        hidden: ``{layer: (N, N)}``; empty if not asked for.
    """

    output: Tensor
    ntk: Tensor | None
    hidden: dict[str, Tensor]


def take_snapshot(
    model: Model,
    x: Any,
    plan: Plan,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
) -> Snapshot:
    """Measure ``model`` on ``x`` as ``plan`` says, leaving no trace in it.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        plan: What to measure.
        lambdas: As ``ntk`` takes them.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        What the plan asks for.

    Raises:
        ValueError: If the model cannot be measured; the message says why.
    """
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        with torch.no_grad():
            output = checked_output(network, probe)
        return Snapshot(
            output,
            ntk(network, probe, lambdas=lambdas, trace=plan.ntk_trace) if plan.ntk else None,
            hidden_kernels(network, probe, plan.layers) if plan.hidden else {},
        )
