"""Norms: over channels and positions, with gains and biases of a network at initialization."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_eft.theory.architecture.nodes import Affine, Norm
from torch_eft.theory.architecture.reading.arguments import as_value, traced_shape
from torch_eft.theory.architecture.reading.graph import BATCH_NORM_TRAINING, Axis, Graph, NotReadableError, Value

INSTANCE_NORM = "InstanceNorm normalizes each channel by itself and is not covered: use GroupNorm or LayerNorm"


def gains(
    graph: Graph, value: Value, gain: Any, bias: Any, axes: Sequence[Axis], name: str, factor: float = 1.0
) -> Value:
    """The gains and biases behind a norm, if it has some; they have the axes given, channels among them."""
    gain, bias = graph.own(gain, "gain", name), graph.own(bias, "bias", name)
    if gain is None and bias is None and factor == 1.0:
        return value
    if len(axes) > 1 and {axis for dim in value.dims for axis in dim} - {"n", *axes}:
        raise NotReadableError(
            f"gains of {name} for some axes of positions that others share are not covered: elementwise_affine=False, "
            "or normalize over channels alone or over all positions"
        )
    layer = next((each.name.rpartition(".")[0] for each in (gain, bias) if each is not None), name)
    size = 1.0
    if gain is not None:
        values = gain.tensor.detach()
        size = float(values.flatten()[0])
        if size == 0 or bool((values != size).any()):
            raise NotReadableError(
                f"the gains of {layer!r} are {'0' if size == 0 else 'not equal (trained)'}: the theory is of a network "
                "at initialization with gains of one size; initialize them to 1"
            )
    if bias is not None and bool(bias.tensor.detach().any()):
        raise NotReadableError(
            f"the biases of {layer!r} are not 0 (trained); the theory is of a network at initialization"
        )
    node = Affine(
        (value.node,), factor * size, graph.rate(gain) / size**2, graph.rate(bias), len(axes) > 1, f"gains of {layer}"
    )
    positions = graph.positions[value.node]
    order = sorted(range(len(axes)), key=lambda place: -1 if axes[place] == "c" else int(axes[place]))
    before = [-1 if axis == "c" else positions[int(axis)] for axis in axes]

    def arranged(one: Tensor) -> Tensor:
        apart = one.reshape(before).permute(order)
        apart = apart.reshape(len(apart), *(size if d in axes else 1 for d, size in enumerate(positions)))
        return apart.expand(len(apart), *positions).reshape(len(apart), -1)

    return graph.affine(value, gain, bias, node, arranged, factor)


def channels_of(x: Value, name: str) -> tuple[Axis, ...]:
    """The axes of the second dimension, where norms have their channels; refuse other than neurons there."""
    axes = x.dims[1] if len(x.dims) > 1 else ()
    if "c" not in axes:
        raise NotReadableError(
            f"{name} whose second dimension is not the channels is not covered: transpose in front of it, or use "
            "LayerNorm"
        )
    return axes


def layer_norm(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, centered: bool = True) -> Value:
    """Read LayerNorm, or RMSNorm (not centered); refuse what is not over channels."""
    x = as_value(args[0], "a norm")
    rest = [*args[2:], *[None] * 3]
    gain = keywords.get("weight", rest[0])
    bias = keywords.get("bias", rest[1]) if centered else None
    eps = keywords.get("eps", rest[2] if centered else rest[1])
    if eps is None:
        eps = 1e-5 if centered else torch.finfo(node.meta["val"].dtype).eps
    eps = float(eps)
    axes = [axis for dim in x.dims[len(x.dims) - len(args[1]) :] for axis in dim]
    if "c" not in axes:
        raise NotReadableError(
            "a norm over positions of each channel by itself is not covered: normalize over channels, too"
        )
    over = tuple(axis for axis in axes if axis != "c")
    name = "LayerNorm" if centered else "RMSNorm"
    index = graph.add(Norm((x.node,), over, 1, centered, eps, name), graph.positions[x.node])  # type: ignore[arg-type]
    return gains(graph, Value(index, x.dims), gain, bias, axes, name)


def group_norm(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    """Read GroupNorm; refuse a group for every channel."""
    x, groups = as_value(args[0], "GroupNorm"), int(args[1])
    rest = [*args[2:], *[None] * 3]
    eps = keywords.get("eps", rest[2])
    if groups == traced_shape(node.args[0])[1]:
        raise NotReadableError(INSTANCE_NORM)
    axes = channels_of(x, "GroupNorm")
    over = tuple(axis for dim in x.dims[1:] for axis in dim if axis != "c")
    index = graph.add(
        Norm((x.node,), over, groups, True, 1e-5 if eps is None else float(eps), "GroupNorm"),  # type: ignore[arg-type]
        graph.positions[x.node],
    )
    gain, bias = keywords.get("weight", rest[0]), keywords.get("bias", rest[1])
    if groups > 1 and axes[0] != "c":
        raise NotReadableError("GroupNorm of flattened positions that stand before their channels is not covered")
    return gains(graph, Value(index, x.dims), gain, bias, axes, "GroupNorm")


def batch_norm(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    """Read BatchNorm in evaluation mode as a factor; refuse it in training mode, and trained statistics."""
    x, gain, bias, mean, variance, training, _, eps = args[:8]
    if training:
        raise NotReadableError(BATCH_NORM_TRAINING)
    x = as_value(x, "BatchNorm")
    axes = channels_of(x, "BatchNorm")
    empty = torch.zeros(1, device="cpu")
    sizes = variance.compute(empty).double()
    if bool(mean.compute(empty).any()) or bool((sizes != sizes[0]).any()):
        raise NotReadableError(
            "BatchNorm whose running statistics differ from channel to channel is not covered: the theory is of a "
            "network at initialization; reset_running_stats()"
        )
    return gains(graph, x, gain, bias, axes, "BatchNorm", 1 / math.sqrt(float(sizes[0]) + eps))
