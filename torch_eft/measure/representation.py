"""Hidden representations of one network on the probe, and how far they have moved.

The kernel of a hidden layer is ``(1 / n) sum_j s_{j;a} s_{j;b}`` over its n features s (PDLT 4.1, there
with the activations as features).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.isolation import IsolatedModel, isolated
from torch_eft.measure.output import checked_output
from torch_eft.measure.probe import OutputFn, Probe, as_probe

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.rnn.RNNBase, nn.MultiheadAttention)


def hidden_kernels(
    model: nn.Module, x: Any, layers: Sequence[str] | None = None, output_fn: OutputFn | None = None
) -> dict[str, Tensor]:
    """The kernels of hidden layers on ``x``, in evaluation mode.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        layers: Names of submodules whose outputs are the features. None picks the activation modules
            (``nn.Tanh``, ``nn.ReLU`` ...), or, where there is none, every layer with weights but the last.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        ``{name: (N, N)}`` in the order of execution; a module called several times appears as
        ``name``, ``name:2``, ... Layers whose output is not a tensor with N rows are left out.

    Raises:
        ValueError: If a name is no submodule, or the forward rejects ``x``.
    """
    with isolated(model, output_fn) as network:
        return isolated_hidden_kernels(network, as_probe(x), layers)


def isolated_hidden_kernels(
    network: IsolatedModel, probe: Probe, layers: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """As ``hidden_kernels``, for a network that is already isolated."""
    modules = dict(network.shadow.named_modules())
    if layers is not None:
        unknown = [name for name in layers if name not in modules]
        if unknown:
            raise ValueError(f"layers: {unknown[0]!r} is no submodule; there are {', '.join(n for n in modules if n)}")
        watched = list(layers)
    else:
        watched = [name for name, module in modules.items() if _is_activation(module)]
    weighted = layers is None and not watched
    if weighted:
        watched = [name for name, module in modules.items() if isinstance(module, _WEIGHTED)]
    kernels: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def record(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, Tensor) and value.ndim >= 2 and len(value) == probe.size and value.is_floating_point():
            calls[name] = calls.get(name, 0) + 1
            features = value.detach().flatten(1)
            key = name if calls[name] == 1 else f"{name}:{calls[name]}"
            kernels[key] = features @ features.T / features.shape[1]

    handles = [
        modules[name].register_forward_hook(lambda module, args, value, name=name: record(name, value))
        for name in watched
    ]
    try:
        with torch.no_grad():
            checked_output(network, probe)
    finally:
        for handle in handles:
            handle.remove()
    if weighted and len(kernels) > 1:
        kernels.popitem()  # the last one is the output
    return kernels


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention)


def linear_cka(K: Tensor, reference: Tensor) -> Tensor:
    """Linear centred kernel alignment of two kernels (Kornblith et al. 2019), in [0, 1]; a 0-d tensor.

    <K_c, L_c> / (||K_c|| ||L_c||) with K_c = C K C, C = 1 - (1/N) 1 1^T. NaN for one sample, or for a
    representation that is the same for all samples.
    """
    first, second = _centred(K), _centred(reference)
    return (first * second).sum() / (first.norm() * second.norm())


def _centred(K: Tensor) -> Tensor:
    return K - K.mean(0, keepdim=True) - K.mean(1, keepdim=True) + K.mean()
