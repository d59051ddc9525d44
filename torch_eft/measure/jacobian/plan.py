"""Plans how each parameter's Jacobian is computed: which count, which calls have factors, what falls back."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.jacobian.capture import Capture, LayerCall, unrecognized
from torch_eft.measure.jacobian.gram import FORMED
from torch_eft.measure.jacobian.layers import Axis, in_order_of_factors
from torch_eft.results.choices import nearest

Lambdas: TypeAlias = Mapping[str, float | Tensor] | float | None
"""One number, ``{parameter: a number, or one for every number of it}``, or None for 1."""


@dataclass(frozen=True)
class JacobianPlan:
    """The way in which each parameter's Jacobian is computed.

    Args:
        calls: Signatures of the recognized calls, in order.
        axes: The samples' axis of each.
        kinds: ``{parameter: kind of its call}``, of the recognized ones.
        fallback: ``{parameter: why}``, of the others.
        sample_bytes: Memory of the factors and the graph of one sample.
        outputs: C.
        transposed: The recognized weights that their calls take as (in, out).
        looped: The fallback goes through samples one after the other: some batching rule of torch's is wrong.
    """

    calls: tuple[tuple[Any, ...], ...] = ()
    axes: tuple[Axis, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    fallback: Mapping[str, str] = field(default_factory=dict)
    sample_bytes: int = 0
    outputs: int = 0
    transposed: frozenset[str] = frozenset()
    looped: bool = False

    def in_order(self, value: Tensor, name: str, groups: int) -> Tensor:
        """Return a tensor of a parameter's shape with its numbers in the order in which its factors have them, (P,).

        Args:
            value: The tensor.
            name: The parameter.
            groups: The number of its factors.
        """
        if name in self.fallback:
            return value.flatten()
        return in_order_of_factors(value, self.kinds.get(name, ""), name in self.transposed, groups)

    def check(self, calls: Sequence[LayerCall], left: set[str], samples: int) -> None:
        """Compare what was recorded with the plan.

        Args:
            calls: The recorded calls.
            left: Parameters that have other uses as well.
            samples: N.

        Raises:
            ChangedUseError: If they differ.
        """
        reasons = dict.fromkeys(left, "a use that is not recognized")
        found = [signature(call, axis) for call, axis in zip(calls, self.axes, strict=False)]
        found += [signature(call, None) for call in calls[len(found) :]]
        if tuple(found) != self.calls:
            differ = (Counter(found) - Counter(self.calls)) + (Counter(self.calls) - Counter(found))
            names = {name for use in differ or found for name in use[1:3] if name is not None}
            reasons |= dict.fromkeys(names, "its use depends on the samples")
        for call, axis in zip(calls, self.axes, strict=False):
            if len(call.shape) <= axis.index or call.shape[axis.index] % samples:
                reasons |= dict.fromkeys(call.names, f"a {call.kind} operation whose samples cannot be distinguished")
        if reasons:
            raise ChangedUseError(reasons)


class ChangedUseError(Exception):
    """The parameters are not used as was planned.

    Args:
        reasons: ``{parameter: why}``.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__()
        self.reasons = dict(reasons)


def make_plan(
    network: IsolatedModel, inputs: Any, trainable: Sequence[str], refused: Mapping[str, str], most: int = 3
) -> JacobianPlan:
    """Recognize the uses of the parameters ``trainable``.

    Args:
        network: The network.
        inputs: All of the probe's inputs, on the network's device.
        trainable: Names of the parameters that count.
        refused: ``{parameter: why}``, to be left to the fallback.
        most: Number of samples to look at.

    Returns:
        The plan: nothing says yet that it holds for the other samples.
    """
    count = sample_count(inputs)
    few = min(count, most)
    fewer = (few + 1) // 2 if few > 1 else 1
    fallback = dict(refused)
    while True:
        recognized = [name for name in trainable if name not in fallback]
        try:
            recorded = _record(network, slice_of(inputs, 0, few), trainable, fallback)
            smaller = _record(network, slice_of(inputs, 0, fewer), trainable, fallback).calls
        except Exception as error:  # whatever the recording breaks, the fallback does not need it
            with torch.no_grad():
                outputs = network(network.params, slice_of(inputs, 0, fewer)).shape[1]
            reason = f"the recording of its layers failed: {type(error).__name__}: {error}"
            return JacobianPlan(fallback=fallback | dict.fromkeys(recognized, reason), outputs=outputs)
        axes = _axes(recorded.calls, smaller, few, fewer)
        new = dict.fromkeys(recorded.left, "a use that is not recognized")
        for call, axis in zip(recorded.calls, axes, strict=True):
            if axis is None:
                new |= dict.fromkeys(call.names, f"a {call.kind} operation whose samples cannot be distinguished")
        new |= _mixed_uses(recorded.calls)
        if not new:
            break
        fallback |= new
    kinds = {name: call.kind for call in recorded.calls for name in call.names}
    tables = {call.weight for call in recorded.calls if call.kind == "embedding"}
    kinds |= {name: "embedding and linear" for name in tables if name is not None and kinds[name] == "linear"}
    unused = [name for name in recognized if name not in kinds]
    kinds |= dict.fromkeys(unused, "unused")
    return JacobianPlan(
        tuple(signature(call, axis) for call, axis in zip(recorded.calls, axes, strict=True)),
        tuple(axis for axis in axes if axis is not None),
        kinds,
        fallback,
        _sample_bytes(network, recorded, few),
        recorded.outputs.shape[1],
        frozenset(call.weight for call in recorded.calls if call.weight and call.options.get("transposed")),
    )


def sample_count(inputs: Any) -> int:
    """Return N."""
    return next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def slice_of(inputs: Any, start: int, length: int) -> Any:
    """Return ``length`` samples from ``start`` on."""
    return tree_map_only(Tensor, lambda tensor: tensor[start : start + length], inputs)


@dataclass(frozen=True)
class _Recording:
    outputs: Tensor
    calls: list[LayerCall]
    left: set[str]


def _record(network: IsolatedModel, inputs: Any, trainable: Sequence[str], fallback: Mapping[str, str]) -> _Recording:
    leaves = {name: network.params[name].detach().requires_grad_() for name in trainable}
    with Capture(leaves, fallback) as capture:
        outputs = network({**network.params, **leaves}, inputs)
    return _Recording(outputs, capture.calls, unrecognized(outputs, leaves) - set(fallback))


def _axes(calls: Sequence[LayerCall], smaller: Sequence[LayerCall], few: int, fewer: int) -> list[Axis | None]:
    if len(calls) != len(smaller):
        return [None] * len(calls)
    return [_axis(first, second, few, fewer) for first, second in zip(calls, smaller, strict=True)]


def _axis(call: LayerCall, smaller: LayerCall, few: int, fewer: int) -> Axis | None:
    """Find the one axis that grows with the number of samples; None if the parameter varies along it."""
    index = 0  # a single sample: everything belongs to it
    if few > fewer:
        differ = [i for i, (a, b) in enumerate(zip(call.shape, smaller.shape, strict=False)) if a != b]
        if len(call.shape) != len(smaller.shape) or len(differ) != 1:
            return None
        index = differ[0]
        if call.shape[index] * fewer != smaller.shape[index] * few or call.shape[index] % few:
            return None
    if "convolution" in call.kind and index != 0:
        return None
    if call.kind in ("linear", "embedding") and index == len(call.shape) - 1:
        return None
    if call.kind == "scale":
        shape = (*[1] * (len(call.shape) - len(call.options["shape"])), *call.options["shape"])
        if shape[index] != 1:
            return None
    outer, inner = Axis(index), Axis(index, inner=True)
    if few == fewer or call.shape[index] == few:
        return outer
    return min((outer, inner), key=lambda axis: _difference(call, smaller, axis, few, fewer))


def _difference(call: LayerCall, smaller: LayerCall, axis: Axis, few: int, fewer: int) -> float:
    """Return how far the inputs that belong to the first samples depend on how many others there are."""
    more, less = call.inputs[0], smaller.inputs[0]
    if more is None or less is None or more.ndim <= axis.index:
        return 0.0
    if more.device.type == "meta":
        return float(axis.inner)
    return float((axis.split(more, few)[:fewer] - axis.split(less, fewer)).abs().max())


def _mixed_uses(calls: Sequence[LayerCall]) -> dict[str, str]:
    """Return the parameters whose uses do not add up to one factor, and why."""
    reasons = {}
    forms: dict[str, set[str]] = {}
    for call in calls:
        grouped = call.options.get("groups", 1) > 1
        if call.weight is not None:
            form = {"convolution": "matrix", "linear": "matrix"}.get(call.kind, call.kind)
            form = "transposed matrix" if call.options.get("transposed") else form
            forms.setdefault(call.weight, set()).add(form)
            repeated = sum(other.weight == call.weight and other.kind == call.kind for other in calls) > 1
            if repeated and (grouped or call.kind != "linear"):
                reasons[call.weight] = f"several {call.kind} uses"
        if call.bias is not None:
            forms.setdefault(call.bias, set()).add("bias")
    for name, kinds in forms.items():
        if len(kinds) > 1 and kinds != {"embedding", "matrix"}:  # a table may be a matrix elsewhere
            reasons[name] = f"uses of different kinds: {', '.join(sorted(kinds))}"
    return reasons


def signature(call: LayerCall, axis: Axis | None) -> tuple[Any, ...]:
    """Return what a call must have in common with the planned one: all but the numbers of samples and of places."""
    places = call.kind in ("linear", "embedding")
    shape = tuple(
        -1 if index == (None if axis is None else axis.index) or (places and index < len(call.shape) - 1) else size
        for index, size in enumerate(call.shape)
    )
    return call.kind, call.weight, call.bias, shape, bool(call.options.get("transposed"))


def _sample_bytes(network: IsolatedModel, recorded: _Recording, few: int) -> int:
    """Add up inputs (windows of convolutions), outputs, the gradients or the Jacobian of all outputs, and a buffer."""
    # Of a call that alone has its parameters the smaller one is kept; small networks have all gradients at once.
    channels, size = recorded.outputs.shape[1], recorded.outputs.element_size()
    uses = Counter(name for call in recorded.calls for name in call.names)
    small = sum(call.shape.numel() for call in recorded.calls) <= _SMALL * few
    numbers, buffer = 0, 0
    for call in recorded.calls:
        windows = torch.Size(call.options["kernel"]).numel() if call.kind == "convolution" else 1
        own, kept = call.shape.numel() // few, channels * (call.shape.numel() // few)
        parameters = sum(network.params[name].numel() for name in call.names)
        formed = call.kind in ("linear", "convolution", "scale") and all(uses[name] == 1 for name in call.names)
        if formed and not small:
            kept = channels * parameters if call.options.get("groups", 1) > 1 else min(kept, channels * parameters)
        numbers += kept + 3 * own  # the output, what is computed from it, and one gradient
        numbers += 0 if call.inputs[0] is None else windows * call.inputs[0].numel() // few
        if call.weight is not None and call.kind != "scale":
            weight = network.params[call.weight]
            if call.shape.numel() > few * len(weight):  # several places: the Jacobian is formed in parts
                buffer = max(buffer, channels * min(weight.numel(), FORMED * (weight.numel() // len(weight))))
    return (numbers + buffer) * size


_SMALL = 2**14
"""Numbers of a sample in all calls' outputs, up to which all outputs of the network may go through together."""


def checked_lambdas(network: IsolatedModel, lambdas: Lambdas) -> dict[str, float | Tensor]:
    """Return lambda of every trainable parameter with lambda > 0: a number, or a tensor of the parameter's shape.

    Args:
        network: The network.
        lambdas: See ``ntk``.

    Raises:
        ValueError: If there is no trainable parameter, ``lambdas`` is neither a number nor such a mapping, names other
            parameters, or gives negative values.
    """
    names = set(network.params)
    if not names:
        raise ValueError("model: it has no trainable parameter, so its NTK is empty; set requires_grad on some")
    if isinstance(lambdas, Mapping):
        if set(lambdas) != names:
            raise ValueError(f"lambdas: {wrong_name(lambdas, names)}; name every trainable parameter once")
        values = {name: _lambda(value, name, network.params[name]) for name, value in lambdas.items()}
    else:
        values = dict.fromkeys(network.params, 1.0 if lambdas is None else _number(lambdas))
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    ends = torch.stack([torch.stack(value.aminmax()) for value in tensors.values()]).tolist() if tensors else []
    extremes = dict(zip(tensors, ends, strict=True))  # read in one wait for the device
    for name, value in values.items():
        least, largest = extremes.get(name) or (value, value)
        if not (math.isfinite(largest) and least >= 0):
            wrong = least if not least >= 0 else largest
            raise ValueError(f"lambdas: {wrong:g} given for {name!r}; it must be finite and >= 0")
    held = {name for name, value in values.items() if not isinstance(value, Tensor) and value == 0}
    return {name: values[name] for name in network.params if name not in held}


def _lambda(value: Any, name: str, parameter: Tensor) -> float | Tensor:
    """Return a lambda as a number or, of the parameter's shape and where it is, as a tensor."""
    if not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != parameter.shape):
        return _number(value, f" for {name!r}")
    if value.shape != parameter.shape:
        raise ValueError(
            f"lambdas: a tensor {tuple(value.shape)} given for {name!r}; give a number, or a tensor of the shape of "
            f"the parameter, {tuple(parameter.shape)}"
        )
    if value.layout != torch.strided or value.is_complex():
        kind = "complex" if value.is_complex() else str(value.layout).removeprefix("torch.")
        raise ValueError(f"lambdas: a {kind} tensor given for {name!r}; give a real and dense one")
    return value.detach().to(parameter)


def wrong_name(given: Iterable[str], names: Iterable[str]) -> str:
    """Name a parameter that is not there, with the nearest one that is, or else one that is missing."""
    given, names = set(given), set(names)
    if unknown := sorted(given - names):
        return f"{unknown[0]!r} is not a trainable parameter{nearest(unknown[0], sorted(names))}"
    return f"{min(names - given)!r} is missing"


def _number(value: Any, place: str = "") -> float:
    """Return a lambda as a float, refusing strings and tensors of several numbers."""
    several = isinstance(value, Tensor) and value.numel() != 1
    if several or isinstance(value, str | complex) or not hasattr(value, "__float__"):
        raise ValueError(f"lambdas: {value!r} given{place}; give a number, or {{parameter name: number}}")
    return float(value)
