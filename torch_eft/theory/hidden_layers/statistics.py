"""Statistics that move hidden representations in training: Xi, Y, C and Mv at order 1/n.

The observable of hidden layer l on inputs a, b is a mean over its neurons j,
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
from typing import Literal, get_args

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice
from torch_eft.results.presentation.repr import short_repr
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.points import MOST_QUADRATURE_LABELS
from torch_eft.theory.gaussian.two_point_moments import Kinks
from torch_eft.theory.initialization.estimators import check_statistics, vertex_replicas
from torch_eft.theory.initialization.evaluator import Vertices
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width
from torch_eft.theory.initialization.recursions.responses import f_response, vertex_response

Observable = Literal["activations", "preactivations", "ntk"]
"""The observable of a hidden layer: the kernel of its activations or preactivations, or its NTK."""


@dataclass(frozen=True, repr=False)
class RepresentationStatistics:
    """The four statistics of one hidden layer, for N_p observed inputs a, b and N training inputs c, d.

    Args:
        layer: l = 1 .. L-1.
        observable: ``"activations"``, ``"preactivations"`` or ``"ntk"``.
        divisor: The width that divides them: n_l, and n_{l-1} for ``"ntk"``.
        Xi: (N_p, N_p, N, N), Xi_{ab;c;d}.
        Y: (N_p, N_p, N, N), not symmetric in c, d.
        C: (N_p, N_p, N, N).
        Mv: (N_p, N_p, N, N); None for ``"ntk"``.
        error: ``{name: standard error}`` of the entries (rms) where moments were sampled.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([3, 16, 16, 1], "linear")
        >>> first, second = theory.representation_statistics(ensemble, torch.eye(2, 3), torch.eye(1, 3))
        >>> first.divisor, first.Xi.shape
        (16, torch.Size([1, 1, 2, 2]))
    """

    layer: int
    observable: Observable
    divisor: int
    Xi: Tensor
    Y: Tensor
    C: Tensor
    Mv: Tensor | None
    error: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return short_repr(self)


def representation_statistics(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    x_probe: Tensor,
    *,
    observable: Observable = "activations",
    top: int | None = None,
    num_samples: int = 16384,
    num_replicas: int = 4,
    seed: int = 0,
    kinks: Kinks = "distributional",
    check_validity: bool = True,
) -> list[RepresentationStatistics]:
    """Compute Xi, Y, C and Mv of all hidden layers.

    Args:
        ensemble: The ensemble.
        x_train: Inputs c, d, (N, n_0).
        x_probe: Inputs a, b, (N_p, n_0).
        observable: ``"activations"``, ``"preactivations"`` or ``"ntk"``.
        top: The layer m whose outputs are J, z and u; None means L. The hidden layers are then 1 .. m-1.
        num_samples: Sample size in all, for more than four distinct inputs.
        num_replicas: Number of independent samples, from which the error is estimated.
        seed: Seed of the samples.
        kinks: Treatment of explicit derivatives at a kink, see ``initial_statistics``. Training moves by
            ``"distributional"``; R, S, T, hence the NTK's Y and C, are then NaN for ReLU.
        check_validity: True to refuse ensembles with r >= 1.

    Returns:
        The statistics of layers 1 .. m-1, float64.

    Raises:
        ValueError: If inputs or names do not fit, or the expansion does not cover the ensemble.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x = torch.eye(2, 3)
        >>> found = theory.representation_statistics(theory.MLPEnsemble([3, 16, 24, 1], "linear"), x, x[:1])
        >>> [(layer.layer, layer.divisor, tuple(layer.Xi.shape)) for layer in found]
        [(1, 16, (1, 1, 2, 2)), (2, 24, (1, 1, 2, 2))]
    """
    check_choice("observable", observable, get_args(Observable))
    m = ensemble.depth if top is None else top
    if not 1 <= m <= ensemble.depth:
        raise ValueError(f"top: {top} given; the layers are 1 .. {ensemble.depth}")
    inputs = DistinctInputs.of(ensemble, x_train, x_probe)
    vertices_needed = ("Q", "R", "S", "T") if observable == "ntk" else ("P", "Q")
    check_statistics(ensemble, inputs.x, vertices_needed, kinks, check_validity)
    K, Theta, pairs = infinite_width(ensemble, inputs.x, kinks)
    label_sets = inputs.label_sets(inputs.probe, inputs.probe)
    replicas = vertex_replicas(ensemble, K, Theta, pairs, label_sets, num_samples, num_replicas, seed, kinks)
    names = ("Xi", "Y", "C") if observable == "ntk" else ("Xi", "Y", "C", "Mv")

    def read(vertices: Vertices) -> Iterator[tuple[tuple[int, str], Tensor]]:
        statistics = HiddenStatistics(vertices, observable)
        for layer in range(1, m):
            for name in names:
                yield (layer, name), statistics.array(name, layer, m, "abcd").expand(inputs.shape).clone()

    results = replicas.combined(read)
    rows, columns = inputs.probe_copies, inputs.train_copies

    def full(layer: int, name: str) -> Tensor:
        return results[layer, name][0][rows][:, rows][:, :, columns][..., columns]

    return [
        RepresentationStatistics(
            layer,
            observable,
            dividing_width(ensemble, layer, observable),
            full(layer, "Xi"),
            full(layer, "Y"),
            full(layer, "C"),
            full(layer, "Mv") if "Mv" in names else None,
            {name: results[layer, name][1] for name in names if results[layer, name][1] > 0},
        )
        for layer in range(1, m)
    ]


def dividing_width(ensemble: MLPEnsemble, layer: int, observable: Observable) -> int:
    """Return the width that divides the statistics of hidden layer l: n_l, and n_{l-1} for its NTK."""
    return ensemble.widths[layer - 1 if observable == "ntk" else layer]


@dataclass(frozen=True)
class DistinctInputs:
    """Probe and training inputs as one list without repetitions.

    Args:
        x: The distinct inputs, (M, n_0).
        probe: Indices into ``x`` of the distinct probe inputs; all of ``x`` if it is short.
        train: Likewise. It is the same object as ``probe`` if the sets are equal: the evaluator of vertices exchanges
            labels only if they run over one tensor object.
        probe_copies: (N_p,), which of ``probe`` each probe input is.
        train_copies: (N,), which of ``train`` each training input is.
    """

    x: Tensor
    probe: Tensor
    train: Tensor
    probe_copies: Tensor
    train_copies: Tensor

    @classmethod
    def of(cls, ensemble: MLPEnsemble, x_train: Tensor, x_probe: Tensor) -> "DistinctInputs":
        """Check the inputs and drop repetitions."""
        x_probe = check_inputs("x_probe", x_probe, ensemble)
        x_train = check_inputs("x_train", x_train, ensemble).to(x_probe.device)
        x, where = torch.unique(torch.cat([x_probe, x_train]), dim=0, return_inverse=True)
        if len(x) <= MOST_QUADRATURE_LABELS:  # one set for all labels: far fewer distinct moments to integrate
            everything = torch.arange(len(x), device=x.device)
            return cls(x, everything, everything, where[: len(x_probe)], where[len(x_probe) :])
        probe, probe_copies = torch.unique(where[: len(x_probe)], return_inverse=True)
        train, train_copies = torch.unique(where[len(x_probe) :], return_inverse=True)
        if torch.equal(probe, train):
            train = probe
        return cls(x, probe, train, probe_copies, train_copies)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of an array over a, b, c, d."""
        return len(self.probe), len(self.probe), len(self.train), len(self.train)

    def label_sets(self, a: Tensor, b: Tensor) -> Mapping[str, Tensor]:
        """Return the inputs that each label runs over: a and b over the given ones, c and d over training inputs."""
        return {"a": a, "b": b, "c": self.train, "d": self.train}


class HiddenStatistics:
    """Xi, Y, C and Mv as broadcast arrays, from a lazy evaluator of the vertices; each is computed once, on demand.

    Args:
        vertices: The evaluator, with the labels a, b, c, d.
        observable: The observable of the hidden layers.
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

    def array(self, name: str, layer: int, m: int, labels: str) -> Tensor:
        """Return the statistic of hidden layer l with the outputs of layer m, with one axis per label."""
        key = (name, layer, m, labels)
        if key not in self._memo:
            self._memo[key] = self._recursions[name](layer, m, labels)
        return self._memo[key]

    # ---- the four recursions, from layer m - 1 to m

    def _Xi(self, layer: int, m: int, labels: str) -> Tensor:
        if self._is_ntk_layer(layer, m):
            return self._symmetric(lambda abcd: self._v.array("Q", m, abcd), labels)
        return self._v.C_W(m - 1) * self._x(1, layer, m - 1, labels)

    def _Y(self, layer: int, m: int, labels: str) -> Tensor:
        v = self._v
        if self._is_ntk_layer(layer, m):
            return self._symmetric(lambda abcd: v.array("T", m, abcd), labels)
        below, C_W = m - 1, v.C_W(m - 1)
        c, d = labels[2:]
        total = v.lambda_W(below) * self._x(1, layer, below, labels)
        if v.curved:
            total = total + C_W * v.Theta(below, c, d) * self._x(2, layer, below, labels)
        if self._is_first_step(layer, below):

            def inner(abcd: str) -> Tensor:
                a, b, c, d = abcd
                to_a, to_b = v.array("Q", below, c + d + a + a), v.array("Q", below, c + d + a + b)
                return v.width_ratio(below) * self._response(below, a, b, to_a, to_b)

            return total + C_W * v.M(below, 1, 1, c, d) * self._symmetric(inner, labels)
        return total + C_W * v.M(below, 1, 1, c, d) * self.array("Y", layer, below, labels)

    def _C(self, layer: int, m: int, labels: str) -> Tensor:
        v, below = self._v, m - 1
        if self._is_ntk_layer(layer, m):

            def start(abcd: str) -> Tensor:
                return v.array("R", m, abcd) + v.array("S", m, abcd)

            return self._symmetric(start, labels)
        c, d = labels[2:]
        if not self._is_first_step(layer, below):
            return v.C_W(below) * v.M(below, 1, 1, c, d) * self.array("C", layer, below, labels)

        def base(abcd: str) -> Tensor:
            a, b, c, d = abcd
            curvature = v.zero()
            if self._observable == "activations" and v.curved:
                curvature = v.moment(below, (2, 0, 1, 1), abcd) * v.Theta(below, a, c) * v.Theta(below, a, d)
                curvature = curvature + v.width_ratio(below) * v.M(below, 1, 1, c, d) * v.M(
                    below, 2, 0, a, b
                ) * v.array("B", below, a + a + c + d)
            to_a, to_b = v.array("P", below, a + c + d + a), v.array("P", below, a + c + d + b)
            inner = v.width_ratio(below) * v.M(below, 1, 1, c, d) * self._response(below, a, b, to_a, to_b)
            return curvature + inner + self._squared_motion(below, abcd)

        return v.C_W(below) * self._symmetric(base, labels)

    def _Mv(self, layer: int, m: int, labels: str) -> Tensor:
        v, below = self._v, m - 1
        if self._is_first_step(layer, below):
            return v.C_W(below) * self._squared_motion(below, labels)
        return v.C_W(below) * v.M(below, 1, 1, *labels[2:]) * self.array("Mv", layer, below, labels)

    # ---- the terms of the recursions

    def _is_ntk_layer(self, layer: int, m: int) -> bool:
        """Return True at the layer m at which the NTK's statistics are vertices."""
        return self._observable == "ntk" and m == layer

    def _is_first_step(self, layer: int, m: int) -> bool:
        """Return True if the step from m is the first one, from the vertices of layer l."""
        return self._observable != "ntk" and m == layer

    def _symmetric(self, function: Callable[[str], Tensor], labels: str) -> Tensor:
        """Return f(a, b, c, d) + f(b, a, c, d)."""
        a, b, c, d = labels
        return function(labels) + function(b + a + c + d)

    def _x(self, derivative: int, layer: int, m: int, labels: str) -> Tensor:
        """Return E[X_c s^(k)_c s^(k-1)_d] k = ``derivative``, of one neuron of layer m, times the divisor."""
        v = self._v
        c, d = labels[2:]
        if not self._is_first_step(layer, m):
            to_c, to_d = self.array("Xi", layer, m, labels[:2] + c + c), self.array("Xi", layer, m, labels)
            return vertex_response(v, m, derivative, c, d, to_c, to_d)

        def base(abcd: str) -> Tensor:
            same = self._joint(m, derivative, abcd) * v.Theta(m, abcd[0], abcd[2])
            return same + v.width_ratio(m) * self._f_response(m, derivative, abcd)

        return self._symmetric(base, labels)

    def _joint(self, m: int, derivative: int, labels: str) -> Tensor:
        """Return <phi'_a phi_b s^(k)_c s^(k-1)_d>; by parts for phi(z) = z."""
        v = self._v
        if self._observable == "activations":
            return v.moment(m, (1, 0, derivative, derivative - 1), labels)
        _, b, c, d = labels
        return vertex_response(v, m, derivative, c, d, v.K(m, b, c), v.K(m, b, d))

    def _f_response(self, m: int, derivative: int, labels: str) -> Tensor:
        """Return CF[phi'_a phi_b, s^(k)_c s^(k-1)_d](a, b; c, d)."""
        v = self._v
        if self._observable == "activations":
            return f_response(v, m, 1, derivative, *labels)
        a, b, c, d = labels
        return vertex_response(v, m, derivative, c, d, v.array("F", m, b + a + c + c), v.array("F", m, b + a + d + c))

    def _response(self, m: int, a: str, b: str, to_a: Tensor, to_b: Tensor) -> Tensor:
        """Return the response of phi'_a phi_b to a vertex with one preactivation label."""
        return vertex_response(self._v, m, 1, a, b, to_a, to_b) if self._observable == "activations" else to_b

    def _squared_motion(self, m: int, labels: str) -> Tensor:
        """Return E[phi'_a phi'_b s'_c s'_d H_ac H_bd], of one neuron and of two, times the divisor."""
        v = self._v
        a, b, c, d = labels
        slopes = v.M(m, 1, 1, c, d)
        if self._observable == "activations":
            same, other = v.moment(m, (1, 1, 1, 1), labels), slopes * v.M(m, 1, 1, a, b)
        else:
            same = other = slopes
        moved = same * v.Theta(m, a, c) * v.Theta(m, b, d)
        return moved + v.width_ratio(m) * other * v.array("B", m, labels)
