"""Computes Taylor terms along a line by repeated reverse mode: slow, and independent of the rules of jets."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.checks import check_twice_differentiable, derivatives_of_order
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.jets.kinked import KINKED_RULES
from torch_eft.measure.jets.names import COMPARISONS
from torch_eft.measure.jets.series import note_kink

_MEMORY = 2**30
_GRAPH = {0: 1, 1: 3, 2: 8, 3: 18}
"""What graphs of repeated passes keep, by order, in units of what one forward keeps: convolutions 2.9, 7.4, 17.4."""


def series_by_reverse_mode(
    base: IsolatedModel, direction: Mapping[str, Tensor], probe: Probe, order: int, pattern: Tensor | None = None
) -> Tensor:
    """Compute Taylor terms along s -> f(theta_0 + s d), of all outputs, or of their product with a fixed ``pattern``.

    A derivative of many outputs with respect to the one s takes two backward passes: (d/dw) (d/ds) (w . f). An
    operation without a derivative of that order raises a ``ValueError``.

    Args:
        base: The network at theta_0.
        direction: d, for every trainable parameter.
        probe: Inputs.
        order: Order of the last term.
        pattern: (N, C).

    Returns:
        (order + 1, N, C), or (order + 1,) with a pattern.
    """
    with _differentiable_backends(), _Watching():
        s = next(iter(base.params.values())).new_zeros(()).requires_grad_()
        moved = {name: value + s * direction[name] for name, value in base.params.items()}
        current = base(moved, tree_map_only(Tensor, torch.clone, base.place(probe)))
        with derivatives_of_order(max(order, 2), base.shadow):  # two passes even for the first term
            if order > 1 or (order and pattern is None):
                check_twice_differentiable(current)
            if pattern is not None:
                current = (current * pattern).sum()
            terms = [current.detach()]
            w = torch.zeros_like(terms[0], requires_grad=True)
            for degree in range(1, order + 1):
                if pattern is None:
                    current = _slope(_slope((current * w).sum(), s), w)
                else:
                    current = _slope(current, s)
                terms.append(current.detach() / math.factorial(degree))
    return torch.stack(terms)


def projected_series_by_reverse_mode(
    base: IsolatedModel,
    direction: Mapping[str, Tensor],
    probe: Probe,
    order: int,
    pattern: Tensor,
    memory: int = _MEMORY,
) -> Tensor:
    """As ``series_by_reverse_mode`` with a pattern, for as many samples at a time as memory is likely to hold.

    Args:
        base: The network at theta_0.
        direction: d, for every trainable parameter.
        probe: Inputs.
        order: Order of the last term.
        pattern: (N, C).
        memory: Bytes aimed at; one sample is computed whatever it takes.

    Returns:
        (order + 1,).
    """
    samples = max(1, memory // max(1, _GRAPH[order] * _kept_by_forward(base, direction, probe.first(1))))
    blocks = (slice(start, start + samples) for start in range(0, probe.size, samples))
    return torch.stack(
        [series_by_reverse_mode(base, direction, probe.part(block), order, pattern[block]) for block in blocks]
    ).sum(0)


def _kept_by_forward(base: IsolatedModel, direction: Mapping[str, Tensor], probe: Probe) -> int:
    """Bytes that a forward keeps for its backward, parameters left out."""
    kept: dict[int, int] = {}
    s = next(iter(base.params.values())).new_zeros(()).requires_grad_()
    moved = {name: value + s * direction[name] for name, value in base.params.items()}
    own = {
        value.untyped_storage().data_ptr() for value in (*moved.values(), *base.params.values(), *direction.values())
    }

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = base(moved, tree_map_only(Tensor, torch.clone, base.place(probe)))  # noqa: F841  keeps what is saved
    return sum(kept.values())


def _slope(value: Tensor, variable: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(variable)
    return torch.autograd.grad(value, variable, create_graph=True, allow_unused=True, materialize_grads=True)[0]


@contextmanager
def _differentiable_backends() -> Iterator[None]:
    """Switch off fused recurrent kernels, which have a first derivative only."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    before = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


class _Watching(Decomposed):
    """Decompositions that also note the kinks that are met."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kinked = func in KINKED_RULES or func in COMPARISONS
        if kinked and any(isinstance(value, Tensor) and value.requires_grad for value in args):
            note_kink(func.__name__.strip("_"))
        return super().__torch_function__(func, types, args, kwargs)
