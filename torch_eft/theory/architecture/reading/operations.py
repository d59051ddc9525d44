"""What every tensor operation is in the theory: a node, a rearrangement of dimensions, or a refusal in words."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from torch_eft.theory.architecture.label_maps import (
    LabelMaps,
    adaptive_axis,
    convolution_axis,
    flatten_axis,
    identity_maps,
    window_axis,
)
from torch_eft.theory.architecture.nodes import Add, Affine, Elementwise, Norm
from torch_eft.theory.architecture.reading.graph import Axis, Graph, NotReadableError, Parameter, Raw, Value, view_dims
from torch_eft.theory.gaussian.activations import Activation, get_activation, leaky_relu

_SEEDS = "use seeds (measure.statistics_over_seeds, eft.predict_from_networks)"

_REFUSED = {
    "max_pool": "max pooling is not covered: pool by average (nn.AvgPool1d, 2d, 3d), or use a stride",
    "adaptive_max_pool": "max pooling is not covered: pool by average (nn.AdaptiveAvgPool2d), or use a stride",
    "amax": "a maximum over positions is not covered: take the mean",
    "max": "a maximum is not covered: take the mean",
    "scaled_dot_product": f"attention is not covered: {_SEEDS}",
    "_native_multi_head_attention": f"attention is not covered: {_SEEDS}",
    "softmax": f"softmax (attention) is not covered: {_SEEDS}; as the output's last step, leave it to the loss",
    "log_softmax": "log_softmax is not covered: leave it to the loss (nn.CrossEntropyLoss)",
    "glu": f"gating (glu) multiplies two values of the network and is not covered: {_SEEDS}",
    "bmm": f"a product of two values of the network (attention, token mixing) is not covered: {_SEEDS}",
    "matmul": f"a product by matmul is not covered: use nn.Linear for weights; for attention {_SEEDS}",
    "mm": f"a product by mm is not covered: use nn.Linear for weights; for attention {_SEEDS}",
    "einsum": f"einsum is not covered: use nn.Linear for weights; for attention {_SEEDS}",
    "cat": f"concatenation is not covered: add instead of concatenating, or {_SEEDS}",
    "stack": f"stacking is not covered: add instead, or {_SEEDS}",
    "embedding": "embeddings of tokens are not covered: give one-hot vectors to a Linear",
    "conv_transpose": f"transposed convolutions are not covered: {_SEEDS}",
    "instance_norm": "InstanceNorm normalizes each channel by itself and is not covered: use GroupNorm or LayerNorm",
    "lstm": f"recurrent layers are not covered: {_SEEDS}",
    "gru": f"recurrent layers are not covered: {_SEEDS}",
    "rnn": f"recurrent layers are not covered: {_SEEDS}",
    "prelu": "PReLU learns its slope and is not covered: use nn.LeakyReLU",
    "detach": f"detach cuts the gradient and is not covered: {_SEEDS}",
    "upsample": f"upsampling is not covered: {_SEEDS}",
}


def read_operation(graph: Graph, name: str, node: Any, args: list[Any], keywords: dict[str, Any]) -> Any:
    """Return what the result of an operation is.

    Args:
        graph: Is added to.
        name: Of the operation, ``"conv2d.default"``.
        node: Of the traced graph.
        args: Arguments: values, parameters, raw tensors and numbers.
        keywords: Likewise.

    Returns:
        A ``Value``.

    Raises:
        NotReadableError: If it is not covered.
    """
    plain = name.split(".")[0]
    plain = plain[:-1] if plain.endswith("_") and not plain.startswith("_") else plain
    if plain in _ELEMENTWISE:
        value = _value(args[0], plain)
        activation = _ELEMENTWISE[plain](*args[1:], **keywords)
        return Value(graph.add(Elementwise((value.node,), activation, plain), graph.positions[value.node]), value.dims)
    if plain in _RULES:
        return _RULES[plain](graph, node, args, keywords)
    for start, message in _REFUSED.items():
        if plain.startswith(start):
            raise NotReadableError(message)
    if any(isinstance(each, Parameter) for each in args):
        (first, *_) = [each for each in args if isinstance(each, Parameter)]
        raise NotReadableError(f"{plain} of the parameter {first.name!r} is not covered: use layers of torch.nn")
    raise NotReadableError(f"the operation {plain} is not covered: {_SEEDS}")


def _value(given: Any, name: str) -> Value:
    if isinstance(given, Value):
        return given
    what = f"the parameter {given.name!r}" if isinstance(given, Parameter) else "the inputs"
    raise NotReadableError(f"{name} of {what} is not covered: a Linear or a convolution must stand between")


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _sizes(graph: Graph, value: Value, shape: tuple[int, ...]) -> dict[Axis, int]:
    """The length of every axis."""
    sizes: dict[Axis, int] = {"n": 2, **dict(enumerate(graph.positions[value.node]))}
    for dim, size in zip(value.dims, shape, strict=True):
        if "c" in dim:
            sizes["c"] = size // math.prod(sizes[axis] for axis in dim if axis != "c")
    return sizes


def _linear(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else keywords.get("bias")
    if isinstance(x, Raw):
        x = graph.data(x, len(x.shape) - 1, "a Linear")
    x = _value(x, "linear")
    last, before = x.dims[-1], graph.positions[x.node]
    if "c" not in last:
        raise NotReadableError(
            "a Linear that mixes positions (token mixing) is not covered: its kernel does not average over channels; "
            f"{_SEEDS}"
        )
    flat = {axis for axis in last if axis != "c"}
    maps = LabelMaps(
        tuple(
            flatten_axis(size) if axis in flat else one
            for axis, (size, one) in enumerate(zip(before, identity_maps(before).axes, strict=True))
        )
    )
    dims = (*x.dims[:-1], ("c",))
    return graph.weight(x, weight, bias, maps, _shape(node)[-1], dims, "a Linear")


def _convolution(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, axes: int) -> Value:
    x, weight, bias, stride, padding, dilation, groups = _filled(args, keywords, _CONVOLUTION)
    if groups != 1:
        kind = "depthwise" if groups == _shape(node)[1] else "grouped"
        raise NotReadableError(f"{kind} convolutions (groups = {groups}) are not covered: use groups = 1, or {_SEEDS}")
    if isinstance(x, Raw):
        if len(x.shape) != axes + 2:
            raise NotReadableError(f"a convolution reads {len(x.shape)} dimensions; give a batch (N, C, ...)")
        x = graph.data(x, 1, "a convolution")
    x = _value(x, "a convolution")
    if len(x.dims) != axes + 2 or x.dims[1] != ("c",):
        raise NotReadableError(
            "a convolution reads channels that are not the second dimension; transpose in front of it"
        )
    before = graph.positions[x.node]
    places = _axes_of(x, before, range(2, axes + 2))
    kernel = weight.tensor.shape[2:] if isinstance(weight, Parameter) else (1,) * axes
    made = list(identity_maps(before).axes)
    for d, axis in enumerate(places):
        step, spread = _one(stride, d), _one(dilation, d)
        whole = spread * (kernel[d] - 1)
        if isinstance(padding, str):
            pad = (whole // 2, whole - whole // 2) if padding == "same" else (0, 0)
        else:
            pad = (_one(padding, d), _one(padding, d))
        made[axis] = convolution_axis(before[axis], kernel[d], stride=step, padding=pad, dilation=spread)
    dims = (x.dims[0], ("c",), *((axis,) for axis in places))
    return graph.weight(x, weight, bias, LabelMaps(tuple(made)), _shape(node)[1], dims, "a convolution")


_CONVOLUTION = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _filled(args: list[Any], keywords: dict[str, Any], names: dict[str, Any]) -> list[Any]:
    given = {**names, **keywords, **dict(zip(names, args[2:], strict=False))}
    return [args[0], args[1], *(given[name] for name in names)]


def _one(given: Any, index: int) -> int:
    if isinstance(given, int):
        return given
    return int(given[index] if len(given) > 1 else given[0])


def _axes_of(x: Value, sizes: tuple[int, ...], dims: Any) -> list[int]:
    """The axis of positions of some dimensions, one each; an empty dimension is an axis of length 1 that is left."""
    free = [axis for axis, size in enumerate(sizes) if size == 1 and not any(axis in dim for dim in x.dims)]
    found = []
    for d in dims:
        dim = [axis for axis in x.dims[d] if axis not in ("n", "c")]
        if len(x.dims[d]) == 1 and len(dim) == 1:
            found.append(dim[0])
        elif not x.dims[d] and free:
            found.append(free.pop(0))
        else:
            raise NotReadableError("positions were reshaped before a layer that needs them apart; keep (N, C, H, W)")
    return found


def _average(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, axes: int) -> Value:
    names = {"stride": [], "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    x, kernel, stride, padding, ceil, counted, divisor = _filled(args, keywords, names)
    x = _value(x, "average pooling")
    if divisor is not None:
        raise NotReadableError("divisor_override of average pooling is not covered: leave it out")
    before = graph.positions[x.node]
    places = _axes_of(x, before, range(len(x.dims) - axes, len(x.dims)))
    maps = {}
    for d, axis in enumerate(places):
        step = _one(stride, d) if stride else _one(kernel, d)
        maps[axis] = window_axis(
            before[axis], _one(kernel, d), stride=step, padding=_one(padding, d), count_padding=counted, ceil=ceil
        )
    return Value(graph.pool(x, maps, "average pooling"), _restored(x, places))


def _adaptive(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, axes: int) -> Value:
    x = _value(args[0], "average pooling")
    before = graph.positions[x.node]
    places = _axes_of(x, before, range(len(x.dims) - axes, len(x.dims)))
    after = _shape(node)[-axes:]
    maps = {axis: adaptive_axis(before[axis], after[d]) for d, axis in enumerate(places)}
    return Value(graph.pool(x, maps, "average pooling"), _restored(x, places))


def _restored(x: Value, places: list[int]) -> tuple[tuple[Axis, ...], ...]:
    return (*x.dims[: len(x.dims) - len(places)], *((axis,) for axis in places))


def _mean(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, total: bool = False) -> Value:
    x, over, keep = [*args, *[None] * (3 - len(args))][:3]
    over, keep = keywords.get("dim", over), keywords.get("keepdim", keep)
    x = _value(x, "mean")
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


def _pad(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    x, pads = _value(args[0], "padding"), args[1]
    mode = args[2] if len(args) > 2 and isinstance(args[2], str) else keywords.get("mode", "constant")
    filling = keywords.get("value", args[3] if len(args) > 3 else None)
    if filling:
        raise NotReadableError("padding with another number than 0 is not covered: pad with 0")
    count = len(pads) // 2
    before = graph.positions[x.node]
    places = _axes_of(x, before, range(len(x.dims) - count, len(x.dims)))
    maps = {}
    for d, axis in enumerate(places):
        front, behind = pads[2 * (count - 1 - d)], pads[2 * (count - 1 - d) + 1]
        one = torch.eye(before[axis], dtype=torch.float64, device="cpu")[None]
        maps[axis] = F.pad(one.mT, (front, behind), mode=mode).mT
    return Value(graph.pool(x, maps, "padding"), _restored(x, places))


def _select(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    x, dim, index = _value(args[0], "select"), args[1] % len(args[0].dims), args[2]
    (axis,) = _axes_of(x, graph.positions[x.node], [dim])
    size = graph.positions[x.node][axis]
    rows = torch.eye(size, dtype=torch.float64, device="cpu")[None, index % size, None]
    return Value(graph.pool(x, {axis: rows}, "one position"), (*x.dims[:dim], *x.dims[dim + 1 :]))


def _rearranged(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    """Reshape, flatten, squeeze: the order of axes stays."""
    x = _value(args[0], "reshape")
    before = tuple(_meta_shape(node.args[0]))
    dims = view_dims(x.dims, _sizes(graph, x, before), _shape(node))
    if dims is None:
        raise NotReadableError(
            "a reshape that splits channels or positions (attention heads, pixel shuffle, patches) is not covered: "
            f"{_SEEDS}"
        )
    return Value(x.node, dims)


def _meta_shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _moved(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, kind: str) -> Value:
    x = _value(args[0], "transpose")
    order = list(range(len(x.dims)))
    if kind == "permute":
        order = [d % len(order) for d in args[1]]
    else:
        a, b = (-2, -1) if kind == "last" else (args[1], args[2])
        order[a], order[b] = order[b], order[a]
    return Value(x.node, tuple(x.dims[d] for d in order))


def _same(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    if isinstance(args[0], Parameter):
        raise NotReadableError(
            f"the parameter {args[0].name!r} that joins the samples (a class token, a position embedding) is not "
            f"covered: pool over tokens instead, or {_SEEDS}"
        )
    if tuple(_meta_shape(node.args[0])) != _shape(node):
        raise NotReadableError("expanding a value is not covered: repeat the inputs instead")
    return _value(args[0], "copy")


def _dropout(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    if args[2] and args[1] > 0:
        raise NotReadableError("dropout in training mode is not covered: model.eval(), or p = 0")
    return _value(args[0], "dropout")


def _sum_of(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, sign: float = 1.0) -> Value:
    factor = sign * float(keywords.get("alpha", 1.0))
    for each in args:
        if isinstance(each, Parameter):
            raise NotReadableError(
                f"adding the parameter {each.name!r} (a position embedding, a bias of its own) is not covered: leave "
                f"it out, or {_SEEDS}"
            )
        if isinstance(each, Raw) and each.of_inputs:
            raise NotReadableError(
                "a sum with the raw inputs is not covered: put a Linear or a convolution on the skip"
            )
        if isinstance(each, Raw) or (isinstance(each, int | float) and each != 0):
            raise NotReadableError("adding a constant is not covered: leave it out")
    values = [each for each in args if isinstance(each, Value)]
    if len(values) == 1:
        return values[0] if isinstance(args[0], Value) else _scaled(graph, values[0], factor)
    first, second = values
    if first.dims != second.dims or graph.positions[first.node] != graph.positions[second.node]:
        raise NotReadableError("a sum of values of different shapes (broadcasting) is not covered: give both one shape")
    second = second if factor == 1.0 else _scaled(graph, second, factor)
    return Value(graph.add(Add((first.node, second.node)), graph.positions[first.node]), first.dims)


def _scaled(graph: Graph, value: Value, factor: float) -> Value:
    index = graph.add(Affine((value.node,), factor, name="a factor"), graph.positions[value.node])
    return Value(index, value.dims)


def _product(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, power: int = 1) -> Value:
    if all(isinstance(each, Value) for each in args[:2]):
        raise NotReadableError(
            f"gating (a product of two values of the network) is not covered: {_SEEDS}; a fused activation (nn.SiLU, "
            "nn.GELU) or norm (nn.RMSNorm) is read"
        )
    for each in args:
        if isinstance(each, Parameter):
            raise NotReadableError(
                f"multiplying by the parameter {each.name!r} (LayerScale, a gate) is not covered: {_SEEDS}"
            )
        if isinstance(each, Raw):
            raise NotReadableError("multiplying by a tensor that is no weight is not covered: use a number")
    value, number = args if isinstance(args[0], Value) else (args[1], args[0])
    if not isinstance(value, Value) or (power < 0 and not isinstance(args[0], Value)):
        raise NotReadableError(f"dividing by a value of the network is not covered: {_SEEDS}")
    return _scaled(graph, value, float(number) ** power)


def _negative(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    return _scaled(graph, _value(args[0], "neg"), -1.0)


def _gains(
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


def _layer_norm(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, centered: bool = True) -> Value:
    x = _value(args[0], "a norm")
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
    return _gains(graph, Value(index, x.dims), gain, bias, bool(over), name)


def _group_norm(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    x, groups = _value(args[0], "GroupNorm"), int(args[1])
    rest = [*args[2:], *[None] * 3]
    eps = keywords.get("eps", rest[2])
    channels = _meta_shape(node.args[0])[1]
    if groups == channels:
        raise NotReadableError(_REFUSED["instance_norm"])
    over = tuple(axis for dim in x.dims[2:] for axis in dim)
    index = graph.add(
        Norm((x.node,), over, groups, True, 1e-5 if eps is None else float(eps), "GroupNorm"),  # type: ignore[arg-type]
        graph.positions[x.node],
    )
    gain, bias = keywords.get("weight", rest[0]), keywords.get("bias", rest[1])
    return _gains(graph, Value(index, x.dims), gain, bias, False, "GroupNorm")


def _batch_norm(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    x, gain, bias, mean, variance, training, _, eps = args[:8]
    if training:
        raise NotReadableError(
            "BatchNorm in training mode is not covered: every output depends on the whole batch. model.eval(), or use "
            f"GroupNorm or LayerNorm; else {_SEEDS}"
        )
    x = _value(x, "BatchNorm")
    empty = torch.zeros(1, device="cpu")
    sizes = variance.compute(empty).double()
    if bool(mean.compute(empty).any()) or bool((sizes != sizes[0]).any()):
        raise NotReadableError(
            "BatchNorm whose running statistics differ from channel to channel is not covered: the theory is of a "
            "network at initialization; reset_running_stats()"
        )
    return _gains(graph, x, gain, bias, False, "BatchNorm", 1 / math.sqrt(float(sizes[0]) + eps))


def _elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Activation:
    if (alpha, scale, input_scale) == (1.0, 1.0, 1.0):
        return get_activation("elu")
    return Activation(f"elu({alpha:g})", lambda z: scale * F.elu(input_scale * z, alpha), kinks=(0.0,))


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    if beta == 1.0:
        return get_activation("softplus")
    return Activation(f"softplus({beta:g})", lambda z: torch.logaddexp(beta * z, torch.zeros_like(z)) / beta)


def _clamped(low: float, high: float) -> Activation:
    return Activation(f"hardtanh({low:g}, {high:g})", lambda z: z.clamp(low, high), kinks=(float(low), float(high)))


_NAMED = ("relu", "tanh", "sigmoid", "silu", "selu", "mish", "hardswish", "erf", "sin", "cos", "abs")
_ELEMENTWISE: dict[str, Callable[..., Activation]] = {
    **{name: partial(get_activation, name) for name in _NAMED},
    "atan": partial(get_activation, "arctan"),
    "gelu": lambda approximate="none": get_activation("gelu" if approximate == "none" else "gelu_tanh"),
    "leaky_relu": lambda negative_slope=0.01: leaky_relu(negative_slope),
    "elu": _elu,
    "softplus": _softplus,
    "hardtanh": lambda low=-1.0, high=1.0: _clamped(low, high),
    "relu6": lambda: _clamped(0.0, 6.0),
}
"""Activations by the names of torch's operations."""

_RULES: Mapping[str, Callable[..., Value]] = {
    "linear": _linear,
    **{f"conv{d}d": partial(_convolution, axes=d) for d in (1, 2, 3)},
    **{f"avg_pool{d}d": partial(_average, axes=d) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": partial(_adaptive, axes=d) for d in (1, 2, 3)},
    "mean": _mean,
    "sum": partial(_mean, total=True),
    "pad": _pad,
    "constant_pad_nd": _pad,
    "select": _select,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"), _rearranged),
    "permute": partial(_moved, kind="permute"),
    "transpose": partial(_moved, kind="transpose"),
    **dict.fromkeys(("t", "mT", "numpy_T"), partial(_moved, kind="last")),
    **dict.fromkeys(("contiguous", "clone", "to", "_to_copy", "alias", "expand", "lift_fresh_copy"), _same),
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "add": _sum_of,
    "sub": partial(_sum_of, sign=-1.0),
    "mul": _product,
    "div": partial(_product, power=-1),
    "neg": _negative,
    "layer_norm": _layer_norm,
    "rms_norm": partial(_layer_norm, centered=False),
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
}
