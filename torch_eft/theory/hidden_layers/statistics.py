"""Statistics that move hidden representations in training: Xi, Y, C and Mv at order 1/n.

What is observed of hidden layer l on inputs a, b is a mean over its neurons j,
    activations     g_ab = (1/n_l) sum_j s(z_ja) s(z_jb)           preactivations  g_ab = (1/n_l) sum_j z_ja z_jb
    NTK             g_ab = (1/n_l) sum_j H^(l)_jj;ab.
With J_kc the gradient of output k at input c, u_{kc,k'd} = d2 z_kc . J_k'd, and D the divisor of the observable,
    E[(dg_ab . J_kc) z_k'd]     = delta_kk' Xi_{ab;c;d} / D        E[dg_ab . u_{kc,k'd}] = delta_kk' Y_{ab;cd} / D
    E[d2 g_ab [J_kc, J_k'd]]    = delta_kk' C_{ab;cd} / D
    E[(1/n_l) sum_j (df_ja . J_kc)(df_jb . J_k'd)] = delta_kk' Mv_{ab;cd} / D,  f = s(z) or z: how far neurons move.
D = n_l for the first two, n_{l-1} for the NTK; no width above l enters. They start at layer l + 1 (the NTK's at l, from
P .. U) and are carried from layer to layer, as the vertices are, by W averaged over the layer above: parameters above l
do not enter g, so that X_kc = dg . J_kc obeys X'_kc = sum_i W_ki s'_ic X_ic. Nothing inverts K. PDLT follows the NTK
of the output only (11.2, chapter infinity), which contains lambda_W g of the last hidden layer: its Xi, C and Y are the
lambda_W parts of Q, R + S and T.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.points import MOST_QUADRATURE_LABELS
from torch_eft.theory.gaussian.two_point_moments import Kinks
from torch_eft.theory.initialization.estimators import check_statistics, vertex_replicas
from torch_eft.theory.initialization.evaluator import Vertices
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width
from torch_eft.theory.initialization.responses import f_response, vertex_response

Observable = Literal["activations", "preactivations", "ntk"]
"""What is observed of a hidden layer: the kernel of its activations or preactivations, or its NTK."""

_OBSERVABLES = ("activations", "preactivations", "ntk")


@dataclass(frozen=True)
class RepresentationStatistics:
    """The four statistics of one hidden layer, for N_p inputs a, b whose change is asked for and N inputs c, d.

    Args:
        layer: l = 1 .. L-1.
        observable: What is observed of it.
        divisor: The width that divides them: n_l, and n_{l-1} for ``"ntk"``.
        Xi: (N_p, N_p, N, N), Xi_{ab;c;d}.
        Y: (N_p, N_p, N, N), not symmetric in c, d.
        C: (N_p, N_p, N, N).
        Mv: (N_p, N_p, N, N); None for ``"ntk"``.
        error: ``{name: standard error}`` of the entries (rms) where moments were sampled.
    """

    layer: int
    observable: Observable
    divisor: int
    Xi: Tensor
    Y: Tensor
    C: Tensor
    Mv: Tensor | None
    error: dict[str, float] = field(default_factory=dict)


def representation_statistics(
    ensemble: MLPEnsemble,
    x_probe: Tensor,
    x_train: Tensor,
    observable: Observable = "activations",
    top: int | None = None,
    samples: int = 16384,
    replicas: int = 4,
    seed: int = 0,
    kinks: Kinks = "distributional",
    any_aspect_ratio: bool = False,
) -> list[RepresentationStatistics]:
    """Xi, Y, C and Mv of every hidden layer.

    Args:
        ensemble: The ensemble.
        x_probe: Inputs a, b, (N_p, n_0).
        x_train: Inputs c, d, (N, n_0).
        observable: ``"activations"``, ``"preactivations"`` or ``"ntk"``.
        top: The layer m whose outputs are J, z and u; None means L. The hidden layers are then 1 .. m-1.
        samples: Sample size in all, for more than four different inputs.
        replicas: Independent samples, to estimate the error from.
        seed: Seed of the samples.
        kinks: What explicit derivatives are at a kink, see ``initial_statistics``. ``"distributional"`` is what
            training moves by; R, S, T, hence the NTK's Y and C, are then NaN for ReLU.
        any_aspect_ratio: Whether to go on where r >= 1.

    Returns:
        One ``RepresentationStatistics`` a hidden layer, float64.

    Raises:
        ValueError: If inputs or names do not fit, or the expansion does not cover the ensemble.
    """
    if observable not in _OBSERVABLES:
        raise ValueError(f"observable: {observable!r} given; choose from {', '.join(_OBSERVABLES)}")
    m = ensemble.depth if top is None else top
    if not 1 <= m <= ensemble.depth:
        raise ValueError(f"top: {top} given; the layers are 1 .. {ensemble.depth}")
    labels = Labels.of(ensemble, x_probe, x_train)
    names = ("Q", "R", "S", "T") if observable == "ntk" else ("P", "Q")
    check_statistics(ensemble, labels.x, names, kinks, not any_aspect_ratio)
    K, Theta, pairs = infinite_width(ensemble, labels.x, kinks)
    sets = labels.sets(labels.probe, labels.probe)
    evaluators = vertex_replicas(ensemble, K, Theta, pairs, sets, samples, replicas, seed, kinks)
    wanted = ("Xi", "Y", "C") if observable == "ntk" else ("Xi", "Y", "C", "Mv")

    def read(vertices: Vertices) -> Iterator[tuple[tuple[int, str], Tensor]]:
        statistics = HiddenStatistics(vertices, observable)
        for layer in range(1, m):
            for name in wanted:
                yield (layer, name), statistics.array(name, layer, m, "abcd").expand(labels.shape).clone()

    results = evaluators.combined(read)
    rows, columns = labels.probe_copies, labels.train_copies

    def full(layer: int, name: str) -> Tensor:
        return results[layer, name][0][rows][:, rows][:, :, columns][..., columns]

    return [
        RepresentationStatistics(
            layer,
            observable,
            divisor(ensemble, layer, observable),
            full(layer, "Xi"),
            full(layer, "Y"),
            full(layer, "C"),
            full(layer, "Mv") if "Mv" in wanted else None,
            {name: results[layer, name][1] for name in wanted if results[layer, name][1] > 0},
        )
        for layer in range(1, m)
    ]


def divisor(ensemble: MLPEnsemble, layer: int, observable: Observable) -> int:
    """The width that divides the statistics of hidden layer l: n_l, and n_{l-1} for its NTK."""
    return ensemble.widths[layer - 1 if observable == "ntk" else layer]


@dataclass(frozen=True)
class Labels:
    """Probe and training inputs as labels of one list without repetitions.

    Args:
        x: The different inputs, (M, n_0).
        probe: Index into ``x`` that holds the different probe inputs; all of ``x`` where it is short.
        train: Likewise; the same object where the sets are equal.
        probe_copies: (N_p,), which of ``probe`` each probe input is.
        train_copies: (N,), which of ``train`` each training input is.
    """

    x: Tensor
    probe: Tensor
    train: Tensor
    probe_copies: Tensor
    train_copies: Tensor

    @classmethod
    def of(cls, ensemble: MLPEnsemble, x_probe: Tensor, x_train: Tensor) -> "Labels":
        """The labels of checked inputs."""
        x_probe = check_inputs("x_probe", x_probe, ensemble)
        x_train = check_inputs("x_train", x_train, ensemble).to(x_probe.device)
        x, where = torch.unique(torch.cat([x_probe, x_train]), dim=0, return_inverse=True)
        if len(x) <= MOST_QUADRATURE_LABELS:  # one set: far fewer different moments to integrate
            everything = torch.arange(len(x), device=x.device)
            return cls(x, everything, everything, where[: len(x_probe)], where[len(x_probe) :])
        probe, probe_copies = torch.unique(where[: len(x_probe)], return_inverse=True)
        train, train_copies = torch.unique(where[len(x_probe) :], return_inverse=True)
        if torch.equal(probe, train):
            train = probe
        return cls(x, probe, train, probe_copies, train_copies)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of an array over a, b, c, d."""
        return len(self.probe), len(self.probe), len(self.train), len(self.train)

    def sets(self, a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
        """The letters: a and b over the given probe inputs, c and d over the training inputs."""
        return {"a": a, "b": b, "c": self.train, "d": self.train}


class HiddenStatistics:
    """Xi, Y, C and Mv as broadcast arrays, on a lazy evaluator of the vertices; computed once when asked for.

    Args:
        vertices: The evaluator, with the letters a, b, c, d.
        observable: What is observed.
    """

    def __init__(self, vertices: Vertices, observable: Observable) -> None:
        self._v, self._observable = vertices, observable
        self._memo: dict[tuple[str, int, int, str], Tensor] = {}
        self._recursions: dict[str, Callable[[int, int, str], Tensor]] = {
            "Xi": self._Xi,
            "Y": self._Y,
            "C": self._C,
            "Mv": self._Mv,
        }

    def array(self, name: str, layer: int, m: int, letters: str) -> Tensor:
        """The statistic of hidden layer l with the outputs of layer m, for letters a, b, c, d; one axis a letter."""
        key = (name, layer, m, letters)
        if key not in self._memo:
            self._memo[key] = self._recursions[name](layer, m, letters)
        return self._memo[key]

    # ---- the four recursions, from layer m - 1 to m

    def _Xi(self, layer: int, m: int, letters: str) -> Tensor:
        if self._starts(layer, m):
            return self._symmetric(lambda word: self._v.array("Q", m, word), letters)
        return self._v.C_W(m - 1) * self._x(1, layer, m - 1, letters)

    def _Y(self, layer: int, m: int, letters: str) -> Tensor:
        v = self._v
        if self._starts(layer, m):
            return self._symmetric(lambda word: v.array("T", m, word), letters)
        below, C_W = m - 1, v.C_W(m - 1)
        c, d = letters[2:]
        total = v.lambda_W(below) * self._x(1, layer, below, letters)
        if v.curved:
            total = total + C_W * v.Theta(below, c, d) * self._x(2, layer, below, letters)
        if self._base(layer, below):

            def inner(word: str) -> Tensor:
                a, b, c, d = word
                to_a, to_b = v.array("Q", below, c + d + a + a), v.array("Q", below, c + d + a + b)
                return v.width_ratio(below) * self._answer(below, a, b, to_a, to_b)

            return total + C_W * v.M(below, 1, 1, c, d) * self._symmetric(inner, letters)
        return total + C_W * v.M(below, 1, 1, c, d) * self.array("Y", layer, below, letters)

    def _C(self, layer: int, m: int, letters: str) -> Tensor:
        v, below = self._v, m - 1
        if self._starts(layer, m):

            def start(word: str) -> Tensor:
                return v.array("R", m, word) + v.array("S", m, word)

            return self._symmetric(start, letters)
        c, d = letters[2:]
        if not self._base(layer, below):
            return v.C_W(below) * v.M(below, 1, 1, c, d) * self.array("C", layer, below, letters)

        def base(word: str) -> Tensor:
            a, b, c, d = word
            bent = v.zero()
            if self._observable == "activations" and v.curved:
                bent = v.four(below, (2, 0, 1, 1), word) * v.Theta(below, a, c) * v.Theta(below, a, d)
                bent = bent + v.width_ratio(below) * v.M(below, 1, 1, c, d) * v.M(below, 2, 0, a, b) * v.array(
                    "B", below, a + a + c + d
                )
            to_a, to_b = v.array("P", below, a + c + d + a), v.array("P", below, a + c + d + b)
            inner = v.width_ratio(below) * v.M(below, 1, 1, c, d) * self._answer(below, a, b, to_a, to_b)
            return bent + inner + self._pulled(below, word)

        return v.C_W(below) * self._symmetric(base, letters)

    def _Mv(self, layer: int, m: int, letters: str) -> Tensor:
        v, below = self._v, m - 1
        if self._base(layer, below):
            return v.C_W(below) * self._pulled(below, letters)
        return v.C_W(below) * v.M(below, 1, 1, *letters[2:]) * self.array("Mv", layer, below, letters)

    # ---- their parts

    def _starts(self, layer: int, m: int) -> bool:
        """Whether m is where the NTK's statistics are vertices."""
        return self._observable == "ntk" and m == layer

    def _base(self, layer: int, m: int) -> bool:
        """Whether the step from m is the first, made of the vertices of layer l."""
        return self._observable != "ntk" and m == layer

    def _symmetric(self, function: Callable[[str], Tensor], letters: str) -> Tensor:
        """f(a, b, c, d) + f(b, a, c, d)."""
        a, b, c, d = letters
        return function(letters) + function(b + a + c + d)

    def _x(self, order: int, layer: int, m: int, letters: str) -> Tensor:
        """E[X_c s^(order)_c s^(order-1)_d] of one neuron of layer m, times the divisor: x10 and x21."""
        v = self._v
        c, d = letters[2:]
        if not self._base(layer, m):
            to_c, to_d = self.array("Xi", layer, m, letters[:2] + c + c), self.array("Xi", layer, m, letters)
            return vertex_response(v, m, order, c, d, to_c, to_d)

        def base(word: str) -> Tensor:
            same = self._joint(m, order, word) * v.Theta(m, word[0], word[2])
            return same + v.width_ratio(m) * self._contraction(m, order, word)

        return self._symmetric(base, letters)

    def _joint(self, m: int, order: int, letters: str) -> Tensor:
        """<phi'_a phi_b s^(order)_c s^(order-1)_d>; by parts for phi(z) = z."""
        v = self._v
        if self._observable == "activations":
            return v.four(m, (1, 0, order, order - 1), letters)
        _, b, c, d = letters
        return vertex_response(v, m, order, c, d, v.K(m, b, c), v.K(m, b, d))

    def _contraction(self, m: int, order: int, letters: str) -> Tensor:
        """CF[phi'_a phi_b, s^(order)_c s^(order-1)_d](a, b; c, d)."""
        v = self._v
        if self._observable == "activations":
            return f_response(v, m, 1, order, *letters)
        a, b, c, d = letters
        return vertex_response(v, m, order, c, d, v.array("F", m, b + a + c + c), v.array("F", m, b + a + d + c))

    def _answer(self, m: int, a: str, b: str, to_a: Tensor, to_b: Tensor) -> Tensor:
        """The answer of phi'_a phi_b to a vertex with one preactivation label."""
        return vertex_response(self._v, m, 1, a, b, to_a, to_b) if self._observable == "activations" else to_b

    def _pulled(self, m: int, letters: str) -> Tensor:
        """E[phi'_a phi'_b s'_c s'_d H_ac H_bd], of one neuron and of two, times the divisor."""
        v = self._v
        a, b, c, d = letters
        slopes = v.M(m, 1, 1, c, d)
        if self._observable == "activations":
            same, other = v.four(m, (1, 1, 1, 1), letters), slopes * v.M(m, 1, 1, a, b)
        else:
            same = other = slopes
        moved = same * v.Theta(m, a, c) * v.Theta(m, b, d)
        return moved + v.width_ratio(m) * other * v.array("B", m, letters)
