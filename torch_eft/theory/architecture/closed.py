"""K and Theta of an architecture at infinite width, in closed form, and the order parameters that they are made of.

Forward, kernels K(h) of every node: a ``Weight`` makes K = C_b + C_W Av Phi of Phi = <h h>, an activation
Phi = <sigma sigma>_K. Backward, with g = sqrt(n) df/dh, covariances G of every node, from G = 1 at an output: an
activation makes <sigma' sigma'> o G of G, a ``Weight`` C_W Av^T G. Then

    Theta = sum over weights of sum over positions of (lambda_b + lambda_W Av Phi) o G,

and the gains and biases of norms add lambda <(g y)(g y)> and lambda <g g>. Norms divide both by the same standard
deviations; the rest of their derivative is 1/n smaller (K and Theta as in Lee et al. 2019; sections 2 to 4 of PDLT 4
and 8 for dense layers).

Averages over the neurons of a population are order parameters: Phi and the variances of norms, G behind every weight,
<(g y)(g y)>. They are kept as tensors of the graph of automatic differentiation, so that the total derivative of a
kernel with respect to each is at hand (``spread``). Kernels are blocks: B pairs of samples, (B, P, P) positions.

The sum over a wide layer's weights is Gaussian; biases, and the weights that read the data, are numbers of their own
law, whose fourth cumulant is counted at first order where the activation is smooth.

Closed forms need Gaussian inputs of every activation: sums of weights' outputs, pooled and normalized as they may be,
but not of another activation's.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_eft.theory.architecture.moments import Quartic, activation_pairs
from torch_eft.theory.architecture.nodes import Add, Affine, Architecture, Data, Elementwise, Norm, Pool, Weight
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS

_NOT_GAUSSIAN = 2e-3
"""Excess kurtosis from which it is counted: it changes K and Theta by at most some tenths of it."""


def without_closed_form(architecture: Architecture) -> dict[int, str]:
    """Return the populations that have no closed form, each with the reason, which names a node."""
    gaussian: list[bool] = []
    roots: list[frozenset[int]] = []
    found: dict[int, str] = {}
    for index, node in enumerate(architecture.nodes):
        read = [roots[each] for each in node.inputs]
        plain = all(gaussian[each] for each in node.inputs)
        fresh = isinstance(node, Data | Weight)
        reason = None if fresh else _obstacle(architecture, index, plain, read, gaussian)
        if reason is not None:
            found.setdefault(architecture.populations[index], reason)
        gaussian.append(fresh or (plain and not isinstance(node, Elementwise)))
        roots.append(frozenset([index]) if fresh else frozenset().union(*read))
    return found


def obstacle(architecture: Architecture) -> str | None:
    """Return why there is no closed form; None where there is one."""
    return next(iter(without_closed_form(architecture).values()), None)


def check_closed_form(architecture: Architecture) -> None:
    """Raise ValueError with the reason where there is no closed form."""
    if (reason := obstacle(architecture)) is not None:
        raise ValueError(
            f"architecture: K and Theta have no closed form, as {reason}; use seeds (predict_from_networks)"
        )


def _obstacle(
    architecture: Architecture, index: int, plain: bool, read: list[frozenset[int]], gaussian: list[bool]
) -> str | None:
    node = architecture.nodes[index]
    if isinstance(node, Add) and len(frozenset().union(*read)) < sum(map(len, read)):
        return f"{node.name!r} adds two functions of the same neurons"
    if isinstance(node, Elementwise):
        if not plain:
            return f"{node.name!r} acts on what another activation made, which is not Gaussian"
        if node.activation.kinks and node.activation.slopes is None:
            return f"{node.name!r}: {node.activation.name} has a kink and no closed form in blocks"
    if isinstance(node, Norm) and not plain:
        return f"{node.name!r} normalizes what an activation made, which is not Gaussian"
    if isinstance(node, Add) and sum(not gaussian[each] for each in node.inputs) > 1:
        return f"{node.name!r} adds two activations"
    if isinstance(node, Affine) and node.lambda_gain:
        for reader in architecture.consumers(index):
            if not _linear_reader(architecture, reader):
                return f"the trained {node.name} go into {architecture.nodes[reader].name!r}, with no weights between"
    return None


def _linear_reader(architecture: Architecture, index: int) -> bool:
    node = architecture.nodes[index]
    if isinstance(node, Pool):
        return all(isinstance(architecture.nodes[each], Weight) for each in architecture.consumers(index))
    return isinstance(node, Weight | Elementwise)


@dataclass
class Samples:
    """Pairs of samples whose blocks are computed together.

    Args:
        rows: The first sample of every pair, (B,).
        columns: The second.
        diagonal: Of every sample s, the pair (s, s), (N,); None where the variances are known.
    """

    rows: Tensor
    columns: Tensor
    diagonal: Tensor | None

    @classmethod
    def all_pairs(cls, number: int) -> "Samples":
        """Every sample with itself and all later ones."""
        rows, columns = torch.triu_indices(number, number, device="cpu")
        return cls(rows, columns, (rows == columns).nonzero().flatten())


@dataclass
class OrderParameters:
    """Averages over single neurons, by the node that they belong to.

    Args:
        phi: <h h> at the input of every weight, (B, P, P).
        back: G = <g g> at its output.
        norm: The variance of every norm, (N, positions that are left).
        mean: Its mean, likewise: 0, but not its fluctuations.
        gain: <(g y)(g y)> of gains.
        bias: <g g> of biases.
    """

    phi: dict[int, Tensor] = field(default_factory=dict)
    back: dict[int, Tensor] = field(default_factory=dict)
    norm: dict[int, Tensor] = field(default_factory=dict)
    mean: dict[int, Tensor] = field(default_factory=dict)
    gain: dict[int, Tensor] = field(default_factory=dict)
    bias: dict[int, Tensor] = field(default_factory=dict)

    def all(self) -> list[tuple[str, int, Tensor]]:
        """Return (kind, node, tensor) of each."""
        return [(kind, index, tensor) for kind, found in vars(self).items() for index, tensor in found.items()]


class ClosedKernels:
    """One pass forward and backward over the blocks of some pairs of samples.

    Args:
        architecture: The architecture; ``obstacle`` of it is None.
        data: Of every ``Data`` node, (N, P, channels).
        samples: The pairs.
        variances: Of nodes whose variances are needed, (N, P), where ``samples`` do not have all diagonal pairs.
    """

    def __init__(
        self,
        architecture: Architecture,
        data: dict[int, Tensor],
        samples: Samples,
        variances: dict[int, Tensor] | None = None,
    ) -> None:
        self.architecture, self.data, self.samples = architecture, data, samples
        self.variances = dict(variances or {})
        """Of the nodes that activations and norms read."""
        self.K: list[Tensor] = []
        self.mean: dict[int, Tensor] = {}
        """Of all neurons alike, (N, P), where a centered norm makes one; it is 0, its derivative is not."""
        self.order = OrderParameters()
        self.deviation: dict[int, Tensor] = {}
        """Of every norm, (N, P)."""
        self.center: dict[int, Tensor] = {}
        """What a norm subtracts, (N, P), where it is not 0."""
        self.quartic: dict[int, Quartic] = {}
        """Of nodes that are not Gaussian by the law of biases and a first layer's weights, on the samples used."""
        self._used, places = torch.cat([samples.rows, samples.columns]).unique(return_inverse=True)
        self._places = places[: len(samples.rows)], places[len(samples.rows) :]
        self._pairs = {
            index: activation_pairs(node.activation)
            for index, node in enumerate(architecture.nodes)
            if isinstance(node, Elementwise) and not _only_drawn(node)
        }
        for index, node in enumerate(architecture.nodes):
            self.K.append(self._forward(index, node))
            self._follow_laws(index, node)

    @property
    def output_kernel(self) -> Tensor:
        """K of the outputs, (B,)."""
        return self.K[-1][:, 0, 0]

    def _forward(self, index: int, node: object) -> Tensor:
        rows, columns = self.samples.rows, self.samples.columns
        if isinstance(node, Data):
            x = self.data[index]
            return x[rows] @ x[columns].mT / node.channels
        if isinstance(node, Weight):
            phi = self._separate(self.kernel(node.inputs[0]))
            self.order.phi[index] = phi
            return node.C_b + node.C_W * node.maps.average(phi)
        if isinstance(node, Elementwise):
            return self._moment(index, "value")
        means = [self.mean[each] for each in node.inputs if each in self.mean]  # type: ignore[attr-defined]
        if isinstance(node, Pool):
            if means:
                self.mean[index] = node.maps.on_labels(means[0])[0]
            return node.maps.sum_pairs(self.K[node.inputs[0]])
        if isinstance(node, Add):
            if means:
                self.mean[index] = torch.stack(means).sum(0)
            return torch.stack([self.K[each] for each in node.inputs]).sum(0)
        if isinstance(node, Affine):
            if means:
                self.mean[index] = means[0] * node.factor
            return self.K[node.inputs[0]] * node.factor**2
        assert isinstance(node, Norm)
        variance = self._separate(over_positions(self._variance(node.inputs[0]), self._sizes(index), node.over))
        self.order.norm[index] = variance
        self.deviation[index] = spread_out(variance + node.eps, self._sizes(index), node.over).sqrt()
        if means or node.centered:
            before = means[0] if means else torch.zeros_like(self.deviation[index])
            if node.centered and torch.is_grad_enabled():
                middle = self._separate(over_positions(before, self._sizes(index), node.over))
                self.order.mean[index] = middle
                before = before - spread_out(middle, self._sizes(index), node.over)
            self.mean[index] = before / self.deviation[index]
        return self._normalized(index, self.K[node.inputs[0]])

    def _follow_laws(self, index: int, node: object) -> None:
        """The part of a node that is not Gaussian: numbers of their own law that are not averaged over neurons."""
        if isinstance(node, Data | Elementwise):
            return
        if isinstance(node, Weight):
            parts = self._own_laws(index, node)
        else:
            known = [self.quartic[each].parts for each in node.inputs if each in self.quartic]  # type: ignore[attr-defined]
            if not known:
                return
            parts = torch.cat(known, -1)
            if isinstance(node, Pool):
                parts = node.maps.on_labels(parts.mT)[0].mT
            elif isinstance(node, Affine):
                parts = parts * node.factor
            elif isinstance(node, Norm):
                parts = parts / self.deviation[index][self._used][..., None]
        if parts.shape[-1]:
            self.quartic[index] = Quartic(parts.detach())

    def _own_laws(self, index: int, node: Weight) -> Tensor:
        """Of weights that read the data, and of biases, (U, P, numbers)."""
        found = [self.K[0].new_zeros(len(self._used), math.prod(node.maps.outputs), 0)]
        excess = -EXCESS_KURTOSIS[node.weight_law]
        if node.inputs[0] in self.data and excess:
            x = self.data[node.inputs[0]][self._used]
            patches = node.maps.on_labels(x.mT).permute(1, 3, 0, 2).flatten(2)
            found.append(patches * (excess**0.25 * math.sqrt(node.C_W / patches.shape[-1])))
        excess = -EXCESS_KURTOSIS[node.bias_law]
        if node.C_b and excess:
            found.append((excess**0.25 * math.sqrt(node.C_b)) * found[0].new_ones(*found[0].shape[:2], 1))
        return torch.cat(found, -1)

    def law_kurtosis(self) -> dict[bool, float]:
        """The largest excess kurtosis, in size, that laws of weights and biases give what activations read.

        Returns:
            Where it is counted (True), and where it is not.
        """
        found = {True: 0.0, False: 0.0}
        for index, node in enumerate(self.architecture.nodes):
            if isinstance(node, Elementwise) and node.inputs[0] in self.quartic and node.inputs[0] in self._varied():
                size = self.quartic[node.inputs[0]].size(self._variance(node.inputs[0])[self._used])
                counted = index not in self.drawn and not node.activation.kinks
                found[counted] = max(found[counted], size)
        return {counted: size if size >= _NOT_GAUSSIAN else 0.0 for counted, size in found.items()}

    def _varied(self) -> set[int]:
        """Nodes whose variance is known."""
        return {*self.variances, *(i for i, node in enumerate(self.architecture.nodes) if isinstance(node, Weight))}

    @property
    def drawn(self) -> set[int]:
        """Nodes whose values are drawn."""
        return set()

    def _sizes(self, index: int) -> tuple[int, ...]:
        return self.architecture.positions[index]

    def _variance(self, index: int) -> Tensor:
        if index not in self.variances:
            assert self.samples.diagonal is not None
            self.variances[index] = self.K[index][self.samples.diagonal].diagonal(dim1=-2, dim2=-1)
        return self.variances[index]

    def _moment(self, index: int, factor: str) -> Tensor:
        read = self.architecture.nodes[index].inputs[0]
        variance = self._variance(read)
        rows, columns = variance[self.samples.rows], variance[self.samples.columns]
        mean = self.mean.get(read)
        means = None if mean is None else (mean[self.samples.rows], mean[self.samples.columns])
        found = self._pairs[index].moment(factor, self.K[read], rows, columns, means)  # type: ignore[arg-type]
        quartic = self.quartic.get(read)
        if quartic is None or quartic.size(variance[self._used].detach()) < _NOT_GAUSSIAN:
            return found
        cumulants = quartic.cumulants(*self._places)
        more = self._pairs[index].quartic(factor, self.K[read].detach(), rows.detach(), columns.detach(), cumulants)  # type: ignore[arg-type]
        return found if more is None else found + more

    def _normalized(self, index: int, X: Tensor) -> Tensor:
        one = 1 / self.deviation[index]
        return X * one[self.samples.rows][:, :, None] * one[self.samples.columns][:, None, :]

    @staticmethod
    def _separate(X: Tensor) -> Tensor:
        """A tensor of its own in the graph, whose derivative is taken."""
        return X * 1.0 if X.requires_grad else X.detach().requires_grad_(torch.is_grad_enabled())

    def kernel(self, index: int) -> Tensor:
        """K of a node, (B, P, P)."""
        return self.K[index]

    def ntk(self) -> Tensor:
        """Theta of one output, (B,), by the pass backward; G of what weights read is kept in ``readers``."""
        nodes = self.architecture.nodes
        self.readers: dict[int, Tensor] = {}
        self._arrived: dict[int, Tensor] = {}
        edges: dict[int, list[tuple[int, Any]]] = {}
        edges[len(nodes) - 1] = [(-1, torch.ones_like(self.K[-1]))]
        Theta = torch.zeros_like(self.K[-1][:, 0, 0])
        for index in reversed(range(len(nodes))):
            node = nodes[index]
            if index not in edges or isinstance(node, Data):
                continue
            if isinstance(node, Weight):
                G = self.order.back[index] = self._separate(self._gathered(index, edges[index]))
                phi = self.order.phi[index]
                if node.lambda_W or node.lambda_b:
                    Theta = Theta + ((node.lambda_b + node.lambda_W * node.maps.average(phi)) * G).sum((-1, -2))
                if isinstance(nodes[node.inputs[0]], Data):
                    continue
                self.readers[index] = node.C_W * node.maps.average_adjoint(G)
                message = self._sent(index, node.inputs[0])
            else:
                if isinstance(node, Affine) and (node.lambda_gain or node.lambda_bias):
                    Theta = Theta + self._affine(index, node, edges[index])
                message = self._backward(index, node, edges[index])
            for each in node.inputs:
                edges.setdefault(each, []).append((index, message))
        return Theta

    def _gathered(self, index: int, messages: list[tuple[int, Any]]) -> Tensor:
        """G at the output of a node, of what its readers sent."""
        return torch.stack([message for _, message in messages]).sum(0)

    def _sent(self, index: int, read: int) -> Any:
        """What a weight sends to the node that it reads."""
        return self.readers[index]

    def _backward(self, index: int, node: object, messages: list[tuple[int, Any]]) -> Any:
        """What a node sends to those that it reads."""
        G = self._gathered(index, messages)
        if isinstance(node, Elementwise):
            self._arrived[index] = G
            return self._moment(index, "slope") * G
        if isinstance(node, Pool):
            return node.maps.average_adjoint(G)
        if isinstance(node, Norm):
            return self._normalized(index, G)
        return G * node.factor**2 if isinstance(node, Affine) else G

    def _affine(self, index: int, node: Affine, messages: list[tuple[int, Any]]) -> Tensor:
        """The part of gains and biases."""
        G = self._gathered(index, messages)
        total = torch.zeros_like(G[:, 0, 0])
        if node.lambda_bias:
            self.order.bias[index] = self._separate(G)
            total = total + node.lambda_bias * shared(self.order.bias[index], node)
        if node.lambda_gain:
            parts = []
            for reader, message in messages:
                if isinstance(self.architecture.nodes[reader], Elementwise):  # message is <sigma' sigma'> o G
                    parts.append(self._moment(reader, "gain") * self._arrived[reader])
                else:
                    parts.append(self.K[index] * message)
            self.order.gain[index] = self._separate(torch.stack(parts).sum(0))
            total = total + node.lambda_gain * shared(self.order.gain[index], node)
        return total


def _only_drawn(node: Elementwise) -> bool:
    return bool(node.activation.kinks) and node.activation.slopes is None


def shared(X: Tensor, node: Affine) -> Tensor:
    """Sum a block over pairs of positions, or over equal ones where every position has its own parameter; (B,)."""
    return X.diagonal(dim1=-2, dim2=-1).sum(-1) if node.per_position else X.sum((-1, -2))


def over_positions(variance: Tensor, sizes: tuple[int, ...], over: tuple[int, ...]) -> Tensor:
    """Average (.., P) over axes of positions; (.., positions that are left)."""
    lead = variance.ndim - 1
    full = variance.reshape(*variance.shape[:-1], *sizes)
    return (full.mean([lead + axis for axis in over]) if over else full).reshape(*variance.shape[:-1], -1)


def spread_out(variance: Tensor, sizes: tuple[int, ...], over: tuple[int, ...]) -> Tensor:
    """The inverse: repeat along the axes that were averaged over; (.., P)."""
    lead = variance.shape[:-1]
    left = [1 if axis in over else size for axis, size in enumerate(sizes)]
    return variance.reshape(*lead, *left).expand(*lead, *sizes).reshape(*lead, math.prod(sizes))
