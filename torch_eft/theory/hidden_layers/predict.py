"""How hidden representations move in training: kernels, NTKs and neurons of every hidden layer, to order 1/n.

Full-batch gradient descent on squared error. To this order only the frozen path enters: with theta the parameters,
theta_t - theta_0 = p_kc J_kc + q_{kc,k'd} u_{kc,k'd} + .., both along e = z - y of infinite width (Theta = U lambda U^T
on the training inputs, e_m(t) = g_m^t e_m(0)),
    p_k = - Phi e_k,   Phi = U diag(phi) U^T,   phi_m = (1 - g_m^t) / lambda_m,
    q_{kc,k'd} = sum_mn U_cm U_dn psi_mn e_km e_k'n,   psi_mn(t) = eta sum_{s<t} g_m^s phi_n(s).
Averaged over z(0) ~ N(0, K), with S = E sum_k e_k e_k^T = n_L K + y y^T (y is N x n_L, outputs of one network are
uncorrelated) and the statistics of ``representation``, D their divisor,
    D E[g_ab(t) - g_ab(0)] = sum_cd { - n_L Phi_cd Xi_{ab;c;d} + [psi o S]_cd Y_{ab;cd} + 1/2 (Phi S Phi)_cd C_{ab;cd} }
    D E[(1/n_l) sum_j df_ja df_jb] = sum_cd (Phi S Phi)_cd Mv_{ab;cd}:
g is quadratic in the change of parameters at order 1/n; d3 g, and the fluctuations of H and dH inside p and q, are of
order 1/n^2 (dg . J is itself O(1/n) and odd under theta_L -> - theta_L). Signs: Xi is where the output's own spread is
unlearnt, Y and C grow with the targets. Directions that Theta does not see, as of repeated inputs, move nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.two_point_moments import Kinks
from torch_eft.theory.hidden_layers.moments import TrainingMoments
from torch_eft.theory.hidden_layers.result import HiddenLayerForecast
from torch_eft.theory.hidden_layers.statistics import HiddenStatistics, Labels, Observable, divisor
from torch_eft.theory.hidden_layers.validity import difference_movement, representation_validity
from torch_eft.theory.initialization.estimators import check_statistics, vertex_replicas
from torch_eft.theory.initialization.evaluator import Vertices, divergent
from torch_eft.theory.initialization.infinite_width import infinite_width
from torch_eft.theory.initialization.kernels import mean_correction
from torch_eft.theory.training.optimizer import Reduction
from torch_eft.theory.training.predict import InfiniteWidthTraining
from torch_eft.theory.training.time_sums import Dynamics

_ARRAYS = 64
"""Float64 arrays over a, b, c, d that are alive at once, about, at the peak of the recursion."""

_COEFFICIENTS = 2**22
"""Entries of (times, N, N) made at once."""


@dataclass(frozen=True)
class RepresentationForecast:
    """The predicted change of every hidden layer.

    Args:
        steps: (T+1,) optimizer steps; for gradient flow, flow time / learning rate.
        layers: One ``HiddenLayerForecast`` a hidden layer.
        observable: ``"activations"`` or ``"preactivations"``.
        provenance: Which theory, for which ensemble.
        validity: Where it holds.
    """

    steps: Tensor
    layers: tuple[HiddenLayerForecast, ...]
    observable: Observable
    provenance: str
    validity: Validity


def predict_representation(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    y_train: Tensor,
    x_probe: Tensor,
    learning_rate: float,
    steps: float,
    reduction: Reduction = "mean",
    at_steps: Sequence[float] | None = None,
    dynamics: Dynamics = "gradient_descent",
    observable: Literal["activations", "preactivations"] = "activations",
    ntk: bool = True,
    samples: int = 16384,
    replicas: int = 4,
    seed: int = 0,
    memory: int = 4 * 2**30,
    kinks: Kinks = "distributional",
) -> RepresentationForecast:
    """How every hidden layer will move in training, before anything is trained; all at order 1/n.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        steps: Number T of optimizer steps; ``math.inf`` with ``at_steps`` for the trained network.
        reduction: ``"sum"``: L = (1/2) sum (z - y)^2 (PDLT); ``"mean"``: torch's ``MSELoss``.
        at_steps: The steps to return; None means 0, 1, .. T.
        dynamics: ``"gradient_descent"`` or ``"gradient_flow"`` (time in units of the learning rate).
        observable: Kernel and movement of ``"activations"`` or of ``"preactivations"``.
        ntk: Whether to predict the hidden NTKs too, which takes most of the time.
        samples: Sample size in all, for more than four different inputs.
        replicas: Independent samples, to estimate the error from.
        seed: Seed of the samples.
        memory: Bytes allowed for arrays over two probe and two training inputs; less makes more, smaller tiles.
        kinks: What explicit derivatives are at a kink. Training moves by ``"distributional"``.

    Returns:
        A ``RepresentationForecast``, float64.

    Raises:
        ValueError: If shapes, names or steps do not fit, the learning rate is beyond 2 / lambda_max, the expansion
            does not cover the inputs, or one probe input does not fit into ``memory``.
    """
    if observable not in ("activations", "preactivations"):
        raise ValueError(f"observable: {observable!r} given; give 'activations' or 'preactivations'")
    times = _times(steps, at_steps, dynamics)
    training = InfiniteWidthTraining(ensemble, x_train, y_train, x_probe, learning_rate, reduction, dynamics)
    labels = Labels.of(ensemble, x_probe, x_train)
    check_statistics(ensemble, labels.x, (), kinks, check_validity=False)
    K, Theta, pairs = infinite_width(ensemble, labels.x, kinks)
    index, y = labels.train[labels.train_copies], training.y_train.to(labels.x)
    S = ensemble.widths[-1] * K[-1][index][:, index] + y @ y.T
    moments = TrainingMoments(Theta[-1][index][:, index], S, training.rate, dynamics, labels)
    read_out = _ReadOut(
        ensemble.widths[-1], observable, ntk and not divergent(ensemble, kinks), moments, times.to(labels.x.device)
    )
    parted = difference_movement(ensemble, Theta, pairs, labels.train, moments, times.to(labels.x.device))
    rows = labels.probe.split(_tile(labels, memory))
    whole: list[dict[tuple[int, str], tuple[Tensor, float]]] = []
    for part in rows:
        sets = labels.sets(labels.probe if len(rows) == 1 else part, labels.probe)
        evaluators = vertex_replicas(ensemble, K, Theta, pairs, sets, samples, replicas, seed, kinks)
        whole.append(evaluators.combined(lambda vertices: read_out(vertices).items()))
    copies = labels.probe_copies
    probe = labels.probe[copies]
    layers = []
    for number in range(1, ensemble.depth):
        values = {}
        errors = {}
        for layer, name in whole[0]:
            if layer == number:
                values[name] = torch.cat([tile[layer, name][0] for tile in whole], -2)[..., copies, :][..., copies]
                weights = [len(part) * tile[layer, name][1] ** 2 for part, tile in zip(rows, whole, strict=True)]
                errors[name] = math.sqrt(sum(weights) / len(labels.probe))
        kernel = pairs[number - 1].explicit((0,), (0,)) if observable == "activations" else K[number - 1]
        kernel = kernel[probe][:, probe]
        layers.append(
            HiddenLayerForecast(
                number,
                ensemble.widths[number],
                kernel,
                kernel + values["kernel_correction"],
                values["kernel_drift"],
                values["kernel_terms"],
                values["movement"],
                Theta[number - 1][probe][:, probe] + values["ntk_correction"],
                values.get("ntk_drift"),
                {name: error for name, error in errors.items() if error > 0},
            )
        )
    what = f"full-batch {dynamics.replace('_', ' ')}, reduction {reduction}"
    return RepresentationForecast(
        times,
        tuple(layers),
        observable,
        f"order 1/n, hidden {observable}, {ensemble}, {what}",
        representation_validity(ensemble, labels.x, layers, moments.spread, kinks, float(parted.max())),
    )


def _times(steps: float, at_steps: Sequence[float] | None, dynamics: Dynamics) -> Tensor:
    """The steps to return, float64.

    Raises:
        ValueError: If there are none, or one is negative, beyond ``steps``, or broken for gradient descent.
    """
    if at_steps is None and steps >= 0 and math.isfinite(steps):
        at_steps = range(int(steps) + 1)
    wanted = [] if at_steps is None else list(at_steps)
    if not wanted or not all(0 <= t <= steps for t in wanted):
        raise ValueError(f"steps: {steps}, at_steps: {at_steps} given; need 0 <= at_steps <= steps, and at least one")
    broken = [t for t in wanted if math.isfinite(t) and t != int(t)]
    if broken and dynamics == "gradient_descent":
        raise ValueError(f"at_steps: {broken[0]} given; steps of gradient descent are whole numbers")
    return torch.tensor(wanted, dtype=torch.float64)


def _tile(labels: Labels, memory: int) -> int:
    """Probe inputs a at a time.

    Raises:
        ValueError: If one does not fit.
    """
    single = 8 * _ARRAYS * len(labels.probe) * len(labels.train) ** 2
    if single > memory:
        raise ValueError(
            f"x_train: {len(labels.train)} different inputs and {len(labels.probe)} probe inputs need about "
            f"{single / 2**30:.1f} GiB, memory allows {memory / 2**30:.1f} GiB; give fewer inputs or more memory"
        )
    return min(len(labels.probe), memory // single)


@dataclass(frozen=True)
class _ReadOut:
    """Everything of order 1/n that an evaluator of vertices yields.

    Args:
        outputs: n_L.
        observable: What the kernel is of.
        ntk: Whether the NTK's drift is wanted.
        moments: Of the frozen path.
        times: (T+1,).
    """

    outputs: int
    observable: Observable
    ntk: bool
    moments: TrainingMoments
    times: Tensor

    def __call__(self, v: Vertices) -> dict[tuple[int, str], Tensor]:
        """``{(layer, name): (.., a, b)}``."""
        depth, widths = v.ensemble.depth, v.ensemble.widths
        a, b, c, d = (len(v.label_sets[letter]) for letter in "abcd")
        kernel, ntk = HiddenStatistics(v, self.observable), HiddenStatistics(v, "ntk")
        found: dict[tuple[int, str], Tensor] = {}
        drifts: dict[tuple[int, str], list[Tensor]] = {}
        for layer in range(1, depth):
            correction = v.array("G1", layer, "ab")
            if self.observable == "activations":
                correction = mean_correction(v, layer, 0, 0, "a", "b")
            for name, value in (("kernel", correction), ("ntk", v.array("Theta1", layer, "ab"))):
                found[layer, f"{name}_correction"] = value.expand(a, b, 1, 1)[:, :, 0, 0] / widths[layer - 1]
            for name, statistics in (("kernel", kernel), ("ntk", ntk)):
                if name == "kernel" or self.ntk:
                    width = divisor(v.ensemble, layer, self.observable if name == "kernel" else "ntk")
                    drifts[layer, f"{name}_drift"] = [
                        (factor / width * statistics.array(tensor, layer, depth, "abcd")).expand(a, b, c, d)
                        for tensor, factor in (("Xi", -float(self.outputs)), ("Y", 1.0), ("C", 0.5))
                    ]
            moved = kernel.array("Mv", layer, depth, "abcd").expand(a, b, c, d) / widths[layer]
            drifts[layer, "movement"] = [torch.zeros_like(moved), torch.zeros_like(moved), moved]
        parts: dict[tuple[int, str], list[Tensor]] = {key: [] for key in drifts}
        for some in self.times.split(max(1, _COEFFICIENTS // (c * d))):
            coefficients = self.moments.at(some)
            for key, tensors in drifts.items():
                terms = [
                    (weight.flatten(1) @ tensor.reshape(a * b, c * d).T).reshape(-1, a, b)
                    for weight, tensor in zip(coefficients, tensors, strict=True)
                ]
                parts[key].append(terms[0] + terms[1] + terms[2])
                if key[1] == "kernel_drift":
                    size = terms[0].abs() + terms[1].abs() + terms[2].abs()
                    parts.setdefault((key[0], "kernel_terms"), []).append(size)
        return found | {key: torch.cat(value) for key, value in parts.items()}
