"""The vertices of order 1/n of convolutional networks: an MLP's at labels (sample, position), and patch averages.

The layer z'_{i;x} = b_i + sum_{j,d} W_{ijd} sum_y P^d_{xy} s(z_{j;y}) is, label by label, one of an MLP with weights
that are shared by positions. Every recursion of ``initialization.recursions`` holds at formal labels y = (sample,
position); its result goes to the labels behind the layer by one average Av over the patch for each Kronecker delta of
the outputs, as the two labels of a delta share their weights' offset d, whether it comes from a Wick contraction of two
weights or from one derivative d/dW_{ijd} of both:

    pairs (12)(34) in printed order, but (14)(23) for P; G1 and Theta1 one pair. E_zzzz .. E_ddII: all four share d,
    (1/k) times the average over d of all four.

1/n is one over channels, C_W and lambda_W include the patch (fan-in n k).
"""

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice
from torch_eft.results.trajectory import Validity
from torch_eft.theory.architecture.chains.chain import Chain, chain_of, pairs_of
from torch_eft.theory.architecture.chains.paired import PairedStep
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.gaussian.four_point_moments import FourPointMoments
from torch_eft.theory.gaussian.two_point_moments import Kinks, TwoPointMoments
from torch_eft.theory.initialization.estimators import RECURSIONS, ReplicaKind, Replicas, moment_replicas
from torch_eft.theory.initialization.evaluator import (
    SINGLE_NEURON,
    SYMMETRIES,
    LabelSets,
    VertexSource,
    Vertices,
    divergent,
)
from torch_eft.theory.initialization.neuron.pairs import as_gaussian, neuron_pairs
from torch_eft.theory.initialization.neuron.remarks import check_kinked_biases, counted_laws
from torch_eft.theory.initialization.statistics import STATISTICS, LayerStatistics
from torch_eft.theory.signal_propagation.regimes import EDGE, TOO_DEEP

_ARRAYS = 60
"""Arrays over four labels alive at once, at most."""

ChainLayers = tuple[list[Tensor], list[Tensor], list[TwoPointMoments]]
"""K and Theta at layers 1 .. L over the labels behind them, and two-point moments at layers 1 .. L-1."""


def architecture_vertices(
    architecture: Architecture,
    x: Tensor,
    *,
    statistics: Collection[str] = STATISTICS,
    num_samples: int = 65536,
    num_replicas: int = 4,
    seed: int = 0,
    memory: int = 8 * 2**30,
    kinks: Kinks = "autograd",
) -> LayerStatistics:
    """The statistics of order 1/n at the outputs of a convolutional network, for a few small inputs.

    Chains of convolutions and dense layers with one activation, average pooling in front of layers, any read-out. Four
    labels run over (samples x positions)^4 in every layer; without pooling, over samples^4 positions^2.

    Args:
        architecture: As ``read_architecture`` returns it, or built of nodes.
        x: Inputs, (N, ...).
        statistics: Names out of ``STATISTICS`` and of E_zzzz, E_zzH, E_HH, E_dHz, E_ddI, E_ddII.
        num_samples: Sample size in all, where moments are sampled: for smooth activations and more than four labels.
        num_replicas: Independent samples that share it, at least 2, to estimate the error.
        seed: Seed of the samples; the global random state is left alone.
        memory: Bytes allowed for tensors over four labels.
        kinks: See ``initial_statistics``.

    Returns:
        The statistics of the outputs, (N, ..), where n_{l-1} is the number of channels in front of the last layer.

    Raises:
        ValueError: If it is no such chain, a name is unknown, or the tensors do not fit into ``memory``.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> nn = torch.nn
        >>> layers = [nn.Conv1d(1, 32, 2), nn.Tanh(), nn.Conv1d(32, 32, 2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 1)]
        >>> model = nn.Sequential(*layers)
        >>> x = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0))
        >>> last = theory.architecture_vertices(theory.read_architecture(model, x), x, statistics=["V", "A"])
        >>> last.V.shape, last.A.shape
        (torch.Size([1, 1, 1, 1]), torch.Size([1, 1, 1, 1]))
    """
    names = {statistics} if isinstance(statistics, str) else set(statistics)
    for name in sorted(names):
        check_choice("statistics", name, (*STATISTICS, *SINGLE_NEURON))
    check_choice("kinks", kinks, ("autograd", "distributional"))
    chain = chain_of(architecture, x)
    wanted = [name for name in (*STATISTICS, *SINGLE_NEURON) if name in names - {"K", "Theta"}]
    check_vertices(chain, memory)
    layers = chain_kernels(chain, kinks)
    kind, runs = chain_vertices(chain, layers, {*wanted, "V"}, num_samples, num_replicas, seed, kinks)
    found = Replicas(kind, runs).combined(lambda run: run.items())
    return LayerStatistics(
        chain.depth,
        layers[0][-1],
        layers[1][-1],
        **{name: found[name][0] for name in wanted},
        error={name: found[name][1] for name in wanted if found[name][1] > 0},
        validity=chain_validity(chain, layers[0][-1], torch.einsum("aaaa->a", found["V"][0])),
    )


def chain_kernels(chain: Chain, kinks: Kinks = "autograd") -> ChainLayers:
    """Return K and Theta of every layer, and the two-label moments between them."""
    ensemble, patches = chain.ensemble, chain.patches
    gram = patches @ patches.T / patches.shape[1]
    g = ensemble.C_W[0] * (gram + gram.T) / 2
    K, Theta = [ensemble.C_b[0] + g], [ensemble.lambda_b[0] + ensemble.lambda_W[0] * gram]
    pairs: list[TwoPointMoments] = []
    for index in range(1, chain.depth):
        moments = neuron_pairs(ensemble, index - 1, g, patches, kinks)
        weight, slope = (
            chain.averaged(value, index + 1, (0, 1))
            for value in (moments.explicit((0,), (0,)), moments.explicit((1,), (1,)) * Theta[-1])
        )
        g = ensemble.C_W[index] * weight
        K.append(ensemble.C_b[index] + g)
        Theta.append(ensemble.lambda_b[index] + ensemble.lambda_W[index] * weight + ensemble.C_W[index] * slope)
        pairs.append(moments)
    return K, Theta, pairs


class WholeStep(Vertices):
    """The step from layer m to m + 1: the recursions at the labels of layer m, then patch averages.

    Args:
        chain: The chain.
        layers: Its kernels.
        moments: Of each layer.
        before: The step before it; None for the first.
        kinks: The meaning of explicit derivatives at a kink.
    """

    def __init__(
        self,
        chain: Chain,
        layers: ChainLayers,
        moments: Callable[[int], FourPointMoments],
        before: "WholeStep | None",
        kinks: Kinks,
    ) -> None:
        self._m: int = 1 if before is None else before._m + 1
        K, Theta, pairs = layers
        everything = torch.arange(chain.labels(self._m), device=K[0].device)
        gaussian = [as_gaussian(pair) for pair in pairs]
        super().__init__(
            chain.ensemble, K, Theta, gaussian, moments, dict.fromkeys("abcd", everything), RECURSIONS, kinks
        )
        self._chain, self._before = chain, before
        self._tensors: dict[str, Tensor] = {}

    def array(self, name: str, layer: int, labels: str) -> Tensor:
        """The vertex ``name`` at layer m for the printed ``labels``."""
        if self._before is None:
            return self.zero()
        letters = sorted(set(labels))
        tensor = torch.einsum(f"{labels}->{''.join(letters)}", self._before.tensor(name))
        return self._broadcast(tensor, letters)

    def tensor(self, name: str) -> Tensor:
        """The vertex at layer m + 1 on all labels behind it, as printed."""
        if name not in self._tensors:
            labels = "ab" if name in ("G1", "Theta1") else "abcd"
            array = self._recursions[name](self, self._m + 1, labels)
            count = len(self.label_sets["a"])
            value = array.reshape(array.shape[: len(labels)]).expand([count] * len(labels)).double()
            if name in SINGLE_NEURON:
                last = self._chain.layers[self._m]
                value = self._chain.averaged_together(value, self._m + 1) / last.count
            else:
                for pair in pairs_of(name):
                    value = self._chain.averaged(value, self._m + 1, pair)
            self._tensors[name] = value
        return self._tensors[name]


def chain_vertices(
    chain: Chain,
    layers: ChainLayers,
    names: Collection[str],
    num_samples: int,
    num_replicas: int,
    seed: int,
    kinks: Kinks = "autograd",
) -> tuple[ReplicaKind, Iterator[dict[str, Tensor]]]:
    """Vertices at the outputs on all samples, in repeated estimates.

    Args:
        chain: The chain.
        layers: Its kernels.
        names: Of the vertices.
        num_samples: Sample size in all.
        num_replicas: Independent samples.
        seed: Of the samples.
        kinks: The meaning of explicit derivatives at a kink.

    Returns:
        How the estimates are related, and one dictionary by name for each.
    """
    if chain.depth == 1:
        shapes = {name: [chain.samples] * (2 if name in ("G1", "Theta1") else 4) for name in names}
        return "refined", iter([{name: layers[0][0].new_zeros(shape) for name, shape in shapes.items()}])
    K, _, pairs = layers
    found = moment_replicas(chain.ensemble.activation, K[:-1], pairs, num_samples, num_replicas, seed, kinks)
    return found.kind, (_at_outputs(chain, layers, moments, names, kinks) for moments in found.members)


def _at_outputs(
    chain: Chain,
    layers: ChainLayers,
    moments: Callable[[int], FourPointMoments],
    names: Collection[str],
    kinks: Kinks,
) -> dict[str, Tensor]:
    lost = divergent(chain.ensemble, kinks)
    if chain.selects:
        paired: PairedStep | None = None
        for _ in range(chain.depth - 1):
            paired = PairedStep(chain, layers, moments, paired, kinks)
        assert paired is not None
        found = {name: paired.tensor(name)[(0,) * len(pairs_of(name))] for name in names}
    else:
        step: WholeStep | None = None
        for _ in range(chain.depth - 1):
            step = WholeStep(chain, layers, moments, step, kinks)
        assert step is not None
        found = {name: step.tensor(name) for name in names}
    return {name: value * (torch.nan if name in lost else 1.0) for name, value in found.items()}


class ChainVertices:
    """Vertices at the outputs over all samples, each estimate kept; as the theory of training takes them.

    Args:
        chain: The chain.
        layers: Its kernels.
        num_samples: Sample size in all.
        num_replicas: Independent samples.
        seed: Of the samples.
    """

    def __init__(self, chain: Chain, layers: ChainLayers, num_samples: int, num_replicas: int, seed: int) -> None:
        names = [*SYMMETRIES, *(SINGLE_NEURON if not chain.ensemble.gaussian else ())]
        self.kind, runs = chain_vertices(chain, layers, names, num_samples, num_replicas, seed)
        self.runs, self.depth, self.sampled = list(runs), chain.depth, self.kind == "independent"

    def replicas(self, label_sets: LabelSets) -> Replicas[VertexSource]:
        """Evaluators on sets of labels, to be combined."""
        return Replicas(self.kind, (_OnSets(run, label_sets) for run in self.runs))


class _OnSets:
    def __init__(self, tensors: dict[str, Tensor], label_sets: LabelSets) -> None:
        self._tensors, self._sets, self._axes = tensors, label_sets, list(label_sets)

    def array(self, name: str, layer: int, labels: str) -> Tensor:
        """The vertex for the printed labels."""
        index = []
        for label in labels:
            shape = [1] * len(self._axes)
            shape[self._axes.index(label)] = -1
            index.append(self._sets[label].reshape(shape))
        return self._tensors[name][tuple(index)]


def check_vertices(chain: Chain, memory: int) -> None:
    """Refuse tensors over four labels that do not fit, and what the recursions do not cover.

    Raises:
        ValueError: With what to do.
    """
    largest = max(chain.labels(layer) for layer in range(1, chain.depth + 1))
    needed = 8 * _ARRAYS * largest ** (2 if chain.selects else 4) * (chain.samples**2 if chain.selects else 1)
    if needed > memory:
        raise ValueError(
            f"x: {chain.samples} inputs have up to {largest} labels (sample, position), whose vertices need about "
            f"{needed / 2**30:.1f} GiB; memory allows {memory / 2**30:.1f} GiB. Give fewer or smaller inputs; "
            "architecture_statistics gives the spread over seeds of larger ones, drawn networks the drift"
        )
    check_kinked_biases(chain.ensemble, chain.patches)


def chain_validity(chain: Chain, K: Tensor, V: Tensor) -> Validity:
    """Return where order 1/n holds, by the relative variance of an output's variance, epsilon.

    Args:
        chain: The chain.
        K: Kernel of the outputs, (N, N).
        V: Vertex at the outputs with equal labels, (N,).
    """
    n = chain.ensemble.widths[-2]
    epsilon = float((V / n / K.diagonal().square()).mean().clamp_min(0.0)) if chain.depth > 1 else 0.0
    size = f"order 1/n, n = {n} channels; epsilon = Var G/E[G]^2 = {epsilon:.3g}"
    if epsilon >= TOO_DEEP:
        size += ": not small, so that these are of the right order at best; use more channels or fewer layers"
    elif epsilon >= EDGE:
        size += ": expect errors of that relative size"
    flag = "invalid" if epsilon >= TOO_DEEP else "caution" if epsilon >= EDGE else "valid"
    return Validity(flag, (size, *counted_laws(chain.ensemble, first_order=True)), {"epsilon": epsilon})  # type: ignore[arg-type]
