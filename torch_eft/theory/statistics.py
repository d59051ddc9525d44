"""The statistics of an MLP ensemble at initialisation, layer by layer: the joint distribution to order 1/n.

K and Theta at infinite width (``blocks``) and the vertices of order 1/n (``kernel``, ``ntk``, ``differentials``),
each of which multiplies 1/n_{l-1} at layer l.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_eft.theory.blocks import check_inputs, evaluators, infinite_width
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.vertices import Vertices

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
    samples: int = 16384,
    replicas: int = 4,
    seed: int = 0,
    memory: int = 8 * 2**30,
) -> list[LayerStatistics]:
    """The statistics at every layer, l = 1 .. L.

    With at most four inputs and a smooth activation, three- and four-label moments are integrated; else they
    are sampled, ``replicas`` times independently, and ``error`` tells how well. For a kinked activation (ReLU) P .. U
    are those that automatic differentiation of the network sees, with sigma'' = 0 almost everywhere; they are not the
    rates of change of its NTK.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0), any real dtype.
        quantities: Names out of ``QUANTITIES``; K and Theta are always there.
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
        labels = torch.arange(len(x), device=x.device)
        layers = range(1, ensemble.depth + 1)
        tables = [
            {(name, layer): _full(evaluator, name, layer, len(x)) for layer in layers for name in wanted}
            for evaluator in evaluators(
                ensemble, K, Theta, pairs, dict.fromkeys("abcd", labels), samples, replicas, seed
            )
        ]
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
