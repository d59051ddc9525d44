"""The graph under construction: which value of the forward is which node, and what its dimensions are.

Every dimension of a value is made of axes: samples ``"n"``, neurons ``"c"``, axes of positions 0, 1, .. in the node's
own order. Flattening puts several axes into one dimension, transposing moves them; axes of length 1 are left out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_eft.theory.architecture.label_maps import LabelMaps, identity_maps
from torch_eft.theory.architecture.nodes import Affine, Architecture, Data, Node, Pool, Weight
from torch_eft.theory.architecture.reading.checking import Held
from torch_eft.theory.architecture.reading.initialization import Drawn, layer_laws, remarks
from torch_eft.theory.architecture.reading.weight_laws import WeightStatistics, weight_statistics

Axis = str | int
Dims = tuple[tuple[Axis, ...], ...]


BATCH_NORM_TRAINING = (
    "BatchNorm in training mode is not covered: every output depends on the whole batch. model.eval(), or use "
    "GroupNorm or LayerNorm; else use seeds (measure.statistics_over_seeds, eft.predict_from_networks)"
)


class NotReadableError(ValueError):
    """The architecture has a part that the theory does not cover; the message names it, and what to do instead.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(1, 4, 3), torch.nn.MaxPool1d(2))
        >>> try:
        ...     theory.read_architecture(model, torch.zeros(1, 1, 8))
        ... except theory.NotReadableError as error:
        ...     print(error)
        max pooling is not covered: pool by average (nn.AvgPool1d, 2d, 3d), or use a stride
    """


@dataclass(frozen=True)
class Value:
    """A tensor of the forward that depends on random weights.

    Args:
        node: Index of its node.
        dims: The axes of each of its dimensions.
    """

    node: int
    dims: Dims


@dataclass(frozen=True)
class Parameter:
    """A parameter itself."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Raw:
    """What is computed from the inputs alone, or a constant.

    Args:
        compute: x -> tensor.
        shape: Of the tensor for the inputs that were traced.
        of_inputs: Whether it depends on x.
    """

    compute: Callable[[Tensor], Any]
    shape: tuple[int, ...]
    of_inputs: bool


class Graph:
    """Nodes as they are read.

    Args:
        traced: The forward as a graph of operations.
        parameters: Of the module, by name.
        buffers: Likewise.
        lambdas: Relative learning rates by name; None is 1.
    """

    def __init__(
        self,
        traced: torch.fx.GraphModule,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        lambdas: Mapping[str, float] | None,
    ) -> None:
        self.traced, self.lambdas = traced, lambdas
        self.nodes: list[Node] = []
        self.positions: list[tuple[int, ...]] = []
        self.held: dict[int, Held] = {}
        self.used: dict[int, str] = {}
        self._first_of: dict[Any, Parameter] = {}
        self._drawn: dict[int, Drawn] = {}
        self._values: dict[Any, Any] = {}
        self._overwritten: set[Any] = set()
        self._views: dict[Any, Any] = {}
        places = [node for node in traced.graph.nodes if node.op == "placeholder"]
        names = [*parameters, *buffers]
        for node, name in zip(places, names, strict=False):
            if name in parameters:
                self._values[node] = Parameter(name, parameters[name])
            else:
                self._values[node] = _constant(buffers[name])
        self._values[places[-1]] = Raw(_as_it_is, tuple(places[-1].meta["val"].shape), True)

    def constant(self, node: Any) -> None:
        """Enter a tensor that the forward makes itself."""
        self._values[node] = _constant(getattr(self.traced, node.target))

    def value(self, given: Any) -> Any:
        """Return what an argument is: a Value, Parameter, Raw, or a plain number or list."""
        if isinstance(given, torch.fx.Node):
            if given in self._overwritten:
                raise NotReadableError(
                    "a tensor is changed in place and the old one is used again; write out-of-place operations"
                )
            return self._values[given]
        return type(given)(map(self.value, given)) if isinstance(given, list | tuple) else given

    def read(self, node: Any, rule: Callable[["Graph", str, Any, list[Any], dict[str, Any]], Any]) -> None:
        """Enter the result of an operation."""
        arguments = [self.value(each) for each in node.args]
        keywords = {key: self.value(each) for key, each in node.kwargs.items()}
        name = str(node.target).removeprefix("aten.")
        flat = [*arguments, *keywords.values()]
        inner = [one for each in flat for one in (each if isinstance(each, list | tuple) else [each])]
        if any(isinstance(one, Value | Parameter) for one in inner):
            self._values[node] = rule(self, name, node, arguments, keywords)
        else:
            self._values[node] = self._raw(node, inner)
        first = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else None
        if first is not None:
            if in_place(name):
                shared = self._origin(first)
                self._overwritten.update(each for each in self._values if self._origin(each) is shared)
            elif name.split(".")[0] in _VIEWS:
                self._views[node] = first

    def _origin(self, node: Any) -> Any:
        """What a view is of."""
        while node in self._views:
            node = self._views[node]
        return node

    def _raw(self, node: Any, inner: list[Any]) -> Raw:
        """What an operation makes of the inputs alone; refused where it is not the same for every call and batch."""
        name, given = str(node.target).removeprefix("aten.").split(".")[0], list(node.args)
        if name == "batch_norm" and given[5]:
            raise NotReadableError(BATCH_NORM_TRAINING)
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if random and not ("dropout" in name and not (given[1] and given[2])):
            raise NotReadableError(
                f"{name.strip('_')} of the inputs draws random numbers: model.eval(), or leave it to the data"
            )
        kept = {each: self._values[each] for each in node.all_input_nodes}
        target, args, keywords = node.target, node.args, node.kwargs
        value = node.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        changes = in_place(str(target).removeprefix("aten."))

        def compute(x: Tensor) -> Any:
            def look(each: torch.fx.Node) -> Any:
                return kept[each].compute(x)

            given = torch.fx.map_arg(args, look)
            if changes:
                given = (given[0].clone(), *given[1:])
            return target(*given, **torch.fx.map_arg(keywords, look))

        return Raw(compute, shape, any(isinstance(one, Raw) and one.of_inputs for one in inner))

    def add(self, node: Node, positions: tuple[int, ...]) -> int:
        """Append a node and return its index."""
        self.nodes.append(node)
        self.positions.append(positions)
        return len(self.nodes) - 1

    def affine(
        self,
        value: Value,
        gain: Parameter | None,
        bias: Parameter | None,
        node: Affine,
        arranged: Callable[[Tensor], Tensor],
        factor: float,
    ) -> Value:
        """Append gains and biases, which ``arranged`` puts into (channels, positions)."""
        index = self.add(node, self.positions[value.node])
        names = [None if each is None else each.name for each in (gain, bias)]
        self.held[index] = Held(names[0], names[1], arranged, factor)
        return Value(index, value.dims)

    def pool(self, value: Value, axes: Mapping[int, Tensor], name: str) -> int:
        """Append a linear map of some axes of positions."""
        sizes = self.positions[value.node]
        kept = identity_maps(sizes).axes
        maps = LabelMaps(tuple(axes.get(axis, kept[axis]) for axis in range(len(sizes))))
        return self.add(Pool((value.node,), maps, name), maps.outputs)

    def data(self, raw: Raw, channel: int, name: str) -> Value:
        """Append the inputs as a layer reads them, with the dimension that is its channels."""
        if not raw.of_inputs:
            raise NotReadableError(f"{name} reads a constant; it must read the inputs, or what is made of them")
        if not raw.shape or raw.shape[0] != 2:
            raise NotReadableError(f"{name} reads a tensor that does not begin with the samples; keep (N, ...)")
        order = [d for d in range(1, len(raw.shape)) if d != channel]
        sizes = tuple(raw.shape[d] for d in order)

        def prepare(x: Tensor) -> Tensor:
            return _two_by_two(raw, x).permute(0, *order, channel)

        node = Data(raw.shape[channel], sizes, prepare, name)
        index = self.add(node, sizes)
        dims: list[tuple[Axis, ...]] = [("n",)]
        dims += [("c",) if d == channel else (order.index(d),) for d in range(1, len(raw.shape))]
        return Value(index, tuple(dims))

    def weight(
        self,
        value: Value,
        weight: Any,
        bias: Any,
        maps: LabelMaps,
        channels: int,
        dims: Dims,
        name: str,
        arranged: Callable[[Tensor], Tensor],
    ) -> Value:
        """Append a layer, with the law of its weights, which ``arranged`` puts into (channels, before, k)."""
        weight, bias = self._own(weight, "weight", name), self._own(bias, "bias", name)
        layer = weight.name.removesuffix(".weight")
        fan_in = weight.tensor.numel() // channels
        W = weight_statistics(weight.tensor)
        b = None if bias is None else weight_statistics(bias.tensor)
        if W.variance == 0 or not math.isfinite(W.variance) or W.distribution == "constant":
            raise NotReadableError(
                f"the weights of {layer!r} are {'all 0' if W.variance == 0 else 'no random numbers'}"
            )
        self._check_drawn(weight, layer, W)
        node = Weight(
            (value.node,),
            channels,
            maps,
            lambda_W=self._lambda(weight) * fan_in,
            lambda_b=self._lambda(bias),
            name=layer,
        )
        index = self.add(node, maps.outputs)
        self.held[index] = Held(weight.name, None if bias is None else bias.name, arranged)
        fan_out = weight.tensor.numel() // weight.tensor.shape[1]
        self._drawn[index] = Drawn(W, b, fan_in, fan_out, channels, weight.tensor.ndim > 2, layer)
        return Value(index, dims)

    def _check_drawn(self, weight: Parameter, layer: str, W: WeightStatistics) -> None:
        """Refuse weights that are no draws of their own: mostly 0, or those of another layer."""
        zeros = float((weight.tensor.detach() == 0).double().mean())
        if zeros > 0.5:
            raise NotReadableError(
                f"{100 * zeros:.3g} % of the weights of {layer!r} are 0 (an identity, sparse, pruned); the theory is "
                "of weights that are drawn independently: initialize them anew"
            )
        key = (tuple(weight.tensor.shape), W.variance, W.largest)
        other = self._first_of.setdefault(key, weight)
        if other is not weight and torch.equal(other.tensor.detach(), weight.tensor.detach()):
            raise NotReadableError(
                f"{other.name!r} and {weight.name!r} have the same values (a layer was copied); the theory is of "
                "weights that are drawn independently: initialize one anew (reset_parameters)"
            )

    def _own(self, given: Any, what: str, name: str) -> Any:
        if given is None and what == "bias":
            return None
        if not isinstance(given, Parameter):
            raise NotReadableError(
                f"the {what} of {name} is computed (weight norm, low rank, a product); it must be a parameter itself"
            )
        if id(given.tensor) in self.used:
            raise NotReadableError(
                f"the parameter {given.name!r} is used twice; layers that share weights are not independent. Use seeds "
                "(measure.statistics_over_seeds)"
            )
        self.used[id(given.tensor)] = given.name
        return given

    def own(self, given: Any, what: str, name: str) -> Any:
        """Return a parameter that is used for the first time; None if there is none."""
        return None if given is None else self._own(given, what, name)

    def _lambda(self, parameter: Parameter | None) -> float:
        if parameter is None or not parameter.tensor.requires_grad:
            return 0.0
        if self.lambdas is None:
            return 1.0
        if parameter.name not in self.lambdas:
            raise ValueError(f"lambdas: no value for {parameter.name!r} given; give one for every trainable parameter")
        return float(self.lambdas[parameter.name])

    def rate(self, parameter: Parameter | None) -> float:
        """Return lambda of a parameter; 0 without."""
        return self._lambda(parameter)

    def finished(self, output: Any) -> Architecture:
        """Return the architecture, whose output is what the forward returns."""
        (given,) = output.args
        leaves = given if isinstance(given, list | tuple) else [given]
        if len(leaves) != 1 or not isinstance(self.value(leaves[0]), Value):
            raise NotReadableError("the forward must return one tensor that depends on weights, (N, C)")
        value = self.value(leaves[0])
        last = [node for node in self.nodes if isinstance(node, Weight)]
        if not last or [dim for dim in value.dims if dim] not in ([("n",), ("c",)], [("c",)]):
            raise NotReadableError("the output is not (N, C): flatten or pool positions in front of a last Linear")
        try:
            return Architecture(*self._with_laws(value.node + 1))
        except ValueError as error:
            raise NotReadableError(str(error).removeprefix("nodes: ")) from error

    def _with_laws(self, count: int) -> tuple[list[Node], tuple[str, ...]]:
        """The first nodes with C_W, C_b and laws, and remarks on these."""
        nodes, layers = list(self.nodes), list(self._drawn.values())
        laws = layer_laws(layers)
        for index, law in zip(self._drawn, laws, strict=True):
            nodes[index] = replace(nodes[index], **vars(law))
        return nodes[:count], remarks(layers, laws)


def in_place(name: str) -> bool:
    """Whether an operation changes its first argument."""
    plain = name.split(".")[0]
    return plain.endswith("_") and not plain.startswith("_")


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _two_by_two(raw: Raw, x: Tensor) -> Tensor:
    """What is made of the inputs, in batches of the size that was traced: the forward may have written it down."""
    if raw.compute is _as_it_is:
        return x
    parts = [raw.compute(torch.cat([x, x[-1:]])[start : start + 2]) for start in range(0, len(x), 2)]
    return torch.cat(parts)[: len(x)]


def _constant(tensor: Tensor) -> Raw:
    return Raw(lambda x: tensor.to(x.device), tuple(tensor.shape), False)


def view_dims(dims: Dims, sizes: Mapping[Axis, int], shape: Sequence[int]) -> Dims | None:
    """Return the axes of the dimensions after a reshape; None if it splits one."""
    left = [axis for dim in dims for axis in dim if sizes[axis] > 1]
    found: list[tuple[Axis, ...]] = []
    for size in shape:
        dim: list[Axis] = []
        product = 1
        while product < size and left:
            dim.append(left.pop(0))
            product *= sizes[dim[-1]]
        if product != size:
            return None
        found.append(tuple(dim))
    return None if left else tuple(found)


_VIEWS = {
    "view", "reshape", "flatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "alias", "select", "slice",
    "expand", "movedim", "mT", "numpy_T", "chunk", "split", "unbind", "view_as", "unflatten",
    "narrow", "to", "contiguous", "detach", "dropout", "identity",
}  # fmt: skip
"""Operations whose result can share memory with what they read."""
