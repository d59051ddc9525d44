"""Finds the operations of a network that have kinks, and the side of each of their units.

At a kink, sigma' jumps and sigma'' is a delta function, which differentiation takes as zero. Each second derivative by
autodiff therefore lacks a part of order one, however wide the network: it is the rate of change of H only as long as no
unit changes its side. Over a training step many do, and H changes by the sum of many small jumps: its rate is the
secant over a step of that size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe


def kinked_operations(model: Model, x: Any, *, output_fn: OutputFn | None = None) -> tuple[str, ...]:
    """Name the kinked operations that the forward executes on ``x``.

    Operations whose slope jumps (ReLU, max pooling, clamp, maximum ...) or which are piecewise constant (sign, round
    ...), and selections by comparison of activations (``torch.where(z > 0, ...)``, ``z * (z > 0)``, sorting). ELU and
    CELU with alpha = 1 are not among them, nor kinks of what depends on no trainable parameter. Inside TorchScript,
    custom autograd functions in C++ and fused functions of torch other than recurrent ones, nothing is seen.

    Raises ``ValueError`` if the forward rejects ``x``, or what it returns is not (N, C).

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        The names, e.g. ``("relu in '1'", "max_pool2d in 'pool'")``; empty for smooth networks.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4), torch.nn.GELU())
        >>> measure.kinked_operations(model, torch.eye(3))
        ("relu in '1'",)
    """
    with isolated(model, output_fn) as network:
        return kink_sides(network, network.params, as_probe(x)).names


@dataclass(frozen=True)
class Sides:
    """The kinked operations of one forward, and on which side each of their units was."""

    names: tuple[str, ...]
    sides: tuple[Tensor, ...]
    all_seen: bool


def kink_sides(network: IsolatedModel, params: dict[str, Tensor], probe: Probe) -> Sides:
    """Run one forward with the given parameters and record its kinked operations."""
    # Gradients mark the activations that training changes: not constants, inputs and frozen parts.
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    trainable = replace(network, params=leaves)
    with _module_names(network.shadow) as stack, _Watch(stack) as watch:
        checked_output(trainable, probe)
    return Sides(tuple(dict.fromkeys(watch.names)), tuple(watch.sides), watch.all_seen)


@contextmanager
def _module_names(module: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forwards are running, outermost first."""
    stack: list[str] = []
    handles = []

    def leave(part: nn.Module, args: Any, value: Any) -> None:
        stack.pop()

    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):  # takes no hooks
            continue
        handles.append(part.register_forward_pre_hook(lambda part, args, name=name: stack.append(name)))
        handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def cut_operations(network: IsolatedModel, inputs: Any) -> tuple[str, ...]:
    """Name the operations through which outputs depend on parameters, but gradients do not, or by a rule of their own.

    Args:
        network: Isolated.
        inputs: Some samples, where the network is.

    Returns:
        The names, e.g. ``("detach in 'gate'",)``.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in network.params.items()}
    with _module_names(network.shadow) as stack, _CutWatch(stack) as watch:
        z = network(leaves, inputs)
    pending, seen = [z.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        owner = getattr(node, "_forward_cls", None)
        if owner is not None:
            watch.names.append(f"the backward of {owner.__name__}")
        pending += [previous for previous, _ in node.next_functions]
    return tuple(dict.fromkeys(watch.names))


class _CutWatch(TorchFunctionMode):
    """Names what is done with activations or parameters outside of the gradient."""

    def __init__(self, modules: list[str]) -> None:
        super().__init__()
        self.modules = modules
        self.names: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments of ``func``, then call it."""
        kwargs = kwargs or {}
        name = "data" if func == Tensor.data.__get__ else func.__name__  # type: ignore[attr-defined]
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
            off = not torch.is_grad_enabled() and name != "__get__"
            if kwargs.get("padding_idx") is not None and "embedding" in name:
                self.names.append(f"padding_idx of an embedding in {self._place}")
            if off or name in ("detach", "detach_", "data", "item", "tolist", "numpy", "register_hook"):
                self.names.append(f"{'no_grad' if off else name} in {self._place}")
        return func(*args, **kwargs)

    @property
    def _place(self) -> str:
        return repr(self.modules[-1]) if self.modules and self.modules[-1] else "the forward"


def bounded_norms(network: IsolatedModel) -> tuple[str, ...]:
    """Name the embeddings with rows at their ``max_norm``: to be put back there has no gradient, and is a kink.

    Args:
        network: Isolated.

    Returns:
        The names, e.g. ``("max_norm of 'table'",)``.
    """
    names = []
    for name, part in network.shadow.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None:
            weight = network.params.get(f"{name}.weight".removeprefix("."))
            if weight is not None and bool((weight.norm(part.norm_type, 1) > (1 - 1e-3) * part.max_norm).any()):
                names.append(f"max_norm of {name!r}")
    return tuple(names)


Side = Callable[..., Tensor]
"""A function of the arguments of a kinked operation that returns the number of each unit's smooth piece."""


def _pieces(*kinks: float) -> Side:
    """The sides of an activation with kinks at the given points: the number of kinks below the input."""

    def side(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first, *others = (input > kink for kink in kinks)
        return torch.stack([first, *others]).sum(0) if others else first

    return side


def _clamp_side(input: Tensor, min: Any = None, max: Any = None, **kwargs: Any) -> Tensor:
    low = torch.zeros_like(input, dtype=torch.int8) if min is None else (input > min).to(torch.int8)
    return low if max is None else low + (input > max)


def _hardtanh_side(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return _clamp_side(input, min_val, max_val)


def _shrink_side(input: Tensor, lambd: float = 0.5, **kwargs: Any) -> Tensor:
    return _clamp_side(input, -lambd, lambd)


def _threshold_side(input: Tensor, threshold: float, *args: Any, **kwargs: Any) -> Tensor:
    return input > threshold


def _larger_side(input: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
    return input > other


def _extreme_side(of: Callable[..., Tensor]) -> Side:
    def side(input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
        dim = kwargs.get("other", dim)
        if isinstance(dim, Tensor):
            return input > dim
        if dim is None or (isinstance(dim, tuple | list) and not dim):
            return of(input.flatten(), 0)
        if isinstance(dim, int):
            return of(input, dim)
        axes = sorted(axis % input.ndim for axis in dim)
        return of(input.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes)), -1)

    return side


def _order_side(of: Callable[..., Any]) -> Side:
    def side(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = of(input, *args, **kwargs)
        return input > result if isinstance(result, Tensor) else result[1]

    return side


def _pool_side(of: Callable[..., Any]) -> Side:
    def side(*args: Any, **kwargs: Any) -> Tensor:
        return of(*args, **{**kwargs, "return_indices": True})[1]

    return side


def _rounded_side(of: Callable[..., Tensor]) -> Side:
    def side(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return of(input, *args, **kwargs)

    return side


_F = nn.functional
_AT_ZERO = _pieces(0.0)
_KINKED: dict[str, Side | None] = {
    **dict.fromkeys(
        ("relu", "leaky_relu", "prelu", "rrelu", "elu", "selu", "abs", "absolute", "sign", "sgn"), _AT_ZERO
    ),
    **{"relu6": _pieces(0.0, 6.0), "hardswish": _pieces(-3.0, 3.0), "hardsigmoid": _pieces(-3.0, 3.0)},
    **{"hardtanh": _hardtanh_side, "softshrink": _shrink_side, "hardshrink": _shrink_side},
    **dict.fromkeys(("threshold", "clamp_min"), _threshold_side),
    **dict.fromkeys(("clamp", "clip"), _clamp_side),
    **{"clamp_max": lambda input, max, **kwargs: input > max},
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), _larger_side),
    **dict.fromkeys(("max", "amax"), _extreme_side(torch.argmax)),
    **dict.fromkeys(("min", "amin"), _extreme_side(torch.argmin)),
    **{name: _order_side(getattr(torch, name)) for name in ("topk", "sort", "median", "kthvalue", "cummax", "cummin")},
    **{name: _rounded_side(getattr(torch, name)) for name in ("floor", "ceil", "round", "trunc")},
    **{f"max_pool{d}d": _pool_side(getattr(_F, f"max_pool{d}d_with_indices")) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": _pool_side(getattr(_F, f"adaptive_max_pool{d}d_with_indices")) for d in (1, 2, 3)},
    **dict.fromkeys(("fractional_max_pool2d", "fractional_max_pool3d"), None),  # places drawn at random
    **dict.fromkeys(("rnn_relu", "rnn_relu_cell"), None),
}
"""Kinked operations by name; None where the units' sides cannot be seen."""

_SELECTORS = frozenset(
    [
        *("gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal"),
        *("argmax", "argmin", "argsort", "bucketize", "searchsorted"),
    ]
)


class _Watch(TorchFunctionMode):
    """Names kinked operations on activations and keeps their units' sides.

    A mask or an index computed from activations is followed to where it meets activations again.
    """

    def __init__(self, modules: list[str]) -> None:
        super().__init__()
        self.modules = modules
        self.names: list[str] = []
        self.sides: list[Tensor] = []
        self.all_seen = True
        self._selections: dict[int, Tensor] = {}  # by id, and kept alive so that no id is given twice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments of ``func``, then call it."""
        kwargs = kwargs or {}
        name = func.__name__.strip("_").removesuffix("_with_indices")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        trainable = any(tensor.requires_grad for tensor in tensors)
        if trainable and name in _KINKED and _is_kinked(name, args, kwargs):
            self._note(name, _KINKED[name], args, kwargs)
        value = func(*args, **kwargs)
        selections = [tensor for tensor in tensors if id(tensor) in self._selections]
        if selections or (trainable and name in _SELECTORS):
            results = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            if any(result.requires_grad for result in results):
                self.names.append(self._where(f"{name} by selection"))
                self.sides += [tensor.detach() for tensor in selections]
            else:
                self._selections |= {id(result): result for result in results}
        return value

    def _note(self, name: str, side: Side | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.names.append(self._where(name))
        if side is None:
            self.all_seen = False
            return
        with torch.no_grad():
            self.sides.append(side(*args, **kwargs))

    def _where(self, name: str) -> str:
        inside = self.modules[-1] if self.modules else ""
        return f"{name} in {inside!r}" if inside else f"{name} in the forward"


def _is_kinked(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if any(isinstance(value, Tensor) and value.is_complex() for value in (*args, *kwargs.values())):
        return False  # the absolute value has a tip at one point of the plane, which no path crosses
    if name == "elu":
        return float(kwargs.get("alpha", args[1] if len(args) > 1 else 1.0)) != 1.0
    if name == "leaky_relu":
        return float(kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)) != 1.0
    return True
