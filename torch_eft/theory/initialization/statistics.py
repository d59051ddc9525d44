"""The statistics of an MLP ensemble at initialization, layer by layer: the joint distribution to order 1/n.

K and Theta at infinite width (``infinite_width``), the vertices of order 1/n, each of which multiplies 1/n_{l-1} at
layer l, and the covariance of the dNTK, which multiplies its square (``recursions``).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice
from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.two_point_moments import Kinks
from torch_eft.theory.initialization.estimators import check_statistics, vertex_replicas
from torch_eft.theory.initialization.evaluator import (
    FLUCTUATIONS,
    SINGLE_NEURON,
    Vertices,
    full_tensor,
    printed_labels,
)
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width
from torch_eft.theory.initialization.neuron.remarks import counted_laws
from torch_eft.theory.signal_propagation.regimes import first_order_validity, infinite_width_validity

STATISTICS = ("K", "G1", "V", "Theta", "Theta1", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U")
"""The names of all fifteen statistics, in the book's order."""

_ALL = (*STATISTICS, *FLUCTUATIONS, *SINGLE_NEURON)


@dataclass(frozen=True, repr=False)
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
        X3a: (N,) * 6, as all that follow: E[dH_{i0 i1 i2;012} dH_{i3 i4 i5;345}] of the pairing (03)(14)(25).
        X3b: (04)(13)(25).
        XQQ: (01)(34)(25).
        XPQ: (12)(34)(05).
        XPP: (12)(45)(03).
        XUU: E[z_{a;x} H_{ac;02} z_{b;y} H_{bc;35}] connected: axes x, 0, 2, y, 3, 5.
        XUQ: E[z_{a;x} H_{ac;35} dH_{bbc;012}] connected: axes x, 3, 5, 0, 1, 2.
        XUP: E[z_{a;x} H_{ac;35} dH_{cbb;012}] connected, likewise.
        E_zzzz: (N,) * 4, as all that follow: what weights that are not Gaussian add to E[z z z z], connected, beside
            the three pairings, where all four neurons are one. A bias that is not Gaussian adds <b^4> - 3 C_b^2 there,
            at any width.
        E_zzH: Likewise to E[z_1 z_2 DH_34].
        E_HH: To E[DH_12 DH_34].
        E_dHz: To E[dH_012 z_3].
        E_ddI: To E[ddI_0123].
        E_ddII: To E[ddII_1234].
        error: ``{name: standard error}`` of the tensor's entries (rms) where moments were sampled; empty where they
            are exact, or integrated by one rule.
        validity: Where the network's expansion holds: to order 1/n where such statistics were asked for, else order 0.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> theory.LayerStatistics(layer=1, K=torch.eye(2), Theta=torch.eye(2))
        LayerStatistics(
          layer: 1
          K: (2, 2) float32
          Theta: (2, 2) float32
          error: {}
        )
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
    X3a: Tensor | None = None
    X3b: Tensor | None = None
    XQQ: Tensor | None = None
    XPQ: Tensor | None = None
    XPP: Tensor | None = None
    XUU: Tensor | None = None
    XUQ: Tensor | None = None
    XUP: Tensor | None = None
    E_zzzz: Tensor | None = None
    E_zzH: Tensor | None = None
    E_HH: Tensor | None = None
    E_dHz: Tensor | None = None
    E_ddI: Tensor | None = None
    E_ddII: Tensor | None = None
    error: dict[str, float] = field(default_factory=dict)
    validity: Validity | None = None

    def __repr__(self) -> str:
        return short_repr(self)


def initial_statistics(
    ensemble: MLPEnsemble,
    x: Tensor,
    *,
    statistics: Collection[str] = STATISTICS,
    num_samples: int = 16384,
    num_replicas: int = 4,
    seed: int = 0,
    memory: int = 8 * 2**30,
    kinks: Kinks = "autograd",
    check_validity: bool = True,
) -> list[LayerStatistics]:
    """The statistics at every layer, l = 1 .. L.

    The covariance of the dNTK with itself, X3a .. XUP, has six labels and is given on request, and so is what weights
    that are not Gaussian add to cumulants of single neurons, E_zzzz .. E_ddII. The laws of weights and biases are
    counted in all of them but the covariance of the dNTK; ``validity`` names what is left out.

    Moments with three and more labels are exact for scale-invariant activations (linear, ReLU, leaky ReLU, |z|),
    integrated to about 1e-9 for at most four inputs, and otherwise sampled ``num_replicas`` times independently, with
    the standard error in ``error``.

    At a kink (ReLU, SELU) P .. U depend on the meaning of an explicit second derivative. ``kinks="autograd"``: zero, as
    automatic differentiation of the network sees it almost everywhere; such P .. U are what a measurement by autograd
    gives, not the rates of change of the network's NTK. ``"distributional"``: the delta function, the limit of
    smooth activations; R, S, T, U then diverge where sigma' jumps and are NaN, with a warning.

    Raises ``QuadratureError`` if the activation is not smooth enough for quadrature.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0), any real dtype.
        statistics: Names out of ``STATISTICS`` and of X3a, X3b, XQQ, XPQ, XPP, XUU, XUQ, XUP, E_zzzz, E_zzH, E_HH,
            E_dHz, E_ddI, E_ddII. K and Theta are always included; they alone are cheap for large N.
        num_samples: Sample size in all, shared by the replicas.
        num_replicas: Independent samples to estimate the error from, at least 2.
        seed: Seed of the samples; the global random state is left alone.
        memory: Bytes allowed for tensors with four and six labels, see ``statistics_memory``.
        kinks: ``"autograd"`` or ``"distributional"``; they differ only where the activation has a kink.
        check_validity: Whether to refuse r >= 1; False gives the coefficients of the 1/n expansion there, too.

    Returns:
        One ``LayerStatistics`` per layer, float64, on the device of ``x``.

    Raises:
        ValueError: If ``x`` does not fit ``ensemble.widths[0]``, is empty or not finite, if a name is unknown, if
            the tensors do not fit into ``memory``; and, where more than K and Theta is asked for, if r >= 1, if an
            input vanishes with C_b = 0, if two inputs coincide for a kinked activation, or if hidden biases of ReLU
            and its like are far from Gaussian; and if XQQ, XUU or XUQ (of
            ELU or SELU: any with six labels) is asked for at a kink.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([3, 100, 100, 1], "linear")
        >>> last = theory.initial_statistics(ensemble, torch.eye(3), statistics=["V"])[-1]
        >>> last.layer, last.V.shape, last.validity.flag
        (3, torch.Size([3, 3, 3, 3]), 'valid')
    """
    x = check_inputs("x", x, ensemble)
    names = {statistics} if isinstance(statistics, str) else set(statistics)
    for name in sorted(names):
        check_choice("statistics", name, _ALL)
    wanted = [name for name in _ALL if name in names - {"K", "Theta"}]
    if wanted:
        check_statistics(ensemble, x, wanted, kinks, check_validity)
        needed = statistics_memory(ensemble, len(x), statistics=wanted)
        if needed > memory:
            raise ValueError(
                f"x: {len(x)} inputs need about {needed / 2**30:.1f} GiB for tensors with four and more labels, memory "
                f"allows {memory / 2**30:.1f} GiB; give fewer inputs, ask for fewer statistics (K and Theta are cheap) "
                "or go block by block with theory.vertex_block or theory.vertex_tiles"
            )
    K, Theta, pairs = infinite_width(ensemble, x, kinks)
    layers = range(1, ensemble.depth + 1)
    results: dict[tuple[str, int], tuple[Tensor, float]] = {}
    if wanted:

        def read(vertices: Vertices) -> Iterator[tuple[tuple[str, int], Tensor]]:
            for layer in layers:
                for name in wanted:
                    yield (name, layer), full_tensor(vertices, name, layer, len(x)).clone()

        letters = max((printed_labels(name) for name in (*wanted, "V")), key=len)
        sets = dict.fromkeys(letters, torch.arange(len(x), device=x.device))
        results = vertex_replicas(ensemble, K, Theta, pairs, sets, num_samples, num_replicas, seed, kinks).combined(
            read
        )
    validity = first_order_validity(ensemble, x) if wanted else infinite_width_validity(ensemble, x)
    validity = replace(validity, reasons=(*validity.reasons, *counted_laws(ensemble, bool(wanted))))
    return [
        LayerStatistics(
            layer,
            K[layer - 1],
            Theta[layer - 1],
            **{name: results[name, layer][0] for name in wanted},
            validity=validity,
            error={name: results[name, layer][1] for name in wanted if results[name, layer][1] > 0},
        )
        for layer in layers
    ]


def statistics_memory(ensemble: MLPEnsemble, num_inputs: int, *, statistics: Collection[str] = STATISTICS) -> int:
    """Estimate the bytes that ``initial_statistics`` takes at its peak.

    Every tensor with four labels is held twice per layer (value and spread), beside about eight moments; those with six
    likewise, beside some forty.

    Args:
        ensemble: The ensemble.
        num_inputs: N.
        statistics: The names asked for.

    Returns:
        Bytes.

    Example:
        >>> from torch_eft import theory
        >>> theory.statistics_memory(theory.MLPEnsemble([3, 50, 1], "tanh"), 10, statistics=["V"])
        1600000
    """
    slots = [len(printed_labels(name)) for name in statistics if name not in ("K", "Theta")]
    four, six = (2 * slots.count(count) for count in (4, 6))
    return 8 * ensemble.depth * (num_inputs**4 * (four + 8) + (num_inputs**6 * (six + 40) if six else 0))
