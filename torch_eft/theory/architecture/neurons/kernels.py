"""Kernels as averages over drawn neurons, where none has a closed form: activations behind sums with another's output.

In such a population u = L xi of every weight that writes into it, L L^T = K and xi fixed, and every node is a path, a
function of u, so that automatic differentiation goes through the draws (the draws of a population are exactly
orthonormal, where there are enough of them). Backward, what a weight r that reads the population sends is g = v o g~,
with v the product of slopes along the path and g~ ~ N(0, G_r) the same for all of them: <g g> = <v v> o G_r, without
drawing g~; only behind pooling that follows slopes is it drawn. Slopes that jump have delta functions as derivatives:
of the width ``_WIDTH`` in standard deviations, which biases the response of G by about as much, and nothing else.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.theory.architecture.closed import (
    ClosedKernels,
    Samples,
    over_positions,
    shared,
    spread_out,
    without_closed_form,
)
from torch_eft.theory.architecture.nodes import Add, Affine, Architecture, Elementwise, Norm, Pool, Weight
from torch_eft.theory.gaussian.activations import Activation

_WIDTH = 0.05
_JITTER = 1e-7
"""Relative to the variance: roots of kernels of nearly equal labels are not differentiable."""


def kernels_of(
    architecture: Architecture, data: dict[int, Tensor], samples: Samples, count: int, seed: int
) -> ClosedKernels:
    """Return a pass over pairs of samples, in closed form where all populations have one.

    Args:
        architecture: Any.
        data: Of every ``Data`` node, (N, P, channels).
        samples: All pairs of the samples.
        count: Neurons to draw in populations without closed form.
        seed: Of their draws.

    Returns:
        The pass, forward.
    """
    if without_closed_form(architecture):
        return SampledKernels(architecture, data, samples, count, seed)
    return ClosedKernels(architecture, data, samples)


@dataclass
class Message:
    """What arrives at a node from its readers.

    Args:
        sources: ``{weight: (v, G)}``: slopes (S, N, P) on the way, None for 1, and <g~ g~> blocks.
        drawn: g itself, (S, N, P).
    """

    sources: dict[int, tuple[Tensor | None, Tensor]]
    drawn: Tensor | None = None


class SampledKernels(ClosedKernels):
    """As ``ClosedKernels``, with averages over drawn neurons in populations that have no closed form.

    Args:
        architecture: Any.
        data: Of every ``Data`` node, (N, P, channels).
        samples: All pairs of the samples.
        count: Neurons of a population.
        seed: Of their draws.
    """

    def __init__(
        self, architecture: Architecture, data: dict[int, Tensor], samples: Samples, count: int, seed: int
    ) -> None:
        self.path: dict[int, Tensor] = {}
        """Of nodes in populations without closed form, (S, N, P)."""
        self._open = without_closed_form(architecture)
        self._count, self._number = count, len(next(iter(data.values())))
        self._generator = torch.Generator(device=next(iter(data.values())).device).manual_seed(seed)
        self._xi: dict[int, Tensor] = {}
        self._kernels: dict[int, Tensor] = {}
        super().__init__(architecture, data, samples)

    @property
    def drawn(self) -> set[int]:
        """Nodes whose values are drawn."""
        return {*self.path}

    def _is_open(self, index: int) -> bool:
        return self.architecture.populations[index] in self._open

    def kernel(self, index: int) -> Tensor:
        """K of a node, (B, P, P)."""
        if index not in self.path or isinstance(self.architecture.nodes[index], Weight):
            return self.K[index]
        if index not in self._kernels:
            self._kernels[index] = self._pairs_of(self.path[index])
        return self._kernels[index]

    def _pairs_of(self, h: Tensor, other: Tensor | None = None) -> Tensor:
        """<h h>, in blocks."""
        rows, columns = h[:, self.samples.rows], h[:, self.samples.columns]
        return torch.einsum("sbp,sbq->bpq", rows, columns) / len(h)

    def _forward(self, index: int, node: object) -> Tensor:
        if not self._is_open(index):
            return super()._forward(index, node)
        if isinstance(node, Weight):
            K = super()._forward(index, node)
            self.path[index] = self._draws(index, K)
            return K
        assert isinstance(node, Add | Elementwise | Pool | Affine | Norm)
        read = [self.path[each] for each in node.inputs]
        if isinstance(node, Add):
            self.path[index] = torch.stack(read).sum(0)
        elif isinstance(node, Elementwise):
            self.path[index] = node.activation.function(read[0])
        elif isinstance(node, Pool):
            self.path[index] = node.maps.on_labels(read[0])[0]
        elif isinstance(node, Affine):
            self.path[index] = read[0] * node.factor
        else:
            self.path[index] = self._norm(index, node, read[0])
        return self.path[index][:1, :1]  # K is made where it is asked for

    def _norm(self, index: int, node: Norm, h: Tensor) -> Tensor:
        sizes = self._sizes(index)
        square = self._separate(over_positions(h.square().mean(0), sizes, node.over))
        self.order.norm[index] = square
        if node.centered:
            mean = self._separate(over_positions(h.mean(0), sizes, node.over))
            self.order.mean[index] = mean
            square = square - mean.square()
            self.center[index] = spread_out(mean, sizes, node.over)
            h = h - self.center[index]
        self.deviation[index] = spread_out(square + node.eps, sizes, node.over).sqrt()
        return h / self.deviation[index]

    def _draws(self, index: int, K: Tensor) -> Tensor:
        P = K.shape[-1]
        matrix = joined(K, self.samples, self._number)
        scale = matrix.detach().diagonal().mean().clamp_min(1e-300)
        one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        root = torch.linalg.cholesky(matrix + _JITTER * scale * one)
        return (self._independent(index) @ root.mT).reshape(self._count, self._number, P)

    def _independent(self, index: int) -> Tensor:
        """Xi of a weight, (S, N P), orthonormal among all weights that write into the population."""
        if index not in self._xi:
            architecture = self.architecture
            population = architecture.populations[index]
            writers = [
                each
                for each, p in enumerate(architecture.populations)
                if p == population and isinstance(architecture.nodes[each], Weight)
            ]
            widths = [self._number * _product(self._sizes(each)) for each in writers]
            like = next(iter(self.data.values()))
            xi = torch.randn(self._count, sum(widths), generator=self._generator, dtype=like.dtype, device=like.device)
            if self._count >= 2 * sum(widths):
                xi = xi - xi.mean(0)
                root = torch.linalg.cholesky(xi.mT @ xi / self._count)
                xi = torch.linalg.solve_triangular(root, xi.mT, upper=False).mT
            self._xi.update(zip(writers, xi.split(widths, 1), strict=True))
        return self._xi[index]

    def _sent(self, index: int, read: int) -> Any:
        G = self.readers[index]
        return Message({index: (None, G)}) if self._is_open(read) else G

    def _merged(self, messages: list[tuple[int, Message]]) -> Message:
        sources: dict[int, tuple[Tensor | None, Tensor]] = {}
        drawn = [message.drawn for _, message in messages if message.drawn is not None]
        for _, message in messages:
            for weight, (v, G) in message.sources.items():
                if weight in sources:  # the same g~ on two ways
                    before = sources[weight][0]
                    v = (1.0 if before is None else before) + (v if v is not None else torch.ones(1).to(G))
                sources[weight] = (v, G)
        return Message(sources, torch.stack(drawn).sum(0) if drawn else None)

    def _gathered(self, index: int, messages: list[tuple[int, Any]]) -> Tensor:
        if not isinstance(messages[0][1], Message):
            return super()._gathered(index, messages)
        return self._second_moment(self._merged(messages), None)

    def _second_moment(self, message: Message, factor: Tensor | None) -> Tensor:
        """<(g y)(g y)>, y the factor."""
        parts = []
        for v, G in message.sources.values():
            w = v if factor is None else factor if v is None else v * factor
            parts.append(G if w is None else self._pairs_of(w.expand(-1, self._number, -1)) * G)
        if message.drawn is not None:
            parts.append(self._pairs_of(message.drawn if factor is None else message.drawn * factor))
        return torch.stack(parts).sum(0)

    def _backward(self, index: int, node: object, messages: list[tuple[int, Any]]) -> Any:
        if not isinstance(messages[0][1], Message):
            return super()._backward(index, node, messages)
        message = self._merged(messages)
        if isinstance(node, Elementwise):
            return self._times(message, _slope(self.path[node.inputs[0]], node.activation))
        if isinstance(node, Norm):
            return self._times(message, 1 / self.deviation[index][None])
        if isinstance(node, Affine):
            return self._times(message, self.path[index].new_full((1, 1, 1), node.factor))
        if not isinstance(node, Pool):
            return message
        plain = {
            weight: (None, node.maps.average_adjoint(G)) for weight, (v, G) in message.sources.items() if v is None
        }
        bent = {weight: pair for weight, pair in message.sources.items() if pair[0] is not None}
        drawn = self._drawn(bent, message.drawn)
        return Message(plain, None if drawn is None else node.maps.adjoint_on_labels(drawn))  # type: ignore[arg-type]

    @staticmethod
    def _times(message: Message, factor: Tensor) -> Message:
        sources = {weight: (factor if v is None else v * factor, G) for weight, (v, G) in message.sources.items()}
        return Message(sources, None if message.drawn is None else message.drawn * factor)  # type: ignore[arg-type]

    def _drawn(self, sources: dict[int, tuple[Tensor | None, Tensor]], known: Tensor | None) -> Tensor | None:
        """G of sources whose slopes differ from neuron to neuron, drawn."""
        parts = [] if known is None else [known]
        for v, G in sources.values():
            matrix = joined(G, self.samples, self._number)
            scale = matrix.detach().diagonal().mean().clamp_min(1e-300)
            one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
            root = torch.linalg.cholesky(matrix + _JITTER * scale * one)
            xi = torch.randn(self._count, len(root), generator=self._generator, dtype=root.dtype, device=root.device)
            parts.append((xi @ root.mT).reshape(self._count, self._number, -1) * v)
        return torch.stack(parts).sum(0) if parts else None

    def _affine(self, index: int, node: Affine, messages: list[tuple[int, Any]]) -> Tensor:
        if not isinstance(messages[0][1], Message):
            return super()._affine(index, node, messages)
        message = self._merged(messages)
        total = torch.zeros_like(self.K[-1][:, 0, 0])
        if node.lambda_bias:
            self.order.bias[index] = self._separate(self._second_moment(message, None))
            total = total + node.lambda_bias * shared(self.order.bias[index], node)
        if node.lambda_gain:
            self.order.gain[index] = self._separate(self._second_moment(message, self.path[index]))
            total = total + node.lambda_gain * shared(self.order.gain[index], node)
        return total


def joined(blocks: Tensor, samples: Samples, number: int) -> Tensor:
    """Put the blocks of all pairs into one matrix, (N P, N P), differentiable."""
    rows, columns, P = samples.rows, samples.columns, blocks.shape[-1]
    full = blocks.new_zeros(number, number, P, P)
    full = full.index_put((columns, rows), blocks.mT)
    full = full.index_put((rows, columns), blocks)
    return full.transpose(1, 2).reshape(number * P, number * P)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


class _Slope(torch.autograd.Function):
    """sigma'(z), whose derivative has delta functions of a finite width at jumps."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(z)
        ctx.activation = activation
        return activation(z, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (W,) = gradients
        (z,) = ctx.saved_tensors
        activation = ctx.activation
        total = torch.zeros_like(z) if activation.slopes is not None else activation(z, 2)
        width = _WIDTH * z.square().mean(0, keepdim=True).sqrt().clamp_min(1e-300)
        for kink in activation.kinks:
            if jump := activation.jump(1, kink):
                total = total + jump * torch.exp(-((z - kink) / width).square() / 2) / (width * 2.5066282746310002)
        return W * total, None


def _slope(z: Tensor, activation: Activation) -> Tensor:
    return _Slope.apply(z, activation)
