"""How signals and gradients change along the layers of an architecture, at infinite width.

Of every layer the kernel K and the squared gradient J = sum over its neurons and positions of (df/dh)^2 of an output f,
which is the trace of G (``architecture.closed``) over positions. Of every residual stream, its growth: with a norm in
front of every branch, h -> h + a W2 s(W1 norm(h)),

    K_{l+1} = K_l + a^2 kappa,      J_l = J_{l+1} (1 + a^2 chi_b / K_l),      J_0 / J_L = (K_L / K_0)^(chi_b / kappa),

a power law for any initialization, so that such a network is critical whatever its weights are; its exponent
and K_L / K_0 tell what depth does to it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.architecture.closed import ClosedKernels, Samples
from torch_eft.theory.architecture.neurons.kernels import kernels_of
from torch_eft.theory.architecture.nodes import Add, Architecture, Norm, Pool, Weight
from torch_eft.theory.architecture.statistics import population_name, prepare

_NEURONS = 4096
"""Drawn where there is no closed form."""

_GROWN = 1.05
"""Growth of K from which the exponent of a stream is one: below, both logarithms are close to 0."""


@dataclass(frozen=True)
class LayerProfile:
    """A layer with weights.

    Args:
        name: Of its weights.
        population: Of its neurons.
        neurons: Their number.
        positions: Positions of each.
        K: Its kernel, the mean over inputs and positions.
        gradient: J, the mean over inputs; averaging over positions by pooling behind it, which divides J by
            their number whatever the depth, is left out.
        share: The part of the NTK's trace that its weights and biases make.
    """

    name: str
    population: str
    neurons: int
    positions: int
    K: float
    gradient: float
    share: float


@dataclass(frozen=True)
class StreamProfile:
    """A residual stream.

    Args:
        name: Of its population.
        blocks: Branches that are added to it.
        normed: Whether every branch begins with a norm.
        kernel_growth: K at its end over that at its start, the geometric mean over inputs.
        gradient_growth: J at its start over that at its end, likewise.
    """

    name: str
    blocks: int
    normed: bool
    kernel_growth: float
    gradient_growth: float

    @property
    def exponent(self) -> float | None:
        """Log of ``gradient_growth`` over log of ``kernel_growth``, of a normed stream; None where K hardly grows."""
        if not self.normed or self.kernel_growth < _GROWN or self.gradient_growth <= 0:
            return None
        return math.log(self.gradient_growth) / math.log(self.kernel_growth)


@dataclass(frozen=True)
class Profile:
    """Layers and streams in the order of the forward.

    Args:
        layers: Those with weights, the last one included.
        streams: Residual streams.
        last_kernel: K of what the last hidden layer is part of: of its stream's end, if it is added to one.
        Theta: NTK of one output on the inputs, (N, N).
    """

    layers: tuple[LayerProfile, ...]
    streams: tuple[StreamProfile, ...]
    last_kernel: float
    Theta: Tensor


def layer_profile(architecture: Architecture, x: Tensor, *, seed: int = 0) -> Profile:
    """Return kernels and squared gradients along an architecture.

    Args:
        architecture: As ``read_architecture`` returns it, or built of nodes.
        x: Inputs, (N, ...), a few.
        seed: Of neurons drawn where there is no closed form.

    Returns:
        The profile.

    Raises:
        ValueError: If the inputs do not fit.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> from torch_eft.theory.estimates.layer_profile import layer_profile
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> profile = layer_profile(theory.read_architecture(model, torch.eye(3)), torch.eye(3))
        >>> [layer.name for layer in profile.layers], round(sum(layer.share for layer in profile.layers), 6)
        (['0', '2'], 1.0)
    """
    samples = Samples.all_pairs(len(x))
    with torch.no_grad():
        kernels = kernels_of(architecture, prepare(architecture, x), samples, _NEURONS, seed)
        pairs = kernels.ntk()
        Theta = pairs.new_zeros(len(x), len(x))
        Theta[samples.rows, samples.columns] = pairs
        Theta[samples.columns, samples.rows] = pairs
        layers = tuple(_layer(kernels, index, float(Theta.trace())) for index in _weights(architecture))
        streams = tuple(
            stream for population in architecture.hidden if (stream := _stream(kernels, population)) is not None
        )
        last = _last_sum(architecture, _weights(architecture))
        last_kernel = 0.0 if last is None else float(_mean(kernels, last).mean())
    return Profile(layers, streams, last_kernel, Theta)


def _weights(architecture: Architecture) -> list[int]:
    return [index for index, node in enumerate(architecture.nodes) if isinstance(node, Weight)]


def _last_sum(architecture: Architecture, weights: list[int]) -> int | None:
    """The last hidden layer, or the last sum of its stream."""
    if len(weights) < 2:
        return None
    sums = [
        index
        for index, node in enumerate(architecture.nodes)
        if isinstance(node, Add) and architecture.populations[index] == architecture.populations[weights[-2]]
    ]
    return max([weights[-2], *sums])


def _layer(kernels: ClosedKernels, index: int, whole: float) -> LayerProfile:
    architecture = kernels.architecture
    node, population = architecture.nodes[index], architecture.populations[index]
    assert isinstance(node, Weight)
    G, phi = (values[index][kernels.samples.diagonal] for values in (kernels.order.back, kernels.order.phi))
    part = float(((node.lambda_b + node.lambda_W * node.maps.average(phi)) * G).sum())
    return LayerProfile(
        name=node.name,
        population=population_name(architecture, population),
        neurons=architecture.widths[population],
        positions=G.shape[-1],
        K=float(_mean(kernels, index).mean()),
        gradient=float(_trace(kernels, index).mean()) * _averaged(architecture, index),
        share=part / whole if whole > 0 else 0.0,
    )


def _mean(kernels: ClosedKernels, index: int) -> Tensor:
    """K of every input, the mean over positions, (N,)."""
    return kernels.kernel(index)[kernels.samples.diagonal].diagonal(dim1=-2, dim2=-1).mean(-1)


def _trace(kernels: ClosedKernels, index: int) -> Tensor:
    """J of every input, (N,)."""
    return kernels.order.back[index][kernels.samples.diagonal].diagonal(dim1=-2, dim2=-1).sum(-1)


def _growth(after: Tensor, before: Tensor) -> float:
    """The ratio for every input by itself, the geometric mean."""
    return float((after / before).log().mean().exp())


def _averaged(architecture: Architecture, index: int) -> float:
    """By how much the pools behind a node divide squared gradients: the positions that each averages over."""
    factor = 1.0
    for pool in architecture.nodes[index + 1 :]:
        if isinstance(pool, Pool):
            for axis in pool.maps.axes:
                factor /= float(axis[0].square().sum(1).mean())
    return factor


def _stream(kernels: ClosedKernels, population: int) -> StreamProfile | None:
    architecture = kernels.architecture
    nodes = architecture.nodes
    adds = [
        index
        for index, node in enumerate(nodes)
        if isinstance(node, Add) and architecture.populations[index] == population
    ]
    if not adds:
        return None
    first, last = adds[0], adds[-1]
    # Where a layer begins the stream, it is read by branches, too; else the first sum begins it.
    begins = [each for each in nodes[first].inputs if isinstance(nodes[each], Weight)]
    start = next((each for each in begins if len(architecture.consumers(each)) > 1), None)
    ends = [each for each in nodes[last].inputs if isinstance(nodes[each], Weight)]
    blocks = len(adds) - (start is None)
    if not ends or blocks == 0 or (start is None and not begins):
        return None
    gradient = _trace(kernels, begins[0] if start is None else start)
    end = _trace(kernels, ends[0])
    beginning = _mean(kernels, first if start is None else start)
    if not bool((end > 0).all() and (beginning > 0).all()):
        return None
    readers = [
        nodes[reader]
        for index, node in enumerate(nodes[:last])
        if architecture.populations[index] == population and (index == start or isinstance(node, Add))
        for reader in architecture.consumers(index)
    ]
    branches = [node for node in readers if not isinstance(node, Add)]
    return StreamProfile(
        name=population_name(architecture, population),
        blocks=blocks,
        normed=bool(branches) and all(isinstance(node, Norm) for node in branches),
        kernel_growth=_growth(_mean(kernels, last), beginning),
        gradient_growth=_growth(gradient, end),
    )
