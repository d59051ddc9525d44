"""Chains of convolutions and dense layers, as the vertices of order 1/n take them."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from torch_eft.theory.architecture.label_maps import LabelMaps
from torch_eft.theory.architecture.nodes import Architecture, Data, Elementwise, Pool, Weight
from torch_eft.theory.architecture.statistics import prepare
from torch_eft.theory.ensemble import MLPEnsemble


@dataclass(frozen=True)
class Layer:
    """A layer, with the pooling in front of it.

    Args:
        pools: Label maps of the pooling, in order.
        maps: Its own, P^d.
    """

    pools: tuple[LabelMaps, ...]
    maps: LabelMaps

    @property
    def count(self) -> int:
        """k, the number of weights between two neurons."""
        return self.maps.count

    def average_adjoint(self, G: Tensor) -> Tensor:
        """Return Av^T[G], (..., P', P') -> (..., P, P)."""
        for maps in reversed((*self.pools, self.maps)):
            G = maps.average_adjoint(G)
        return G

    def average(self, X: Tensor) -> Tensor:
        """Return Av[X], (..., P, P) -> (..., P', P')."""
        for maps in (*self.pools, self.maps):
            X = maps.average(X)
        return X

    @functools.cached_property
    def matrices(self) -> Tensor:
        """P^d behind the pooling, (k, P', P)."""
        size = math.prod((self.pools or (self.maps,))[0].inputs)
        values = torch.eye(size, dtype=torch.float64, device="cpu")
        for pool in self.pools:
            values = pool.on_labels(values)[0]
        return self.maps.on_labels(values).mT


class ChainEnsemble(MLPEnsemble):
    """The hyperparameters of a chain."""

    def __str__(self) -> str:
        channels = "-".join(map(str, self.widths[1:]))
        return f"network of convolutions and dense layers, channels {channels}, {self.activation.name}"


@dataclass(frozen=True)
class Chain:
    """Layers one after the other, one activation between them.

    Args:
        ensemble: Its hyperparameters, layer by layer, as if it were an MLP: the widths are n_0 k of the first layer,
            then channels.
        layers: Label maps, layer by layer.
        patches: (N P', n_0 k): what the first layer's weights multiply, for every label behind it.
        samples: N.
    """

    ensemble: MLPEnsemble
    layers: tuple[Layer, ...]
    patches: Tensor
    samples: int

    @property
    def depth(self) -> int:
        """L."""
        return len(self.layers)

    @functools.cached_property
    def selects(self) -> bool:
        """Whether labels at one position stay at one position down to the inputs: no layer averages over positions."""
        for layer in self.layers[1:]:
            maps = layer.matrices
            if not bool(((maps == 0) | (maps == 1)).all()) or bool((maps.sum(2) > 1).any()):
                return False
        return math.prod(self.layers[-1].maps.outputs) == 1

    def labels(self, layer: int) -> int:
        """Return N times the positions behind a layer, 1 .. L."""
        return self.samples * math.prod(self.layers[layer - 1].maps.outputs)

    def averaged(self, X: Tensor, layer: int, pair: tuple[int, int]) -> Tensor:
        """Take a tensor over labels in front of a layer to labels behind it, on two of its axes.

        Args:
            X: (.., N P, .., N P, ..), a label being sample * P + position.
            layer: 1 .. L.
            pair: The two axes.

        Returns:
            (.., N P', .., N P', ..).
        """
        N, X = self.samples, X.movedim(pair, (-2, -1))
        blocks = X.unflatten(-1, (N, -1)).unflatten(-3, (N, -1)).movedim(-2, -3)
        blocks = self.layers[layer - 1].average(blocks).movedim(-3, -2)
        return blocks.flatten(-4, -3).flatten(-2, -1).movedim((-2, -1), pair)

    def averaged_together(self, X: Tensor, layer: int) -> Tensor:
        """Take four labels that share one weight: (1/k) sum_d of P^d on all axes, (N P,) * 4 -> (N P',) * 4."""
        layer_maps = self.layers[layer - 1]
        total: Tensor | float = 0.0
        for one in layer_maps.matrices.to(X):
            part = X
            for axis in range(X.ndim):
                moved = part.movedim(axis, -1).unflatten(-1, (self.samples, -1)) @ one.mT
                part = moved.flatten(-2, -1).movedim(-1, axis)
            total = total + part
        assert isinstance(total, Tensor)
        return total / layer_maps.count


def chain_of(architecture: Architecture, x: Tensor) -> Chain:
    """Return an architecture as a chain.

    Args:
        architecture: Of data, weights, one activation and pooling.
        x: Inputs, (N, ...).

    Raises:
        ValueError: If it is no chain, with what to do.
    """
    data = prepare(architecture, x)
    layers: list[Layer] = []
    weights: list[Weight] = []
    activations = []
    pools: list[LabelMaps] = []
    acts = True  # data need no activation
    for index, node in enumerate(architecture.nodes):
        if index and node.inputs != (index - 1,):
            _refuse(f"{node.name!r} reads {len(node.inputs)} nodes, not the one in front of it")
        if isinstance(node, Weight):
            if not acts:
                _refuse(f"no activation stands in front of {node.name!r}")
            weights.append(node)
            layers.append(Layer(tuple(pools), node.maps))
            pools, acts = [], False
        elif isinstance(node, Elementwise):
            if pools:
                _refuse(f"{node.name!r} acts behind a pooling")
            activations.append(node.activation)
            acts = True
        elif isinstance(node, Pool):
            if not acts or not weights:
                _refuse(f"{node.name!r} pools in front of an activation")
            pools.append(node.maps)
        elif not isinstance(node, Data) or index:
            _refuse(f"{node.name!r} is a {type(node).__name__}")
    if len({activation.name for activation in activations}) > 1:
        _refuse(f"activations differ: {', '.join(dict.fromkeys(one.name for one in activations))}")
    if any(weight.weight_law == "orthogonal" for weight in weights):
        _refuse("orthogonal weights of convolutions are not derived")
    (inputs,) = data.values()
    patches = torch.einsum("doi,nic->nodc", layers[0].matrices.to(inputs), inputs).flatten(2).flatten(0, 1)
    ensemble = ChainEnsemble(
        [patches.shape[1], *(weight.channels for weight in weights)],
        activations[0] if activations else "linear",
        C_b=[weight.C_b for weight in weights],
        C_W=[weight.C_W for weight in weights],
        lambda_b=[weight.lambda_b for weight in weights],
        lambda_W=[weight.lambda_W for weight in weights],
        weight_law=[weight.weight_law for weight in weights],
        bias_law=[weight.bias_law for weight in weights],
    )
    return Chain(ensemble, tuple(layers), patches, len(inputs))


def _refuse(reason: str) -> NoReturn:
    raise ValueError(
        f"architecture: {reason}; vertices of order 1/n are derived for chains of convolutions and dense layers with "
        "one activation. architecture_statistics gives the spread over seeds, drawn networks (predict_from_networks) "
        "the drift"
    )


def pairs_of(name: str) -> Sequence[tuple[int, int]]:
    """Return the printed slots of a vertex that share an output, and so an offset."""
    return ((0, 3), (1, 2)) if name == "P" else ((0, 1),) if name in ("G1", "Theta1") else ((0, 1), (2, 3))
