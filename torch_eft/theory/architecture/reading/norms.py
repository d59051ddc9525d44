"""Norms: over channels and positions, with gains and biases of a network at initialization."""

import math
from typing import Any

import torch

from torch_eft.theory.architecture.nodes import Affine, Norm
from torch_eft.theory.architecture.reading.arguments import USE_SEEDS, as_value, traced_shape
from torch_eft.theory.architecture.reading.graph import Graph, NotReadableError, Value

INSTANCE_NORM = "InstanceNorm normalizes each channel by itself and is not covered: use GroupNorm or LayerNorm"


def gains(
    graph: Graph, value: Value, gain: Any, bias: Any, per_position: bool, name: str, factor: float = 1.0
) -> Value:
    """The gains and biases behind a norm, if it has some."""
    gain, bias = graph.own(gain, "gain", name), graph.own(bias, "bias", name)
    if gain is None and bias is None and factor == 1.0:
        return value
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
        (value.node,), factor * size, graph.rate(gain) / size**2, graph.rate(bias), per_position, f"gains of {layer}"
    )
    return Value(graph.add(node, graph.positions[value.node]), value.dims)


def layer_norm(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, centered: bool = True) -> Value:
    """Read LayerNorm, or RMSNorm (not centered); refuse what is not over channels."""
    x = as_value(args[0], "a norm")
    rest = [*args[2:], *[None] * 3]
    gain = keywords.get("weight", rest[0])
    bias = keywords.get("bias", rest[1]) if centered else None
    eps = keywords.get("eps", rest[2] if centered else rest[1])
    eps = torch.finfo(torch.float32).eps if eps is None and not centered else 1e-5 if eps is None else float(eps)
    axes = [axis for dim in x.dims[len(x.dims) - len(args[1]) :] for axis in dim]
    if "c" not in axes:
        raise NotReadableError(
            "a norm over positions of each channel by itself is not covered: normalize over channels, too"
        )
    over = tuple(axis for axis in axes if axis != "c")
    name = "LayerNorm" if centered else "RMSNorm"
    index = graph.add(Norm((x.node,), over, 1, centered, eps, name), graph.positions[x.node])  # type: ignore[arg-type]
    return gains(graph, Value(index, x.dims), gain, bias, bool(over), name)


def group_norm(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    """Read GroupNorm; refuse a group for every channel."""
    x, groups = as_value(args[0], "GroupNorm"), int(args[1])
    rest = [*args[2:], *[None] * 3]
    eps = keywords.get("eps", rest[2])
    channels = traced_shape(node.args[0])[1]
    if groups == channels:
        raise NotReadableError(INSTANCE_NORM)
    over = tuple(axis for dim in x.dims[2:] for axis in dim)
    index = graph.add(
        Norm((x.node,), over, groups, True, 1e-5 if eps is None else float(eps), "GroupNorm"),  # type: ignore[arg-type]
        graph.positions[x.node],
    )
    gain, bias = keywords.get("weight", rest[0]), keywords.get("bias", rest[1])
    return gains(graph, Value(index, x.dims), gain, bias, False, "GroupNorm")


def batch_norm(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    """Read BatchNorm in evaluation mode as a factor; refuse it in training mode, and trained statistics."""
    x, gain, bias, mean, variance, training, _, eps = args[:8]
    if training:
        raise NotReadableError(
            "BatchNorm in training mode is not covered: every output depends on the whole batch. model.eval(), or use "
            f"GroupNorm or LayerNorm; else {USE_SEEDS}"
        )
    x = as_value(x, "BatchNorm")
    empty = torch.zeros(1, device="cpu")
    sizes = variance.compute(empty).double()
    if bool(mean.compute(empty).any()) or bool((sizes != sizes[0]).any()):
        raise NotReadableError(
            "BatchNorm whose running statistics differ from channel to channel is not covered: the theory is of a "
            "network at initialization; reset_running_stats()"
        )
    return gains(graph, x, gain, bias, False, "BatchNorm", 1 / math.sqrt(float(sizes[0]) + eps))
