"""Statistics on blocks of labels: kernels at infinite width, and any vertex on chosen sets of inputs, tile by tile.

Infinite width (PDLT 4.1 and 8.2; index-free):
    K^(1) = C_b + C_W x.x / n_0                 Theta^(1) = lambda_b + lambda_W x.x / n_0
    K^(l+1) = C_b + C_W M_00                    Theta^(l+1) = lambda_b + lambda_W M_00 + C_W M_11 * Theta^(l)
with M_pq = <sigma^(p)_a sigma^(q)_b> under N(0, K^(l)).
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from torch_eft.theory import differentials, kernel, ntk
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.four_label import (
    MOST_QUADRATURE_LABELS,
    Points,
    quadrature_points,
    quadrature_spacings,
    sample_points,
)
from torch_eft.theory.pair_moments import PairMoments
from torch_eft.theory.vertices import Recursion, Vertices

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


def evaluators(
    ensemble: MLPEnsemble,
    K: list[Tensor],
    Theta: list[Tensor],
    pairs: list[PairMoments],
    sets: Mapping[str, Tensor],
    samples: int,
    replicas: int,
    seed: int,
) -> Iterator[Vertices]:
    """One integrated evaluator for at most four inputs and a smooth activation, else ``replicas`` sampled ones.

    Four inputs of large variance (K above about 2 for tanh) would need too many nodes, and are sampled, too.

    Raises:
        ValueError: If there are fewer than two replicas, or too few samples for the number of inputs.
    """
    if len(K[0]) <= MOST_QUADRATURE_LABELS and not ensemble.activation.kinked:
        rules = [quadrature_spacings(ensemble.activation, K[m]) for m in range(ensemble.depth - 1)]
        known = [rule for rule in rules if rule is not None]
        if len(known) == len(rules):
            yield Vertices(
                ensemble, K, Theta, pairs, lambda m: quadrature_points(K[m - 1], known[m - 1]), sets, RECURSIONS
            )
            return
    if replicas < 2:
        raise ValueError(f"replicas: {replicas} given; at least 2 are needed to estimate the error")
    for replica in range(replicas):
        yield Vertices(ensemble, K, Theta, pairs, _sampler(K, samples // replicas, seed, replica), sets, RECURSIONS)


def _sampler(K: list[Tensor], samples: int, seed: int, replica: int) -> Callable[[int], Points]:
    def sampled(m: int) -> Points:
        return sample_points(K[m - 1], samples, seed + 1000 * replica + m)

    return sampled


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

    Returns:
        The block, float64, one axis a different letter in the order of ``sets``; and the standard error of its
        entries (rms), 0 where moments are integrated.

    Raises:
        ValueError: If a name or letter is unknown, or ``x`` does not fit.
    """
    x = check_inputs("x", x, ensemble)
    if name not in RECURSIONS:
        raise ValueError(f"name: {name!r} is unknown; choose from {', '.join(RECURSIONS)}")
    slots = 2 if name in ("G1", "Theta1") else 4
    if len(letters) != slots or not set(letters) <= set(sets):
        raise ValueError(f"letters: {letters!r} given; {name} has {slots} labels, out of the sets {', '.join(sets)}")
    K, Theta, pairs = infinite_width(ensemble, x)
    found = []
    for evaluator in evaluators(ensemble, K, Theta, pairs, sets, samples, replicas, seed):
        array = evaluator.array(name, ensemble.depth if layer is None else layer, letters)
        full = [len(index) if letter in letters else 1 for letter, index in sets.items()]
        array = array.expand(full)
        found.append(array.reshape([size for size, letter in zip(full, sets, strict=True) if letter in letters]))
    values = torch.stack(found)
    error = float(values.var(0).mean().sqrt()) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    return values.mean(0), error


def tiles(
    ensemble: MLPEnsemble,
    x: Tensor,
    name: str,
    tile: int = 8,
    layer: int | None = None,
    samples: int = 4096,
    seed: int = 0,
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

    Yields:
        (rows, columns, block (tile, tile, N, N), standard error).
    """
    everything = torch.arange(len(x), device=x.device)
    for row in range(0, len(x), tile):
        for column in range(0, len(x), tile):
            rows, columns = slice(row, min(row + tile, len(x))), slice(column, min(column + tile, len(x)))
            sets = {"x": everything[rows], "y": everything[columns], "g": everything, "d": everything}
            value, error = block(ensemble, x, name, "xygd", sets, layer, samples, seed=seed)
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
