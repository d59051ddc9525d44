"""The mode that records, and what it keeps of every call."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from torch_eft.measure.forward.decompositions import WRITTEN_OUT, without_dispatch
from torch_eft.measure.jets.jet import Jet, coefficients_of, jet

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
        self._stretched: dict[int, tuple[str, Tensor]] = {}  # kept alive, so that no id is given twice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record what a rule recognizes; pass everything else on."""
        kwargs = kwargs or {}
        rule = RULES.get(func)
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

    def stretched(self, tensor: Any) -> str | None:
        """Return the name of a parameter, itself or in another shape, None of other tensors."""
        return self._names.get(id(tensor)) or self._stretched.get(id(tensor), (None, None))[0]

    def note_shape(self, name: str, tensor: Tensor) -> None:
        """Note that a tensor has all numbers of a parameter in their order, for ``stretched``."""
        self._stretched[id(tensor)] = name, tensor

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
            if output._is_view():  # what writes to a view (an activation in place) takes its place in the graph from it
                output = torch.ops.aten._unsafe_view(output, output.shape)
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


Rule = Callable[..., Tensor | None]
RULES: dict[Callable[..., Any], Rule] = {}
"""Function of torch -> what records it; None for a use that it does not recognize."""


def _accepts(rule: Rule, *args: Any, **kwargs: Any) -> bool:
    """Return whether the rule knows this form of the call; otherwise the use stays unrecognized."""
    try:
        _signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_signature = functools.cache(inspect.signature)


def rule_for(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for some functions."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register
