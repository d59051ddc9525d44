"""Turns recorded calls and gradients into the factors of the Jacobian, kind by kind."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_eft.measure.jacobian.capture import LayerCall
from torch_eft.measure.jacobian.gram import DenseFactor, EmbeddingFactor, Factor, OuterProductFactor, PerOutput

Gradients = tuple[PerOutput, ...]
"""g_0, g_1, ... of one call's output: for every output of the network a tensor of the call's shape."""


@dataclass(frozen=True)
class Axis:
    """Axis of a layer's output on which the samples are.

    Args:
        index: The axis; its length may be a multiple of N.
        inner: True if samples run faster than the other index on this axis.
    """

    index: int
    inner: bool = False

    def split(self, x: Tensor, samples: int) -> Tensor:
        """Return (..., N m, ...) as (N, m, ...)."""
        x = x.movedim(self.index, 0)
        return x.unflatten(0, (-1, samples)).transpose(0, 1) if self.inner else x.unflatten(0, (samples, -1))


def factors(
    calls: Sequence[LayerCall], gradients: Sequence[Gradients], axes: Sequence[Axis], samples: int
) -> list[Factor]:
    """Return one factor per parameter (a layer's bias may stand with its weight).

    Args:
        calls: The recorded calls.
        gradients: Of their outputs.
        axes: The samples' axis in each output.
        samples: N.
    """
    outer: dict[tuple[str, int], list[OuterProductFactor]] = {}
    direct: dict[str, list[DenseFactor]] = {}
    for call, g, axis in zip(calls, gradients, axes, strict=True):
        for factor in _KINDS[call.kind](call, g, axis, samples):
            if isinstance(factor, OuterProductFactor):
                group = len(outer)  # groups of a convolution are different parameters
                outer.setdefault((factor.weight, 0 if _mergeable(call) else group), []).append(factor)
            else:
                direct.setdefault(factor.weight, []).append(factor)
    result: list[Factor] = []
    for (_, _), uses in outer.items():
        alone = len(uses) == 1 and uses[0].bias not in direct and _uses(outer, uses[0].bias) == 1
        for use in uses:
            if use.bias is not None and not alone:
                direct.setdefault(use.bias, []).append(use.of_bias())
        result.append(uses[0] if alone else _merged(uses))
    return result + [_summed(uses) for uses in direct.values()]


def _mergeable(call: LayerCall) -> bool:
    return call.options.get("groups", 1) == 1


def _uses(outer: Mapping[tuple[str, int], Sequence[OuterProductFactor]], bias: str | None) -> int:
    return sum(use.bias == bias for uses in outer.values() for use in uses) if bias is not None else 1


def _merged(uses: Sequence[OuterProductFactor]) -> OuterProductFactor:
    """Put the places of all uses of a weight side by side."""
    if len(uses) == 1:
        return replace(uses[0], bias=None)
    inputs = tuple(_joined(uses, q) for q in range(len(uses[0].inputs)))
    gradients = tuple(
        tuple(torch.cat(parts, 1) for parts in zip(*(use.gradients[p] for use in uses), strict=True))
        for p in range(len(uses[0].gradients))
    )
    return replace(uses[0], inputs=inputs, gradients=gradients, bias=None)


def _joined(uses: Sequence[OuterProductFactor], q: int) -> Tensor | None:
    if all(use.inputs[q] is None for use in uses):
        return None
    return torch.cat(
        [torch.zeros_like(_given(use.inputs[0])) if (a := use.inputs[q]) is None else a for use in uses], 1
    )


def _given(x: Tensor | None) -> Tensor:
    """Return the zeroth coefficient of an input, which is never left out."""
    assert x is not None
    return x


def _summed(uses: Sequence[DenseFactor]) -> DenseFactor:
    if len(uses) == 1:
        return uses[0]
    return DenseFactor(
        uses[0].weight, tuple(torch.stack(parts).sum(0) for parts in zip(*(use.jacobians for use in uses), strict=True))
    )


# ---- kinds


def _each_output(gradients: Gradients, function: Callable[[Tensor], Tensor]) -> Gradients:
    return tuple(tuple(function(part) for part in g) for g in gradients)


def _inputs(call: LayerCall, axis: Axis, samples: int) -> tuple[Tensor | None, ...]:
    """Return the inputs of a linear layer or an ungrouped convolution, (N, T, D) each."""
    if call.kind == "linear":
        return tuple(None if a is None else axis.split(a, samples).flatten(1, -2) for a in call.inputs)
    windows = [None if a is None else _windows(a, call).flatten(2) for a in call.inputs]
    return tuple(None if w is None else _samples(w, axis, samples) for w in windows)


def _places(x: Tensor, call: LayerCall, axis: Axis, samples: int) -> Tensor:
    """Return the gradient at its output, (N, T, E)."""
    return axis.split(x, samples).flatten(1, -2) if call.kind == "linear" else _samples(x.flatten(2).mT, axis, samples)


def _linear(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    gradients = _each_output(g, partial(_places, call=call, axis=axis, samples=samples))
    return [OuterProductFactor(call.names[0], _inputs(call, axis, samples), gradients, call.bias)]


def _convolution(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    groups = call.options["groups"]
    if groups == 1:
        return _linear(call, g, axis, samples)
    windows = [None if a is None else _windows(a, call) for a in call.inputs]  # (N, places, k, Cin)
    parts = _each_output(g, lambda x: x.flatten(2).mT)
    result: list[Factor] = []
    for index in range(groups):
        inputs = tuple(None if w is None else _group(w, index, groups, axis, samples) for w in windows)
        gradients = _each_output(parts, partial(_group, index=index, groups=groups, axis=axis, samples=samples))
        result.append(OuterProductFactor(call.names[0], inputs, gradients))
    if call.bias is not None:
        summed = _each_output(parts, lambda x: _samples(x, axis, samples).sum(1))
        result.append(DenseFactor(call.bias, tuple(torch.stack(rows) for rows in summed)))
    return result


def in_order_of_factors(gradient: Tensor, kind: str, transposed: bool, groups: int) -> Tensor:
    """Return a parameter's gradient with its numbers in the order in which factors have them, (P,).

    Args:
        gradient: Of the parameter's shape.
        kind: Of its call.
        transposed: Whether the call takes the weight as (in, out).
        groups: The number of factors of the parameter.
    """
    if kind == "convolution" and gradient.ndim > 1:
        gradient = gradient.flatten(2).mT
    if kind == "transposed convolution":
        gradient = torch.cat([part.permute(2, 1, 0) for part in gradient.flatten(2).chunk(groups)])
    return (gradient.mT if transposed and gradient.ndim == 2 else gradient).flatten()


def weighted(
    factors: Sequence[Factor], lambdas: Mapping[str, Tensor], in_order: Callable[[Tensor, str, int], Tensor]
) -> list[Factor]:
    """Return factors with lambda of every number of some parameters.

    Args:
        factors: All factors of some samples.
        lambdas: ``{parameter: tensor of its shape}``.
        in_order: Brings a tensor of a parameter, by its name and its number of factors, into the order of factors.
    """
    counts = Counter(name for factor in factors for name in factor.names)
    parts: dict[str, Iterator[Tensor]] = {}
    for name, value in lambdas.items():
        if counts[name]:
            parts[name] = iter(in_order(value, name, counts[name]).chunk(counts[name]))
    result: list[Factor] = []
    for factor in factors:
        own = [next(parts[name]) if name in parts else None for name in factor.names]
        result.append(factor.weighted(own[0], own[1] if len(own) > 1 else None))
    return result


class Formed:
    """The Jacobian of a layer used at more places than it has inputs, formed as gradients come in.

    It is then smaller than the gradients: of a convolution on large images by an order of magnitude.

    Args:
        call: The call.
        axis: The samples' axis.
        samples: N.
    """

    def __init__(self, call: LayerCall, axis: Axis, samples: int) -> None:
        self.call, self.axis, self.samples = call, axis, samples
        self._inputs = _inputs(call, axis, samples)
        self._rows: list[list[Tensor]] = []
        self._biases: list[list[Tensor]] = []

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Take the next output's g_0, g_1, ..."""
        g = [_places(part, self.call, self.axis, self.samples) for part in gradients]
        one = OuterProductFactor(self.call.names[0], self._inputs, tuple((part,) for part in g))
        self._rows.append([J[0] for J in one.formed(range(len(g)))])
        self._biases.append([part.sum(1) for part in g])

    def factors(self) -> list[Factor]:
        """Return J_m of the weight and of the bias."""
        result: list[Factor] = [
            DenseFactor(self.call.names[0], tuple(torch.stack(J) for J in zip(*self._rows, strict=True)))
        ]
        if self.call.bias is not None:
            result.append(DenseFactor(self.call.bias, tuple(torch.stack(J) for J in zip(*self._biases, strict=True))))
        return result


def worth_forming(call: LayerCall, calls: Sequence[LayerCall], samples: int) -> bool:
    """Return whether a call has more places than inputs, and its parameters no other use."""
    if call.weight is None or call.kind not in ("linear", "convolution") or call.options.get("groups", 1) > 1:
        return False
    if sum(bool({*call.names} & {*other.names}) for other in calls) > 1:
        return False
    x = _given(call.inputs[0])
    if call.kind == "linear":
        inputs, outputs = x.shape[-1], call.shape[-1]
    else:
        inputs, outputs = x.shape[1] * torch.Size(call.options["kernel"]).numel(), call.shape[1]
    return call.shape.numel() // (samples * outputs) > inputs


def _transposed(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    """Exchange the roles: windows of the gradient meet the input, place by place."""
    groups = call.options["groups"]
    places = _given(call.inputs[0]).shape[2:]
    windows = _each_output(g, lambda x: _windows(x, call, places))
    result: list[Factor] = []
    for index in range(groups):
        inputs = tuple(
            None if a is None else _group(a.flatten(2).mT, index, groups, axis, samples) for a in call.inputs
        )
        gradients = _each_output(windows, partial(_group, index=index, groups=groups, axis=axis, samples=samples))
        result.append(OuterProductFactor(call.names[0], inputs, gradients))
    return result


def _group(x: Tensor, index: int, groups: int, axis: Axis, samples: int) -> Tensor:
    """Return the channels of one group, (N m, places, ..., channels) as (N, m places, ... channels)."""
    return _samples(x.chunk(groups, -1)[index].flatten(2), axis, samples)


def _samples(x: Tensor, axis: Axis, samples: int) -> Tensor:
    """Return (N m, places, channels) as (N, m places, channels)."""
    return x if len(x) == samples else axis.split(x, samples).flatten(1, 2)


def _windows(x: Tensor, call: LayerCall, places: Sequence[int] | None = None) -> Tensor:
    """Return what a convolution's kernel sees, (N, places, kernel, channels)."""
    kernel = call.options["kernel"]
    count = len(kernel)
    stride, dilation = (_each(call.options[name], count) for name in ("stride", "dilation"))
    x = F.pad(x, _padding(call.options["padding"], kernel, dilation))
    if places is None:
        places = [
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
        ]
    else:  # an output that output_padding has made longer than the windows reach, or shorter
        short = [
            max(0, (n - 1) * s + d * (k - 1) + 1 - size)
            for size, n, k, s, d in zip(x.shape[2:], places, kernel, stride, dilation, strict=True)
        ]
        if any(short):
            x = F.pad(x, [edge for extra in reversed(short) for edge in (0, extra)])
    x = x.movedim(1, -1).contiguous()  # channels last: then windows are copied in long runs
    steps = x.stride()
    strides = (
        steps[0],
        *(s * step for s, step in zip(stride, steps[1:-1], strict=True)),
        *(d * step for d, step in zip(dilation, steps[1:-1], strict=True)),
        1,
    )
    view = x.as_strided((len(x), *places, *kernel, x.shape[-1]), strides)
    return view.reshape(len(x), torch.Size(places).numel(), torch.Size(kernel).numel(), x.shape[-1])


def _each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count if len(value) == 1 else 1)


def _padding(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return the padding before and after, last axis first, as ``torch.nn.functional.pad`` takes it."""
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in whole]
    else:
        pairs = [(p, p) for p in _each(0 if isinstance(padding, str) else padding, len(kernel))]
    return [edge for pair in reversed(pairs) for edge in pair]


def _embedding(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    tokens = axis.split(_given(call.inputs[0]), samples).flatten(1)
    inputs = (tokens, *[None] * (len(g) - 1))
    gradients = _each_output(g, lambda x: axis.split(x, samples).flatten(1, -2))
    return [EmbeddingFactor(call.names[0], inputs, gradients, rows_of_table=call.options["rows"])]


def _scale(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    result: list[Factor] = []
    if call.weight is not None:
        jacobians = []
        for order in range(len(g)):
            rows = []
            for i in range(len(g[0])):
                terms = [g[p][i] * a for p in range(order + 1) if (a := call.inputs[order - p]) is not None]
                rows.append(_reduced(sum(terms[1:], terms[0]), call, axis, samples))
            jacobians.append(torch.stack(rows))
        result.append(DenseFactor(call.weight, tuple(jacobians)))
    if call.bias is not None:
        reduced = _each_output(g, lambda x: _reduced(x, call, axis, samples))
        result.append(DenseFactor(call.bias, tuple(torch.stack(parts) for parts in reduced)))
    return result


def _reduced(x: Tensor, call: LayerCall, axis: Axis, samples: int) -> Tensor:
    """Sum a call's output over what the parameter is stretched along, (N, P)."""
    shape = [*[1] * (x.ndim - len(call.options["shape"])), *call.options["shape"]]
    del shape[axis.index]
    x = axis.split(x, samples)  # (N, m, ...)
    return x.sum([1, *(index + 2 for index, size in enumerate(shape) if size == 1)]).reshape(samples, -1)


_KINDS = {
    "linear": _linear,
    "convolution": _convolution,
    "transposed convolution": _transposed,
    "embedding": _embedding,
    "scale": _scale,
}
