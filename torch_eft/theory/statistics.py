"""The statistics of an MLP ensemble at initialisation, layer by layer: the joint distribution to order 1/n.

Infinite width (PDLT 4.1 and 8.2; index-free):
    K^(1) = C_b + C_W x.x / n_0                 Theta^(1) = lambda_b + lambda_W x.x / n_0
    K^(l+1) = C_b + C_W M_00                    Theta^(l+1) = lambda_b + lambda_W M_00 + C_W M_11 * Theta^(l)
with M_pq = <sigma^(p)_a sigma^(q)_b> under N(0, K^(l)). Order 1/n: the vertices of ``kernel``, ``ntk`` and
``differentials``, each of which multiplies 1/n_{l-1} at layer l.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_eft.theory import differentials, kernel, ntk
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.four_label import (
    MOST_QUADRATURE_LABELS,
    Points,
    quadrature_points,
    quadrature_step,
    sample_points,
)
from torch_eft.theory.pair_moments import PairMoments
from torch_eft.theory.vertices import Kinks, Recursion, Vertices

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
QUANTITIES = ("K", "G1", "V", "Theta", "Theta1", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U")
"""All fifteen statistics, in the book's order."""


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of layer l on N points; what was not asked for is None.

    Args:
        layer: l = 1 .. L.
        K: (N, N), ``E[z_{i;a} z_{j;b}] = delta_ij (K + G1 / n_{l-1})``.
        Theta: (N, N), ``E[H_{ij;ab}] = delta_ij (Theta + Theta1 / n_{l-1})``.
        G1: (N, N).
        V: (N, N, N, N), axes as printed: V_(12)(34).
        Theta1: (N, N).
        A: A_(12)(34).
        B: B_1324: axes 1, 3, 2, 4.
        D: D_1234.
        F: F_1324: axes 1, 3, 2, 4.
        P: P_0123.
        Q: Q_0123.
        R: R_0123.
        S: S_1234.
        T: T_1324: axes 1, 3, 2, 4.
        U: U_1423: axes 1, 4, 2, 3.
        error: ``{name: standard error}`` of the tensor's entries (rms) where moments were sampled; empty where they
            were integrated.
    """

    layer: int
    K: Tensor
    Theta: Tensor
    G1: Tensor | None = None
    V: Tensor | None = None
    Theta1: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    D: Tensor | None = None
    F: Tensor | None = None
    P: Tensor | None = None
    Q: Tensor | None = None
    R: Tensor | None = None
    S: Tensor | None = None
    T: Tensor | None = None
    U: Tensor | None = None
    error: dict[str, float] = field(default_factory=dict)


def initial_statistics(
    ensemble: MLPEnsemble,
    x: Tensor,
    quantities: Collection[str] = ("K", "Theta"),
    kinks: Kinks = "autograd",
    samples: int = 16384,
    replicas: int = 4,
    seed: int = 0,
    memory: int = 8 * 2**30,
) -> list[LayerStatistics]:
    """The statistics at every layer, l = 1 .. L.

    With at most four inputs and a smooth activation, three- and four-label moments are integrated; else they
    are sampled, ``replicas`` times independently, and ``error`` tells how well.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0), any real dtype.
        quantities: Names out of ``QUANTITIES``; K and Theta are always there.
        kinks: ``"autograd"``: sigma'' = 0 at kinks, as automatic differentiation of the network sees it.
        samples: Sample size S in all, shared by the replicas.
        replicas: Independent samples to estimate the error from, at least 2.
        seed: Seed of the samples; the global random state is left alone.
        memory: Bytes allowed for tensors with four labels.

    Returns:
        One ``LayerStatistics`` a layer, float64, on the device of ``x``.

    Raises:
        ValueError: If ``x`` does not fit ``ensemble.widths[0]``, is empty or not finite, if a name is unknown, or if
            the tensors do not fit into ``memory``.
        QuadratureError: If the activation is not smooth enough for quadrature.
    """
    x = check_inputs("x", x, ensemble)
    unknown = sorted(set(quantities) - set(QUANTITIES))
    if unknown:
        raise ValueError(f"quantities: {unknown[0]!r} is unknown; choose from {', '.join(QUANTITIES)}")
    K, Theta, pairs = infinite_width(ensemble, x)
    wanted = [name for name in QUANTITIES if name in set(quantities) - {"K", "Theta"}]
    found: dict[tuple[str, int], Tensor] = {}
    errors: dict[tuple[str, int], float] = {}
    if wanted:
        _check_memory(len(x), len(wanted), ensemble.depth, memory)
        integrated = len(x) <= MOST_QUADRATURE_LABELS and not ensemble.activation.kinked
        tables = []
        for evaluator in _evaluators(ensemble, x, K, Theta, pairs, kinks, samples, replicas, seed, integrated):
            tables.append(
                {
                    (name, layer): _full(evaluator, name, layer, len(x))
                    for layer in range(1, ensemble.depth + 1)
                    for name in wanted
                }
            )
        for key in tables[0]:
            stack = torch.stack([table[key] for table in tables])
            found[key] = stack.mean(0)
            if len(tables) > 1:
                errors[key] = float(stack.var(0).mean().sqrt()) / math.sqrt(len(tables))
    return [
        LayerStatistics(
            layer,
            K[layer - 1],
            Theta[layer - 1],
            **{name: found[name, layer] for name in wanted},
            error={name: errors[name, layer] for name in wanted if (name, layer) in errors},
        )
        for layer in range(1, ensemble.depth + 1)
    ]


def infinite_width(ensemble: MLPEnsemble, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[PairMoments]]:
    """K and Theta at layers 1 .. L, and the two-label moments at layers 1 .. L-1, for checked inputs."""
    gram = x @ x.T / ensemble.widths[0]
    gram = (gram + gram.T) / 2
    K = [ensemble.C_b[0] + ensemble.C_W[0] * gram]
    Theta = [ensemble.lambda_b[0] + ensemble.lambda_W[0] * gram]
    pairs = []
    for index in range(1, ensemble.depth):
        moments = PairMoments(ensemble.activation, K[-1])
        M_00, M_11 = moments(0, 0), moments(1, 1)
        K.append(ensemble.C_b[index] + ensemble.C_W[index] * M_00)
        Theta.append(
            ensemble.lambda_b[index] + ensemble.lambda_W[index] * M_00 + ensemble.C_W[index] * M_11 * Theta[-1]
        )
        pairs.append(moments)
    return K, Theta, pairs


def _evaluators(
    ensemble: MLPEnsemble,
    x: Tensor,
    K: list[Tensor],
    Theta: list[Tensor],
    pairs: list[PairMoments],
    kinks: Kinks,
    samples: int,
    replicas: int,
    seed: int,
    integrated: bool,
) -> Iterator[Vertices]:
    labels = torch.arange(len(x), device=x.device)
    sets = dict.fromkeys("abcd", labels)

    def points_of(replica: int) -> Callable[[int], Points]:
        def points(m: int) -> Points:
            if integrated:
                return quadrature_points(ensemble.activation, K[m - 1], quadrature_step(ensemble.activation, K[m - 1]))
            return sample_points(K[m - 1], samples // replicas, seed + 1000 * replica + m)

        return points

    for replica in range(1 if integrated else replicas):
        yield Vertices(ensemble, K, Theta, pairs, points_of(replica), sets, RECURSIONS, kinks)


def _full(evaluator: Vertices, name: str, layer: int, count: int) -> Tensor:
    letters = "ab" if name in ("G1", "Theta1") else "abcd"
    array = evaluator.array(name, layer, letters)
    array = array.reshape(array.shape[: len(letters)])
    return array.expand([count] * len(letters)).clone()


def _check_memory(count: int, tensors: int, depth: int, memory: int) -> None:
    needed = 8 * count**4 * depth * (tensors + 8)
    if needed > memory:
        raise ValueError(
            f"x: {count} inputs need about {needed / 2**30:.1f} GiB for tensors with four labels, memory allows "
            f"{memory / 2**30:.1f} GiB; ask for fewer quantities or inputs"
        )


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
