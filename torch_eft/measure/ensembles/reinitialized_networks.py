"""Measures one network and others of its architecture drawn anew: their spread over seeds, for any architecture.

Unlike ``seeds``, which needs exchangeable outputs, this takes logarithms: Var log tr H is well estimated by a few
networks even where H has a heavy tail, and e^Var - 1 is Var tr H / E[tr H]^2 if tr H is lognormal, as it is to leading
order in depth and width (Hanin & Nica 2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.ensembles.draws import Draw
from torch_eft.measure.forward.checks import MemoryLimitError
from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.kernels.ntk import ntk as ntk_of
from torch_eft.measure.network.batch_norm import batch_norms, with_batch_statistics
from torch_eft.measure.representations.bottlenecks import Bottleneck, bottlenecks
from torch_eft.results.progress.bar import counted


@dataclass(frozen=True)
class OneNetwork:
    """The measurements of one network.

    Args:
        bottlenecks: Its bottlenecks.
        outputs: (N, C).
        trace: (N,), tr H / C for each input; None where H does not fit into memory.
    """

    bottlenecks: list[Bottleneck]
    outputs: Tensor
    trace: Tensor | None


@dataclass(frozen=True)
class ReinitializedNetworks:
    """A network and others of its architecture.

    Args:
        own: The network as it is.
        drawn: The others; empty where they cannot be drawn.
        refusal: Reason why they cannot; None if they can.
        ntk_refusal: Reason why H was not measured; None if it was.
    """

    own: OneNetwork
    drawn: list[OneNetwork]
    refusal: str | None
    ntk_refusal: str | None


def reinitialized_networks(
    model: Model,
    x: Any,
    *,
    num_networks: int,
    initialize: Callable[[nn.Module], Any] | None = None,
    output_fn: OutputFn | None = None,
    seed: int = 0,
    statistics_of: Probe | None = None,
) -> ReinitializedNetworks:
    """Measure ``model`` and networks of its architecture drawn anew, in evaluation mode; the model is left alone.

    Args:
        model: Any module, or one that is isolated.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        num_networks: Number of networks to draw, >= 0.
        initialize: Draws the parameters of the module it is given, in place; None uses ``reset_parameters`` or an
            ``_init_weights`` of the module, if the network given could be one of its draws.
        output_fn: Turns what the model returns into (N, C).
        seed: Of the first network.
        statistics_of: Inputs of which BatchNorm layers that have seen none take their statistics; None leaves them.

    Returns:
        The network and those drawn.

    Raises:
        ValueError: If ``num_networks`` is negative or the forward rejects ``x``.
    """
    if num_networks < 0:
        raise ValueError(f"num_networks: {num_networks} given; give a number of networks >= 0")
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        norms = batch_norms(network.origin, unused=True) if statistics_of is not None else ()

        def normed(one: IsolatedModel) -> IsolatedModel:
            return one if statistics_of is None else with_batch_statistics(one, statistics_of, norms)

        ntk_refusal = None
        try:
            ntk_of(network, probe, trace=True)
        except MemoryLimitError as error:
            ntk_refusal = str(error)
        own = _one(normed(network), probe, ntk_refusal is None)
        if num_networks == 0:
            return ReinitializedNetworks(own, [], None, ntk_refusal)
        try:
            draw = Draw(network, initialize, seed)
        except ValueError as error:
            return ReinitializedNetworks(own, [], str(error), ntk_refusal)
        drawn = []
        for _ in counted("measuring networks of other seeds", range(num_networks), num_networks):
            values = {name: value[0] for name, value in draw(1).items()}
            params = {name: values[name] for name in network.params}
            constants = {name: values[name] for name in network.constants}
            one = normed(replace(network, params=params, constants=constants))
            drawn.append(_one(one, probe, ntk_refusal is None))
    return ReinitializedNetworks(own, drawn, None, ntk_refusal)


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
    return OneNetwork(bottlenecks(network, probe), outputs, trace)
