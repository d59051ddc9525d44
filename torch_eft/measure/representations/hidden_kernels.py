"""Measures the hidden representations of one network on the probe.

The kernel of a hidden layer is ``(1 / n) sum_j s_{j;a} s_{j;b}`` over its n features s (PDLT 4.1, there
with the activations as features; preactivations if their layers are named).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.forward.structure import all_finite, has_values
from torch_eft.measure.representations.alignment import target_kernel
from torch_eft.results.choices import check_choice
from torch_eft.results.presentation.repr import short_repr

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.rnn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True, repr=False)
class Representation:
    """The hidden layers of one network on N samples.

    Args:
        K: ``{layer: (N, N)}``, the kernels, in the order of execution.
        widths: ``{layer: n}``, the numbers of features (channels times places).
        target_kernel: y y^T of the targets, (N, N), or None if none were given.
        activations: ``{layer: (N, n)}`` if they were kept, else None.

    Example:
        >>> import torch
        >>> from torch_eft.measure import Representation
        >>> Representation({"1": torch.eye(3)}, {"1": 8})
        Representation(
          K: {1: (3, 3) float32}
          widths: {1: 8}
        )
    """

    K: dict[str, Tensor]
    widths: dict[str, int]
    target_kernel: Tensor | None = None
    activations: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        return short_repr(self)


def representation(
    model: Model,
    x: Any,
    *,
    targets: Tensor | None = None,
    layers: Sequence[str] | None = None,
    output_fn: OutputFn | None = None,
    keep: bool = False,
) -> Representation:
    """Measure the hidden layers of ``model`` on ``x``, in evaluation mode.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        targets: (N, C) or (N,), or class numbers (N,), taken as one-hot.
        layers: Names of submodules whose outputs are the features; None picks them as ``hidden_kernels`` does.
        output_fn: Turns what the model returns into (N, C).
        keep: Keep the activations, which ``movement`` needs: N n numbers per layer.

    Returns:
        The kernels of the layers, and their activations if they are kept.

    Raises:
        ValueError: If a name is not that of a submodule, the forward rejects ``x``, a kernel is not finite, or the
            targets are not N.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> hidden = measure.representation(model, torch.eye(3), keep=True)
        >>> hidden.widths, hidden.K["1"].shape, hidden.activations["1"].shape
        ({'1': 4}, torch.Size([3, 3]), torch.Size([3, 4]))
    """
    probe = as_probe(x)
    kernels: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    kept: dict[str, Tensor] = {}
    with isolated(model, output_fn) as network:
        for name, features in _features(network, probe, layers, keep).items():
            kernels[name], widths[name] = features.kernel, features.width
            if features.values is not None:
                kept[name] = features.values
    if not all_finite(*kernels.values()):
        wrong = next(name for name, K in kernels.items() if not all_finite(K))
        first = int((~kernels[wrong].diagonal().isfinite()).nonzero()[0])
        raise ValueError(
            f"model: the activations of layer {wrong!r} on sample {first} of the probe are NaN or infinite, or their "
            "squares are; look at that input and the parameters, or measure in float64"
        )
    return Representation(kernels, widths, target_kernel(targets, probe.size), kept if keep else None)


def hidden_kernels(
    model: Model, x: Any, *, layers: Sequence[str] | None = None, output_fn: OutputFn | None = None
) -> dict[str, Tensor]:
    """Measure the kernels of hidden layers on ``x``, in evaluation mode.

    Raises ``ValueError`` if a name is not that of a submodule, or the forward rejects ``x``.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        layers: Names of submodules whose outputs are the features. None picks the activation modules
            (``nn.Tanh``, ``nn.ReLU`` ...) but one that is the output, or, where there is none, every layer with weights
            but the last.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        ``{name: (N, N)}`` in the order of execution; a module called several times appears as
        ``name``, ``name:2``, ... The samples' axis is the one that changes with their number (the second one of a
        recurrent layer with ``batch_first=False``); layers whose output is no tensor with such an axis of N are left
        out.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> list(measure.hidden_kernels(model, torch.eye(3), layers=["0", "1"]))
        ['0', '1']
    """
    with isolated(model, output_fn) as network:
        return {name: features.kernel for name, features in _features(network, as_probe(x), layers).items()}


@dataclass(frozen=True)
class _Features:
    kernel: Tensor
    width: int
    values: Tensor | None


def _features(
    network: IsolatedModel, probe: Probe, layers: Sequence[str] | None, keep: bool = False
) -> dict[str, _Features]:
    modules = dict(network.shadow.named_modules())
    if layers is not None:
        for name in layers:
            check_choice("layers", name, [name for name in modules if name])
        watched = list(layers)
    else:
        watched = [name for name, module in modules.items() if _is_activation(module)]
    weighted = layers is None and not watched
    if weighted:
        watched = [name for name, module in modules.items() if isinstance(module, _WEIGHTED)]
    scripted = [name for name in watched if isinstance(modules[name], torch.jit.ScriptModule)]
    if scripted:
        raise ValueError(f"layers: {scripted[0]!r} is scripted and takes no hooks; name modules that are not")
    shapes: dict[str, torch.Size] = {}
    found: dict[str, _Features] = {}
    last: Tensor | None = None

    def keep_features(name: str, value: Tensor) -> None:
        nonlocal last
        last = value
        axis = _sample_axis(value.shape, shapes.get(name), probe.size)
        if axis is not None:
            features = value.detach().movedim(axis, 0).flatten(1)
            # A clone: a later operation may change the output in place.
            values = features.clone() if keep else None
            found[name] = _Features(features @ features.T / features.shape[1], features.shape[1], values)

    with torch.no_grad():
        inputs = network.place(probe)
        other = tree_map_only(Tensor, lambda x: x[:1].clone() if probe.size > 1 else torch.cat([x, x]), inputs)
        with _recording(network, watched, lambda name, value: shapes.update({name: value.shape})), suppress(Exception):
            network(network.params, other)  # fails where only so many samples are taken
        with _recording(network, watched, keep_features):
            output = checked_output(network, probe)
    if found and (len(found) > 1 if weighted else layers is None and _is_same(last, output)):
        found.popitem()  # the last one is the output
    return found


@contextmanager
def _recording(network: IsolatedModel, watched: Sequence[str], record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``record`` with the name and the output of every call of the watched modules."""
    modules = dict(network.shadow.named_modules())
    calls: dict[str, int] = {}

    def note(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point():
            calls[name] = calls.get(name, 0) + 1
            record(name if calls[name] == 1 else f"{name}:{calls[name]}", value)

    handles = [
        modules[name].register_forward_hook(lambda module, args, value, name=name: note(name, value))
        for name in watched
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sample_axis(shape: torch.Size, other: torch.Size | None, samples: int) -> int | None:
    """The axis that changes with the number of samples; the first one where no other number of them was taken."""
    axes = range(len(shape)) if other is not None and len(other) == len(shape) else range(1)
    changed = [axis for axis in axes if other is None or shape[axis] != other[axis]]
    return changed[0] if len(changed) == 1 and shape[changed[0]] == samples else None


def _is_same(value: Tensor | None, output: Tensor) -> bool:
    """Whether the output is this value, or a view of all of it."""
    if value is None or not has_values(output) or value.numel() != output.numel():
        return False
    return value.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention)
