"""Reverse mode, once and over itself: gradients of gradients, with zeros where nothing depends on a parameter."""

import logging
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.isolation import IsolatedModel

_log = logging.getLogger("torch_eft")


def pull_back(
    values: Sequence[Tensor], weights: Sequence[Tensor], leaves: Sequence[Tensor], keep: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradient of ``sum values . weights`` with the weights held fixed.

    Args:
        values: Functions of the leaves.
        weights: One of the same shape for every value.
        leaves: What is differentiated with respect to.
        keep: Make the gradient differentiable in turn, also with respect to the weights.

    Returns:
        One tensor per leaf.
    """
    pairs = [pair for pair in zip(values, weights, strict=True) if pair[0].requires_grad]
    if not pairs or not leaves:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    dependent, fixed = zip(*pairs, strict=True)
    return torch.autograd.grad(
        dependent, leaves, fixed, retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True
    )


def gradients_along(
    value: Tensor, leaves: Sequence[Tensor], direction: Sequence[Tensor], order: int
) -> list[tuple[Tensor, ...]]:
    """Return the Taylor coefficients along ``direction`` of the gradient of one number.

    Args:
        value: 0-d.
        leaves: What is differentiated with respect to.
        direction: One tensor per leaf; not looked at for order 0.
        order: Of the last coefficient.

    Returns:
        For every m up to ``order`` one tensor per leaf: J_m = (J_{m-1} . v)' / m.
    """
    coefficients = []
    for m in range(order + 1):
        gradient = pull_back([value], [torch.ones_like(value)], leaves, keep=m < order)
        coefficients.append(gradient)
        if m < order:
            value = torch.stack([(g * v).sum() for g, v in zip(gradient, direction, strict=True)]).sum() / (m + 1)
    return coefficients


def ordinary_gradients(
    network: IsolatedModel, inputs: Any, weights: Tensor, names: Sequence[str], block: int
) -> tuple[Tensor, dict[str, Tensor], bool]:
    """Return outputs and the gradient of ``sum weights . outputs`` by one ordinary forward and backward pass.

    At the module's own parameters it is the module itself that runs, as the training runs it but in evaluation mode,
    where all that its forward could change is known and put back: plain attributes, containers and tensors. A module
    with hooks, with objects of other kinds among its attributes, or one that is wrapped for several devices is left
    alone, and its copy runs.

    Args:
        network: The network.
        inputs: All samples, where the network is.
        weights: (C, N).
        names: The parameters wanted.
        block: The number of samples of one pass.

    Returns:
        (N, C), ``{name: gradient}``, and whether the module itself ran.
    """
    state = _State()
    live = _at_own_parameters(network) and state.takes(network.origin, network.shadow)
    if live:
        own = dict(network.origin.named_parameters())
        leaves: dict[str, Tensor] = {name: own[name] for name in names}
        try:
            with state.put_back():
                return *_in_blocks(partial(_call, network), inputs, weights, leaves, block), True
        except Exception as error:
            _log.info("torch_eft: the module itself did not run (%s: %s); its copy does", type(error).__name__, error)
    leaves = {name: network.params[name].detach().requires_grad_() for name in names}
    return *_in_blocks(partial(network, {**network.params, **leaves}), inputs, weights, leaves, block), False


def _in_blocks(
    run: Callable[[Any], Tensor], inputs: Any, weights: Tensor, leaves: Mapping[str, Tensor], block: int
) -> tuple[Tensor, dict[str, Tensor]]:
    outputs, sums = [], {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for start in range(0, weights.shape[1], block):
        rows = slice(start, start + block)
        z = run(tree_map_only(Tensor, partial(_rows, rows=rows), inputs))
        outputs.append(z.detach())
        if z.requires_grad:
            gradients = torch.autograd.grad((z * weights[:, rows].T).sum(), list(leaves.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.detach()
    return torch.cat(outputs), sums


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[rows].clone()


def _call(network: IsolatedModel, inputs: Any) -> Tensor:
    if isinstance(inputs, dict):
        z = network.origin(**inputs)
    else:
        z = network.origin(*inputs) if isinstance(inputs, tuple | list) else network.origin(inputs)
    return z if network.output_fn is None else network.output_fn(z)


def _at_own_parameters(network: IsolatedModel) -> bool:
    own = dict(network.origin.named_parameters())
    return all(
        name in own
        and value.data_ptr() == own[name].data_ptr()
        and value.dtype == own[name].dtype
        and own[name].requires_grad
        and not own[name]._backward_hooks
        for name, value in network.params.items()
    )


_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, type, slice, range),
    *(torch.device, torch.dtype, torch.Size, torch.memory_format),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType),
)
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOST = 20_000  # values to be put back


class _State:
    """What a forward can change in a module."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._restore: list[Callable[[], object]] = []
        self._before: list[Callable[[], object]] = []

    def takes(self, module: nn.Module, copied: nn.Module) -> bool:
        """Note everything; return whether it is all of kinds that can be put back."""
        copies = dict(copied.named_modules())
        for name, part in module.named_modules():
            if isinstance(part, _WRAPPERS) or any(_foreign(getattr(part, hooks, {})) for hooks in _HOOKS):
                return False
            attributes = vars(part)
            other = copies.get(name)
            # What a module leaves out of its copies, such as a trainer and its logs, it does without here, too.
            missing = {key for key, value in attributes.items() if value is not None and _is_none(other, key)}
            if not all(self._note(value) for key, value in attributes.items() if key not in missing):
                return False
            self._keep(attributes)
            changes = {"training": getattr(other, "training", False)} | dict.fromkeys(missing)
            self._before.append(partial(attributes.update, changes))
        return True

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Go to evaluation mode, and back to what was noted."""
        try:
            for action in self._before:
                action()
            yield
        finally:
            with torch.no_grad():
                for action in reversed(self._restore):
                    action()

    def _note(self, value: Any) -> bool:
        if isinstance(value, _PLAIN) or id(value) in self._seen:
            return True
        self._seen[id(value)] = value
        if len(self._seen) > _MOST:
            return False
        if isinstance(value, nn.Parameter):
            return True
        if isinstance(value, Tensor):
            if value.is_inference():
                return False
            self._restore.append(partial(_restore_tensor, value, value._version, value.detach().clone()))
            return True
        if isinstance(value, nn.Module):
            return self._note(vars(value))
        if isinstance(value, dict | list | set | deque):
            self._keep(value)
        elif not isinstance(value, tuple | frozenset):
            return False
        return all(self._note(part) for part in (value.values() if isinstance(value, dict) else value))

    def _keep(self, value: Any) -> None:
        before = list(value.items()) if isinstance(value, dict) else list(value)

        def restore() -> None:
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(before)

        self._restore.append(restore)


def _restore_tensor(value: Tensor, version: int, before: Tensor) -> None:
    if value._version != version:
        value.copy_(before)


def _foreign(hooks: Mapping[int, Any]) -> bool:
    return any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks.values())


def _is_none(module: nn.Module | None, name: str) -> bool:
    return module is not None and name in vars(module) and vars(module)[name] is None
