"""Vertices on tiles of probe and training labels, for contractions that run over many of them.

One set of random points serves all tiles and all vertices. Where two labels run over many inputs and two over few,
labels are paired so that both pair features have few columns; tensors of sampled moments are kept in single precision,
far below the sampling error.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from torch_eft.results.progress.work import worked
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.four_point_moments import Factor, FourPointMoments, exact_mean, products
from torch_eft.theory.gaussian.points import (
    MOST_QUADRATURE_LABELS,
    Points,
    sample_points,
    square_root,
)
from torch_eft.theory.gaussian.scale_invariant import Orders
from torch_eft.theory.gaussian.two_point_moments import Kinks, SmoothPairs, TwoPointMoments
from torch_eft.theory.initialization.estimators import (
    RECURSIONS,
    ReplicaKind,
    Replicas,
    VertexReplicas,
    vertex_replicas,
)
from torch_eft.theory.initialization.evaluator import SINGLE_NEURON, LabelSets, VertexSource, Vertices, full_tensor
from torch_eft.theory.initialization.infinite_width import InfiniteWidthLayers, infinite_width
from torch_eft.theory.initialization.neuron.moments import AnyPoints, MixedMoments, neuron_spacings, piece_sample
from torch_eft.theory.initialization.neuron.pairs import MixedPairs, as_gaussian


class VertexTiles:
    """Evaluators of the vertices on any sets of labels.

    Args:
        ensemble: The ensemble.
        layers: Kernels over all points, as ``infinite_width`` returns them.
        num_samples: Sample size in all, where moments are sampled.
        num_replicas: Independent samples that share it; one gives no error estimate.
        seed: Seed of the samples.
        kinks: The meaning of explicit derivatives at a kink.
        x: The points; equal ones (a probe point that is also a training point) count once. None: all count.
        integrated: Linearly independent points over which moments are integrated at most; over more they are sampled.

    Attributes:
        sampled: Whether they are.
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        layers: InfiniteWidthLayers,
        num_samples: int,
        num_replicas: int,
        seed: int,
        kinks: Kinks = "autograd",
        x: Tensor | None = None,
        integrated: int = MOST_QUADRATURE_LABELS,
    ) -> None:
        self.ensemble, self.depth = ensemble, ensemble.depth
        self._kinks, self._seed, self._num_replicas = kinks, seed, num_replicas
        self._size = num_samples // num_replicas
        self.layers, self._place = layers, None if x is None else _places(x)
        self.K, self.Theta = layers[0][-1], layers[1][-1]
        if x is not None and self._place is not None:
            kept = x.new_empty(int(self._place.max()) + 1, x.shape[1]).index_copy(0, self._place, x)
            layers = infinite_width(ensemble, kept, kinks)
        self._distinct = K, Theta, pairs = layers
        activation = ensemble.activation
        closed = activation.slopes is not None and not any(isinstance(pair, MixedPairs) for pair in pairs)
        self.sampled = not closed and not (
            len(K[0]) <= MOST_QUADRATURE_LABELS
            and square_root(K[0])[1].shape[1] <= integrated
            and (activation.kinked or neuron_spacings(activation, K, pairs) is not None)
        )
        self.kind: ReplicaKind = "independent" if self.sampled else "refined"
        single = [_SinglePairs(as_gaussian(pair)) for pair in pairs]
        self._single = [k.float() for k in K], [k.float() for k in Theta], single
        self._moments: dict[tuple[int, int], FourPointMoments] = {}
        self._whole: list[_Whole] = []

    def replicas(self, label_sets: LabelSets) -> Replicas[VertexSource]:
        """Evaluators on sets of labels, to be combined."""
        label_sets = self._placed(label_sets)
        return Replicas(self.kind, self._sampled(label_sets) if self.sampled else self._integrated(label_sets))

    def evaluators(self, label_sets: LabelSets) -> Iterator[Vertices]:
        """Evaluators of vertices and moments alike, on sets of labels that share nothing with other ones."""
        label_sets = self._placed(label_sets)
        return self._sampled(label_sets) if self.sampled else self._summed(label_sets)

    def _placed(self, label_sets: LabelSets) -> LabelSets:
        """The sets among the different points; labels of one set keep sharing one tensor object."""
        if self._place is None:
            return label_sets
        placed = {id(index): self._place[index] for index in label_sets.values()}
        return {label: placed[id(index)] for label, index in label_sets.items()}

    def _summed(self, label_sets: LabelSets) -> Iterator[Vertices]:
        return vertex_replicas(self.ensemble, *self._distinct, label_sets, 1, 2, self._seed, self._kinks).members

    def _sampled(self, label_sets: LabelSets) -> Iterator[Vertices]:
        K, Theta, pairs = self._single
        for replica in range(self._num_replicas):
            moments = functools.partial(self._sampled_moments, replica)
            yield Vertices(self.ensemble, K, Theta, list(pairs), moments, label_sets, RECURSIONS, self._kinks)

    def _integrated(self, label_sets: LabelSets) -> Iterator[VertexSource]:
        points = self._distinct[0][0]
        if len(points) > MOST_QUADRATURE_LABELS:  # closed forms: as cheap on any sets
            yield from self._summed(label_sets)
            return
        if not self._whole:
            everything = torch.arange(len(points), device=points.device)
            self._whole = [_Whole(member, len(points)) for member in self._summed(dict.fromkeys("abcd", everything))]
        for whole in self._whole:
            yield _Part(whole, label_sets)

    def _sampled_moments(self, replica: int, m: int) -> FourPointMoments:
        if (replica, m) not in self._moments:
            pairs, seed = self._distinct[2][m - 1], self._seed + 1000 * replica + m
            if isinstance(pairs, MixedPairs):
                self._moments[replica, m] = MixedMoments(
                    pairs,
                    functools.partial(piece_sample, pairs, pairs.g, self._size, seed),
                    lambda piece, points: _PairedMoments(piece.activation, points, _SinglePairs(piece.pairs)),
                )
            else:
                points = sample_points(self._distinct[0][m - 1], self._size, seed)
                self._moments[replica, m] = _PairedMoments(self.ensemble.activation, points, self._single[2][m - 1])
        return self._moments[replica, m]


class SingleNeuronTiles:
    """Vertices of a network with one output that have no more than E_zzzz .. E_ddII.

    Where all outputs are one, the pairings of an index structure are equal, and these six cumulants can be written as
    vertices: V = E_zzzz / 3, D = E_zzH, A = E_HH, P = E_dHz, R = E_ddI / 3, S = E_ddII, the others 0. What they add to
    an observable that is linear in vertices is that of a network with this one output.

    Args:
        tiles: The vertices.
    """

    def __init__(self, tiles: VertexReplicas) -> None:
        self._tiles = tiles
        self.depth, self.kind, self.sampled = tiles.depth, tiles.kind, tiles.sampled

    def replicas(self, label_sets: LabelSets) -> Replicas[VertexSource]:
        """Evaluators on sets of labels, to be combined."""
        members = self._tiles.replicas(label_sets).members
        return Replicas(self.kind, (_SingleNeuron(member, len(label_sets)) for member in members))


_SINGLE_NEURON = {
    "V": ("E_zzzz", 1 / 3),
    "D": ("E_zzH", 1.0),
    "A": ("E_HH", 1.0),
    "P": ("E_dHz", 1.0),
    "R": ("E_ddI", 1 / 3),
    "S": ("E_ddII", 1.0),
}


def single_neuron_part(source: VertexSource, name: str, layer: int, labels: str) -> Tensor | float:
    """What is added to a vertex of a network with one output, see ``SingleNeuronTiles``.

    Args:
        source: The vertices.
        name: Of the vertex.
        layer: L.
        labels: As printed.

    Returns:
        A broadcast array, or 0.
    """
    if name not in _SINGLE_NEURON:
        return 0.0
    added, share = _SINGLE_NEURON[name]
    return share * source.array(added, layer, labels)


class _SingleNeuron:
    def __init__(self, source: VertexSource, axes: int) -> None:
        self._source, self._axes = source, axes

    def array(self, name: str, layer: int, labels: str) -> Tensor:
        """The vertex for the printed labels."""
        value = single_neuron_part(self._source, name, layer, labels)
        if isinstance(value, Tensor):
            return value
        return self._source.array("E_zzzz", layer, labels[:1] * 4).new_zeros([1] * self._axes)


def with_single_neurons(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vertices of a network with one output, E_zzzz .. E_ddII among them, in which these are counted.

    Args:
        tensors: ``{name: vertex}``, labels as printed.

    Returns:
        The same without E_zzzz .. E_ddII.
    """
    added = {name: share * tensors[source] for name, (source, share) in _SINGLE_NEURON.items()}
    return {
        name: value + added[name] if name in added else value
        for name, value in tensors.items()
        if name not in SINGLE_NEURON
    }


def _places(x: Tensor) -> Tensor | None:
    """The place of each point among the different ones, in the order of their last occurrence; None if all are."""
    points = torch.arange(len(x), device=x.device)
    different, which = torch.unique(x, dim=0, return_inverse=True)
    if len(different) == len(x):
        return None
    last = points.new_zeros(len(different)).scatter_reduce(0, which, points, "amax")
    return last.argsort().argsort()[which]


class _Whole:
    """Vertices of a few points, each integrated once for all of them."""

    def __init__(self, vertices: Vertices, count: int) -> None:
        self._vertices, self._count = vertices, count
        self._known: dict[tuple[str, int], Tensor] = {}

    def tensor(self, name: str, layer: int) -> Tensor:
        """The vertex on all points, in the printed order of labels."""
        if (name, layer) not in self._known:
            self._known[name, layer] = full_tensor(self._vertices, name, layer, self._count)
        return self._known[name, layer]


class _Part:
    """Vertices of a few points on sets of labels."""

    def __init__(self, whole: _Whole, label_sets: LabelSets) -> None:
        self._whole, self._label_sets, self._axes = whole, label_sets, list(label_sets)

    def array(self, name: str, layer: int, labels: str) -> Tensor:
        """The vertex for the printed labels."""
        index = []
        for label in labels:
            shape = [1] * len(self._axes)
            shape[self._axes.index(label)] = -1
            index.append(self._label_sets[label].reshape(shape))
        return self._whole.tensor(name, layer)[tuple(index)]


class _PairedMoments:
    """Moments with three to six labels over a sample, split so that the two matrices multiplied are narrow.

    With f and g the products of functions on the two sides, returns the exact <f> <g> plus the covariance about exact
    means, fg - f <g> - <f> g + 2 <f> <g>, averaged over the sample.

    Args:
        activation: sigma.
        points: The sample.
        pairs: The exact two-label moments.
    """

    def __init__(self, activation: Activation, points: AnyPoints, pairs: TwoPointMoments) -> None:
        assert isinstance(points, Points)
        self._activation, self._z, self._pairs = activation, points.z, pairs
        self._functions: dict[Orders, Tensor] = {}

    def moment(self, factors: Sequence[Factor]) -> Tensor:
        """<prod f>, one axis per factor."""
        n = [len(index) for _, index in factors]
        splits = _splits(len(n))
        columns = [sum(math.prod(n[slot] for slot in side) for side in split) for split in splits]
        left, right = splits[columns.index(min(columns))]
        first, second = [factors[slot] for slot in left], [factors[slot] for slot in right]
        mean_first, mean_second = (
            exact_mean(self._pairs, side) if len(side) < 3 else self.moment(side).flatten() for side in (first, second)
        )
        product = self._z.new_zeros(len(mean_first), len(mean_second))
        sum_first, sum_second = torch.zeros_like(mean_first), torch.zeros_like(mean_second)
        columns_first, columns_second = self._columns(first), self._columns(second)
        rows = max(1, _FEATURES // min(columns))
        for start in range(0, len(self._z), rows):  # small enough for the features to stay in the cache
            part = slice(start, start + rows)
            f, g = (products([column[part] for column in side]) for side in (columns_first, columns_second))
            product.addmm_(f.T, g)
            worked(len(f) * product.numel())
            sum_first, sum_second = sum_first + f.sum(0), sum_second + g.sum(0)
        count = len(self._z)
        product /= count
        product -= torch.outer(sum_first / count - mean_first, mean_second)
        product -= torch.outer(mean_first, sum_second / count - mean_second)
        order = (*left, *right)
        value = product.reshape([n[slot] for slot in order])
        return value.permute([order.index(axis) for axis in range(len(n))])

    def _columns(self, factors: Sequence[Factor]) -> list[Tensor]:
        """Every factor at all points, (S, n)."""
        for orders, _ in factors:
            if orders not in self._functions:
                self._functions[orders] = torch.stack([self._activation(self._z, order) for order in orders]).prod(0)
        return [self._functions[orders][:, _consecutive(index)] for orders, index in factors]


@functools.cache
def _splits(count: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All ways to split labels into two sides of at most half of them."""
    most = (count + 1) // 2
    sides = (part for size in range(1, count) for part in itertools.combinations(range(count), size))
    splits = [(side, tuple(slot for slot in range(count) if slot not in side)) for side in sides if 0 in side]
    return [split for split in splits if max(map(len, split)) <= most]


_FEATURES = 2**21
"""Entries of the features multiplied at once."""


def _consecutive(index: Tensor) -> Tensor | slice:
    """Consecutive numbers as a slice, which copies nothing."""
    if len(index) and bool((index.diff() == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


class _SinglePairs:
    """Exact two-label moments, rounded to single precision."""

    def __init__(self, pairs: TwoPointMoments) -> None:
        self._pairs = pairs
        self._known: dict[tuple, Tensor] = {}

    def single(self, orders: Orders) -> Tensor:
        """<prod sigma^(p)_a>, (N,)."""
        if isinstance(self._pairs, SmoothPairs | MixedPairs):
            half = len(orders) // 2
            return self.explicit(orders[:half], orders[half:]).diagonal()
        return self._pairs.single(orders).float()

    def explicit(self, first: Orders, second: Orders) -> Tensor:
        """<prod sigma^(p)_a prod sigma^(q)_b>, (N, N)."""
        key, mirror = (tuple(sorted(first)), tuple(sorted(second))), (tuple(sorted(second)), tuple(sorted(first)))
        if key not in self._known:
            if mirror in self._known:
                self._known[key] = self._known[mirror].T
            elif isinstance(self._pairs, SmoothPairs | MixedPairs):
                # Of a thousand points a matrix takes megabytes, and there are hundreds: no second one is kept.
                self._known[key] = self._pairs.computed(*key).float()
            else:
                self._known[key] = self._pairs.explicit(*key).float()
        return self._known[key]

    def response(self, p: int, q: int, i: int, j: int) -> Tensor:
        """<d_a^i d_b^j sigma^(p)_a sigma^(q)_b>, (N, N)."""
        if isinstance(self._pairs, SmoothPairs | MixedPairs):
            return self.explicit((p + i,), (q + j,))
        key = ("response", p, q, i, j)
        if key not in self._known:
            self._known[key] = self._pairs.response(p, q, i, j).float()
        return self._known[key]


def expanded(source: VertexSource, name: str, depth: int, labels: str, sizes: Sequence[int]) -> Tensor:
    """A vertex at the output on the full product of the sets, float64."""
    return source.array(name, depth, labels).double().expand(*sizes)
