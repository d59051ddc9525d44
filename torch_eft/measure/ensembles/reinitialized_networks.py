"""One network, and the same architecture drawn again and again: what differs from seed to seed, whatever it is.

Unlike ``seeds``, which needs outputs that are exchangeable, this takes logarithms: Var log tr H is well estimated by a
few networks even where H has a heavy tail, and e^Var - 1 is Var tr H / E[tr H]^2 if tr H is lognormal, as it is to
leading order in depth and width (Hanin & Nica 2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.ensembles.draws import Draw
from torch_eft.measure.forward.checks import MemoryLimitError
from torch_eft.measure.forward.isolation import IsolatedModel, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.kernels.ntk import ntk as ntk_of
from torch_eft.measure.representations.bottlenecks import Bottleneck, trunk


@dataclass(frozen=True)
class OneNetwork:
    """What is measured of one network.

    Args:
        places: Its trunk.
        outputs: (N, C).
        trace: (N,), tr H / C for each input; None where H does not fit into memory.
    """

    places: list[Bottleneck]
    outputs: Tensor
    trace: Tensor | None


@dataclass(frozen=True)
class Redraws:
    """A network and ``seeds`` others.

    Args:
        own: The network as it is.
        drawn: The others; empty where they cannot be drawn.
        reason: Why they cannot; empty if they can.
        memory: Why H was not measured; empty if it was.
    """

    own: OneNetwork
    drawn: list[OneNetwork]
    reason: str
    memory: str


def reinitialized_networks(
    model: nn.Module,
    x: Any,
    seeds: int,
    initialize: Callable[[nn.Module], Any] | None = None,
    output_fn: OutputFn | None = None,
    seed: int = 0,
) -> Redraws:
    """Measure ``model`` and ``seeds`` networks of its kind, in evaluation mode; both are left alone.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        seeds: Number of networks to draw, >= 0.
        initialize: Draws the parameters of the module it is given, in place; None calls ``reset_parameters``.
        output_fn: Turns what the model returns into (N, C).
        seed: Of the first network.

    Raises:
        ValueError: If ``seeds`` is negative or the forward rejects ``x``.
    """
    if seeds < 0:
        raise ValueError(f"seeds: {seeds} given; give a number of networks >= 0")
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        memory = ""
        try:
            ntk_of(network, probe, trace=True)
        except MemoryLimitError as error:
            memory = str(error)
        own = _one(network, probe, not memory)
        if seeds == 0:
            return Redraws(own, [], "", memory)
        try:
            draw = Draw(network, initialize, seed)
        except ValueError as error:
            return Redraws(own, [], str(error), memory)
        drawn = []
        for _ in range(seeds):
            values = {name: value[0] for name, value in draw(1).items()}
            params = {name: values[name] for name in network.params}
            constants = {name: values[name] for name in network.constants}
            drawn.append(_one(replace(network, params=params, constants=constants), probe, not memory))
    return Redraws(own, drawn, "", memory)


def log_variance(values: list[float]) -> tuple[float, float]:
    """Var log and its standard error for lognormal values; NaN where a value is not positive or there are too few."""
    if len(values) < 3 or not all(0 < value < math.inf for value in values):
        return math.nan, math.nan
    logs = torch.tensor(values, dtype=torch.float64, device="cpu").log()
    variance = float(logs.var())
    return variance, variance * math.sqrt(2 / (len(values) - 1))


def _one(network: IsolatedModel, probe: Probe, ntk: bool) -> OneNetwork:
    with torch.no_grad():
        outputs = checked_output(network, probe).double()
    trace = ntk_of(network, probe, trace=True).diagonal().double() if ntk else None
    return OneNetwork(trunk(network, probe), outputs, trace)
