"""Draws single neurons of every population: what they contribute to the order parameters.

Given the kernels, the neurons of a population are independent and alike. One of them is a forward path, h at all nodes
and labels, from u ~ N(0, K) of the weights that write into it; and a backward path, g at all its nodes, from
g ~ N(0, C_W Av^T G) of the weights that read it. Biases, the weights of a first layer and those of the read-out are
drawn from their own law: they are single numbers, not sums.
"""

import math

import torch
from torch import Tensor

from torch_eft.theory.architecture.closed import ClosedKernels, over_positions
from torch_eft.theory.architecture.neurons.kernels import joined
from torch_eft.theory.architecture.nodes import Add, Affine, Architecture, Data, Elementwise, Norm, Pool, Weight
from torch_eft.theory.gaussian.laws import Law, draw


class Neurons:
    """Draws of the neurons of all hidden populations.

    Args:
        kernels: Of all pairs of samples, forward and backward.
        number: Samples N.
        generator: Of the random numbers.
    """

    def __init__(self, kernels: ClosedKernels, number: int, generator: torch.Generator) -> None:
        self.kernels, self.number, self.generator = kernels, number, generator
        self.architecture: Architecture = kernels.architecture
        self._roots: dict[tuple[str, int], Tensor] = {}
        self._read_out = self._output_gradient()

    def draw(self, population: int, count: int) -> "Draw":
        """Draw neurons of one population, each with two independent paths backward.

        Args:
            population: Which.
            count: How many.

        Returns:
            Their paths.
        """
        nodes = self.architecture.nodes
        members = [i for i, p in enumerate(self.architecture.populations) if p == population]
        h: dict[int, Tensor] = {}
        for index in members:
            h[index] = self._forward(index, h, count)
        found = Draw(h)
        for index, node in enumerate(nodes):
            if isinstance(node, Weight) and node.inputs[0] in h:
                found.phi[index] = h[node.inputs[0]]
            if isinstance(node, Norm) and index in h:
                sizes, read = self.architecture.positions[index], h[node.inputs[0]]
                found.norm[index] = over_positions(read.square(), sizes, node.over)
                found.mean[index] = over_positions(read, sizes, node.over)
        for path in found.paths:
            self._backward(members, h, path, count)
        return found

    def _forward(self, index: int, h: dict[int, Tensor], count: int) -> Tensor:
        node = self.architecture.nodes[index]
        if isinstance(node, Weight):
            return self._preactivations(index, node, count)
        if isinstance(node, Add):
            return torch.stack([h[each] for each in node.inputs]).sum(0)
        read = h[node.inputs[0]]
        if isinstance(node, Elementwise):
            return node.activation(read)
        if isinstance(node, Pool):
            return node.maps.on_labels(read)[0]
        if isinstance(node, Affine):
            return read * node.factor
        assert isinstance(node, Norm)
        center = self.kernels.center.get(index)
        return (read if center is None else read - center) / self.kernels.deviation[index]

    def _preactivations(self, index: int, node: Weight, count: int) -> Tensor:
        like = self.kernels.K[index]
        source = self.architecture.nodes[node.inputs[0]]
        bias_free = node.bias_law == "gaussian" or node.C_b == 0
        if isinstance(source, Data) and node.weight_law not in ("gaussian", "orthogonal"):
            x = self.kernels.data[node.inputs[0]]
            patches = node.maps.on_labels(x.mT).permute(1, 3, 0, 2).flatten(2)  # (N, P', k channels)
            fan_in = patches.shape[-1]
            W = draw(node.weight_law, node.C_W / fan_in, (count, fan_in), self.generator, like)
            u = torch.einsum("sf,npf->snp", W, patches)
            constant = node.C_b > 0
        else:
            u = self._gaussian("K", index, count, like - node.C_b if not bias_free else like)
            constant = not bias_free
        if constant:
            u = u + draw(node.bias_law, node.C_b, (count,), self.generator, like)[:, None, None]
        return u

    def _backward(self, members: list[int], h: dict[int, Tensor], path: "Path", count: int) -> None:
        nodes = self.architecture.nodes
        arrived: dict[int, list[Tensor]] = {}
        for index, node in enumerate(nodes):
            if isinstance(node, Weight) and node.inputs[0] in h:
                arrived.setdefault(node.inputs[0], []).append(self._gradient(index, node, count))
        for index in reversed(members):
            if index not in arrived:
                continue
            node, g = nodes[index], torch.stack(arrived[index]).sum(0)
            if isinstance(node, Weight):
                path.back[index] = g
                continue
            if isinstance(node, Elementwise):
                g = g * node.activation(h[node.inputs[0]], 1)
            elif isinstance(node, Pool):
                g = node.maps.adjoint_on_labels(g)
            elif isinstance(node, Norm):
                g = g / self.kernels.deviation[index]
            elif isinstance(node, Affine):
                path.bias[index], path.gain[index] = g, g * h[index]
                g = g * node.factor
            for each in node.inputs:
                arrived.setdefault(each, []).append(g)

    def _gradient(self, index: int, node: Weight, count: int) -> Tensor:
        """G at the input of a weight, (count, N, P)."""
        outwards = self._read_out.get(index)
        if outwards is None:
            return self._gaussian("G", index, count, self.kernels.readers[index])
        like = self.kernels.K[index]
        w = draw(_single(node), node.C_W / node.maps.count, (count, node.maps.count), self.generator, like)
        return torch.einsum("sk,knp->snp", w, outwards)

    def _output_gradient(self) -> dict[int, Tensor]:
        """df/dz at the last weights, carried through each of their maps to what they read, (k, N, P)."""
        architecture = self.architecture
        nodes, last = architecture.nodes, architecture.populations[-1]
        arrived = {len(nodes) - 1: self.kernels.K[-1].new_ones(self.number, 1)}
        found: dict[int, Tensor] = {}
        for index in reversed(range(len(nodes))):
            node = nodes[index]
            if architecture.populations[index] != last or index not in arrived:
                continue
            g = arrived[index]
            if isinstance(node, Weight):
                size = math.prod(node.maps.inputs)
                dense = node.maps.on_labels(torch.eye(size, dtype=g.dtype, device=g.device))  # (k, P, P')
                found[index] = torch.einsum("kpo,no->knp", dense, g)
                continue
            g = node.maps.adjoint_on_labels(g) if isinstance(node, Pool) else g
            g = g * node.factor if isinstance(node, Affine) else g
            for each in node.inputs:
                arrived[each] = arrived.get(each, 0.0) + g
        return found

    def _gaussian(self, kind: str, index: int, count: int, blocks: Tensor) -> Tensor:
        """Draws of N(0, blocks), (count, N, P)."""
        if (kind, index) not in self._roots:
            self._roots[kind, index] = _root(joined(blocks, self.kernels.samples, self.number))
        root = self._roots[kind, index]
        xi = torch.randn(count, len(root), generator=self.generator, dtype=root.dtype, device=root.device)
        return (xi @ root.mT).reshape(count, self.number, -1)


def _single(node: Weight) -> Law:
    """The law of one number: those of an orthogonal matrix are Gaussian, one by one."""
    return "gaussian" if node.weight_law == "orthogonal" else node.weight_law


class Path:
    """Of a path backward: g at the output of every weight, and g, g y at gains, by node, (S, N, P)."""

    def __init__(self) -> None:
        self.back: dict[int, Tensor] = {}
        self.bias: dict[int, Tensor] = {}
        self.gain: dict[int, Tensor] = {}


class Draw:
    """Single neurons of a population.

    Args:
        h: Of every node, (S, N, P).
    """

    def __init__(self, h: dict[int, Tensor]) -> None:
        self.h = h
        self.phi: dict[int, Tensor] = {}
        """What every weight reads."""
        self.norm: dict[int, Tensor] = {}
        """h^2 in front of every norm, averaged over its positions."""
        self.mean: dict[int, Tensor] = {}
        """h, likewise."""
        self.paths = (Path(), Path())


def _root(matrix: Tensor) -> Tensor:
    """A root of a positive matrix, which may be singular to rounding."""
    scale = float(matrix.diagonal().mean())
    if scale == 0:
        return torch.zeros_like(matrix)
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for jitter in (1e-12, 1e-10, 1e-8):
        root, failed = torch.linalg.cholesky_ex(matrix + jitter * scale * one)
        if not int(failed):
            return root
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt()
