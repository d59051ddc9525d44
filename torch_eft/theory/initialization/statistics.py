"""The statistics of an MLP ensemble at initialization, layer by layer: the joint distribution to order 1/n.

K and Theta at infinite width (``blocks``) and the vertices of order 1/n (``kernel``, ``ntk``, ``differentials``),
each of which multiplies 1/n_{l-1} at layer l.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.two_point_moments import Kinks
from torch_eft.theory.initialization.estimators import (
    ReplicaMean,
    check_inputs,
    check_statistics,
    evaluators,
    infinite_width,
)
from torch_eft.theory.initialization.evaluator import Vertices
from torch_eft.theory.signal_propagation.regimes import first_order_validity, infinite_width_validity

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
            are exact, or integrated by one rule.
        validity: Where the network's expansion holds: to order 1/n where such statistics were asked for, else order 0.
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
    validity: Validity | None = None


def initial_statistics(
    ensemble: MLPEnsemble,
    x: Tensor,
    quantities: Collection[str] = QUANTITIES,
    samples: int = 16384,
    replicas: int = 4,
    seed: int = 0,
    memory: int = 8 * 2**30,
    kinks: Kinks = "autograd",
    any_aspect_ratio: bool = False,
) -> list[LayerStatistics]:
    """The statistics at every layer, l = 1 .. L.

    Moments with three and four labels are exact for two slopes (linear, ReLU, leaky ReLU, |z|), integrated to about
    1e-9 for at most four inputs, and sampled else, ``replicas`` times independently; ``error`` tells how well.

    At a kink (ReLU, SELU) P .. U depend on what an explicit second derivative is. ``kinks="autograd"``: zero, as
    automatic differentiation of the network sees it almost everywhere; such P .. U are what a measurement by autograd
    gives, not the rates of change of the network's NTK. ``"distributional"``: the delta function, the limit of
    smooth activations; R, S, T, U then diverge where sigma' jumps and are NaN, with a warning.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0), any real dtype.
        quantities: Names out of ``QUANTITIES``; K and Theta are always there, and cost least: all that is needed for
            large N.
        samples: Sample size S in all, shared by the replicas.
        replicas: Independent samples to estimate the error from, at least 2.
        seed: Seed of the samples; the global random state is left alone.
        memory: Bytes allowed for tensors with four labels, see ``statistics_memory``.
        kinks: ``"autograd"`` or ``"distributional"``; they differ only where the activation has a kink.
        any_aspect_ratio: Whether to give the coefficients of the 1/n expansion also where r >= 1.

    Returns:
        One ``LayerStatistics`` a layer, float64, on the device of ``x``.

    Raises:
        ValueError: If ``x`` does not fit ``ensemble.widths[0]``, is empty or not finite, if a name is unknown, if
            the tensors do not fit into ``memory``; and, where more than K and Theta is asked for, if r >= 1, if an
            input vanishes with C_b = 0, or if two inputs coincide for a kinked activation.
        QuadratureError: If the activation is not smooth enough for quadrature.
    """
    x = check_inputs("x", x, ensemble)
    unknown = sorted(set(quantities) - set(QUANTITIES))
    if unknown:
        raise ValueError(f"quantities: {unknown[0]!r} is unknown; choose from {', '.join(QUANTITIES)}")
    wanted = [name for name in QUANTITIES if name in set(quantities) - {"K", "Theta"}]
    if wanted:
        check_statistics(ensemble, x, wanted, kinks, any_aspect_ratio)
        needed = statistics_memory(ensemble, len(x), wanted)
        if needed > memory:
            raise ValueError(
                f"x: {len(x)} inputs need about {needed / 2**30:.1f} GiB for tensors with four labels, memory allows "
                f"{memory / 2**30:.1f} GiB; give fewer inputs, ask for fewer quantities (K and Theta are cheap), or go "
                "block by block with theory.block or theory.tiles"
            )
    K, Theta, pairs = infinite_width(ensemble, x, kinks)
    found: dict[tuple[str, int], ReplicaMean] = {}
    if wanted:
        labels = torch.arange(len(x), device=x.device)
        refined, runs = evaluators(
            ensemble, K, Theta, pairs, dict.fromkeys("abcd", labels), samples, replicas, seed, kinks
        )
        for evaluator in runs:
            for layer in range(1, ensemble.depth + 1):
                for name in wanted:
                    value = _full(evaluator, name, layer, len(x))
                    found.setdefault((name, layer), ReplicaMean(refined)).add(value)
    results = {key: combined.result() for key, combined in found.items()}
    validity = first_order_validity(ensemble, x) if wanted else infinite_width_validity(ensemble, x)
    return [
        LayerStatistics(
            layer,
            K[layer - 1],
            Theta[layer - 1],
            **{name: results[name, layer][0] for name in wanted},
            validity=validity,
            error={name: results[name, layer][1] for name in wanted if results[name, layer][1] > 0},
        )
        for layer in range(1, ensemble.depth + 1)
    ]


def _full(evaluator: Vertices, name: str, layer: int, count: int) -> Tensor:
    letters = "ab" if name in ("G1", "Theta1") else "abcd"
    array = evaluator.array(name, layer, letters)
    array = array.reshape(array.shape[: len(letters)])
    return array.expand([count] * len(letters)).clone()


def statistics_memory(ensemble: MLPEnsemble, inputs: int, quantities: Collection[str] = QUANTITIES) -> int:
    """Bytes that ``initial_statistics`` takes at its peak, estimated, for that many inputs.

    Every tensor with four labels is held twice a layer (value and spread), beside about eight moments.

    Args:
        ensemble: The ensemble.
        inputs: N.
        quantities: What is asked for.
    """
    tensors = sum(name not in ("K", "Theta", "G1", "Theta1") for name in quantities)
    return 8 * inputs**4 * ensemble.depth * (2 * tensors + 8)
