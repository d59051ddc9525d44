"""Operations that are linear maps of positions: pooling by average, means, padding, one position."""

from typing import Any

import torch
from torch.nn import functional as F

from torch_eft.theory.architecture.label_maps import adaptive_axis, window_axis
from torch_eft.theory.architecture.reading.arguments import as_value, axes_of, entry, filled, restored, traced_shape
from torch_eft.theory.architecture.reading.graph import Graph, NotReadableError, Value


def average(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, axes: int) -> Value:
    """Read average pooling; refuse a divisor of its own."""
    names = {"stride": [], "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    x, kernel, stride, padding, ceil, counted, divisor = filled(args, keywords, names)
    x = as_value(x, "average pooling")
    if divisor is not None:
        raise NotReadableError("divisor_override of average pooling is not covered: leave it out")
    before = graph.positions[x.node]
    places = axes_of(x, before, range(len(x.dims) - axes, len(x.dims)))
    maps = {}
    for d, axis in enumerate(places):
        step = entry(stride, d) if stride else entry(kernel, d)
        maps[axis] = window_axis(
            before[axis], entry(kernel, d), stride=step, padding=entry(padding, d), count_padding=counted, ceil=ceil
        )
    return Value(graph.pool(x, maps, "average pooling"), restored(x, places))


def adaptive(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, axes: int) -> Value:
    """Read average pooling to a given number of positions."""
    x = as_value(args[0], "average pooling")
    before = graph.positions[x.node]
    places = axes_of(x, before, range(len(x.dims) - axes, len(x.dims)))
    after = traced_shape(node)[-axes:]
    maps = {axis: adaptive_axis(before[axis], after[d]) for d, axis in enumerate(places)}
    return Value(graph.pool(x, maps, "average pooling"), restored(x, places))


def mean(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, total: bool = False) -> Value:
    """Read a mean, or sum, over positions; refuse one over channels or samples."""
    x, over, keep = [*args, *[None] * (3 - len(args))][:3]
    over, keep = keywords.get("dim", over), keywords.get("keepdim", keep)
    x = as_value(x, "mean")
    whole = range(len(x.dims))
    places = sorted(
        d % len(x.dims) for d in (whole if over is None or over == [] else [over] if isinstance(over, int) else over)
    )
    axes = [axis for d in places for axis in x.dims[d]]
    if "c" in axes or "n" in axes:
        raise NotReadableError("a mean over channels or samples is not covered: average over positions alone")
    before = graph.positions[x.node]
    maps = {}
    for axis in axes:
        size = before[axis]  # type: ignore[index]
        row = torch.ones(1, 1, size, dtype=torch.float64, device="cpu")
        maps[axis] = row if total else row / size
    dims = [() if d in places else dim for d, dim in enumerate(x.dims)]
    dims = [dim for d, dim in enumerate(dims) if keep or d not in places]
    return Value(graph.pool(x, maps, "mean"), tuple(dims))  # type: ignore[arg-type]


def pad(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    """Read padding; refuse another number than 0."""
    x, pads = as_value(args[0], "padding"), args[1]
    mode = args[2] if len(args) > 2 and isinstance(args[2], str) else keywords.get("mode", "constant")
    filling = keywords.get("value", args[3] if len(args) > 3 else None)
    if filling:
        raise NotReadableError("padding with another number than 0 is not covered: pad with 0")
    count = len(pads) // 2
    before = graph.positions[x.node]
    places = axes_of(x, before, range(len(x.dims) - count, len(x.dims)))
    maps = {}
    for d, axis in enumerate(places):
        front, behind = pads[2 * (count - 1 - d)], pads[2 * (count - 1 - d) + 1]
        one = torch.eye(before[axis], dtype=torch.float64, device="cpu")[None]
        maps[axis] = F.pad(one.mT, (front, behind), mode=mode).mT
    return Value(graph.pool(x, maps, "padding"), restored(x, places))


def select(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    """Read the choice of one position."""
    x, dim, index = as_value(args[0], "select"), args[1] % len(args[0].dims), args[2]
    (axis,) = axes_of(x, graph.positions[x.node], [dim])
    size = graph.positions[x.node][axis]
    rows = torch.eye(size, dtype=torch.float64, device="cpu")[None, index % size, None]
    return Value(graph.pool(x, {axis: rows}, "one position"), (*x.dims[:dim], *x.dims[dim + 1 :]))
