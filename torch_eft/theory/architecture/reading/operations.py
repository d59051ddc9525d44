"""What every tensor operation is in the theory: a node, a rearrangement of dimensions, or a refusal in words."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_eft.theory.architecture.label_maps import (
    LabelMaps,
    convolution_axis,
    flatten_axis,
    identity_maps,
)
from torch_eft.theory.architecture.nodes import Add, Affine, Elementwise
from torch_eft.theory.architecture.reading.arguments import USE_SEEDS, as_value, axes_of, entry, filled, traced_shape
from torch_eft.theory.architecture.reading.graph import Axis, Graph, NotReadableError, Parameter, Raw, Value, view_dims
from torch_eft.theory.architecture.reading.norms import INSTANCE_NORM, batch_norm, group_norm, layer_norm
from torch_eft.theory.architecture.reading.positions import adaptive, average, mean, pad, select
from torch_eft.theory.gaussian.activations import Activation, get_activation, leaky_relu

_REFUSED = {
    "max_pool": "max pooling is not covered: pool by average (nn.AvgPool1d, 2d, 3d), or use a stride",
    "adaptive_max_pool": "max pooling is not covered: pool by average (nn.AdaptiveAvgPool2d), or use a stride",
    "amax": "a maximum over positions is not covered: take the mean",
    "max": "a maximum is not covered: take the mean",
    "scaled_dot_product": f"attention is not covered: {USE_SEEDS}",
    "_native_multi_head_attention": f"attention is not covered: {USE_SEEDS}",
    "softmax": f"softmax (attention) is not covered: {USE_SEEDS}; as the output's last step, leave it to the loss",
    "log_softmax": "log_softmax is not covered: leave it to the loss (nn.CrossEntropyLoss)",
    "glu": f"gating (glu) multiplies two values of the network and is not covered: {USE_SEEDS}",
    "bmm": f"a product of two values of the network (attention, token mixing) is not covered: {USE_SEEDS}",
    "matmul": f"a product by matmul is not covered: use nn.Linear for weights; for attention {USE_SEEDS}",
    "mm": f"a product by mm is not covered: use nn.Linear for weights; for attention {USE_SEEDS}",
    "einsum": f"einsum is not covered: use nn.Linear for weights; for attention {USE_SEEDS}",
    "cat": f"concatenation is not covered: add instead of concatenating, or {USE_SEEDS}",
    "stack": f"stacking is not covered: add instead, or {USE_SEEDS}",
    "embedding": "embeddings of tokens are not covered: give one-hot vectors to a Linear",
    "conv_transpose": f"transposed convolutions are not covered: {USE_SEEDS}",
    "instance_norm": INSTANCE_NORM,
    "lstm": f"recurrent layers are not covered: {USE_SEEDS}",
    "gru": f"recurrent layers are not covered: {USE_SEEDS}",
    "rnn": f"recurrent layers are not covered: {USE_SEEDS}",
    "prelu": "PReLU learns its slope and is not covered: use nn.LeakyReLU",
    "detach": f"detach cuts the gradient and is not covered: {USE_SEEDS}",
    "rsub": "subtracting from a constant is not covered: leave the constant out, and negate",
    "upsample": f"upsampling is not covered: {USE_SEEDS}",
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
        value = as_value(args[0], plain)
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
    raise NotReadableError(f"the operation {plain} is not covered: {USE_SEEDS}")


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
    x = as_value(x, "linear")
    last, before = x.dims[-1], graph.positions[x.node]
    if "c" not in last:
        raise NotReadableError(
            "a Linear that mixes positions (token mixing) is not covered: its kernel does not average over channels; "
            f"{USE_SEEDS}"
        )
    flat = {axis for axis in last if axis != "c"}
    maps = LabelMaps(
        tuple(
            flatten_axis(size) if axis in flat else one
            for axis, (size, one) in enumerate(zip(before, identity_maps(before).axes, strict=True))
        )
    )
    dims = (*x.dims[:-1], ("c",))
    sizes = [_sizes(graph, x, traced_shape(node.args[0]))[axis] for axis in last]
    order = sorted(range(len(last)), key=lambda place: -1 if last[place] == "c" else int(last[place]))
    channels = sizes[order[0]]

    def arranged(W: Tensor) -> Tensor:
        return W.reshape(len(W), *sizes).permute(0, *(1 + place for place in order)).reshape(len(W), channels, -1)

    return graph.weight(x, weight, bias, maps, traced_shape(node)[-1], dims, "a Linear", arranged)


def _convolution(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, axes: int) -> Value:
    x, weight, bias, stride, padding, dilation, groups = filled(args, keywords, _CONVOLUTION)
    if groups != 1:
        kind = "depthwise" if groups == traced_shape(node)[1] else "grouped"
        raise NotReadableError(
            f"{kind} convolutions (groups = {groups}) are not covered: use groups = 1, or {USE_SEEDS}"
        )
    if isinstance(x, Raw):
        if len(x.shape) != axes + 2:
            raise NotReadableError(f"a convolution reads {len(x.shape)} dimensions; give a batch (N, C, ...)")
        x = graph.data(x, 1, "a convolution")
    x = as_value(x, "a convolution")
    if len(x.dims) != axes + 2 or x.dims[1] != ("c",):
        raise NotReadableError(
            "a convolution reads channels that are not the second dimension; transpose in front of it"
        )
    before = graph.positions[x.node]
    places = axes_of(x, before, range(2, axes + 2))
    kernel = weight.tensor.shape[2:] if isinstance(weight, Parameter) else (1,) * axes
    made = list(identity_maps(before).axes)
    for d, axis in enumerate(places):
        step, spread = entry(stride, d), entry(dilation, d)
        whole = spread * (kernel[d] - 1)
        if isinstance(padding, str):
            pad = (whole // 2, whole - whole // 2) if padding == "same" else (0, 0)
        else:
            pad = (entry(padding, d), entry(padding, d))
        made[axis] = convolution_axis(before[axis], kernel[d], stride=step, padding=pad, dilation=spread)
    dims = (x.dims[0], ("c",), *((axis,) for axis in places))
    order = sorted(range(axes), key=places.__getitem__)
    return graph.weight(
        x,
        weight,
        bias,
        LabelMaps(tuple(made)),
        traced_shape(node)[1],
        dims,
        "a convolution",
        lambda W: W.permute(0, 1, *(2 + d for d in order)).flatten(2),
    )


_CONVOLUTION = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _rearranged(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    """Reshape, flatten, squeeze: the order of axes stays."""
    x = as_value(args[0], "reshape")
    before = tuple(traced_shape(node.args[0]))
    dims = view_dims(x.dims, _sizes(graph, x, before), traced_shape(node))
    if dims is None:
        raise NotReadableError(
            "a reshape that splits channels or positions (attention heads, pixel shuffle, patches) is not covered: "
            f"{USE_SEEDS}"
        )
    return Value(x.node, dims)


def _moved(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, kind: str) -> Value:
    x = as_value(args[0], "transpose")
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
            f"covered: pool over tokens instead, or {USE_SEEDS}"
        )
    if tuple(traced_shape(node.args[0])) != traced_shape(node):
        raise NotReadableError("expanding a value is not covered: repeat the inputs instead")
    return as_value(args[0], "copy")


def _dropout(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    if args[2] and args[1] > 0:
        raise NotReadableError("dropout in training mode is not covered: model.eval(), or p = 0")
    return as_value(args[0], "dropout")


def _sum_of(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any], *, sign: float = 1.0) -> Value:
    factor = sign * float(keywords.get("alpha", 1.0))
    for each in args:
        if isinstance(each, Parameter):
            raise NotReadableError(
                f"adding the parameter {each.name!r} (a position embedding, a bias of its own) is not covered: leave "
                f"it out, or {USE_SEEDS}"
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
    if keywords.get("rounding_mode"):
        raise NotReadableError(f"a division that rounds is not covered: {USE_SEEDS}")
    if all(isinstance(each, Value) for each in args[:2]):
        raise NotReadableError(
            f"gating (a product of two values of the network) is not covered: {USE_SEEDS}; a fused activation "
            "(nn.SiLU, nn.GELU) or norm (nn.RMSNorm) is read"
        )
    for each in args:
        if isinstance(each, Parameter):
            raise NotReadableError(
                f"multiplying by the parameter {each.name!r} (LayerScale, a gate) is not covered: {USE_SEEDS}"
            )
        if isinstance(each, Raw):
            raise NotReadableError("multiplying by a tensor that is no weight is not covered: use a number")
    value, number = args if isinstance(args[0], Value) else (args[1], args[0])
    if not isinstance(value, Value) or (power < 0 and not isinstance(args[0], Value)):
        raise NotReadableError(f"dividing by a value of the network is not covered: {USE_SEEDS}")
    return _scaled(graph, value, float(number) ** power)


def _negative(graph: Graph, node: Any, args: list[Any], keywords: dict[str, Any]) -> Value:
    return _scaled(graph, as_value(args[0], "neg"), -1.0)


def _elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Activation:
    if (alpha, scale, input_scale) == (1.0, 1.0, 1.0):
        return get_activation("elu")
    return Activation(f"elu({alpha:g})", lambda z: scale * F.elu(input_scale * z, alpha), kinks=(0.0,))


_LINEAR_FROM = 15.0
"""Where softplus is linear to 3e-7."""


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    if threshold < _LINEAR_FROM:
        raise NotReadableError(
            f"softplus that is linear beyond {threshold:g} jumps there and is not covered: use threshold = 20"
        )
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
    **{f"avg_pool{d}d": partial(average, axes=d) for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": partial(adaptive, axes=d) for d in (1, 2, 3)},
    "mean": mean,
    "sum": partial(mean, total=True),
    "pad": pad,
    "constant_pad_nd": pad,
    "select": select,
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
    "layer_norm": layer_norm,
    "rms_norm": partial(layer_norm, centered=False),
    "group_norm": group_norm,
    "batch_norm": batch_norm,
}
