"""The trained distribution of an ensemble: at infinite width and at order 1/n, in closed form or by draws.

Full-batch training on the squared error has closed forms (``infinite_width``, ``corrections``); any other loss, and
minibatches, go by draws of the initial outputs (``sampled``).
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice
from torch_eft.results.progress.bar import working
from torch_eft.results.training import Training, as_training
from torch_eft.results.trajectory import Trajectory
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.training.corrections.correction import CORRECTIONS, provenance
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.corrections.work import corrections_work
from torch_eft.theory.training.infinite_width import FrozenArchitecture, FrozenChain, FrozenTraining
from torch_eft.theory.training.sampled.predict import SampledForecast


def predict_training(
    ensemble: MLPEnsemble | Architecture,
    x_train: Tensor,
    y_train: Tensor,
    x_probe: Tensor,
    training: Training | None = None,
    *,
    learning_rate: float | None = None,
    steps: float | None = None,
    order: Literal[0, 1] = 1,
    at_steps: Sequence[float] | None = None,
    corrections: Collection[str] = CORRECTIONS,
    num_samples: int = 4096,
    num_replicas: int = 2,
    num_draws: int = 2048,
    seed: int = 0,
    memory: int = 4 * 2**30,
    **keywords: Any,
) -> Trajectory:
    """The trained distribution over initializations, before anything is trained.

    Full-batch training on the squared error is predicted in closed form. Other losses, and minibatches, go by draws of
    z(0), at order 1 on at most about 30 points in all.

    Args:
        ensemble: The ensemble; or an architecture as ``read_architecture`` returns it, for the squared error on full
            batches: any at order 0, small chains of convolutions and dense layers (``architecture_vertices``) at
            order 1.
        x_train: Training inputs, (N, n_0), or as the architecture takes them.
        y_train: Targets, (N, n_L); classes (N,) for the cross-entropy.
        x_probe: Probe inputs, (N_p, n_0), likewise.
        training: The training; None builds it from the keywords.
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        steps: Number T of optimizer steps.
        order: 0, infinite width, or 1, with the first correction in 1/n.
        at_steps: The steps to return; None means 0, 1, .. T.
        corrections: At order 1, which of ``"mean"``, ``"covariance"`` and ``"ntk"`` to correct; the rest stays at
            infinite width, and ``provenance`` says so. The NTK costs least, N_p^2 N^2 in labels; the mean output N^3
            per point; the covariance the same again for every pair of outputs.
        num_samples: At order 1, sample size of moments with three and four labels (four points or fewer are
            integrated).
        num_replicas: Independent samples it is shared by, at least 2, to estimate the error.
        num_draws: Number of draws of z(0), where there is no closed form.
        seed: Seed of all samples; the global random state is left alone.
        memory: At order 1, bytes allowed for tensors with four labels.
        **keywords: Further fields of a ``torch_eft.Training``: ``loss``, ``reduction``, ``momentum``, ``schedule``,
            ``batches``, ``dynamics``, ...

    Returns:
        A ``Trajectory``. At order 0 ``ntk_mean`` is constant and ``ntk_change`` zero: both are
        expanded views that hold one copy. At order 1 the mean NTK includes the correction Theta1 / n at
        initialization, ``output_truncation`` and ``ntk_truncation`` estimate the next order by |1/n term|^2 / |0th
        term|, and the provenance names the sampling errors.

    Raises:
        ValueError: If shapes do not fit, the learning rate is beyond the stability bound, the training is outside the
            derivation, or an argument is out of range; at order 1 also if sigma has a kink, training points coincide
            or the tensors do not fit into ``memory``.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([2, 50, 1], "linear")
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> forecast = theory.predict_training(ensemble, x, torch.ones(2, 1), x, learning_rate=0.1, steps=20)
        >>> forecast.output_mean.shape
        torch.Size([21, 2, 1])
        >>> forecast.output_mean[0].tolist()  # before training the mean output vanishes
        [[0.0], [0.0]]
    """
    training = as_training(training, learning_rate=learning_rate, steps=steps, **keywords)
    if order not in (0, 1):
        raise ValueError(f"order: {order} given; give 0 (infinite width) or 1 (first correction in 1/n)")
    if not corrections:
        raise ValueError(f"corrections: none given; choose from {', '.join(CORRECTIONS)}")
    for name in corrections:
        check_choice("corrections", name, CORRECTIONS)
    times = training.times(at_steps, x_train.device)
    if isinstance(ensemble, Architecture):
        if order == 1:
            _check_finite(times)
            chain = FrozenChain(ensemble, x_train, y_train, x_probe, training, memory=memory)
            options = {"num_samples": num_samples, "num_replicas": num_replicas, "seed": seed, "memory": memory}
            finite = FiniteWidthTraining(chain, **options)
            return finite.trajectory(infinite_width_trajectory(chain, training, times), training, corrections)
        architecture = FrozenArchitecture(ensemble, x_train, y_train, x_probe, training, memory=memory)
        return infinite_width_trajectory(architecture, training, times)
    if order == 1:
        _check_finite(times)
    if training.loss != "mse" or not training.is_full_batch:
        sampled = SampledForecast(ensemble, x_train, y_train, x_probe, training, num_draws, seed, memory)
        if order == 0:
            return sampled.infinite_width(times)
        return sampled.first_order(times, corrections, num_samples, num_replicas)
    frozen = FrozenTraining(ensemble, x_train, y_train, x_probe, training)
    if order == 0:
        return infinite_width_trajectory(frozen, training, times)
    finite = FiniteWidthTraining(frozen, num_samples=num_samples, num_replicas=num_replicas, seed=seed, memory=memory)
    with working("predicting the training", _seconds(frozen, training, times, corrections)):
        return finite.trajectory(infinite_width_trajectory(frozen, training, times), training, corrections)


def _check_finite(times: Tensor) -> None:
    if not math.isfinite(float(times.max())):
        raise ValueError("at_steps: inf given; order 1 is integrated up to a finite step. Give one, or order=0")


def _seconds(frozen: FrozenTraining, training: Training, times: Tensor, corrections: Collection[str]) -> float:
    """The work of the corrections, counted in seconds of one core."""
    work = corrections_work(
        len(frozen.x_train),
        frozen.probes,
        frozen.outputs,
        frozen.ensemble.depth,
        times=len(times),
        steps=int(times.max()),
        momentum=bool(training.momentum),
        gaussian=not EXCESS_KURTOSIS[frozen.ensemble.weight_law[-1]],
    )
    return sum(work[name] for name in corrections)


def infinite_width_trajectory(
    frozen: FrozenTraining | FrozenArchitecture, training: Training, steps: Tensor
) -> Trajectory:
    """Return the trajectory at infinite width.

    Args:
        frozen: The training of the ensemble.
        training: The training as it was given, for the provenance.
        steps: (T,).
    """
    mean, covariance = frozen.output(steps)
    outputs = torch.eye(frozen.outputs, dtype=frozen.K.dtype, device=frozen.K.device)
    Theta = frozen.Theta[: frozen.probes, : frozen.probes, None, None] * outputs
    Theta = Theta.expand(len(steps), -1, -1, -1, -1)
    return Trajectory(
        steps=steps,
        output_mean=mean,
        output_covariance=torch.einsum("tab,ij->tabij", covariance, outputs),
        ntk_mean=Theta,
        ntk_change=Theta.new_zeros(1).expand(Theta.shape),
        provenance=provenance(frozen.ensemble, training),
        validity=frozen.validity,
    )
