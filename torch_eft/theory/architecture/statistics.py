"""Kernels and their spread over seeds for any architecture that can be read: the public face."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.presentation.result import Result
from torch_eft.results.trajectory import Validity
from torch_eft.theory.architecture.closed import ClosedKernels, Samples, obstacle, without_closed_form
from torch_eft.theory.architecture.neurons.draws import Neurons
from torch_eft.theory.architecture.neurons.kernels import kernels_of
from torch_eft.theory.architecture.neurons.spread import PopulationMoments, influences, population_moments
from torch_eft.theory.architecture.nodes import Add, Architecture, Data, Norm, Weight
from torch_eft.theory.signal_propagation.regimes import EDGE, TOO_DEEP

_REPLICAS = 4
_PASSES = 3
"""Independent samples of K and Theta where there is no closed form."""
_FEWEST_IN_A_GROUP = 32
"""Neurons of a norm's group from which order 1/n was found good (corrections go like groups / n; 9 % of K at 16)."""
_LEFT = 3.0
"""Per cent that first order leaves at an excess kurtosis of -1 (tanh: 1.7 at -1, K = 0.5, 1.3 at -0.47, K = 2)."""
_MATRICES, _PATHS = 16, 8
"""Blocks of a node, and paths of drawn neurons, that are alive at once (measured)."""


@dataclass(frozen=True, repr=False)
class ArchitectureStatistics(Result):
    """A network at initialization: kernels at infinite width, and how much networks differ from seed to seed.

    Args:
        K: Kernel of every population by its name, averaged over positions, and of an output as ``"output"``; (N, N).
        Theta: NTK of one output at infinite width, (N, N).
        ntk_relative_sd: Standard deviation over seeds of every entry of one output's NTK, over its mean, (N, N).
        ntk_trace_relative_sd: The same of the trace of the NTK, over inputs and outputs.
        epsilon: Var G / (E G)^2, G the variance of an output given everything below the last layer; mean over inputs.
        shares: The part of the variance of one output's NTK, averaged over inputs, that the neurons of each population
            make; they add up to 1.
        validity: Where these hold.
        error: Standard errors of ``ntk_relative_sd``, ``ntk_trace_relative_sd`` and ``epsilon`` by the neurons drawn;
            where there is no closed form also of ``Theta`` and ``K``, that of the output.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> x = torch.eye(3)[:1]
        >>> found = theory.architecture_statistics(theory.read_architecture(model, x), x, num_samples=1024)
        >>> sorted(found.K), found.validity.flag
        (['0', 'output'], 'valid')
    """

    K: Mapping[str, Tensor]
    Theta: Tensor
    ntk_relative_sd: Tensor
    ntk_trace_relative_sd: float
    epsilon: float
    shares: Mapping[str, float]
    validity: Validity
    error: Mapping[str, Tensor]


def architecture_statistics(
    architecture: Architecture, x: Tensor, *, num_samples: int = 4096, seed: int = 0, memory: int = 8 * 2**30
) -> ArchitectureStatistics:
    """Kernels of an architecture at infinite width, and their spread over seeds at its widths.

    K and Theta are exact where the input of every activation is Gaussian, up to biases and first weights of another
    law, which are counted at first order (see ``validity``); else (an activation behind a sum with another's output)
    they are averages over drawn neurons.

    Args:
        architecture: As ``read_architecture`` returns it, or built of nodes.
        x: Inputs, (N, ...), a few: the cost of the spread grows as N^2.
        num_samples: Neurons drawn of every population.
        seed: Of these draws; the global random state is left alone.
        memory: Bytes allowed.

    Returns:
        The statistics, float64.

    Raises:
        ValueError: If the inputs do not fit, or need more memory than is allowed.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> x = torch.eye(3)[:2]
        >>> statistics = theory.architecture_statistics(theory.read_architecture(model, x), x)
        >>> statistics.Theta.shape, list(statistics.shares)
        (torch.Size([2, 2]), ['0'])
    """
    data = prepare(architecture, x)
    if num_samples < 2 * _REPLICAS:
        raise ValueError(f"num_samples: {num_samples} given; give at least {2 * _REPLICAS}")
    N = len(x)
    needed = _bytes(architecture, N, num_samples)
    if needed > memory:
        raise ValueError(
            f"x: {N} inputs need about {needed / 2**30:.1f} GiB, memory allows {memory / 2**30:.1f} GiB; give fewer "
            "inputs, or smaller ones (kernels grow as the square of positions)"
        )
    samples = Samples.all_pairs(N)
    passes, thetas, named = 1 if obstacle(architecture) is None else _PASSES, [], []
    with torch.no_grad():
        for index in range(passes):
            kernels = kernels_of(architecture, data, samples, num_samples, seed + 1 + index)
            thetas.append(_matrix(kernels.ntk(), samples, N))
            named.append(_kernels_by_name(architecture, kernels, N))
        laws = kernels.law_kurtosis()
    Theta = torch.stack(thetas).mean(0)
    neurons = Neurons(kernels, N, torch.Generator(device=Theta.device).manual_seed(seed))
    pairs = [(int(a), int(b)) for a, b in zip(samples.rows, samples.columns, strict=True)]
    found = [
        influences(architecture, data, [a] if a == b else [a, b], num_samples, seed + 100 + index)
        for index, (a, b) in enumerate(pairs)
    ]
    alone = [index for index, (a, b) in enumerate(pairs) if a == b]
    observables = [H for _, H in found] + [found[index][0] for index in alone]
    count = num_samples // _REPLICAS
    moments = {
        population: population_moments(neurons, population, observables, alone, count, _REPLICAS)
        for population in architecture.hidden
    }
    K = {name: torch.stack([one[name] for one in named]).mean(0) for name in named[0]}
    errors = {}
    if passes > 1:
        errors = {"Theta": _error(thetas), "K": _error([one["output"] for one in named])}
    return _result(architecture, K, Theta, samples, moments, errors, _on_laws(laws))


def _bytes(architecture: Architecture, number: int, count: int) -> float:
    """Of kernels of all pairs, their derivatives, and drawn neurons, as measured."""
    sizes = [math.prod(each) for each in architecture.positions]
    kernels = number * (number + 1) / 2 * sum(size**2 for size in sizes)
    drawn = sum(
        size for size, p in zip(sizes, architecture.populations, strict=True) if p in without_closed_form(architecture)
    )
    return 8 * (_MATRICES * kernels + _PATHS * min(number, 2) * count * drawn)


def _error(values: list[Tensor]) -> Tensor:
    return torch.stack(values).std(0) / math.sqrt(len(values))


def prepare(architecture: Architecture, x: Tensor) -> dict[int, Tensor]:
    """Return what every ``Data`` node holds, (N, P, channels), float64.

    Raises:
        ValueError: If the inputs have another shape than the node, or are not finite.
    """
    if not isinstance(x, Tensor) or x.ndim < 2 or len(x) == 0:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: {given} given; give inputs (N, ...), N >= 1")
    found = {}
    for index, node in enumerate(architecture.nodes):
        if isinstance(node, Data):
            value = (x if node.prepare is None else node.prepare(x)).detach().double()
            wanted = (len(x), *node.positions, node.channels)
            if tuple(value.shape) != wanted:
                raise ValueError(f"x: {node.name!r} is {tuple(value.shape)} for these inputs; it was read as {wanted}")
            if not bool(value.isfinite().all()):
                raise ValueError("x: contains NaN or infinite values; inputs must be finite")
            found[index] = value.reshape(len(x), math.prod(node.positions), node.channels)
    return found


def _matrix(values: Tensor, samples: Samples, number: int) -> Tensor:
    full = values.new_zeros(number, number)
    full[samples.rows, samples.columns] = values
    full[samples.columns, samples.rows] = values
    return full


def population_name(architecture: Architecture, population: int) -> str:
    """Return the name of a population's weight; of a stream, of its first and last."""
    names = [
        node.name
        for node, p in zip(architecture.nodes, architecture.populations, strict=True)
        if p == population and isinstance(node, Weight)
    ]
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} (stream)"


def _kernels_by_name(architecture: Architecture, kernels: ClosedKernels, number: int) -> dict[str, Tensor]:
    found = {}
    for population in architecture.hidden:
        last = max(
            index
            for index, p in enumerate(architecture.populations)
            if p == population and isinstance(architecture.nodes[index], Weight | Add)
        )
        same = kernels.kernel(last).diagonal(dim1=-2, dim2=-1).mean(-1)
        found[population_name(architecture, population)] = _matrix(same, kernels.samples, number)
    found["output"] = _matrix(kernels.output_kernel, kernels.samples, number)
    return found


def _result(
    architecture: Architecture,
    K: dict[str, Tensor],
    Theta: Tensor,
    samples: Samples,
    moments: dict[int, PopulationMoments],
    errors: dict[str, Tensor],
    on_laws: list[str],
) -> ArchitectureStatistics:
    N, outputs, pairs = len(Theta), architecture.output, len(samples.rows)
    zero = Theta.new_zeros(_REPLICAS, pairs + N)
    one, total = zero, Theta.new_zeros(_REPLICAS, 2)
    parts = {}
    for population, found in moments.items():
        n = architecture.hidden[population]
        one, total = one + found.one / n, total + found.total / n
        parts[population_name(architecture, population)] = float(found.total[:, 0].mean() / n)
    variance, size = one[:, :pairs], Theta[samples.rows, samples.columns].abs()
    sd, sd_error = _root(variance, size)
    trace, trace_error = _root(
        (total[:, 1] + (total[:, 0] - total[:, 1]) / outputs)[:, None], Theta.diagonal().mean()[None]
    )
    relative = (one[:, pairs:] / K["output"].diagonal().square()).mean(1)
    whole = sum(parts.values())
    shares = {name: part / whole if whole > 0 else 0.0 for name, part in parts.items()}
    return ArchitectureStatistics(
        K=K,
        Theta=Theta,
        ntk_relative_sd=_matrix(sd, samples, N),
        ntk_trace_relative_sd=float(trace),
        epsilon=float(relative.mean()),
        shares=shares,
        validity=_validity(
            architecture, float(relative.mean()), float(sd[samples.rows == samples.columns].max()), on_laws
        ),
        error={
            **errors,
            "ntk_relative_sd": _matrix(sd_error, samples, N),
            "ntk_trace_relative_sd": trace_error[0],
            "epsilon": relative.std() / math.sqrt(_REPLICAS),
        },
    )


def _root(variance: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Relative standard deviation and its error, from replicas of the variance."""
    mean = variance.mean(0).clamp_min(0)
    sd = mean.sqrt()
    spread = variance.std(0) / math.sqrt(len(variance))
    safe = torch.where(sd > 0, sd, 1.0)
    return torch.where(size > 0, sd / size, 0.0), torch.where(size > 0, spread / (2 * safe) / size, 0.0)


def _on_laws(laws: Mapping[bool, float]) -> list[str]:
    """Sentences on how weights and biases that are not Gaussian enter K and Theta, with the size of it."""
    found, percent = [], _LEFT * laws[True]
    if laws[True]:
        found.append(
            "weights that read the data and biases are not Gaussian (excess kurtosis of what an activation reads up to "
            f"-{laws[True]:.2g}): counted in K and Theta at first order, which leaves up to some {percent:.1g} %"
        )
    if laws[False]:
        found.append(
            f"weights that read the data and biases are not Gaussian (excess kurtosis up to -{laws[False]:.2g}), which "
            "K and Theta leave out where an activation has a kink or is drawn: an error of a tenth of it, or less"
        )
    return found


def _validity(architecture: Architecture, epsilon: float, sd: float, on_laws: list[str]) -> Validity:
    numbers = {"epsilon": epsilon, "ntk_relative_sd": sd}
    largest = max(epsilon, sd**2)
    reasons = [f"order 1/n; relative variances: G {epsilon:.3g}, NTK of one output {sd**2:.3g}"]
    flag = "invalid" if largest >= TOO_DEEP else "caution" if largest >= EDGE else "valid"
    if flag != "valid":
        reasons.append("the next order is as large as these: use wider layers, or fewer")
    crowded = [
        (architecture.widths[p] / node.groups, node.name)
        for node, p in zip(architecture.nodes, architecture.populations, strict=True)
        if isinstance(node, Norm) and node.groups > 1
    ]
    if crowded and min(crowded)[0] < _FEWEST_IN_A_GROUP:
        size, name = min(crowded)
        numbers["neurons_in_a_group"] = size
        reasons.append(
            f"{name!r} has {size:g} channels in a group: corrections go like groups / channels, expect some 10 %; use "
            "fewer groups"
        )
        flag = "caution" if flag == "valid" else flag
    if (reason := obstacle(architecture)) is not None:
        reasons.append(f"K and Theta are averages over drawn neurons, with their errors: {reason}")
    if architecture.remarks and flag == "valid":  # the variances themselves are uncertain
        flag = "caution"
    reasons += [*on_laws, *architecture.remarks]
    return Validity(flag, reasons, numbers)  # type: ignore[arg-type]
