"""Kinks: which operations of a network have them, and the rate of change of the NTK where autodiff's is not it.

At a kink, sigma' jumps and sigma'' is a delta function, which differentiation takes as zero. Each second derivative by
autodiff therefore lacks a part of order one, however wide the network: it is the rate of change of H only as far as no
unit changes its side. Over a training step many do, and H changes by the sum of many small jumps. What H does is its
secant over a step of that size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torch_eft.measure.isolation import IsolatedModel, isolated
from torch_eft.measure.ntk import isolated_ntk
from torch_eft.measure.output import checked_output
from torch_eft.measure.probe import OutputFn, Probe, as_probe


@dataclass(frozen=True)
class Secant:
    """The realised change of the NTK between two settings of the parameters, per unit step.

    Args:
        value: (H(second) - H(first)) / step, (N, N, C, C), or (N, N) averaged over outputs.
        step: The distance that the change is divided by.
        kinked: The kinked operations met, as ``kinked_operations`` names them.
        crossings: Share of the kinked units, over samples, that are on another side at the second setting than at the
            first; 0 without kinks, NaN if some are in operations whose units are not seen (recurrent layers).
    """

    value: Tensor
    step: float
    kinked: tuple[str, ...]
    crossings: float

    @property
    def validity(self) -> str:
        """What the value is, in words."""
        if not self.kinked:
            return "smooth network: the secant tends to the derivative as the step does to 0"
        if math.isnan(self.crossings):
            return "kinks whose units are not seen: the secant holds for this step, autodiff's derivative may not"
        if self.crossings == 0:
            return "within the kinks: no unit changed its side, and autodiff's derivative is the slope"
        return (
            f"across kinks: {self.crossings:.2g} of the kinked units changed their side, which autodiff's derivative "
            "leaves out; the secant holds for this step"
        )


def kinked_operations(model: nn.Module, x: Any, output_fn: OutputFn | None = None) -> tuple[str, ...]:
    """The kinked operations that the forward executes on ``x``, e.g. ``("relu in '1'", "max_pool2d in 'pool'")``.

    Operations whose slope jumps (ReLU, max pooling, clamp, maximum ...) or which are piecewise constant (sign, round
    ...), and selections by comparison of activations (``torch.where(z > 0, ...)``, ``z * (z > 0)``, sorting). ELU and
    CELU with alpha = 1 are not among them, nor kinks of what depends on no trainable parameter. Inside TorchScript,
    custom autograd functions in C++ and fused functions of torch other than recurrent ones, nothing is seen.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        output_fn: Turns what the model returns into (N, C).

    Raises:
        ValueError: If the forward rejects ``x``, or what it returns is not (N, C).
    """
    with isolated(model, output_fn) as network:
        return _sides(network, network.params, as_probe(x)).names


def secant(
    model: nn.Module,
    x: Any,
    params0: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    step: float = 1.0,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
) -> Secant:
    """(H(params) - H(params0)) / step: how the NTK has really changed, over a training step for example.

    Args:
        model: Any module; its own parameters matter only where the two mappings leave them out.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        params0: ``{name of a trainable parameter: value}`` before.
        params: And after.
        step: What to divide by, e.g. the learning rate times the number of steps.
        lambdas: The learning-rate tensor, as ``ntk`` takes it.
        trace: Average over outputs.
        output_fn: Turns what the model returns into (N, C).

    Raises:
        ValueError: As ``ntk``; if a name is no trainable parameter, a shape is another, or ``step`` is not positive.
    """
    with isolated(model, output_fn) as network:
        first, second = (
            _complete(network, values, name) for values, name in ((params0, "params0"), (params, "params"))
        )
        return _between(network, as_probe(x), first, second, step, lambdas, trace)


def secant_ntk(
    model: nn.Module,
    x: Any,
    direction: Mapping[str, Tensor],
    step: float,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
) -> Secant:
    """(H(theta + step d) - H(theta - step d)) / (2 step): the slope of the NTK along d at the scale of a step.

    For smooth networks the derivative along d up to a remainder of order step^2. For kinked ones take the size of a
    training step, and look at ``crossings``.

    Args:
        model: Any module, at theta.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        direction: d, ``{name of a trainable parameter: tensor}``; 0 where a parameter is left out. For a step of
            gradient descent with learning rate eta: minus lambda times the gradient, and ``step`` = eta.
        step: Positive.
        lambdas: The learning-rate tensor, as ``ntk`` takes it.
        trace: Average over outputs.
        output_fn: Turns what the model returns into (N, C).

    Raises:
        ValueError: As ``secant``.
    """
    with isolated(model, output_fn) as network:
        _complete(network, direction, "direction")
        ends: list[dict[str, Tensor]] = []
        for sign in (-1, 1):
            moved = {
                name: network.params[name] + sign * step * d.to(network.params[name]) for name, d in direction.items()
            }
            ends.append({**network.params, **moved})
        return _between(network, as_probe(x), ends[0], ends[1], 2 * step, lambdas, trace)


def _complete(network: IsolatedModel, values: Mapping[str, Tensor], argument: str) -> dict[str, Tensor]:
    for name, value in values.items():
        if name not in network.params:
            raise ValueError(f"{argument}: {name!r} is no trainable parameter")
        if value.shape != network.params[name].shape:
            own = tuple(network.params[name].shape)
            raise ValueError(f"{argument}: {name!r} has shape {tuple(value.shape)}, the parameter {own}")
    return {name: values[name].detach().to(own) if name in values else own for name, own in network.params.items()}


def _between(
    network: IsolatedModel,
    probe: Probe,
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    step: float,
    lambdas: Mapping[str, float] | float | None,
    trace: bool,
) -> Secant:
    if not 0 < step < math.inf:
        raise ValueError(f"step: {step:g} given; it must be positive and finite")
    change, sides = [], []
    for params in (first, second):
        change.append(isolated_ntk(replace(network, params=params), probe, lambdas, trace))
        sides.append(_sides(network, params, probe))
    names = tuple(dict.fromkeys(sides[0].names + sides[1].names))
    return Secant((change[1] - change[0]) / step, step, names, _crossings(*sides))


@dataclass(frozen=True)
class _Sides:
    """The kinked operations of one forward, and on which side each of their units was."""

    names: tuple[str, ...]
    sides: tuple[Tensor, ...]
    all_seen: bool


def _sides(network: IsolatedModel, params: dict[str, Tensor], probe: Probe) -> _Sides:
    # Gradients tell activations that training moves from constants, inputs and what is frozen.
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    moving = replace(network, params=leaves)
    with _module_names(network.shadow) as stack, _Watch(stack) as watch:
        checked_output(moving, probe)
    return _Sides(tuple(dict.fromkeys(watch.names)), tuple(watch.sides), watch.all_seen)


def _crossings(first: _Sides, second: _Sides) -> float:
    """Waits for the device once. Units that only one of the two forwards has count as crossed."""
    if not (first.all_seen and second.all_seen):
        return math.nan
    crossed: list[Tensor] = []
    alone = total = 0
    for index in range(max(len(first.sides), len(second.sides))):
        here, there = first.sides[index : index + 1], second.sides[index : index + 1]
        units = max(side.numel() for side in (*here, *there))
        total += units
        if here and there and here[0].shape == there[0].shape:
            crossed.append((here[0] != there[0]).sum())
        else:
            alone += units
    return (alone + (int(torch.stack(crossed).sum()) if crossed else 0)) / max(1, total)


@contextmanager
def _module_names(module: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forwards are running, outermost first."""
    stack: list[str] = []
    handles = []

    def leave(part: nn.Module, args: Any, value: Any) -> None:
        stack.pop()

    for name, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda part, args, name=name: stack.append(name)))
        handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


Side = Callable[..., Tensor]
"""Takes the arguments of a kinked operation to the numbers of its units' smooth pieces."""


def _pieces(*kinks: float) -> Side:
    """Of an activation."""

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
        found = of(input, *args, **kwargs)
        return input > found if isinstance(found, Tensor) else found[1]

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
"""Kinked operations by name; None where the units' sides are not to be seen."""

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
        """Calls ``func``, and looks at its arguments before."""
        kwargs = kwargs or {}
        name = func.__name__.strip("_").removesuffix("_with_indices")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        moving = any(tensor.requires_grad for tensor in tensors)
        if moving and name in _KINKED and _is_kinked(name, args, kwargs):
            self._note(name, _KINKED[name], args, kwargs)
        value = func(*args, **kwargs)
        selections = [tensor for tensor in tensors if id(tensor) in self._selections]
        if selections or (moving and name in _SELECTORS):
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
    if name == "elu":
        return float(kwargs.get("alpha", args[1] if len(args) > 1 else 1.0)) != 1.0
    if name == "leaky_relu":
        return float(kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)) != 1.0
    return True
