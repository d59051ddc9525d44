"""How the Jacobian of each parameter is had: which uses are recognized, where the samples are, what falls back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.jacobian.capture import Capture, LayerCall, unrecognized
from torch_eft.measure.jacobian.gram import FORMED
from torch_eft.measure.jacobian.layers import Axis


@dataclass(frozen=True)
class Plan:
    """How the Jacobian of each parameter is had: which uses are recognized, where the samples are, what falls back."""

    sites: tuple[tuple[Any, ...], ...] = ()
    axes: tuple[Axis, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    fallback: Mapping[str, str] = field(default_factory=dict)
    sample_bytes: int = 0
    outputs: int = 0


def make_plan(network: IsolatedModel, inputs: Any, trainable: Sequence[str], refused: Mapping[str, str]) -> Plan:
    """Recognize the uses of the parameters ``trainable`` on a few samples.

    Args:
        network: The network.
        inputs: All of the probe's inputs, on the network's device.
        trainable: Names of the parameters that count.
        refused: ``{parameter: why}``, to be left to the fallback.
    """
    count = sample_count(inputs)
    few, fewer = (min(count, 3), min(count, 2)) if count > 2 else (count, 1)
    fallback = dict(refused)
    while True:
        recognized = [name for name in trainable if name not in fallback]
        try:
            traced = _trace(network, slice_of(inputs, 0, few), trainable, fallback)
            smaller = _trace(network, slice_of(inputs, 0, fewer), trainable, fallback).sites
        except Exception as error:  # whatever the recording breaks, the fallback does not need it
            with torch.no_grad():
                outputs = network(network.params, slice_of(inputs, 0, fewer)).shape[1]
            reason = f"the recording of its layers failed: {type(error).__name__}: {error}"
            return Plan(fallback=fallback | dict.fromkeys(recognized, reason), outputs=outputs)
        axes = _axes(traced.sites, smaller, few, fewer)
        new = dict.fromkeys(traced.left, "a use that is not recognized")
        for site, axis in zip(traced.sites, axes, strict=True):
            if axis is None:
                new |= dict.fromkeys(site.names, f"a {site.kind} operation whose samples cannot be told apart")
        new |= _mixed_uses(traced.sites)
        if not new:
            break
        fallback |= new
    kinds = {name: site.kind for site in traced.sites for name in site.names}
    unused = [name for name in recognized if name not in kinds]
    kinds |= dict.fromkeys(unused, "unused")
    return Plan(
        tuple(signature(site, axis) for site, axis in zip(traced.sites, axes, strict=True)),
        tuple(axis for axis in axes if axis is not None),
        kinds,
        fallback,
        _sample_bytes(network, traced, few),
        traced.outputs.shape[1],
    )


def sample_count(inputs: Any) -> int:
    """N."""
    return next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def slice_of(inputs: Any, start: int, length: int) -> Any:
    """Some of the samples."""
    return tree_map_only(Tensor, lambda tensor: tensor[start : start + length], inputs)


@dataclass(frozen=True)
class _Trace:
    outputs: Tensor
    sites: list[LayerCall]
    left: set[str]


def _trace(network: IsolatedModel, inputs: Any, trainable: Sequence[str], fallback: Mapping[str, str]) -> _Trace:
    leaves = {name: network.params[name].detach().requires_grad_() for name in trainable}
    with Capture(leaves, fallback) as capture:
        outputs = network({**network.params, **leaves}, inputs)
    return _Trace(outputs, capture.sites, unrecognized(outputs, leaves) - set(fallback))


def _axes(sites: Sequence[LayerCall], smaller: Sequence[LayerCall], few: int, fewer: int) -> list[Axis | None]:
    if len(sites) != len(smaller):
        return [None] * len(sites)
    return [_axis(first, second, few, fewer) for first, second in zip(sites, smaller, strict=True)]


def _axis(site: LayerCall, smaller: LayerCall, few: int, fewer: int) -> Axis | None:
    """The one axis that grows with the number of samples; None without one, or if the parameter varies along it."""
    index = 0  # a single sample: everything belongs to it
    if few > fewer:
        differ = [i for i, (a, b) in enumerate(zip(site.shape, smaller.shape, strict=False)) if a != b]
        if len(site.shape) != len(smaller.shape) or len(differ) != 1:
            return None
        index = differ[0]
        if site.shape[index] * fewer != smaller.shape[index] * few or site.shape[index] % few:
            return None
    if "convolution" in site.kind and index != 0:
        return None
    if site.kind in ("linear", "embedding") and index == len(site.shape) - 1:
        return None
    if site.kind == "scale":
        shape = (*[1] * (len(site.shape) - len(site.options["shape"])), *site.options["shape"])
        if shape[index] != 1:
            return None
    outer, inner = Axis(index), Axis(index, inner=True)
    if few == fewer or site.shape[index] == few:
        return outer
    return min((outer, inner), key=lambda axis: _difference(site, smaller, axis, few, fewer))


def _difference(site: LayerCall, smaller: LayerCall, axis: Axis, few: int, fewer: int) -> float:
    """How far the inputs that belong to the first samples depend on how many others there are."""
    more, less = site.inputs[0], smaller.inputs[0]
    if more is None or less is None or more.ndim <= axis.index:
        return 0.0
    if more.device.type == "meta":
        return float(axis.inner)
    return float((axis.split(more, few)[:fewer] - axis.split(less, fewer)).abs().max())


def _mixed_uses(sites: Sequence[LayerCall]) -> dict[str, str]:
    """Parameters whose uses do not add up to one factor."""
    found = {}
    forms: dict[str, set[str]] = {}
    for site in sites:
        grouped = site.options.get("groups", 1) > 1
        if site.weight is not None:
            form = {"convolution": "matrix", "linear": "matrix"}.get(site.kind, site.kind)
            forms.setdefault(site.weight, set()).add(form)
            repeated = sum(other.weight == site.weight for other in sites) > 1
            if repeated and (grouped or site.kind != "linear"):
                found[site.weight] = f"several {site.kind} uses"
        if site.bias is not None:
            forms.setdefault(site.bias, set()).add("bias")
    for name, kinds in forms.items():
        if len(kinds) > 1:
            found[name] = f"uses of different kinds: {', '.join(sorted(kinds))}"
    return found


def signature(site: LayerCall, axis: Axis | None) -> tuple[Any, ...]:
    """What a use must have in common with the planned one: all but the number of samples."""
    shape = tuple(-1 if axis is not None and index == axis.index else size for index, size in enumerate(site.shape))
    return site.kind, site.weight, site.bias, shape


def _sample_bytes(network: IsolatedModel, traced: _Trace, few: int) -> int:
    """Inputs (convolutions': what their windows see), outputs, the gradients of every output, and one buffer."""
    channels = traced.outputs.shape[1]
    numbers, buffer = 0, 0
    for site in traced.sites:
        windows = torch.Size(site.options["kernel"]).numel() if site.kind == "convolution" else 1
        numbers += (channels + 1) * site.shape.numel()
        numbers += 0 if site.inputs[0] is None else windows * site.inputs[0].numel()
        if site.weight is not None and site.kind != "scale":
            weight = network.params[site.weight]
            if site.shape.numel() > few * len(weight):  # several places: the Jacobian is formed in parts
                buffer = max(buffer, channels * min(weight.numel(), FORMED * (weight.numel() // len(weight))))
    return (numbers // few + buffer) * traced.outputs.element_size()
