"""Turns recorded calls and gradients into the factors of the Jacobian, kind by kind."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from torch_eft.measure.jacobian.capture import LayerCall
from torch_eft.measure.jacobian.gram import (
    DenseFactor,
    EmbeddingFactor,
    Factor,
    OuterProductFactor,
    PerOutput,
    TiedFactor,
)
from torch_eft.measure.jacobian.layers.formed import Formed, FormedScale
from torch_eft.measure.jacobian.layers.places import Axis, gradients_at_places, inputs_at_places, merged, windows

Gradients = tuple[PerOutput, ...]
"""g_0, g_1, ... of one call's output: for every output of the network a tensor of the call's shape."""


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
            elif isinstance(factor, DenseFactor):
                direct.setdefault(factor.weight, []).append(factor)
    result: list[Factor] = []
    for (_, _), uses in outer.items():
        alone = len(uses) == 1 and uses[0].bias not in direct and _uses(outer, uses[0].bias) == 1
        for use in uses:
            if use.bias is not None and not alone:
                direct.setdefault(use.bias, []).append(use.of_bias())
        result.append(uses[0] if alone else _joined_uses(uses))
    return result + [_summed(uses) for uses in direct.values()]


def _mergeable(call: LayerCall) -> bool:
    return call.options.get("groups", 1) == 1


def _uses(outer: Mapping[tuple[str, int], Sequence[OuterProductFactor]], bias: str | None) -> int:
    return sum(use.bias == bias for uses in outer.values() for use in uses) if bias is not None else 1


def _joined_uses(uses: Sequence[OuterProductFactor]) -> Factor:
    """Return one factor of all uses of a weight, as a table and as a matrix."""
    tables = [use for use in uses if isinstance(use, EmbeddingFactor)]
    matrices = [use for use in uses if not isinstance(use, EmbeddingFactor)]
    if not (tables and matrices):
        return _merged(uses)
    table = _merged(tables)
    assert isinstance(table, EmbeddingFactor)
    return TiedFactor(_merged(matrices), table)


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
    parts = []
    for use in uses:
        a, given = use.inputs[q], use.inputs[0]
        assert given is not None  # the zeroth coefficient of an input is never left out
        parts.append(torch.zeros_like(given) if a is None else a)
    return torch.cat(parts, 1)


def _summed(uses: Sequence[DenseFactor]) -> DenseFactor:
    if len(uses) == 1:
        return uses[0]
    return DenseFactor(
        uses[0].weight, tuple(torch.stack(parts).sum(0) for parts in zip(*(use.jacobians for use in uses), strict=True))
    )


# ---- kinds


def _each_output(gradients: Gradients, function: Callable[[Tensor], Tensor]) -> Gradients:
    return tuple(tuple(function(part) for part in g) for g in gradients)


def _linear(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    gradients = _each_output(g, partial(gradients_at_places, call=call, axis=axis, samples=samples))
    return [OuterProductFactor(call.names[0], inputs_at_places(call, axis, samples), gradients, call.bias)]


def _convolution(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    if call.options["groups"] == 1:
        return _linear(call, g, axis, samples)
    return _as_they_come(Formed(call, axis, samples, len(g[0])), g)


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


def _transposed(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    """Exchange the roles: windows of the gradient meet the input, place by place."""
    groups = call.options["groups"]
    places = call.given.shape[2:]
    seen = _each_output(g, lambda x: windows(x, call, places))
    result: list[Factor] = []
    for index in range(groups):
        inputs = tuple(
            None if a is None else _group(a.flatten(2).mT, index, groups, axis, samples) for a in call.inputs
        )
        gradients = _each_output(seen, partial(_group, index=index, groups=groups, axis=axis, samples=samples))
        result.append(OuterProductFactor(call.names[0], inputs, gradients))
    return result


def _group(x: Tensor, index: int, groups: int, axis: Axis, samples: int) -> Tensor:
    """Return the channels of one group, (N m, places, ..., channels) as (N, m places, ... channels)."""
    return merged(x.chunk(groups, -1)[index].flatten(2), axis, samples)


def _embedding(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    tokens = axis.split(call.given, samples).flatten(1)
    inputs = (tokens, *[None] * (len(g) - 1))
    gradients = _each_output(g, lambda x: axis.split(x, samples).flatten(1, -2))
    return [EmbeddingFactor(call.names[0], inputs, gradients, rows_of_table=call.options["rows"])]


def _scale(call: LayerCall, g: Gradients, axis: Axis, samples: int) -> list[Factor]:
    return _as_they_come(FormedScale(call, axis, samples), g)


def _as_they_come(layer: Formed | FormedScale, g: Gradients) -> list[Factor]:
    for parts in zip(*g, strict=True):
        layer.add(parts)
    return layer.factors()


_KINDS = {
    "linear": _linear,
    "convolution": _convolution,
    "transposed convolution": _transposed,
    "embedding": _embedding,
    "scale": _scale,
}
