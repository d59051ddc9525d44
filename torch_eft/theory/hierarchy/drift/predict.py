"""Forecast of what training changes in one network: the drift of its NTK and of its hidden layers, with their spread.

The mean drift is of order 1/n (``training``, ``hidden_layers``), and one network's drift fluctuates by as much: by the
covariance of its dNTK (``initialization``), which makes the law closed (``law``). Measured against trained ensembles
(tanh and GELU; one to three hidden layers; one to ten outputs; momentum, minibatches, cross-entropy): mean squares tend
to the forecast as 1/n, from 3 to 30 % below it at n = 64, and 90 % bands cover 87 to 93 % of networks at n = 128.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_eft.results.progress.bar import working
from torch_eft.results.training import Training, as_training
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.ensemble import MLPEnsemble, check_ensemble
from torch_eft.theory.hierarchy.drift.assembly import Frozen, JointReader, pair_weights
from torch_eft.theory.hierarchy.drift.closed import ClosedLaw, ClosedMoments, MomentsOnly, closed_forecast
from torch_eft.theory.hierarchy.drift.forms import FormReader, mean_forms
from torch_eft.theory.hierarchy.drift.paths import DrawnTraining
from torch_eft.theory.hierarchy.drift.result import DriftForecast
from torch_eft.theory.hierarchy.drift.sampled import BATCHES, SampledLaw
from torch_eft.theory.initialization.estimators import check_statistics
from torch_eft.theory.initialization.evaluator import FLUCTUATIONS
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.training.infinite_width import FrozenTraining

_INTEGRATED = 2
"""Independent points over which moments are integrated: those with six labels take seconds over three, minutes over
four, and less than one second from samples."""

_STORED = 20
"""Float64 matrices over modes for every pair of probe points, beside those of hidden layers."""


_FITTED_SAMPLES = 2048
"""Those with which the work below was fitted."""


def single_pairs_work(ensemble: MLPEnsemble, train: int, probe: int) -> float:
    """Count the work of the moments of single pairs of probe points, with 2048 samples, without hidden NTKs.

    Args:
        ensemble: The ensemble.
        train: N.
        probe: N_p.

    Returns:
        Seconds of one core, roughly.
    """
    layers = ensemble.depth - 1
    return layers * (0.44 + 0.22 * layers + 1.6e-3 * probe * train + 2.9e-6 * (probe * train) ** 2)


def predict_drift(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    y_train: Tensor,
    x_probe: Tensor,
    training: Training | None = None,
    *,
    learning_rate: float | None = None,
    steps: float | None = None,
    at_steps: Sequence[float] | None = None,
    hidden_ntk: bool = True,
    num_samples: int = 4096,
    num_replicas: int = 2,
    joint_points: int = 8,
    num_draws: int = 512,
    seed: int = 0,
    memory: int = 2 * 2**30,
    **keywords: Any,
) -> DriftForecast:
    """Predict how far training will move the NTK and the hidden layers of one network, before it is trained.

    Mean and variance over initializations at leading order, 1/n and 1/n^2, for gradient descent with momentum (heavy
    ball or Nesterov) and any schedule and for gradient flow: in closed form on full batches of the squared error; for
    other losses and on minibatches over draws of z(0), given which they are closed. The cost grows as N_p^2 N^2 times
    the sample size, and does not grow with any width; in closed form not with n_L either, with draws as their number
    times that of steps times (N n_L)^2.

    Args:
        ensemble: The ensemble; its activation smooth.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L); as the loss takes them.
        x_probe: Probe inputs, (N_p, n_0).
        training: The training; None builds it from the keywords.
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        steps: Number T of optimizer steps.
        at_steps: The steps to return; None means 0, 1, .. T.
        hidden_ntk: True for the NTKs of hidden layers, too.
        num_samples: Sample size in all, for more than two inputs; its error falls as 1/sqrt(num_samples).
        num_replicas: Independent samples it is shared by, at least 2, to estimate the error.
        joint_points: Probe points whose pairs are drawn together by ``quantiles`` and ``draws``, spread evenly over the
            probe; the cost grows as their number to the power 4. Norms over more points are those over these, scaled
            to the exact mean square.
        num_draws: Draws of z(0), where the law is not closed: the error falls as 1/sqrt(num_draws).
        seed: Seed; the global random state is left alone.
        memory: Bytes allowed for arrays over two probe and two training inputs, which are tiled to fit, and for the
            matrices of N^2 entries for every pair of probe inputs: where they do not fit, moments are computed some
            pairs at a time, and nothing can be drawn.
        **keywords: Further fields of a ``torch_eft.Training``.

    Returns:
        The forecast, float64.

    Raises:
        ValueError: If shapes or steps do not fit, the activation has a kink, r >= 1, the training is beyond the
            stability bound, or the points do not fit into ``memory``.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
        >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
        >>> forecast = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=20)
        >>> forecast.ntk.mean.shape, bool(forecast.ntk.relative_rms[-1] > forecast.ntk.relative_rms[1] > 0)
        (torch.Size([21, 2, 2]), True)
    """
    if isinstance(ensemble, Architecture):
        raise ValueError(
            "ensemble: an architecture given; the law of one network's drift takes the covariance of the dNTK, which "
            "is derived for MLPs. theory.predict_training gives the mean drift of small chains of convolutions, "
            "predict_from_networks that of drawn networks"
        )
    check_ensemble(ensemble)
    training = as_training(training, learning_rate=learning_rate, steps=steps, **keywords)
    closed = training.loss == "mse" and training.is_full_batch
    if not closed and math.isinf(training.steps):
        raise ValueError(f"steps: {training.steps} given; draws of z(0) are trained step by step, give a number")
    if num_draws < 2 * BATCHES:
        raise ValueError(f"num_draws: {num_draws} given; at least {2 * BATCHES} are needed to estimate the error")
    if num_replicas < 2:
        raise ValueError(f"num_replicas: {num_replicas} given; at least 2 are needed to estimate the error")
    if joint_points < 1:
        raise ValueError(f"joint_points: {joint_points} given; at least 1 point is needed for the law of a norm")
    if ensemble.activation.kinked:
        raise ValueError(
            f"activation: {ensemble.activation.name} has a kink; its dNTK contains delta functions whose covariance "
            "diverges, and the drift has no expansion in 1/n. Use a smooth activation, e.g. gelu"
        )
    make = FrozenTraining if closed else DrawnTraining
    frozen = make(ensemble, x_train, y_train, x_probe, training)
    check_statistics(ensemble, frozen.x, FLUCTUATIONS, "autograd", check_validity=True)
    if isinstance(frozen, DrawnTraining):
        frozen.check_memory(memory)
    times = training.times(at_steps, frozen.x.device)
    vertices = VertexTiles(ensemble, frozen.layers, num_samples, num_replicas, seed, integrated=_INTEGRATED)
    reader = FormReader(vertices, frozen, hidden_ntk, memory)
    pairs = _pairs_at_once(frozen, memory, hidden_ntk, num_replicas)
    work = single_pairs_work(ensemble, len(frozen.x_train), frozen.probes) * num_samples / _FITTED_SAMPLES
    with working("predicting the drift", (1.5 if hidden_ntk else 1.0) * work):
        if pairs is not None:
            return _in_blocks(reader, pairs, frozen, training, times)
        replicas = reader.replicas()
        forms = mean_forms(replicas)
        joint = JointReader(reader, forms, frozen, memory, joint_points)
        if isinstance(frozen, DrawnTraining):
            return SampledLaw(forms, replicas, joint, frozen, times, num_draws, seed).forecast()
        moments = ClosedMoments(frozen, times, joint.weights)
        moments.add(torch.arange(len(joint.weights), device=times.device), forms, replicas)
        return closed_forecast(moments, frozen, training, times, ClosedLaw(forms, joint, frozen, training, times))


def _in_blocks(reader: FormReader, pairs: int, frozen: Frozen, training: Training, times: Tensor) -> DriftForecast:
    """Means and variances, so many pairs of probe points at a time."""
    needed = f"{len(frozen.x_train)} training points and {frozen.probes} probe points"
    if isinstance(frozen, DrawnTraining):
        raise ValueError(
            f"x_train: {needed} do not fit into memory all at once, as draws of z(0) need them; give fewer points or "
            "more memory, or the squared error on full batches, whose moments are computed in blocks"
        )
    moments = ClosedMoments(frozen, times, pair_weights(frozen))
    for places, runs in reader.blocks(pairs):
        moments.add(places, mean_forms(runs), runs)
    reason = (
        f"memory: the law of {needed} was computed {pairs} pairs of probe points at a time, means and variances only; "
        "draws, quantiles and given take all pairs at once: give fewer points, or more memory to predict_drift"
    )
    return closed_forecast(moments, frozen, training, times, MomentsOnly(reason))


def _pairs_at_once(frozen: Frozen, memory: int, hidden_ntk: bool, num_replicas: int) -> int | None:
    """How many pairs of probe points fit, None for all; refuses where not even one does."""
    layers = (frozen.ensemble.depth - 1) * (8 if hidden_ntk else 4)
    pairs = frozen.probes * (frozen.probes + 1) // 2
    single = 8 * (_STORED + layers) * (1 + num_replicas) * len(frozen.x_train) ** 2
    if pairs * single <= memory:
        return None
    if single > memory:
        raise ValueError(
            f"x_train: {len(frozen.x_train)} points need about {single / 2**30:.1f} GiB for every two probe points, "
            f"memory allows {memory / 2**30:.1f} GiB; give fewer points or more memory"
        )
    return memory // single
