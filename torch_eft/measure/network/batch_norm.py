"""BatchNorm in evaluation mode, with the statistics of given inputs at the network's own parameters.

Running statistics start at 0 and 1 and lag behind the weights: a kernel that is measured with them changes while no
parameter moves. Kernels at theta_0 and at theta_t are compared with the statistics of the same inputs, taken at theta_0
and at theta_t: those of a few training batches, or of the probe where none are known. They are constants for the
derivatives, so that an output stays a function of its own input.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import Probe

STATISTICS = ("running_mean", "running_var")


def batch_norms(module: nn.Module, *, unused: bool = False) -> tuple[str, ...]:
    """Names of the BatchNorm layers whose running statistics training updates: those in training mode.

    Not those that synchronize over processes, as a forward of one process alone would wait for the others.

    Args:
        module: The network.
        unused: Take those that have not seen a batch yet instead, in any mode.

    Returns:
        The names.
    """
    return tuple(
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        and not isinstance(part, nn.SyncBatchNorm)
        and part.running_mean is not None
        and (not bool(part.num_batches_tracked) if unused and part.num_batches_tracked is not None else part.training)
    )


def with_batch_statistics(
    network: IsolatedModel, inputs: Probe | Sequence[Probe], norms: Collection[str]
) -> IsolatedModel:
    """Return the same network with the statistics of given inputs in the place of running ones.

    Args:
        network: Isolated; any parameters.
        inputs: One batch, whose mean and variance are taken as a forward in training mode takes them; or several
            batches: the averages of their means and unbiased variances, at which running statistics would arrive if
            these batches were shown for ever and no parameter moved.
        norms: Names of the BatchNorm layers.

    Returns:
        The network; as it is where there is no such layer, or a layer gets one value of each feature only, which has no
        variance.

    Raises:
        ValueError: If the forward rejects a batch.
    """
    if not norms:
        return network
    shadow, names, alone = network.shadow, _names(network, norms), list[str]()
    seen: dict[str, list[Tensor]] = {}
    several = not isinstance(inputs, Probe)

    def take(name: str, layer: Any, args: tuple[Tensor, ...]) -> None:
        axes = [axis for axis in range(args[0].ndim) if axis != 1]
        count = args[0].numel() // args[0].shape[1]
        if count == 1:
            alone.append(name)
        variance, mean = torch.var_mean(args[0], axes, correction=0)  # as in a forward in training mode
        for buffer, value, kept in (
            ("running_mean", mean, mean),
            ("running_var", variance, variance * (count / max(1, count - 1)) if several else variance),
        ):
            getattr(layer, buffer).copy_(value)  # for this forward alone: the next one begins with what it is given
            seen.setdefault(names[name, buffer], []).append(kept)

    handles = [shadow.get_submodule(name).register_forward_pre_hook(partial(take, name)) for name in norms]
    try:
        with torch.no_grad():
            for batch in [inputs] if isinstance(inputs, Probe) else inputs:
                checked_output(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    buffers = {name: values[0] if len(values) == 1 else torch.stack(values).mean(0) for name, values in seen.items()}
    return network if alone else replace(network, constants=network.constants | buffers)


def statistics_of(network: IsolatedModel, norms: Collection[str]) -> dict[str, Tensor]:
    """``{buffer: value}`` of the statistics with which BatchNorm layers normalize.

    Args:
        network: Isolated.
        norms: Names of the layers.

    Returns:
        The means and variances.
    """
    return {name: network.constants[name] for name in _names(network, norms).values()}


def _names(network: IsolatedModel, norms: Collection[str]) -> dict[tuple[str, str], str]:
    """``{(layer, "running_mean" or "running_var"): buffer}``; two layers that share a buffer have one name for it."""
    places = {(id(place.tensors), place.key): place.name for place in network.isolation.places}
    layers = {name: network.module.get_submodule(name) for name in norms}
    return {(name, key): places[id(layer._buffers), key] for name, layer in layers.items() for key in STATISTICS}
