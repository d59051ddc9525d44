"""Evaluators of the 1/n statistics (exact, integrated or sampled), and the combination of what several of them give."""

import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.four_point_moments import FourPointMoments, SummedMoments
from torch_eft.theory.gaussian.points import (
    MOST_QUADRATURE_LABELS,
    GridPoints,
    KinkedPoints,
    Points,
)
from torch_eft.theory.gaussian.scale_invariant import ScaleInvariantMoments
from torch_eft.theory.gaussian.two_point_moments import Kinks, TwoPointMoments, two_point_moments
from torch_eft.theory.initialization.evaluator import (
    FLUCTUATIONS,
    SINGLE_NEURON,
    LabelSets,
    Recursion,
    VertexSource,
    Vertices,
    divergent,
)
from torch_eft.theory.initialization.neuron.moments import MixedMoments, neuron_spacings, piece_sample
from torch_eft.theory.initialization.neuron.pairs import MixedPairs, as_gaussian
from torch_eft.theory.initialization.neuron.remarks import check_kinked_biases
from torch_eft.theory.initialization.recursions import differentials, fluctuations, kernels, single_neuron

RECURSIONS: dict[str, Recursion] = {
    recursion.__name__: recursion
    for module, names in (
        (kernels, ("G1", "V", "Theta1", "A", "B", "D", "F")),
        (differentials, tuple("PQRSTU")),
        (fluctuations, tuple(FLUCTUATIONS)),
        (single_neuron, tuple(SINGLE_NEURON)),
    )
    for recursion in (getattr(module, name) for name in names)
}

ReplicaKind = Literal["refined", "independent"]
"""Successively finer quadratures, or independent samples."""

Source = TypeVar("Source")
Key = TypeVar("Key", bound=Hashable)

_KINKED_NODES = {1: (32, 40), 2: (32, 40), 3: (20, 28), 4: (14, 18)}
"""Nodes per side and label of the two rules for a kink, by the number of inputs; the error reported is their
difference, that of the coarser one."""

_PARALLEL = 1e-10
"""Inputs whose correlation is closer to 1 than this count as equal: responses at a kink diverge between them."""


class ReplicaMean:
    """Combines repeated estimates: the last of successively finer quadratures, or the mean of independent samples.

    Args:
        kind: Which of the two they are.
    """

    def __init__(self, kind: ReplicaKind) -> None:
        self.kind = kind
        self._count = 0
        self._value: Tensor | None = None
        self._spread: Tensor | float = 0.0

    def add(self, value: Tensor) -> None:
        """Add the next estimate."""
        self._count += 1
        if self._value is None:
            self._value = value
            return
        difference = value - self._value
        if self.kind == "refined":
            self._value, self._spread = value, difference.square()
            return
        self._value = self._value + difference / self._count
        self._spread = self._spread + difference * (value - self._value)

    def result(self) -> tuple[Tensor, float]:
        """The value, and its error (rms over entries): standard error, or difference of the last two; 0 if exact."""
        assert self._value is not None
        if isinstance(self._spread, float):
            return self._value, 0.0
        divisor = 1 if self.kind == "refined" else self._count * (self._count - 1)
        return self._value, float((self._spread.mean() / divisor).sqrt())


class VertexReplicas(Protocol):
    """Vertices of the outputs on any sets of labels, in repeated estimates."""

    @property
    def depth(self) -> int:
        """L."""
        ...

    @property
    def kind(self) -> ReplicaKind:
        """How the estimates are related."""
        ...

    @property
    def sampled(self) -> bool:
        """Whether moments are sampled."""
        ...

    def replicas(self, label_sets: LabelSets) -> "Replicas[VertexSource]":
        """Evaluators on sets of labels, to be combined."""
        ...


@dataclass(frozen=True)
class Replicas(Generic[Source]):
    """Evaluators of the same statistics, to be combined.

    Args:
        kind: How they are related.
        members: The evaluators, one at a time: what one has computed is released with it.
    """

    kind: ReplicaKind
    members: Iterator[Source]

    def combined(self, read: Callable[[Source], Iterable[tuple[Key, Tensor]]]) -> dict[Key, tuple[Tensor, float]]:
        """Combine what ``read`` yields for every member, ``(key, tensor)``; the value and its error for each key."""
        means: dict[Key, ReplicaMean] = {}
        for member in self.members:
            for key, value in read(member):
                means.setdefault(key, ReplicaMean(self.kind)).add(value)
        return {key: mean.result() for key, mean in means.items()}


def vertex_replicas(
    ensemble: MLPEnsemble,
    K: list[Tensor],
    Theta: list[Tensor],
    pairs: list[TwoPointMoments],
    label_sets: LabelSets,
    num_samples: int,
    num_replicas: int,
    seed: int,
    kinks: Kinks = "autograd",
) -> Replicas[Vertices]:
    """Make the evaluators of the 1/n statistics, from what ``infinite_width`` returned.

    Args:
        ensemble: The ensemble.
        K: K^(1) .. K^(L) on all inputs.
        Theta: Theta^(1) .. Theta^(L), likewise.
        pairs: Two-label moments at layers 1 .. L-1.
        label_sets: The inputs that each label runs over.
        num_samples: Sample size in all, where moments are sampled.
        num_replicas: Independent samples that share it.
        seed: Seed of the samples.
        kinks: The meaning of explicit derivatives at a kink.

    Returns:
        The evaluators.

    Raises:
        ValueError: If there are fewer than two replicas, or too few samples for the number of inputs.
    """
    moments = moment_replicas(ensemble.activation, K[:-1], pairs, num_samples, num_replicas, seed, kinks)
    gaussian = [as_gaussian(pair) for pair in pairs]
    return Replicas(
        moments.kind,
        (Vertices(ensemble, K, Theta, gaussian, one, label_sets, RECURSIONS, kinks) for one in moments.members),
    )


def moment_replicas(
    activation: Activation,
    K: Sequence[Tensor],
    pairs: Sequence[TwoPointMoments],
    num_samples: int,
    num_replicas: int,
    seed: int,
    kinks: Kinks = "autograd",
) -> Replicas[Callable[[int], FourPointMoments]]:
    """Make the moments with three and more labels of every layer, as functions of the layer 1 .. L-1.

    Scale-invariant activations: one, exact. At most four inputs: one, integrated, for a smooth sigma; two of different
    fineness for one with a kink. Else ``num_replicas`` sampled ones; also where the rule would need more than 2^25
    nodes, or none resolves sigma.

    Args:
        activation: sigma.
        K: K^(1) .. K^(L-1) on all labels.
        pairs: Two-label moments of these layers.
        num_samples: Sample size in all, where moments are sampled.
        num_replicas: Independent samples that share it.
        seed: Seed of the samples.
        kinks: The meaning of explicit derivatives at a kink.

    Returns:
        The moments.

    Raises:
        ValueError: If there are fewer than two replicas, or too few samples for the number of labels.
    """
    distributional = kinks == "distributional"
    pairs = [as_gaussian(pair) for pair in pairs]
    slopes = activation.slopes
    if slopes is not None and not any(isinstance(pair, MixedPairs) for pair in pairs):
        return Replicas("refined", iter([lambda m: ScaleInvariantMoments(slopes, K[m - 1], distributional)]))

    def summed(
        points: Callable[[int, Tensor, int], Points | GridPoints], control: bool = False
    ) -> Callable[[int], FourPointMoments]:
        def moments(m: int) -> FourPointMoments:
            pair = pairs[m - 1]
            if isinstance(pair, MixedPairs):
                g = pair.g
                return MixedMoments(
                    pair,
                    lambda number: points(m, g, number),
                    lambda piece, some: SummedMoments(piece.activation, g, some, piece.pairs, control),
                )
            # Means of the functions almost everywhere; delta functions are added apart.
            means = pair if not distributional else two_point_moments(activation, K[m - 1])
            return SummedMoments(activation, K[m - 1], points(m, K[m - 1], 0), means, control, distributional)

        return moments

    most = max((len(kernel) for kernel in K), default=0)
    if most <= MOST_QUADRATURE_LABELS:
        if activation.kinked:

            def kinked(fineness: int) -> Callable[[int], FourPointMoments]:
                return summed(
                    lambda m, covariance, piece: KinkedPoints(covariance, _KINKED_NODES[len(covariance)][fineness])
                )

            return Replicas("refined", (kinked(fineness) for fineness in range(2)))
        rules = neuron_spacings(activation, K, pairs)
        if rules is not None:
            known = rules
            grids = summed(lambda m, covariance, piece: GridPoints(covariance, known[m - 1][piece]))
            return Replicas("refined", iter([grids]))
    if num_replicas < 2:
        raise ValueError(f"num_replicas: {num_replicas} given; at least 2 are needed to estimate the error")

    def sampled(replica: int) -> Callable[[int], FourPointMoments]:
        def drawn(m: int, covariance: Tensor, piece: int) -> Points:
            return piece_sample(pairs[m - 1], covariance, num_samples // num_replicas, seed + 1000 * replica + m, piece)

        return summed(drawn, control=not activation.kinked)

    return Replicas("independent", (sampled(replica) for replica in range(num_replicas)))


def check_statistics(
    ensemble: MLPEnsemble, x: Tensor, names: Collection[str], kinks: Kinks, check_validity: bool
) -> None:
    """Refuse what the statistics of order 1/n do not cover, and warn of those that have no value.

    Raises:
        ValueError: If ``kinks`` is unknown, r >= 1, an input vanishes with C_b = 0, or two inputs coincide or hidden
            biases are far from Gaussian for a kinked activation.
    """
    check_choice("kinks", kinks, ("autograd", "distributional"))
    r = ensemble.aspect_ratio
    if r >= 1 and check_validity:
        raise ValueError(
            f"ensemble: r = L/n = {r:.3g} >= 1, where the expansion in 1/n means nothing; use fewer or wider layers, "
            "ask for statistics=('K', 'Theta') alone, or pass check_validity=False to see its coefficients"
        )
    norms = x.square().sum(1)
    if ensemble.C_b[0] == 0 and bool((norms == 0).any()):
        index = int((norms == 0).nonzero()[0])
        raise ValueError(f"x: input {index} has zero norm and C_b = 0, so that its preactivations vanish; drop it")
    check_kinked_biases(ensemble, x)
    if ensemble.activation.kinked:
        # Piecewise linear: sigma'' is 0 as autograd sees it, and with it the statistics that carry one in every term.
        absent = ensemble.activation.slopes is not None and kinks == "autograd"
        K = ensemble.C_b[0] + ensemble.C_W[0] * x @ x.T / ensemble.widths[0]
        rho = K / torch.outer(K.diagonal(), K.diagonal()).sqrt()
        close = (1 - rho.abs() < _PARALLEL).triu(1).nonzero()
        if len(close):
            a, b = close[0].tolist()
            raise ValueError(
                f"x: inputs {a} and {b} have correlation {float(rho[a, b]):.12g} at layer 1; between inputs that "
                f"coincide (or are opposite) the statistics of {ensemble.activation.name}, which has a kink, diverge. "
                "Keep one of them: a label may be used twice"
            )
        unknown = [name for name in names if name in (("XQQ", "XUU", "XUQ") if absent else tuple(FLUCTUATIONS))]
        if unknown:
            raise ValueError(
                f"statistics: {', '.join(unknown)} of {ensemble.activation.name} given, which has a kink: the "
                "covariance of the dNTK takes derivatives of expectations of six inputs, which are derived for smooth "
                "activations. Use one, e.g. gelu"
            )
    lost = [name for name in divergent(ensemble, kinks) if name in names]
    if lost and ensemble.depth > 1:
        warnings.warn(
            f"{', '.join(lost)} of {ensemble.activation.name} are NaN with kinks='distributional': sigma' jumps, and "
            "products of delta functions have no value. kinks='autograd' gives what automatic differentiation sees",
            stacklevel=3,
        )
