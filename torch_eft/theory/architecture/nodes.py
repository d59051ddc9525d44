"""An architecture as a graph of a few kinds of nodes, with the law of its weights.

A value of the graph is, for one neuron (channel) of a population, a number at every label (sample, position).
Populations are the sets of neurons that share an index: a hidden layer, or everything that is added to one residual
stream. Only a ``Weight`` mixes neurons; all other nodes act on each by itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from torch_eft.theory.architecture.label_maps import LabelMaps
from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.laws import Law

_NO_POSITIONS = LabelMaps()


@dataclass(frozen=True)
class Data:
    """Inputs: no neurons, known numbers.

    Args:
        channels: Numbers at a position.
        positions: Positions an axis.
        prepare: Turns the inputs x into (N, positions .., channels); None if they have that shape.
        name: For reports.
    """

    channels: int
    positions: tuple[int, ...] = ()
    prepare: Callable[[Tensor], Tensor] | None = None
    name: str = "data"
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Weight:
    """z'_{i;x} = b_i + sum_{j,d} W_{ijd} sum_y P^d_{xy} h_{j;y}: a dense layer, a convolution, a read-out.

    Args:
        inputs: The node h.
        channels: Neurons after it.
        maps: P^d, d = 1 .. k; its fan-in is n k, n the neurons before.
        C_W: Variance of a weight times the fan-in.
        C_b: Variance of a bias.
        lambda_W: Learning-rate tensor of the weights times the fan-in: the fan-in for one torch learning rate.
        lambda_b: That of the biases; 0 without.
        weight_law: Of one weight.
        bias_law: Of one bias.
        name: For reports.
    """

    inputs: tuple[int]
    channels: int
    maps: LabelMaps = _NO_POSITIONS
    C_W: float = 1.0
    C_b: float = 0.0
    lambda_W: float = 1.0
    lambda_b: float = 1.0
    weight_law: Law = "gaussian"
    bias_law: Law = "gaussian"
    name: str = "weight"


@dataclass(frozen=True)
class Elementwise:
    """sigma(h)."""

    inputs: tuple[int]
    activation: Activation
    name: str = "activation"


@dataclass(frozen=True)
class Pool:
    """A linear map of labels, the same for every neuron: pooling by average, a mean over tokens.

    Args:
        inputs: The node h.
        maps: A single map, k = 1.
        name: For reports.
    """

    inputs: tuple[int]
    maps: LabelMaps
    name: str = "pool"


@dataclass(frozen=True)
class Add:
    """The sum of several nodes of the same neurons."""

    inputs: tuple[int, ...]
    name: str = "add"


@dataclass(frozen=True)
class Norm:
    """(h - mean) / sqrt(variance + eps) over neurons, and over positions: LayerNorm, RMSNorm, GroupNorm.

    Args:
        inputs: The node h.
        over: The axes of positions that it is over, besides the neurons.
        groups: Groups of neurons that are normalized each by itself.
        centered: Whether the mean is subtracted (not by RMSNorm).
        eps: Added to the variance.
        name: For reports.
    """

    inputs: tuple[int]
    over: tuple[int, ...] = ()
    groups: int = 1
    centered: bool = True
    eps: float = 1e-5
    name: str = "norm"


@dataclass(frozen=True)
class Affine:
    """gamma_i factor h + beta_i at gamma = 1, beta = 0: gains and biases of a norm; a constant factor without.

    Args:
        inputs: The node h.
        factor: A constant.
        lambda_gain: Learning-rate tensor of gamma, 0 without.
        lambda_bias: That of beta.
        per_position: Whether every position has its own gamma and beta, or all positions share those of a neuron.
        name: For reports.
    """

    inputs: tuple[int]
    factor: float = 1.0
    lambda_gain: float = 0.0
    lambda_bias: float = 0.0
    per_position: bool = False
    name: str = "affine"


Node = Data | Weight | Elementwise | Pool | Add | Norm | Affine


@dataclass(frozen=True, init=False, repr=False)
class Architecture:
    """A graph of nodes; the last one is the output.

    Args:
        nodes: In the order of the forward; ``inputs`` are indices into it.
        remarks: Sentences on how well its laws are known, where it was read off a network.

    Raises:
        ValueError: If a node reads a later one, neurons or positions do not fit, or the output is not linear in the
            weights of a last layer.

    Example:
        >>> from torch_eft import theory
        >>> from torch_eft.theory.architecture.nodes import Data, Elementwise, Weight
        >>> tanh = theory.get_activation("tanh")
        >>> theory.Architecture([Data(3), Weight((0,), 64), Elementwise((1,), tanh), Weight((2,), 1)])
        Architecture(2 weights, 1 population: weight (64 neurons); 1 output)
    """

    nodes: tuple[Node, ...]
    positions: tuple[tuple[int, ...], ...]
    populations: tuple[int, ...]
    widths: dict[int, int]
    remarks: tuple[str, ...]

    def __init__(self, nodes: Sequence[Node], remarks: Sequence[str] = ()) -> None:
        nodes = tuple(nodes)
        positions: list[tuple[int, ...]] = []
        population: list[int] = []
        for index, node in enumerate(nodes):
            if any(not 0 <= each < index for each in node.inputs):
                raise ValueError(
                    f"nodes: {node.name!r} reads {node.inputs}; a node reads earlier ones, 0 .. {index - 1}"
                )
            population.append(_population(index, node, nodes, population))
            positions.append(_positions(node, positions, nodes))
        widths = {p: getattr(nodes[p], "channels", 0) for p in dict.fromkeys(population) if p >= 0}
        for p in widths:
            channels = {n.channels for n, q in zip(nodes, population, strict=True) if q == p and isinstance(n, Weight)}
            if len(channels) > 1:
                raise ValueError(f"nodes: {sorted(channels)} neurons are added to one another in {nodes[p].name!r}")
        for name, value in (
            ("nodes", nodes),
            ("positions", tuple(positions)),
            ("populations", tuple(population)),
            ("widths", widths),
            ("remarks", tuple(remarks)),
        ):
            object.__setattr__(self, name, value)
        self._check_output()

    def _check_output(self) -> None:
        last = self.populations[-1]
        if math.prod(self.positions[-1]) != 1:
            raise ValueError(
                f"nodes: the output has the positions {self.positions[-1]}; flatten or pool them in front of the last "
                "layer"
            )
        for node, population in zip(self.nodes, self.populations, strict=True):
            if population == last and not isinstance(node, Weight | Pool | Add | Affine):
                raise ValueError(
                    f"nodes: {node.name!r} stands behind the last layer; the output must be linear in its weights. "
                    "End the network with a Linear"
                )
            reads = {self.populations[each] for each in node.inputs}
            if last in reads and population != last:
                raise ValueError(
                    f"nodes: {node.name!r} reads what the output is made of; give the output its own layer"
                )

    @property
    def output(self) -> int:
        """Number of outputs."""
        return self.widths[self.populations[-1]]

    @property
    def hidden(self) -> dict[int, int]:
        """``{population: neurons}`` of all but the outputs; a population is named by its first node."""
        return {p: n for p, n in self.widths.items() if p != self.populations[-1]}

    def consumers(self, index: int) -> list[int]:
        """Return the nodes that read one."""
        return [each for each, node in enumerate(self.nodes) if index in node.inputs]

    def __repr__(self) -> str:
        weights = sum(isinstance(node, Weight) for node in self.nodes)
        names = ", ".join(f"{self.nodes[p].name} ({n} neurons)" for p, n in self.hidden.items())
        many = "population" if len(self.hidden) == 1 else "populations"
        outputs = "output" if self.output == 1 else "outputs"
        return f"Architecture({weights} weights, {len(self.hidden)} {many}: {names}; {self.output} {outputs})"


def _population(index: int, node: Node, nodes: tuple[Node, ...], population: list[int]) -> int:
    """The population of a node, named by its first; -1 for data. An ``Add`` makes one of several."""
    if isinstance(node, Data):
        return -1
    if isinstance(node, Weight):
        return index
    read = {population[each] for each in node.inputs}
    if -1 in read:
        raise ValueError(f"nodes: {node.name!r} reads the data; a Weight must stand between")
    first = min(read)
    if len(read) > 1:
        for each, known in enumerate(population):
            if known in read:
                population[each] = first
    return first


def _positions(node: Node, positions: list[tuple[int, ...]], nodes: tuple[Node, ...]) -> tuple[int, ...]:
    if isinstance(node, Data):
        return node.positions
    read = [positions[each] for each in node.inputs]
    if isinstance(node, Weight | Pool):
        if node.maps.inputs != read[0]:
            raise ValueError(
                f"nodes: the maps of {node.name!r} are of positions {node.maps.inputs}, it reads {read[0]}"
            )
        return node.maps.outputs
    if any(one != read[0] for one in read):
        raise ValueError(f"nodes: {node.name!r} adds positions {', '.join(map(str, read))}")
    return read[0]
