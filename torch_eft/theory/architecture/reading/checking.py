"""Runs what was read, with the module's own weights, beside the module: outputs and gradients must agree.

A reading follows the operations of the forward alone; what they leave open shows in numbers: a backward of its own,
parts without gradients, samples that mix, random numbers, an argument that no rule looks at. It is compared on three
random inputs, and traced on two, in double precision where the forward allows it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from torch_eft.theory.architecture.closed import over_positions, spread_out
from torch_eft.theory.architecture.nodes import Add, Affine, Architecture, Data, Elementwise, Norm, Pool, Weight

_SAMPLES = 3
"""Another number than the two that are traced."""

_PRECISIONS = ((torch.float64, 1e-4), (torch.float32, 1e-2))
"""Those that are tried, and the relative difference from which two numbers are not the same: parts of a forward may
compute in float32, and an activation's kink may lie within rounding."""


@dataclass(frozen=True)
class Held:
    """The parameters of a node.

    Args:
        W: Name of its weights or gains; None without.
        b: Of its biases.
        arranged: Puts the weights into (channels, channels before, k), gains and biases into (channels, positions).
        factor: What gains are multiplied with.
    """

    W: str | None
    b: str | None
    arranged: Callable[[Tensor], Tensor]
    factor: float = 1.0


def disagreement(
    module: Any,
    architecture: Architecture,
    held: Mapping[int, Held],
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Tensor,
) -> str | None:
    """Compare what was read with the module, without a trace in either.

    Args:
        module: The module.
        architecture: As it was read.
        held: The parameters of its nodes.
        parameters: Of the module, on the processor.
        buffers: Likewise.
        x: Inputs that it takes.

    Returns:
        In what they differ; None where they agree.
    """
    for dtype, tolerance in _PRECISIONS:
        placed = [
            {name: _wide(each, dtype).requires_grad_(each.requires_grad) for name, each in parameters.items()}
            for _ in range(2)
        ]
        around = {name: _wide(each, dtype) for name, each in buffers.items()}
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            inputs = _inputs(x, dtype)
            try:
                given = functional_call(module, {**placed[0], **around}, (inputs.clone(),))
            except Exception:  # a forward with a precision of its own
                continue
            theirs = _only(given).flatten(1)
            ours = outputs(architecture, held, placed[1], inputs)
            if ours.shape != theirs.shape or not _same(theirs, ours, tolerance):
                return "its outputs are not those of the operations in its forward"
            weight = torch.randn(ours.shape, dtype=torch.float64)
            gradients = [
                _gradients((value.double() * weight).sum(), each)
                for value, each in zip((theirs, ours), placed, strict=True)
            ]
        whole = math.sqrt(sum(float(each.square().sum()) for each in gradients[1].values()))
        for name, one in gradients[0].items():
            if not _same(one, gradients[1][name], tolerance, tolerance * whole):
                return f"the gradient of {name!r} is not that of the operations in its forward (no_grad, a backward)"
        return None
    return None


def outputs(architecture: Architecture, held: Mapping[int, Held], parameters: Mapping[str, Tensor], x: Any) -> Tensor:
    """Return the outputs of one network.

    Args:
        architecture: The architecture.
        held: The parameters of its nodes.
        parameters: By name.
        x: Inputs, (N, ...).

    Returns:
        (N, C).
    """
    h: list[Tensor] = []
    for index, node in enumerate(architecture.nodes):
        read = [h[each] for each in node.inputs]
        own = held.get(index)
        if isinstance(node, Data):
            value = x if node.prepare is None else node.prepare(x)
            h.append(value.reshape(len(x), math.prod(node.positions), node.channels).mT)
        elif isinstance(node, Weight):
            assert own is not None and own.W is not None
            W = own.arranged(parameters[own.W])
            value = torch.einsum("ock,kncp->nop", W, node.maps.on_labels(read[0].to(W.dtype)))
            h.append(value if own.b is None else value + parameters[own.b][:, None])
        elif isinstance(node, Elementwise):
            h.append(node.activation.function(read[0]))
        elif isinstance(node, Pool):
            h.append(node.maps.on_labels(read[0])[0])
        elif isinstance(node, Add):
            h.append(torch.stack(read).sum(0))
        elif isinstance(node, Norm):
            h.append(_normalized(node, read[0], architecture.positions[index]))
        else:
            h.append(_scaled(node, read[0], own, parameters))
    return h[-1].flatten(1)


def _normalized(node: Norm, h: Tensor, sizes: tuple[int, ...]) -> Tensor:
    groups = h.unflatten(1, (node.groups, -1))
    if node.centered:
        groups = groups - spread_out(over_positions(groups.mean(2, keepdim=True), sizes, node.over), sizes, node.over)
    square = over_positions(groups.square().mean(2, keepdim=True), sizes, node.over)
    return (groups / spread_out(square + node.eps, sizes, node.over).sqrt()).flatten(1, 2)


def _scaled(node: Affine, h: Tensor, own: Held | None, parameters: Mapping[str, Tensor]) -> Tensor:
    if own is None:
        return h * node.factor
    h = h * own.factor
    h = h if own.W is None else h * own.arranged(parameters[own.W])
    return h if own.b is None else h + own.arranged(parameters[own.b])


def _only(given: Any) -> Tensor:
    while not isinstance(given, Tensor):
        (given,) = given.values() if isinstance(given, Mapping) else given
    return given


def _wide(each: Tensor, dtype: torch.dtype) -> Tensor:
    return each.detach().to(dtype, copy=True) if each.is_floating_point() else each.detach().clone()


def _inputs(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.is_floating_point():
        return x.detach().cpu()[:1].expand(_SAMPLES, *x.shape[1:]).clone()
    return torch.randn(_SAMPLES, *x.shape[1:], dtype=dtype, generator=torch.Generator().manual_seed(0))


def _gradients(value: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name, each in parameters.items() if each.requires_grad]
    if not names or not value.requires_grad:
        return {name: torch.zeros_like(parameters[name]) for name in names}
    found: Sequence[Tensor | None] = torch.autograd.grad(value, [parameters[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def _same(first: Tensor, second: Tensor, tolerance: float, floor: float = 0.0) -> bool:
    difference = float((first.detach().double() - second.detach().double()).norm())
    return not difference > tolerance * float(second.detach().double().norm()) + floor
