"""Statistics on blocks of labels: kernels at infinite width, and any vertex on chosen sets of inputs, tile by tile.

Infinite width (PDLT 4.1 and 8.2; index-free):
    K^(1) = C_b + C_W x.x / n_0                 Theta^(1) = lambda_b + lambda_W x.x / n_0
    K^(l+1) = C_b + C_W M_00                    Theta^(l+1) = lambda_b + lambda_W M_00 + C_W M_11 * Theta^(l)
with M_pq = <sigma^(p)_a sigma^(q)_b> under N(0, K^(l)).
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.four_point_moments import FourPointMoments, SummedMoments
from torch_eft.theory.gaussian.points import (
    MOST_QUADRATURE_LABELS,
    GridPoints,
    KinkedPoints,
    Points,
    quadrature_spacings,
    sample_points,
)
from torch_eft.theory.gaussian.scale_invariant import ScaleInvariantMoments
from torch_eft.theory.gaussian.two_point_moments import Kinks, TwoPointMoments, two_point_moments
from torch_eft.theory.initialization import differentials
from torch_eft.theory.initialization import kernels as ntk
from torch_eft.theory.initialization import preactivations as kernel
from torch_eft.theory.initialization.evaluator import Recursion, Vertices, divergent

RECURSIONS: dict[str, Recursion] = {
    "G1": kernel.G1,
    "V": kernel.V,
    "Theta1": ntk.Theta1,
    "A": ntk.A,
    "B": ntk.B,
    "D": ntk.D,
    "F": ntk.F,
    "P": differentials.P,
    "Q": differentials.Q,
    "R": differentials.R,
    "S": differentials.S,
    "T": differentials.T,
    "U": differentials.U,
}


_KINKED_NODES = {1: (32, 40), 2: (32, 40), 3: (20, 28), 4: (14, 18)}
"""Nodes a side and label of the two rules for a kink, by the number of inputs; the error reported is their
difference, that of the coarser one."""

_PARALLEL = 1e-10
"""Inputs of a correlation closer to 1 than this cannot be told apart: responses at a kink diverge between them."""


class ReplicaMean:
    """Several values of one tensor made one: of ever finer quadratures the last, of independent samples the mean.

    Args:
        refined: Whether they are quadratures.
    """

    def __init__(self, refined: bool) -> None:
        self.refined = refined
        self._count = 0
        self._value: Tensor | None = None
        self._spread: Tensor | float = 0.0

    def add(self, value: Tensor) -> None:
        """The next value."""
        self._count += 1
        if self._value is None:
            self._value = value
            return
        difference = value - self._value
        if self.refined:
            self._value, self._spread = value, difference.square()
            return
        self._value = self._value + difference / self._count
        self._spread = self._spread + difference * (value - self._value)

    def result(self) -> tuple[Tensor, float]:
        """The value, and its error (rms over entries): standard error, or difference of the last two; 0 if exact."""
        assert self._value is not None
        if isinstance(self._spread, float):
            return self._value, 0.0
        divisor = 1 if self.refined else self._count * (self._count - 1)
        return self._value, float((self._spread.mean() / divisor).sqrt())


def infinite_width(
    ensemble: MLPEnsemble, x: Tensor, kinks: Kinks = "autograd"
) -> tuple[list[Tensor], list[Tensor], list[TwoPointMoments]]:
    """K and Theta at layers 1 .. L, and the two-label moments at layers 1 .. L-1, for checked inputs."""
    gram = x @ x.T / ensemble.widths[0]
    gram = (gram + gram.T) / 2
    K = [ensemble.C_b[0] + ensemble.C_W[0] * gram]
    Theta = [ensemble.lambda_b[0] + ensemble.lambda_W[0] * gram]
    pairs = []
    for index in range(1, ensemble.depth):
        moments = two_point_moments(ensemble.activation, K[-1], kinks)
        M_00, M_11 = moments.explicit((0,), (0,)), moments.explicit((1,), (1,))
        K.append(ensemble.C_b[index] + ensemble.C_W[index] * M_00)
        Theta.append(
            ensemble.lambda_b[index] + ensemble.lambda_W[index] * M_00 + ensemble.C_W[index] * M_11 * Theta[-1]
        )
        pairs.append(moments)
    return K, Theta, pairs


def evaluators(
    ensemble: MLPEnsemble,
    K: list[Tensor],
    Theta: list[Tensor],
    pairs: list[TwoPointMoments],
    sets: Mapping[str, Tensor],
    samples: int,
    replicas: int,
    seed: int,
    kinks: Kinks = "autograd",
) -> tuple[bool, Iterator[Vertices]]:
    """Whether they are ever finer rather than independent, and the evaluators of the 1/n statistics.

    Two slopes: one, exact. At most four inputs: one, integrated, for a smooth sigma; two of different fineness for one
    with a kink. Else ``replicas`` sampled ones; also where the rule would need more than 2^25 nodes, or none
    resolves sigma.

    Raises:
        ValueError: If there are fewer than two replicas, or too few samples for the number of inputs.
    """
    activation = ensemble.activation
    distributional = kinks == "distributional"

    def vertices(moments: Callable[[int], FourPointMoments]) -> Vertices:
        return Vertices(ensemble, K, Theta, pairs, moments, sets, RECURSIONS, kinks)

    slopes = activation.slopes
    if slopes is not None:
        return True, iter([vertices(lambda m: ScaleInvariantMoments(slopes, K[m - 1], distributional))])

    def summed(points: Callable[[int], Points | GridPoints], control: bool = False) -> Vertices:
        def moments(m: int) -> SummedMoments:
            # Means of the functions almost everywhere; delta functions are added apart.
            means = pairs[m - 1] if not distributional else two_point_moments(activation, K[m - 1])
            return SummedMoments(activation, K[m - 1], points(m), means, control, distributional)

        return vertices(moments)

    if len(K[0]) <= MOST_QUADRATURE_LABELS:
        if activation.kinked:

            def kinked(count: int) -> Vertices:
                return summed(lambda m: KinkedPoints(K[m - 1], count))

            return True, (kinked(count) for count in _KINKED_NODES[len(K[0])])
        rules = [quadrature_spacings(activation, K[m]) for m in range(ensemble.depth - 1)]
        known = [rule for rule in rules if rule is not None]
        if len(known) == len(rules):
            return True, iter([summed(lambda m: GridPoints(K[m - 1], known[m - 1]))])
    if replicas < 2:
        raise ValueError(f"replicas: {replicas} given; at least 2 are needed to estimate the error")

    def sampled(replica: int) -> Vertices:
        return summed(
            lambda m: sample_points(K[m - 1], samples // replicas, seed + 1000 * replica + m),
            control=not activation.kinked,
        )

    return False, (sampled(replica) for replica in range(replicas))


def check_statistics(
    ensemble: MLPEnsemble, x: Tensor, names: Collection[str], kinks: Kinks, any_aspect_ratio: bool
) -> None:
    """Refuse, or warn of, what the statistics of order 1/n do not cover.

    Raises:
        ValueError: If ``kinks`` is unknown, r >= 1, an input vanishes with C_b = 0, or two inputs coincide for a
            kinked activation.
    """
    if kinks not in ("autograd", "distributional"):
        raise ValueError(f"kinks: {kinks!r} given; give 'autograd' or 'distributional'")
    r = ensemble.aspect_ratio
    if r >= 1 and not any_aspect_ratio:
        raise ValueError(
            f"ensemble: r = L/n = {r:.3g} >= 1, where the expansion in 1/n means nothing; use fewer or wider layers, "
            "ask for quantities=('K', 'Theta') alone, or pass any_aspect_ratio=True to see its coefficients"
        )
    norms = x.square().sum(1)
    if ensemble.C_b[0] == 0 and bool((norms == 0).any()):
        index = int((norms == 0).nonzero()[0])
        raise ValueError(f"x: input {index} has zero norm and C_b = 0, so that its preactivations vanish; drop it")
    if ensemble.activation.kinked:
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
    lost = [name for name in divergent(ensemble, kinks) if name in names]
    if lost and ensemble.depth > 1:
        warnings.warn(
            f"{', '.join(lost)} of {ensemble.activation.name} are NaN with kinks='distributional': sigma' jumps, and "
            "products of delta functions have no value. kinks='autograd' gives what automatic differentiation sees",
            stacklevel=3,
        )


def block(
    ensemble: MLPEnsemble,
    x: Tensor,
    name: str,
    letters: str,
    sets: Mapping[str, Tensor],
    layer: int | None = None,
    samples: int = 4096,
    replicas: int = 2,
    seed: int = 0,
    kinks: Kinks = "autograd",
    any_aspect_ratio: bool = False,
) -> tuple[Tensor, float]:
    """One vertex on sets of labels, e.g. R on (probe, probe, train, train).

    Args:
        ensemble: The ensemble.
        x: All inputs, (N, n_0).
        name: One of G1, V, Theta1, A, B, D, F, P, Q, R, S, T, U.
        letters: The sets of its printed labels, e.g. ``"xygd"``; a letter that occurs twice is one label.
        sets: ``{letter: index into x}``; pass the same tensor object for letters of one set.
        layer: l; None means the output layer L.
        samples: Sample size in all.
        replicas: Independent samples, at least 2, to estimate the error.
        seed: Seed; the global random state is left alone.
        kinks: What explicit derivatives are at a kink, see ``initial_statistics``.
        any_aspect_ratio: Whether to go on where r >= 1.

    Returns:
        The block, float64, one axis a different letter in the order of ``sets``; and the standard error of its
        entries (rms), 0 where moments are integrated.

    Raises:
        ValueError: If a name or letter is unknown, ``x`` does not fit, or the expansion does not cover the ensemble
            or the inputs.
    """
    x = check_inputs("x", x, ensemble)
    if name not in RECURSIONS:
        raise ValueError(f"name: {name!r} is unknown; choose from {', '.join(RECURSIONS)}")
    slots = 2 if name in ("G1", "Theta1") else 4
    if len(letters) != slots or not set(letters) <= set(sets):
        raise ValueError(f"letters: {letters!r} given; {name} has {slots} labels, out of the sets {', '.join(sets)}")
    check_statistics(ensemble, x, [name], kinks, any_aspect_ratio)
    K, Theta, pairs = infinite_width(ensemble, x, kinks)
    refined, found = evaluators(ensemble, K, Theta, pairs, sets, samples, replicas, seed, kinks)
    full = [len(index) if letter in letters else 1 for letter, index in sets.items()]
    shape = [size for size, letter in zip(full, sets, strict=True) if letter in letters]
    depth = ensemble.depth if layer is None else layer
    combined = ReplicaMean(refined)
    for evaluator in found:
        combined.add(evaluator.array(name, depth, letters).expand(full).reshape(shape))
    return combined.result()


def tiles(
    ensemble: MLPEnsemble,
    x: Tensor,
    name: str,
    tile: int = 8,
    layer: int | None = None,
    samples: int = 4096,
    seed: int = 0,
    kinks: Kinks = "autograd",
) -> Iterator[tuple[slice, slice, Tensor, float]]:
    """A four-label vertex over all inputs, in tiles of its first two printed labels: memory is one tile's.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0).
        name: The vertex.
        tile: Labels a side.
        layer: l; None means the output layer L.
        samples: Sample size a tile.
        seed: Seed, the same for all tiles: they fit together as parts of one tensor.
        kinks: What explicit derivatives are at a kink, see ``initial_statistics``.

    Yields:
        (rows, columns, block (tile, tile, N, N), standard error).
    """
    everything = torch.arange(len(x), device=x.device)
    for row in range(0, len(x), tile):
        for column in range(0, len(x), tile):
            rows, columns = slice(row, min(row + tile, len(x))), slice(column, min(column + tile, len(x)))
            sets = {"x": everything[rows], "y": everything[columns], "g": everything, "d": everything}
            value, error = block(ensemble, x, name, "xygd", sets, layer, samples, seed=seed, kinks=kinks)
            yield rows, columns, value, error


def check_inputs(name: str, x: Tensor, ensemble: MLPEnsemble) -> Tensor:
    """``x`` as float64 (N, n_0).

    Raises:
        ValueError: Naming ``name``, if the shape or the values are not usable.
    """
    n_0 = ensemble.widths[0]
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != n_0 or x.shape[0] == 0:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: {given} given; widths[0] = {n_0} asks for a tensor of shape (N, {n_0}), N >= 1")
    x = x.to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name}: contains NaN or infinite values; inputs must be finite")
    return x
