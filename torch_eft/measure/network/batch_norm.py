"""BatchNorm in evaluation mode, with the statistics of a batch at the network's own parameters.

Running statistics start at 0 and 1 and lag behind the weights: a kernel that is measured with them changes while no
parameter moves. Kernels at theta_0 and at theta_t are compared with the statistics of the same inputs, taken at theta_0
and at theta_t. They are constants for the derivatives, so that an output stays a function of its own input.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import Probe


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


def with_batch_statistics(network: IsolatedModel, batch: Probe, norms: Collection[str]) -> IsolatedModel:
    """Return the same network with the statistics of a batch in the place of running ones.

    Args:
        network: Isolated; any parameters.
        batch: The inputs.
        norms: Names of the BatchNorm layers.

    Returns:
        The network; as it is where there is no such layer, or a layer gets one value of each feature only, which has no
        variance.

    Raises:
        ValueError: If the forward rejects the batch.
    """
    if not norms:
        return network
    shadow, alone = network.shadow, list[str]()
    layers = [shadow.get_submodule(name) for name in norms]
    buffers = {
        key: network.constants[key].clone()
        for name in norms
        for key in (f"{name}.running_mean".removeprefix("."), f"{name}.running_var".removeprefix("."))
    }

    def take(layer: Any, args: tuple[Tensor, ...]) -> None:
        axes = [axis for axis in range(args[0].ndim) if axis != 1]
        if args[0].numel() == args[0].shape[1]:
            alone.append(type(layer).__name__)
        variance, mean = torch.var_mean(args[0], axes, correction=0)  # as in a forward in training mode
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)

    other = replace(network, constants=network.constants | buffers)
    handles = [layer.register_forward_pre_hook(take) for layer in layers]
    try:
        with torch.no_grad():
            checked_output(other, batch)
    finally:
        for handle in handles:
            handle.remove()
    return network if alone else other
