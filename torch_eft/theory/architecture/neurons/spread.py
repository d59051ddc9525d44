"""The spread of kernel and NTK over seeds, as a sum over populations (the delta method, to leading order in 1/n).

An order parameter q of a population is an average over its n neurons, and differs between networks by the neurons that
were drawn. So does an observable O: by (1/n) sum_s I(s) of the influence of single neurons,

    I(s) = sum over q of the population <dO/dq, q(s)>,     Var O = sum over populations (1/n) Var_s I(s),

dO/dq being the total derivative, through everything that q enters. With g of one output, this is the variance of
H_ii; two independent g of the same neuron give Cov(H_ii, H_jj), hence the variance of the mean over outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.architecture.closed import ClosedKernels, Samples
from torch_eft.theory.architecture.neurons.draws import Draw, Neurons
from torch_eft.theory.architecture.neurons.kernels import kernels_of
from torch_eft.theory.architecture.nodes import Architecture

_CHUNK = 2**24
"""Numbers (neuron, label) that are drawn at once."""


@dataclass
class Influence:
    """Derivatives dO/dq of an observable: kernels of the pairs of a few samples.

    Args:
        members: The samples, in the numbering of all.
        samples: Their pairs, in the numbering of ``members``.
        derivatives: (kind, node, dO/dq) for every order parameter that O depends on.
    """

    members: list[int]
    samples: Samples
    derivatives: list[tuple[str, int, Tensor]]

    def of(self, draw: Draw, path: int, architecture: Architecture) -> Tensor:
        """I(s) of the neurons drawn, (S,), with one of their paths backward."""
        total = torch.zeros(len(next(iter(draw.h.values()))), dtype=torch.float64)
        total = total.to(next(iter(draw.h.values())))
        back = draw.paths[path]
        known = {"phi": draw.phi, "back": back.back, "bias": back.bias, "gain": back.gain}
        for kind, index, W in self.derivatives:
            if kind in ("norm", "mean"):
                single = draw.norm if kind == "norm" else draw.mean
                if index in single:
                    total = total + (single[index][:, self.members] * W).sum((1, 2))
                continue
            if index not in known[kind]:
                continue
            values = known[kind][index][:, self.members]
            pairs = zip(self.samples.rows.tolist(), self.samples.columns.tolist(), W, strict=True)
            for row, column, w in pairs:
                total = total + _quadratic(values[:, row], w, values[:, column])
        return total


def _quadratic(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return ((a @ w) * b).sum(-1)


def influences(
    architecture: Architecture, data: dict[int, Tensor], members: list[int], count: int, seed: int
) -> tuple[Influence, Influence]:
    """Differentiate K and Theta of the pair of the first and last of some samples.

    Args:
        architecture: The architecture.
        data: Of every ``Data`` node, (N, P, channels).
        members: One sample, or two.
        count: Neurons to draw in populations without closed form.
        seed: Of their draws.

    Returns:
        Of K and of Theta, for one output.
    """
    samples = Samples.all_pairs(len(members))
    target = 0 if len(members) == 1 else 1  # (0, 0) or (0, 1)
    with torch.enable_grad():
        kernels = kernels_of(architecture, {key: x[members] for key, x in data.items()}, samples, count, seed)
        K = _differentiated(kernels, kernels.output_kernel[target], members, keep=True)
        return K, _differentiated(kernels, kernels.ntk()[target], members, keep=False)


def _differentiated(kernels: ClosedKernels, value: Tensor, members: list[int], keep: bool) -> Influence:
    order = kernels.order.all()
    if not value.requires_grad or not order:
        return Influence(members, kernels.samples, [])
    found = torch.autograd.grad(value, [q for _, _, q in order], retain_graph=keep, allow_unused=True)
    derivatives = [(kind, index, W) for (kind, index, _), W in zip(order, found, strict=True) if W is not None]
    return Influence(members, kernels.samples, derivatives)


@dataclass
class PopulationMoments:
    """Covariances over single neurons of the influences on some observables.

    Args:
        one: Var_s I(s) of every observable with one output, (replicas, observables).
        both: Cov of two outputs' I(s), (replicas, observables).
        total: Of the mean of some observables, the same two, (replicas, 2).
    """

    one: Tensor
    both: Tensor
    total: Tensor


def population_moments(
    neurons: Neurons,
    population: int,
    found: list[Influence],
    averaged: list[int],
    count: int,
    replicas: int,
) -> PopulationMoments:
    """Draw neurons of one population and return the moments of their influences.

    Args:
        neurons: Draws them.
        population: Which.
        found: The observables.
        averaged: Those whose mean is an observable, too.
        count: Neurons a replica.
        replicas: Independent samples.

    Returns:
        The moments.
    """
    architecture = neurons.architecture
    labels = neurons.number * max(K.shape[-1] for K in neurons.kernels.K)
    step = max(1, min(count, _CHUNK // labels))
    one, both, total = [], [], []
    for _ in range(replicas):
        rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, count, step):
            drawn = neurons.draw(population, min(step, count - start))
            for path in (0, 1):
                rows[path].append(torch.stack([each.of(drawn, path, architecture) for each in found]))
        first, second = (torch.cat(part, 1) for part in rows)
        first_mean, second_mean = first[averaged].mean(0), second[averaged].mean(0)
        one.append((first.var(1) + second.var(1)) / 2)
        both.append(_covariance(first, second))
        total.append(torch.stack([(first_mean.var() + second_mean.var()) / 2, _covariance(first_mean, second_mean)]))
    return PopulationMoments(torch.stack(one), torch.stack(both), torch.stack(total))


def _covariance(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.shape[-1] - 1)
