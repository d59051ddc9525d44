"""Jacobians of a network sample by sample: as factors where its layers are recognised, as such elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_eft.measure.capture import Capture, Site, unrecognised
from torch_eft.measure.composite import WrittenOut
from torch_eft.measure.gram import FORMED, Direct, Factor, PerOutput
from torch_eft.measure.isolation import IsolatedModel
from torch_eft.measure.jets import coefficients_of, jet
from torch_eft.measure.layers import Axis, Formed, factors, worth_forming

_SMALL = 2**19  # numbers in all uses' outputs


@dataclass(frozen=True)
class Plan:
    """How the Jacobian of each parameter is had.

    Args:
        sites: Signatures of the recognised uses in the order of execution.
        axes: The samples' axis of each use's output.
        kinds: ``{parameter: kind of use}``, recognised ones.
        fallback: ``{parameter: why}``, those whose Jacobian is formed sample by sample.
        sample_bytes: Memory for factors, graph and buffers, a sample and a coefficient.
        outputs: C.
    """

    sites: tuple[tuple[Any, ...], ...] = ()
    axes: tuple[Axis, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    fallback: Mapping[str, str] = field(default_factory=dict)
    sample_bytes: int = 0
    outputs: int = 0


def make_plan(network: IsolatedModel, inputs: Any, moving: Sequence[str], refused: Mapping[str, str]) -> Plan:
    """Recognise the uses of the parameters ``moving`` on a few samples.

    Args:
        network: The network.
        inputs: All of the probe's inputs, on the network's device.
        moving: Names of the parameters that count.
        refused: ``{parameter: why}``, to be left to the fallback.
    """
    count = sample_count(inputs)
    few, fewer = (min(count, 3), min(count, 2)) if count > 2 else (count, 1)
    fallback = dict(refused)
    while True:
        recognised = [name for name in moving if name not in fallback]
        try:
            traced = _trace(network, slice_of(inputs, 0, few), moving, fallback)
            smaller = _trace(network, slice_of(inputs, 0, fewer), moving, fallback).sites
        except Exception as error:  # whatever the recording breaks, the fallback does not need it
            with torch.no_grad():
                outputs = network(network.params, slice_of(inputs, 0, fewer)).shape[1]
            reason = f"the recording of its layers failed: {type(error).__name__}: {error}"
            return Plan(fallback=fallback | dict.fromkeys(recognised, reason), outputs=outputs)
        axes = _axes(traced.sites, smaller, few, fewer)
        new = dict.fromkeys(traced.left, "a use that is not recognised")
        for site, axis in zip(traced.sites, axes, strict=True):
            if axis is None:
                new |= dict.fromkeys(site.names, f"a {site.kind} operation whose samples cannot be told apart")
        new |= _mixed_uses(traced.sites)
        if not new:
            break
        fallback |= new
    kinds = {name: site.kind for site in traced.sites for name in site.names}
    unused = [name for name in recognised if name not in kinds]
    kinds |= dict.fromkeys(unused, "unused")
    return Plan(
        tuple(_signature(site, axis) for site, axis in zip(traced.sites, axes, strict=True)),
        tuple(axis for axis in axes if axis is not None),
        kinds,
        fallback,
        _sample_bytes(network, traced, few),
        traced.outputs.shape[1],
    )


def jacobian_factors(
    network: IsolatedModel,
    inputs: Any,
    moving: Sequence[str],
    plan: Plan,
    direction: Mapping[str, Tensor] | None = None,
    order: int = 0,
) -> list[Factor]:
    """The Jacobian's Taylor coefficients J_0 .. J_order along ``direction``, as factors that cover every parameter."""
    found: list[Factor] = []
    samples = sample_count(inputs)
    if plan.sites:
        leaves = {name: network.params[name].detach().requires_grad_() for name in moving}
        params = dict(network.params) | (leaves if direction is None else _jets(leaves, direction, order))
        with Capture({name: params[name] for name in moving}, plan.fallback) as capture:
            outputs = network(params, inputs)
        signatures = tuple(_signature(site, axis) for site, axis in zip(capture.sites, plan.axes, strict=False))
        if signatures != plan.sites or len(capture.sites) != len(plan.sites):
            raise ValueError(
                "model: what its forward does depends on the number or the values of the samples; measure one "
                "sample at a time, or pass samples that take the same way through it"
            )
        found = _factors(outputs, capture.sites, plan.axes, samples, order)
    missing = [name for name in plan.fallback if name in moving]
    if missing:
        found += _fallback(network, inputs, missing, moving, direction, order)
    return found


def reverse_factors(
    network: IsolatedModel, inputs: Any, moving: Sequence[str], direction: Mapping[str, Tensor], order: int
) -> list[Factor]:
    """J_0 .. J_order of every parameter by reverse mode of reverse mode, for operations that jets do not know."""
    leaves = [network.params[name].detach().requires_grad_() for name in moving]
    with WrittenOut():
        outputs = network({**network.params, **dict(zip(moving, leaves, strict=True))}, inputs)
    along = [direction[name] for name in moving]
    rows = [[_reverse_series(value, leaves, along, order) for value in row] for row in outputs]
    return [
        Direct(
            name,
            tuple(
                torch.stack([torch.stack([row[i][m][index] for row in rows]) for i in range(outputs.shape[1])])
                for m in range(order + 1)
            ),
        )
        for index, name in enumerate(moving)
    ]


def _reverse_series(value: Tensor, leaves: Sequence[Tensor], along: Sequence[Tensor], order: int) -> list[list[Tensor]]:
    """Of one number, for every m the flattened rows of J_m, parameter by parameter."""
    found = []
    for m in range(order + 1):
        if value.requires_grad:
            gradients = torch.autograd.grad(
                value,
                leaves,
                create_graph=m < order,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
        found.append([g.detach().flatten() for g in gradients])
        # J_m = (J_{m-1} . v)' / m
        value = torch.stack([(g * v).sum() for g, v in zip(gradients, along, strict=True)]).sum() / (m + 1)
    return found


def sample_count(inputs: Any) -> int:
    """N."""
    return next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def slice_of(inputs: Any, start: int, length: int) -> Any:
    """Some of the samples."""
    return tree_map_only(Tensor, lambda tensor: tensor[start : start + length], inputs)


@dataclass(frozen=True)
class _Trace:
    outputs: Tensor
    sites: list[Site]
    left: set[str]


def _trace(network: IsolatedModel, inputs: Any, moving: Sequence[str], fallback: Mapping[str, str]) -> _Trace:
    leaves = {name: network.params[name].detach().requires_grad_() for name in moving}
    with Capture(leaves, fallback) as capture:
        outputs = network({**network.params, **leaves}, inputs)
    return _Trace(outputs, capture.sites, unrecognised(outputs, leaves) - set(fallback))


def _axes(sites: Sequence[Site], smaller: Sequence[Site], few: int, fewer: int) -> list[Axis | None]:
    if len(sites) != len(smaller):
        return [None] * len(sites)
    return [_axis(first, second, few, fewer) for first, second in zip(sites, smaller, strict=True)]


def _axis(site: Site, smaller: Site, few: int, fewer: int) -> Axis | None:
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


def _difference(site: Site, smaller: Site, axis: Axis, few: int, fewer: int) -> float:
    """How far the inputs that belong to the first samples depend on how many others there are."""
    more, less = site.inputs[0], smaller.inputs[0]
    if more is None or less is None or more.ndim <= axis.index:
        return 0.0
    if more.device.type == "meta":
        return float(axis.inner)
    return float((axis.split(more, few)[:fewer] - axis.split(less, fewer)).abs().max())


def _mixed_uses(sites: Sequence[Site]) -> dict[str, str]:
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


def _signature(site: Site, axis: Axis | None) -> tuple[Any, ...]:
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


def _jets(leaves: Mapping[str, Tensor], direction: Mapping[str, Tensor], order: int) -> dict[str, Tensor]:
    return {name: jet([leaf, direction[name], *[None] * (order - 1)]) for name, leaf in leaves.items()}


def _factors(outputs: Tensor, sites: Sequence[Site], axes: Sequence[Axis], samples: int, order: int) -> list[Factor]:
    """From g_p = d z_order / d o_{order - p} of every use's output.

    Small layers take all outputs of the network at once. Large ones take them one after the other: kernels are large
    enough, operations without a batching rule would be looped over and their results copied, and the Jacobian of a
    layer with many places can take the place of its gradients.
    """
    last = coefficients_of(outputs, order)[order]
    channels = outputs.shape[1]
    edges = [site.edges[order - p] for site in sites for p in range(order + 1)]
    shapes = [site.shape for site in sites for _ in range(order + 1)]
    if last is None or not last.requires_grad:
        zeros = [torch.zeros(shape, dtype=outputs.dtype, device=outputs.device) for shape in shapes]
        return factors(sites, _by_site([(zero,) * channels for zero in zeros], order), axes, samples)
    if channels > 1 and sum(shape.numel() for shape in shapes) <= _SMALL:
        parts = _all_at_once(last, edges, shapes)
        if parts is not None:
            return factors(sites, _by_site(parts, order), axes, samples)
    formed = {
        index: Formed(site, axis, samples)
        for index, (site, axis) in enumerate(zip(sites, axes, strict=True))
        if worth_forming(site, sites, samples)
    }
    kept = [index for index in range(len(sites)) if index not in formed]
    rows: list[list[Tensor]] = []
    for i in range(channels):
        found = torch.autograd.grad(last[:, i].sum(), edges, retain_graph=i < channels - 1, allow_unused=True)
        given = [last.new_zeros(shape) if g is None else g for g, shape in zip(found, shapes, strict=True)]
        for index, layer in formed.items():
            layer.add(given[index * (order + 1) : (index + 1) * (order + 1)])
        rows.append([given[index * (order + 1) + p] for index in kept for p in range(order + 1)])
        del found, given
    gradients = _by_site([tuple(parts) for parts in zip(*rows, strict=True)], order)
    others = factors([sites[index] for index in kept], gradients, [axes[index] for index in kept], samples)
    return [factor for layer in formed.values() for factor in layer.factors()] + others


def _by_site(parts: Sequence[PerOutput], order: int) -> list[tuple[PerOutput, ...]]:
    return [tuple(parts[start : start + order + 1]) for start in range(0, len(parts), order + 1)]


def _all_at_once(last: Tensor, edges: Sequence[Any], shapes: Sequence[torch.Size]) -> list[PerOutput] | None:
    """The gradients of sum_a last_{a;i} for every output i in one backward pass; None where that is not possible."""
    channels = last.shape[1]
    unit = torch.eye(channels, dtype=last.dtype, device=last.device)[:, None].expand(-1, len(last), -1)
    try:
        found = torch.autograd.grad(last, edges, unit, is_grads_batched=True, allow_unused=True, retain_graph=True)
    except RuntimeError:  # an operation that cannot be batched
        return None
    return [
        (last.new_zeros(shape),) * channels if g is None else g.unbind(0)
        for g, shape in zip(found, shapes, strict=True)
    ]


# ---- the fallback


def _fallback(
    network: IsolatedModel,
    inputs: Any,
    names: Sequence[str],
    moving: Sequence[str],
    direction: Mapping[str, Tensor] | None,
    order: int,
) -> list[Factor]:
    """The Jacobian of some parameters, one sample at a time."""
    if order == 0:
        rows = _first_order(network, inputs, names)
        return [Direct(name, (rows[name].flatten(2).transpose(0, 1),)) for name in names]
    assert direction is not None
    found: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(order + 1)] for name in names}
    for index in range(sample_count(inputs)):
        leaves = {name: network.params[name].detach().requires_grad_() for name in moving}
        outputs = network({**network.params, **_jets(leaves, direction, order)}, slice_of(inputs, index, 1))
        for m, part in enumerate(coefficients_of(outputs, order)):
            for name, row in zip(names, _rows(part, [leaves[name] for name in names], outputs.shape[1]), strict=True):
                found[name][m].append(row)
    return [Direct(name, tuple(torch.stack(parts, 1) for parts in found[name])) for name in names]


def _rows(part: Tensor | None, leaves: Sequence[Tensor], channels: int) -> list[Tensor]:
    """D part_i / d leaf, (C, P) each; ``part`` is (1, C)."""
    if part is None or not part.requires_grad:
        return [leaf.new_zeros(channels, leaf.numel()) for leaf in leaves]
    gradients = [
        torch.autograd.grad(part[0, i], leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for i in range(channels)
    ]
    return [torch.stack(row).flatten(1) for row in zip(*gradients, strict=True)]


def _first_order(network: IsolatedModel, inputs: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """(N, C, *parameter) by name."""
    moving = {name: network.params[name] for name in names}
    still = {name: value for name, value in network.params.items() if name not in moving}

    def one_sample(params: dict[str, Tensor], sample: Any) -> Tensor:
        return network({**params, **still}, tree_map_only(Tensor, lambda tensor: tensor[None], sample))[0]

    try:
        return vmap(jacrev(one_sample), in_dims=(None, 0))(moving, inputs)
    except (RuntimeError, NotImplementedError):  # an op without a batching rule: one sample at a time
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for index in range(sample_count(inputs)):
            leaves = {name: value.detach().requires_grad_() for name, value in moving.items()}
            outputs = network({**still, **leaves}, slice_of(inputs, index, 1))
            for name, row in zip(names, _rows(outputs, list(leaves.values()), outputs.shape[1]), strict=True):
                rows[name].append(row)
        return {name: torch.stack(parts) for name, parts in rows.items()}
