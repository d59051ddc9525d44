"""Records what a network does with its parameters: the inputs and outputs of every layer, in one forward.

A ``TorchFunctionMode`` replaces each parameter, where it recognizes what is done with it, by a copy of its value, and
keeps the operation's input and the place of its output in the autograd graph. What still leads from the output to a
parameter afterwards is a use that was not recognized: nothing can be dropped silently.

The same rules serve plain tensors and jets along theta + s v (``jets.py``): there inputs and outputs are series.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torch_eft.measure.forward.decompositions import WRITTEN_OUT, without_dispatch
from torch_eft.measure.jets.jet import Jet, coefficients_of, jet, with_numbers_of

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


@dataclass(frozen=True)
class LayerCall:
    """One operation that uses one or two parameters.

    Args:
        kind: Which rule leads from inputs and gradients to the Jacobian: ``"linear"``, ``"convolution"``,
            ``"transposed convolution"``, ``"embedding"`` or ``"scale"``.
        weight: Name of the weight, or None.
        bias: Name of what is added, or None.
        inputs: Coefficients of the operation's input, outside the autograd graph; None for zero.
        edges: Places of the coefficients of its output in the graph.
        shape: The output's shape.
        options: Further settings of the operation (stride, groups, whether the weight is (in, out) ...).
    """

    kind: str
    weight: str | None
    bias: str | None
    inputs: tuple[Tensor | None, ...]
    edges: tuple[GradientEdge, ...]
    shape: torch.Size
    options: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def given(self) -> Tensor:
        """The zeroth coefficient of the input, which is never left out."""
        assert self.inputs[0] is not None
        return self.inputs[0]


class Capture(TorchFunctionMode):
    """Context in which the recognized uses of ``params`` are recorded.

    Args:
        params: The very tensors (or jets) that the network is called with, by name.
        excluded: Names of parameters to leave alone.
    """

    def __init__(self, params: Mapping[str, Tensor], excluded: Iterable[str] = ()) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []
        self._names = {id(tensor): name for name, tensor in params.items() if name not in set(excluded)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record what a rule recognizes; pass everything else on."""
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None and _accepts(rule, self, func, *args, **kwargs):
            value = rule(self, func, *args, **kwargs)
            if value is not None:
                return value
        if func in _RECURRENT:  # its weights are used by the operations it is made of
            with self:
                value = WRITTEN_OUT[func](*args, **kwargs)
            if value is not None:
                return value
        python = without_dispatch(func)
        if python is not None:
            with self:
                return python(*args, **kwargs)
        return func(*args, **kwargs)

    def name(self, tensor: Any) -> str | None:
        """Return the name of a parameter, None of other tensors."""
        return self._names.get(id(tensor))

    def record(self, kind: str, weight: str | None, bias: str | None, x: Any, output: Tensor, **options: Any) -> Tensor:
        """Note an operation whose parameters were replaced by ``fresh``.

        Args:
            kind: See ``LayerCall``.
            weight: See ``LayerCall``.
            bias: See ``LayerCall``.
            x: The operation's input.
            output: Its output.
            **options: See ``LayerCall``.

        Returns:
            The output, to go on with.
        """
        if isinstance(output, Jet):
            # A zero coefficient (a linear layer's third order, say) has a gradient all the same.
            parts = [output.primal.new_zeros(output.shape) if part is None else part for part in output.coefficients]
            output = jet([part if part.requires_grad else part.detach().requires_grad_() for part in parts])
            coefficients = [part for part in output.coefficients if part is not None]
        elif output.requires_grad:
            coefficients = [output]
        else:  # under no_grad: nothing depends on it
            return output
        inputs = tuple(None if part is None else part.detach() for part in coefficients_of(x, len(coefficients) - 1))
        edges = tuple(get_gradient_edge(part) for part in coefficients)
        self.calls.append(LayerCall(kind, weight, bias, inputs, edges, output.shape, options))
        return output


def fresh(parameter: Any) -> Any:
    """Copy the parameter's value, without a way back to the original in the graph."""
    if isinstance(parameter, Jet):
        first, *others = parameter.coefficients
        assert first is not None
        return jet([first.detach().requires_grad_(), *(part if part is None else part.detach() for part in others)])
    return parameter.detach().requires_grad_() if isinstance(parameter, Tensor) else parameter


def unrecognized(outputs: Tensor, params: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the parameters that the graph of ``outputs`` still leads to."""
    leaves = {id(coefficients_of(tensor, 0)[0]): name for name, tensor in params.items()}
    pending = [part.grad_fn for part in coefficients_of(outputs, 0) if part is not None]
    seen, reached = set(), set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in leaves:
            reached.add(leaves[id(variable)])
        pending += [previous for previous, _ in node.next_functions]
    return reached


# ---- rules: each returns None for a use that it does not recognize

Rule = Callable[..., Tensor | None]
_RULES: dict[Callable[..., Any], Rule] = {}


def _accepts(rule: Rule, *args: Any, **kwargs: Any) -> bool:
    """Return whether the rule knows this form of the call; otherwise the use stays unrecognized."""
    try:
        _signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_signature = functools.cache(inspect.signature)


def _rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


@_rule(F.linear)
def _linear(capture: Capture, func: Any, input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    w, b = capture.name(weight), capture.name(bias)
    if (w is None and b is None) or weight.ndim != 2:
        return None
    output = func(input, fresh(weight) if w else weight, fresh(bias) if b else bias)
    if w is None:
        return capture.record("scale", None, b, output, output, shape=bias.shape)
    return capture.record("linear", w, b, input, output)


@_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(capture: Capture, func: Any, input: Any, weight: Any) -> Tensor | None:
    w = capture.name(weight)
    if w is None or weight.ndim != 2 or capture.name(input) is not None:
        return None
    return capture.record("linear", w, None, input, func(input, fresh(weight)), transposed=True)


@_rule(torch.addmm)
def _addmm(capture: Capture, func: Any, bias: Any, input: Any, weight: Any) -> Tensor | None:
    w, b = capture.name(weight), capture.name(bias)
    if w is None or bias.ndim != 1 or capture.name(input) is not None:
        return None
    output = func(fresh(bias) if b else bias, input, fresh(weight))
    return capture.record("linear", w, b, input, output, transposed=True)


def _convolution(
    capture: Capture,
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    w, b = capture.name(weight), capture.name(bias)
    if w is None or input.ndim != weight.ndim:
        return None
    output = func(input, fresh(weight), fresh(bias) if b else bias, stride, padding, dilation, groups)
    options = dict(kernel=weight.shape[2:], stride=stride, padding=padding, dilation=dilation, groups=groups)
    return capture.record("convolution", w, b, input, output, **options)


def _transposed(
    capture: Capture,
    func: Any,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor | None:
    w, b = capture.name(weight), capture.name(bias)
    if w is None or input.ndim != weight.ndim:
        return None
    # The bias apart: the weight's Jacobian needs the gradient in windows, the bias's does not.
    output = func(input, fresh(weight), None if b else bias, stride, padding, output_padding, groups, dilation)
    options = dict(kernel=weight.shape[2:], stride=stride, padding=padding, dilation=dilation, groups=groups)
    output = capture.record("transposed convolution", w, None, input, output, **options)
    if b is None:
        return output
    shape = (-1, *[1] * (weight.ndim - 2))
    output = output + fresh(bias).reshape(shape)
    return capture.record("scale", None, b, output, output, shape=bias.reshape(shape).shape)


for _dimension in ("1d", "2d", "3d"):
    _RULES[getattr(torch, f"conv{_dimension}")] = _convolution
    _RULES[getattr(F, f"conv{_dimension}")] = _convolution
    _RULES[getattr(torch, f"conv_transpose{_dimension}")] = _transposed
    _RULES[getattr(F, f"conv_transpose{_dimension}")] = _transposed


@_rule(torch.embedding)
def _embedding(
    capture: Capture,
    func: Any,
    weight: Any,
    indices: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    w = capture.name(weight)
    if w is None or scale_grad_by_freq:
        return None
    table, tokens = fresh(weight), indices
    if padding_idx >= 0:  # torch holds this row constant
        tokens = torch.where(indices == padding_idx, -1, indices)
        if isinstance(table, Jet):
            first, *others = table.coefficients
            kept = torch.arange(len(weight), device=weight.device)[:, None] != padding_idx
            table = jet([first, *(part if part is None else part * kept for part in others)])
    return capture.record("embedding", w, None, tokens, func(table, indices), rows=len(weight))


def _scaled(
    capture: Capture,
    normalized: Any,
    weight: Any,
    bias: Any,
    shape: Sequence[int],
    fused: Callable[[Any], None] | None = None,
) -> Tensor:
    """Return normalized * weight + bias, both brought to ``shape``; ``fused`` puts other numbers into the result."""
    w, b = capture.name(weight), capture.name(bias)
    shape = (bias if weight is None else weight).reshape(shape).shape
    output = normalized
    if weight is not None:
        output = output * (fresh(weight) if w else weight).reshape(shape)
    if bias is not None:
        output = output + (fresh(bias) if b else bias).reshape(shape)
    if fused is not None:
        fused(output)
    return capture.record("scale", w, b, normalized, output, shape=shape)


def _numbers_of(func: Callable[..., Any], *args: Any) -> Callable[[Any], None]:
    """Return what puts a fused operation's numbers into the result of its parts."""
    return lambda output: with_numbers_of(output, func, *args)


@_rule(torch.layer_norm)
def _layer_norm(
    capture: Capture,
    func: Any,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor | None:
    if capture.name(weight) is None and capture.name(bias) is None:
        return None
    plain = func(input, normalized_shape, None, None, eps)
    fused = _numbers_of(func, input, normalized_shape, weight, bias, eps)
    return _scaled(capture, plain, weight, bias, tuple(normalized_shape), fused)


@_rule(torch.rms_norm)
def _rms_norm(
    capture: Capture, func: Any, input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor | None:
    if capture.name(weight) is None:
        return None
    fused = _numbers_of(func, input, normalized_shape, weight, eps)
    return _scaled(capture, func(input, normalized_shape, None, eps), weight, None, tuple(normalized_shape), fused)


@_rule(torch.group_norm)
def _group_norm(
    capture: Capture,
    func: Any,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor | None:
    if capture.name(weight) is None and capture.name(bias) is None:
        return None
    fused = _numbers_of(func, input, num_groups, weight, bias, eps)
    return _scaled(capture, func(input, num_groups, None, None, eps), weight, bias, _channels(input), fused)


def _channel_norm(
    capture: Capture, func: Any, input: Any, weight: Any, bias: Any, mean: Any, variance: Any, *others: Any
) -> Tensor | None:
    if capture.name(weight) is None and capture.name(bias) is None:
        return None
    updates = mean is not None and bool(others and others[0])  # running statistics, once
    fused = None if updates else _numbers_of(func, input, weight, bias, mean, variance, *others)
    return _scaled(capture, func(input, None, None, mean, variance, *others), weight, bias, _channels(input), fused)


_RULES[torch.batch_norm] = _RULES[torch.instance_norm] = _channel_norm


@_rule(torch.prelu, F.prelu)
def _prelu(capture: Capture, func: Any, input: Any, weight: Any) -> Tensor | None:
    w = capture.name(weight)
    if w is None:
        return None
    below = -torch.relu(-input)
    shape = _channels(input) if weight.numel() > 1 else tuple([1] * input.ndim)
    return torch.relu(input) + _scaled(capture, below, weight, None, shape)


@_rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(capture: Capture, func: Any, input: Any, other: Any, *, alpha: float = 1) -> Tensor | None:
    for x, parameter in ((input, other), (other, input)):
        b = capture.name(parameter)
        if b is not None and alpha == 1 and _broadcasts(parameter, x):
            return capture.record("scale", None, b, x, x + fresh(parameter), shape=parameter.shape)
    return None


@_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(capture: Capture, func: Any, input: Any, other: Any) -> Tensor | None:
    for x, parameter in ((input, other), (other, input)):
        w = capture.name(parameter)
        if w is not None and _broadcasts(parameter, x):
            return capture.record("scale", w, None, x, x * fresh(parameter), shape=parameter.shape)
    return None


@_rule(Tensor.expand)
def _expand(capture: Capture, func: Any, input: Any, *sizes: Any) -> Tensor | None:
    b = capture.name(input)
    if b is None:
        return None
    output = func(fresh(input), *sizes)
    return capture.record("scale", None, b, output, output, shape=input.shape)


def _broadcasts(parameter: Tensor, x: Any) -> bool:
    """Return whether ``parameter`` is stretched to the shape of ``x``, and not the other way round."""
    return (
        isinstance(x, Tensor) and x.is_floating_point() and torch.broadcast_shapes(parameter.shape, x.shape) == x.shape
    )


def _channels(x: Tensor) -> tuple[int, ...]:
    return (-1, *[1] * (x.ndim - 2))
