"""Forecasts of hidden representations in training: kernels, NTKs and neurons of all hidden layers, to order 1/n.

Full-batch gradient descent on squared error. To this order only the frozen path enters: with theta the parameters,
theta_t - theta_0 = p_kc J_kc + q_{kc,k'd} u_{kc,k'd} + .., both along e = z - y of infinite width (Theta = U lambda U^T
on the training inputs, e_m(t) = g_m^t e_m(0)),
    p_k = - Phi e_k,   Phi = U diag(phi) U^T,   phi_m = (1 - g_m^t) / lambda_m,
    q_{kc,k'd} = sum_mn U_cm U_dn psi_mn e_km e_k'n,   psi_mn(t) = eta sum_{s<t} g_m^s phi_n(s).
Averaged over z(0) ~ N(0, K), with S = E sum_k e_k e_k^T = n_L K + y y^T (y is N x n_L, outputs of one network are
uncorrelated) and the ``statistics`` of this room, D their divisor,
    D E[g_ab(t) - g_ab(0)] = sum_cd { - n_L Phi_cd Xi_{ab;c;d} + [psi o S]_cd Y_{ab;cd} + 1/2 (Phi S Phi)_cd C_{ab;cd} }
    D E[(1/n_l) sum_j df_ja df_jb] = sum_cd (Phi S Phi)_cd Mv_{ab;cd}:
g is quadratic in the change of parameters at order 1/n; d3 g, and the fluctuations of H and dH inside p and q, are of
order 1/n^2 (dg . J is itself O(1/n) and odd under theta_L -> - theta_L). Signs: Xi removes the output's own spread at
the start, Y and C grow with the targets. Null directions of Theta, as of repeated inputs, move nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice
from torch_eft.results.progress.bar import counted
from torch_eft.results.training import Training, as_training
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.two_point_moments import Kinks, TwoPointMoments
from torch_eft.theory.hidden_layers.moments import TrainingMoments
from torch_eft.theory.hidden_layers.result import HiddenLayerForecast, Representation, RepresentationForecast
from torch_eft.theory.hidden_layers.statistics import DistinctInputs, HiddenStatistics, dividing_width
from torch_eft.theory.hidden_layers.validity import difference_movement, representation_validity
from torch_eft.theory.initialization.estimators import check_statistics, vertex_replicas
from torch_eft.theory.initialization.evaluator import Vertices, divergent
from torch_eft.theory.initialization.infinite_width import infinite_width
from torch_eft.theory.initialization.recursions.kernels import mean_correction
from torch_eft.theory.training.infinite_width import FrozenTraining

_ARRAYS = 64
"""Float64 arrays over a, b, c, d that are alive at once, about, at the peak of the recursion."""

_COEFFICIENTS = 2**22
"""Entries of (times, N, N) computed at once."""


def predict_representation(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    y_train: Tensor,
    x_probe: Tensor,
    training: Training | None = None,
    *,
    learning_rate: float | None = None,
    steps: float | None = None,
    at_steps: Sequence[float] | None = None,
    observable: Representation = "activations",
    ntk: bool = True,
    num_samples: int = 16384,
    num_replicas: int = 4,
    seed: int = 0,
    memory: int = 4 * 2**30,
    kinks: Kinks = "distributional",
    **keywords: Any,
) -> RepresentationForecast:
    """Predict how all hidden layers move in training, at order 1/n, before anything is trained.

    The training is gradient descent or gradient flow on the squared error, full batch, at one learning rate.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        training: The training; None builds it from the keywords.
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        steps: Number T of optimizer steps; ``math.inf`` with ``at_steps=[math.inf]`` for the trained network.
        at_steps: The steps to return; None means 0, 1, .. T.
        observable: Kernel and movement of ``"activations"`` or of ``"preactivations"``.
        ntk: True to predict the hidden NTKs too, which takes most of the time.
        num_samples: Sample size in all, for more than four distinct inputs.
        num_replicas: Number of independent samples, from which the error is estimated.
        seed: Seed of the samples.
        memory: Bytes allowed for arrays over two probe and two training inputs; less makes more, smaller tiles.
        kinks: Treatment of explicit derivatives at a kink. Training moves by ``"distributional"``.
        **keywords: Further fields of a ``torch_eft.Training``: ``reduction`` or ``dynamics``.

    Returns:
        The forecast, float64.

    Raises:
        ValueError: If shapes, names or steps do not fit, the training is another, the learning rate is beyond
            2 / lambda_max, the expansion does not cover the inputs, or one probe input does not fit into ``memory``.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
        >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
        >>> forecast = theory.predict_representation(ensemble, x, y, x, learning_rate=0.1, steps=4, ntk=False)
        >>> [layer.kernel_change.shape for layer in forecast.layers]
        [torch.Size([5, 2, 2]), torch.Size([5, 2, 2])]
    """
    check_choice("observable", observable, get_args(Representation))
    training = as_training(training, learning_rate=learning_rate, steps=steps, **keywords)
    if training.loss != "mse" or not training.is_plain or training.schedule is not None:
        raise ValueError(
            f"training: {training} given; the movement of hidden layers is derived for the squared error on full "
            "batches at one learning rate without momentum"
        )
    frozen = FrozenTraining(ensemble, x_train, y_train, x_probe, training)
    inputs = DistinctInputs.of(ensemble, x_train, x_probe)
    times = training.times(at_steps, inputs.x.device).double()
    check_statistics(ensemble, inputs.x, (), kinks, check_validity=False)
    K, Theta, pairs = infinite_width(ensemble, inputs.x, kinks)
    index, y = inputs.train[inputs.train_copies], frozen.y_train.to(inputs.x)
    S = ensemble.widths[-1] * K[-1][index][:, index] + y @ y.T
    moments = TrainingMoments(Theta[-1][index][:, index], S, frozen.propagator.rate, training.dynamics, inputs)
    read_out = _ReadOut(ensemble.widths[-1], observable, ntk and not divergent(ensemble, kinks), moments, times)
    rows = inputs.probe.split(_tile(inputs, memory))
    tiles: list[dict[tuple[int, str], tuple[Tensor, float]]] = []
    for part in counted("predicting hidden layers", rows, len(rows)):
        # A whole set is passed as itself: labels that share one tensor object share moments.
        label_sets = inputs.label_sets(inputs.probe if len(rows) == 1 else part, inputs.probe)
        replicas = vertex_replicas(ensemble, K, Theta, pairs, label_sets, num_samples, num_replicas, seed, kinks)
        tiles.append(replicas.combined(lambda vertices: read_out(vertices).items()))
    layers = _layers(ensemble, inputs, observable, K, Theta, pairs, rows, tiles)
    parted = difference_movement(ensemble, Theta, pairs, inputs.train, moments, times)
    return RepresentationForecast(
        times,
        layers,
        observable,
        f"order 1/n, hidden {observable}, {ensemble}, {training}",
        representation_validity(ensemble, inputs.x, layers, moments.spread, kinks, float(parted.max())),
    )


def _layers(
    ensemble: MLPEnsemble,
    inputs: DistinctInputs,
    observable: Representation,
    K: list[Tensor],
    Theta: list[Tensor],
    pairs: list[TwoPointMoments],
    rows: Sequence[Tensor],
    tiles: list[dict[tuple[int, str], tuple[Tensor, float]]],
) -> tuple[HiddenLayerForecast, ...]:
    """Put the tiles of all layers together, with repeated probe inputs."""
    copies = inputs.probe_copies
    probe = inputs.probe[copies]
    layers = []
    for number in range(1, ensemble.depth):
        values, errors = {}, {}
        for layer, name in tiles[0]:
            if layer == number:
                values[name] = torch.cat([tile[layer, name][0] for tile in tiles], -2)[..., copies, :][..., copies]
                weights = [len(part) * tile[layer, name][1] ** 2 for part, tile in zip(rows, tiles, strict=True)]
                errors[name] = math.sqrt(sum(weights) / len(inputs.probe))
        kernel = pairs[number - 1].explicit((0,), (0,)) if observable == "activations" else K[number - 1]
        kernel = kernel[probe][:, probe]
        layers.append(
            HiddenLayerForecast(
                number,
                ensemble.widths[number],
                kernel,
                kernel + values["kernel_correction"],
                values["kernel_change"],
                values["kernel_terms"],
                values["movement"],
                Theta[number - 1][probe][:, probe] + values["ntk_correction"],
                values.get("ntk_change"),
                {name: error for name, error in errors.items() if error > 0},
            )
        )
    return tuple(layers)


def _tile(inputs: DistinctInputs, memory: int) -> int:
    """Return the number of probe inputs a at a time.

    Raises:
        ValueError: If one does not fit.
    """
    single = 8 * _ARRAYS * len(inputs.probe) * len(inputs.train) ** 2
    if single > memory:
        raise ValueError(
            f"x_train: {len(inputs.train)} distinct inputs and {len(inputs.probe)} probe inputs need about "
            f"{single / 2**30:.1f} GiB, memory allows {memory / 2**30:.1f} GiB; give fewer inputs or more memory"
        )
    return min(len(inputs.probe), memory // single)


@dataclass(frozen=True)
class _ReadOut:
    """Computes everything of order 1/n from an evaluator of vertices.

    Args:
        outputs: n_L.
        observable: The functions whose kernel is forecast.
        ntk: True for the NTK's drift as well.
        moments: Moments of the frozen path.
        times: (T+1,).
    """

    outputs: int
    observable: Representation
    ntk: bool
    moments: TrainingMoments
    times: Tensor

    def __call__(self, v: Vertices) -> dict[tuple[int, str], Tensor]:
        """Return ``{(layer, name): (.., a, b)}``."""
        depth, widths = v.ensemble.depth, v.ensemble.widths
        a, b, c, d = (len(v.label_sets[label]) for label in "abcd")
        kernel, ntk = HiddenStatistics(v, self.observable), HiddenStatistics(v, "ntk")
        corrections: dict[tuple[int, str], Tensor] = {}
        drifts: dict[tuple[int, str], list[Tensor]] = {}
        for layer in range(1, depth):
            correction = v.array("G1", layer, "ab")
            if self.observable == "activations":
                correction = mean_correction(v, layer, 0, 0, "a", "b")
            for name, value in (("kernel", correction), ("ntk", v.array("Theta1", layer, "ab"))):
                corrections[layer, f"{name}_correction"] = value.expand(a, b, 1, 1)[:, :, 0, 0] / widths[layer - 1]
            for name, statistics in (("kernel", kernel), ("ntk", ntk)):
                if name == "kernel" or self.ntk:
                    width = dividing_width(v.ensemble, layer, self.observable if name == "kernel" else "ntk")
                    drifts[layer, f"{name}_change"] = [
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
                if key[1] == "kernel_change":
                    size = terms[0].abs() + terms[1].abs() + terms[2].abs()
                    parts.setdefault((key[0], "kernel_terms"), []).append(size)
        return corrections | {key: torch.cat(value) for key, value in parts.items()}
