"""Measures how signals and gradients pass through any network, block by block, from its Jacobians.

*Bottlenecks* are the outputs of modules with parameters that every path from the inputs to the output goes through.
Inside a residual block there is none, so that the blocks themselves are the bottlenecks. They are found in the autograd
graph, not by names.

At a bottleneck t, J = (1/N C) sum_{a,i} |dz_{i;a} / dt_a|^2, the squared gradient of an output summed over the
features of t; chi = J / J_next is the susceptibility of the part between two bottlenecks, chi_perp of PDLT 5.1 for a
layer of an MLP (averaged partial Jacobian norm: Doshi, He, Gromov 2021).

Averaging over positions (global average pooling, the mean over tokens) divides J by their number, at any depth: m equal
gradients 1/m have the sum of squares 1/m. That is no property of depth. It shows in gradients that have the same sign
at all positions: n = sum_c (sum_p g_cp)^2 / sum_cp g_cp^2 is up to m then, and about 1 where weights mix positions. A
place carries the ratio of its n to that of the next, where positions become fewer, as its factor ``averaged``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import Probe

EXACT_OUTPUTS = 16
"""Number of outputs up to which each is differentiated; of more outputs, as many random combinations are."""


@dataclass(frozen=True)
class Bottleneck:
    """A bottleneck of one network.

    Args:
        name: Name of the module whose output it is; ``name:2`` for its second call, and so on.
        kind: Class of the module.
        features: Number of features per sample.
        variance: Mean square of the features.
        entering: Mean square of the module's input per sample, (N,); None where that is not a tensor of N rows.
        gradient: J, the mean squared gradient of an output.
        averaged: Factor >= 1 by which averaging over positions, between here and the next place, divides J.
    """

    name: str
    kind: str
    features: int
    variance: float
    entering: Tensor | None
    gradient: float
    averaged: float


@dataclass(frozen=True)
class _Record:
    name: str
    module: nn.Module
    node: Any
    edge: Any
    shape: torch.Size
    features: int
    variance: float
    entering: Tensor | None


def bottlenecks(network: IsolatedModel, probe: Probe) -> list[Bottleneck]:
    """The bottlenecks of an isolated network.

    Raises ``ValueError`` if the forward rejects the probe.

    Args:
        network: The network.
        probe: Inputs; samples must not depend on one another.

    Returns:
        The bottlenecks in the order of execution; empty if there is none.
    """
    params = {name: value.detach().requires_grad_() for name, value in network.params.items()}
    inputs = tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t, network.place(probe)
    )
    records, outputs = _recorded(network, params, Probe(inputs))
    leaves = {id(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    chosen = _chosen(records, outputs, leaves)
    if not chosen:
        return []
    squares = _squared_gradients(outputs, [record.edge for record in chosen])
    calls: dict[str, int] = {}
    chain = []
    for index, (record, own) in enumerate(zip(chosen, squares, strict=True)):
        calls[record.name] = calls.get(record.name, 0) + 1
        name = record.name if calls[record.name] == 1 else f"{record.name}:{calls[record.name]}"
        kind, averaged = type(record.module).__name__, 1.0
        if index + 1 < len(chosen):
            averaged = _averaged(record, own, chosen[index + 1], squares[index + 1])
        chain.append(Bottleneck(name, kind, record.features, record.variance, record.entering, own[0], averaged))
    return chain


def _averaged(here: _Record, own: list[float], after: _Record, its: list[float]) -> float:
    """The factor by which averaging over positions divides J from one place to the next."""
    if own[0] == 0 or its[0] == 0:
        return 1.0
    factor = 1.0
    for channels, shared, later in zip((1, -1), own[1:], its[1:], strict=True):
        fewer = here.features / here.shape[channels] / (after.features / after.shape[channels])
        # No more than what J lost: a sum over positions has equal gradients, too, and divides nothing.
        factor = max(factor, min(shared / own[0] / (later / its[0]), fewer, its[0] / own[0]))
    return factor


def _recorded(network: IsolatedModel, params: dict[str, Tensor], probe: Probe) -> tuple[list[_Record], Tensor]:
    records: list[_Record] = []

    def record(name: str, module: nn.Module, args: Any, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.grad_fn is None:
            return
        entering = args[0] if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else None
        if entering is not None and len(entering) == probe.size:
            entering = entering.detach().double().flatten(1).square().mean(1)
        else:
            entering = None
        # Taken now: a later operation may change the tensor in place.
        edge, size = get_gradient_edge(value), value.numel() // probe.size
        variance = float(value.detach().double().square().mean())
        records.append(_Record(name, module, edge.node, edge, value.shape, size, variance, entering))

    handles = [
        module.register_forward_hook(lambda module, args, value, name=name: record(name, module, args, value))
        for name, module in network.shadow.named_modules()
        if name and not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
    ]
    try:
        with torch.no_grad():
            checked_output(network, probe, params)  # raises if something is wrong with the inputs
        return records, network(params, probe.inputs)
    finally:
        for handle in handles:
            handle.remove()


def _chosen(records: Sequence[_Record], outputs: Tensor, leaves: set[int]) -> list[_Record]:
    order: list[Any] = []
    by_node: dict[Any, list[_Record]] = {}
    for record in records:
        if record.node not in by_node:
            order.append(record.node)
        if type(record.module) is not nn.Sequential and _weighted(record.module):
            by_node.setdefault(record.node, []).append(record)
        else:
            by_node.setdefault(record.node, [])
    cuts = [
        by_node[node]
        for index, node in enumerate(order)
        if by_node[node] and not _reaches(outputs.grad_fn, node, set(order[:index]), leaves)
    ]
    return [_named(cut, [record.name for other in cuts if other is not cut for record in other]) for cut in cuts]


def _named(cut: Sequence[_Record], others: Sequence[str]) -> _Record:
    """The outermost module that ends here and holds no other bottleneck: a block rather than its last layer."""
    free = [record for record in cut if not any(name.startswith(f"{record.name}.") for name in others)]
    return min(free or cut, key=lambda record: record.name.count("."))


def _weighted(module: nn.Module) -> bool:
    return "Norm" not in type(module).__name__ and any(True for _ in module.parameters())


def _reaches(start: Any, stop: Any, earlier: set[Any], leaves: set[int]) -> bool:
    """True if a path from ``start`` that avoids ``stop`` leads to the inputs or to something computed earlier."""
    pending, seen = [start], {stop}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if node in earlier or id(getattr(node, "variable", None)) in leaves:
            return True
        seen.add(node)
        pending += [previous for previous, _ in node.next_functions]
    return False


def _squared_gradients(outputs: Tensor, edges: Sequence[Any]) -> list[list[float]]:
    """Return J at every edge; exact for few outputs, else by random signs (Hutchinson).

    Returns:
        For each edge J, and J with the gradients of all positions added: channels first, channels last.
    """
    count, channels = outputs.shape
    if channels <= EXACT_OUTPUTS:
        rows = torch.eye(channels, dtype=outputs.dtype, device=outputs.device)[:, None, :].expand(-1, count, -1)
        weight = 1 / (count * channels)
    else:
        generator = torch.Generator(device="cpu").manual_seed(0)
        signs = torch.randint(0, 2, (EXACT_OUTPUTS, count, channels), generator=generator, device="cpu") * 2 - 1
        rows, weight = signs.to(outputs), 1 / (count * channels * EXACT_OUTPUTS)
    total = torch.zeros(len(edges), 3, dtype=torch.float64, device=outputs.device)
    for u in rows:
        gradients = torch.autograd.grad(outputs, edges, u, retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                g = gradient.detach().double()
                added = (g, g.flatten(2).sum(2), g.flatten(1, -2).sum(1)) if g.ndim > 2 else (g, g, g)
                total[index] += weight * torch.stack([value.square().sum() for value in added])
    return total.tolist()
