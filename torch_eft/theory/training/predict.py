"""The trained distribution of an MLP ensemble: full-batch training on squared error, at order 0 and order 1/n.

At infinite width the NTK is delta_ij Theta and frozen, and the dynamics is linear (PDLT 10.1-10.2;
Lee et al. 2019). With Theta_AA = U diag(lambda) U^T on the training points and the error e = z - y,
    e_m(t) = g_m^t e_m(0),   z_x(t) = z_x(0) - Theta_xA U phi(t) U^T e(0),   phi_m(t) = (1 - g_m^t) / lambda_m,
g = 1 - eta lambda for gradient descent, exp(-eta lambda) for gradient flow; with momentum and schedules phi is as in
``time_sums``. z(0) ~ N(0, K), so that z(t) is
Gaussian with mean Theta_xA U phi U^T y and covariance delta_ij J K J^T, J = (1, -Theta_xA U phi U^T). The corrections
of order 1/n are those of ``ensemble_training``.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from torch_eft.results.trajectory import Trajectory
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import check_inputs
from torch_eft.theory.initialization.statistics import initial_statistics
from torch_eft.theory.signal_propagation.regimes import infinite_width_validity
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.corrections.validity import relative_size, truncation
from torch_eft.theory.training.optimizer import Descent, LossFunction, Reduction, Schedule
from torch_eft.theory.training.sampled.predict import SampledForecast
from torch_eft.theory.training.scope import check_stable, covered_descent
from torch_eft.theory.training.time_sums import Dynamics, ModePropagator

CORRECTIONS = ("mean", "covariance", "ntk")
"""What order 1/n corrects."""

_MATRICES = 8
"""Float64 matrices over all points that are alive at once, at the peak of the recursion."""


class InfiniteWidthTraining:
    """The order-0 forecast in closed form, at any step, without integrating up to it.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        reduction: ``"sum"``: L = (1/2) sum (z - y)^2 (PDLT); ``"mean"``: torch's ``MSELoss``.
        dynamics: ``"gradient_descent"`` or ``"gradient_flow"`` (time t = step, in units of the learning rate).
        memory: Bytes allowed for kernel matrices over all points.
        optimizer: Momentum or a schedule, whose learning rates stand in for ``learning_rate``.

    Raises:
        ValueError: If shapes do not fit, the learning rate is beyond the stability bound for gradient descent, or the
            points do not fit into ``memory``.
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        x_train: Tensor,
        y_train: Tensor,
        x_probe: Tensor,
        learning_rate: float,
        reduction: Reduction = "mean",
        dynamics: Dynamics = "gradient_descent",
        memory: int = 4 * 2**30,
        optimizer: Descent | None = None,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: {reduction!r} given; give 'sum' or 'mean'")
        if dynamics not in ("gradient_descent", "gradient_flow"):
            raise ValueError(f"dynamics: {dynamics!r} given; give 'gradient_descent' or 'gradient_flow'")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate: {learning_rate:g} given; it must be positive")
        x_train = check_inputs("x_train", x_train, ensemble)
        x_probe = check_inputs("x_probe", x_probe, ensemble).to(x_train.device)
        shape = (len(x_train), ensemble.widths[-1])
        if tuple(y_train.shape) != shape:
            raise ValueError(f"y_train: shape {tuple(y_train.shape)} given; x_train and widths ask for {shape}")
        points = len(x_train) + len(x_probe)
        if _MATRICES * 8 * points**2 > memory:
            raise ValueError(
                f"x_train: {len(x_train)} points need about {_MATRICES * 8 * points**2 / 2**30:.1f} GiB, memory allows "
                f"{memory / 2**30:.1f} GiB; give fewer points or more memory"
            )
        self.ensemble = ensemble
        self.dynamics = dynamics
        self.y_train = y_train.to(x_train)
        if not bool(torch.isfinite(self.y_train).all()):
            raise ValueError("y_train: contains NaN or infinite values; targets must be finite")
        self.x_train, self.x_probe = x_train, x_probe
        last = initial_statistics(ensemble, torch.cat([x_probe, x_train]), statistics=("K", "Theta"))[-1]
        probe = len(x_probe)
        self.K = last.K
        self.Theta_probe = last.Theta[:probe, :probe]
        eigenvalues, self._U = torch.linalg.eigh(last.Theta[probe:, probe:])
        self.eigenvalues = eigenvalues.clamp_min(0.0)
        self._coupling = last.Theta[:probe, probe:] @ self._U
        scale = 1.0 if reduction == "sum" else 2.0 / self.y_train.numel()
        optimizer = optimizer or Descent(())
        if dynamics == "gradient_descent":
            check_stable(learning_rate, scale, float(self.eigenvalues[-1]), optimizer)
        self.rate = learning_rate * scale
        self.optimizer = replace(optimizer, learning_rates=tuple(scale * rate for rate in optimizer.learning_rates))
        """In terms of L = (1/2) sum (z - y)^2, like ``rate``."""
        self._sums = ModePropagator(self.eigenvalues, self.rate, dynamics, self.optimizer)
        self.validity = infinite_width_validity(ensemble, torch.cat([x_probe, x_train]))

    def output(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the probe outputs at the given steps.

        Args:
            steps: (T,), >= 0; whole numbers for gradient descent.

        Returns:
            The mean (T, N_p, n_L) and the covariance (T, N_p, N_p) of one output; different
            outputs are uncorrelated and alike at infinite width.
        """
        _, phi = self._sums.single(steps)
        mean = torch.einsum("xm,tm,mi->txi", self._coupling, phi, self._U.T @ self.y_train)
        response = -torch.einsum("xm,tm,am->txa", self._coupling, phi, self._U)
        identity = torch.eye(len(self.Theta_probe), dtype=self.K.dtype, device=self.K.device).expand(len(steps), -1, -1)
        J = torch.cat([identity, response], 2)
        return mean, J @ self.K @ J.mT

    def first_direction(self) -> Tensor:
        """Theta_PA y, (N_p, n_L): the direction in which the mean output starts to move."""
        return self._coupling @ (self._U.T @ self.y_train)


def predict_training(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    y_train: Tensor,
    x_probe: Tensor,
    learning_rate: float,
    steps: int,
    reduction: Reduction = "mean",
    order: Literal[0, 1] = 0,
    dynamics: Dynamics = "gradient_descent",
    at_steps: Sequence[int] | None = None,
    corrections: Collection[str] = CORRECTIONS,
    samples: int = 4096,
    replicas: int = 2,
    seed: int = 0,
    memory: int = 4 * 2**30,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    schedule: Schedule | None = None,
    optimizer: str = "sgd",
    weight_decay: float = 0.0,
    batches: Sequence[Sequence[int] | Tensor] | None = None,
    loss: str | LossFunction = "mse",
    draws: int = 2048,
) -> Trajectory:
    """The trained distribution over initializations, before anything is trained.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L); classes (N,) for the cross-entropy.
        x_probe: Probe inputs, (N_p, n_0).
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        steps: Number T of optimizer steps.
        reduction: ``"sum"``: L = (1/2) sum (z - y)^2 (PDLT), or the sum of cross-entropies; ``"mean"``: torch's.
        order: 0, infinite width; 1, with the first correction in 1/n, n = n_{L-1} (smooth activations).
        dynamics: Full-batch ``"gradient_descent"``, with momentum or a schedule if given, or ``"gradient_flow"`` (time
            in units of the learning rate).
        at_steps: The steps to return; None means 0, 1, .. T.
        corrections: At order 1, which of ``"mean"``, ``"covariance"`` and ``"ntk"`` to correct; the rest stays at order
            0, and ``provenance`` says so. The NTK costs least, N_p^2 N^2 in labels; the mean output N^3 a point; the
            covariance the same again for every pair of outputs.
        samples: At order 1, sample size of moments with three and four labels (four points or fewer are integrated).
        replicas: Independent samples it is shared by, at least 2, to estimate the error.
        seed: Their seed; the global random state is left alone.
        memory: At order 1, bytes allowed for tensors with four labels.
        momentum: Of ``torch.optim.SGD``.
        nesterov: Of ``torch.optim.SGD``.
        dampening: Of ``torch.optim.SGD``.
        schedule: The learning rate of every step in place of ``learning_rate``: a sequence or a function of the step.
        optimizer: ``"sgd"``; others are refused, with what to do instead.
        weight_decay: 0; likewise.
        batches: The training samples of every step's minibatch, the same for all networks; gone through again if fewer
            than ``steps``. By draws of z(0), like any loss but the squared error on full batches.
        loss: ``"mse"``, in closed form; ``"cross_entropy"``, or a differentiable function of (outputs, targets) to a
            number, by draws of z(0) (``sampled_training``), at order 1 on at most some 30 points in all.
        draws: How many.

    Returns:
        A ``Trajectory``. At order 0 ``ntk_mean`` is constant and ``ntk_drift`` zero: both are
        expanded views that hold one copy. At order 1 the mean NTK includes the correction Theta1 / n at
        initialization, ``output_truncation`` and ``ntk_truncation`` estimate the next order by |1/n term|^2 / |0th
        term|, and the provenance tells the sampling errors.

    Raises:
        ValueError: If shapes do not fit, the learning rate is beyond the stability bound, the optimizer is outside the
            derivation, or ``order``, ``steps`` or ``corrections`` is out of range; at order 1 also if sigma has a kink,
            training points coincide or the tensors do not fit into ``memory``.
    """
    if order not in (0, 1):
        raise ValueError(f"order: {order} given; give 0 (infinite width) or 1 (first correction in 1/n)")
    unknown = sorted(set(corrections) - set(CORRECTIONS))
    if unknown or not corrections:
        given = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"corrections: {given} given; choose from {', '.join(CORRECTIONS)}")
    wanted = range(steps + 1) if at_steps is None else at_steps
    if steps < 0 or len(wanted) == 0 or min(wanted) < 0 or max(wanted) > steps:
        raise ValueError(f"steps: {steps}, at_steps: {at_steps} given; need 0 <= at_steps <= steps")
    exact = loss == "mse" and batches is None
    descent = covered_descent(
        learning_rate,
        steps,
        dynamics,
        momentum,
        dampening,
        nesterov,
        schedule,
        optimizer,
        weight_decay,
        batches,
        exact,
        len(x_train),
    )
    told = f"{_described(dynamics, descent)}, reduction {reduction}"
    if not exact:
        sampled = SampledForecast(ensemble, x_train, y_train, x_probe, loss, reduction, descent, draws, seed, memory)
        times = torch.tensor(list(wanted), device=sampled.x.device)
        told += f", loss {loss}" if isinstance(loss, str) else ", a function of the outputs as loss"
        if order == 0:
            return sampled.order_0(times, told)
        return sampled.order_1(times, told, corrections, samples, replicas)
    training = InfiniteWidthTraining(
        ensemble, x_train, y_train, x_probe, learning_rate, reduction, dynamics, optimizer=descent
    )
    times = torch.tensor(list(wanted), device=training.K.device)
    order_0 = _order_0(training, times, told)
    if order == 0:
        return order_0
    finite = FiniteWidthTraining(
        ensemble,
        training.x_probe,
        training.x_train,
        training.y_train,
        training.rate,
        dynamics,
        samples,
        replicas,
        seed,
        memory,
        training.optimizer,
    )
    return _corrected(order_0, finite, [name for name in CORRECTIONS if name in corrections])


def _order_0(training: InfiniteWidthTraining, times: Tensor, told: str) -> Trajectory:
    mean, covariance = training.output(times)
    outputs = torch.eye(training.ensemble.widths[-1], dtype=training.K.dtype, device=training.K.device)
    Theta = torch.einsum("ab,ij->abij", training.Theta_probe, outputs).expand(len(times), -1, -1, -1, -1)
    return Trajectory(
        steps=times,
        output_mean=mean,
        output_covariance=torch.einsum("tab,ij->tabij", covariance, outputs),
        ntk_mean=Theta,
        ntk_drift=Theta.new_zeros(1).expand(Theta.shape),
        provenance=f"order 0 (infinite width), {training.ensemble}, {told}",
        validity=training.validity,
    )


def _described(dynamics: Dynamics, optimizer: Descent) -> str:
    name = ("full-batch " if optimizer.batches is None else "fixed minibatches, ") + dynamics.replace("_", " ")
    if optimizer.momentum:
        name += f" with {'Nesterov momentum' if optimizer.nesterov else 'momentum'} {optimizer.momentum:g}"
    return name + " and a schedule" * (len(set(optimizer.learning_rates)) > 1)


def _corrected(order_0: Trajectory, finite: FiniteWidthTraining, corrections: Sequence[str]) -> Trajectory:
    """Order 0 plus the corrections asked for."""
    steps, sizes, errors = order_0.steps, {}, []
    changes: dict[str, Tensor] = {}
    if "mean" in corrections:
        correction, error = finite.mean_output(steps)
        probe = correction[:, : finite.probes]
        zeroth = finite.path.mean_output(steps)
        moved = steps > 0
        if bool(moved.any()) and bool(zeroth.any()):
            sizes["|z1| / |z0|"] = relative_size(correction[moved], zeroth[moved])
        changes["output_mean"] = order_0.output_mean + probe
        changes["output_truncation"] = truncation(probe, order_0.output_mean)
        changes["train_output_mean"] = (zeroth + correction)[:, finite.probes :]
        errors.append(("mean output", error))
    if "covariance" in corrections:
        correction, error = finite.covariance(steps)
        sizes["|Cov1| / |Cov0|"] = relative_size(correction, order_0.output_covariance)
        changes["output_covariance"] = order_0.output_covariance + correction
        errors.append(("covariance", error))
    if "ntk" in corrections:
        drift, error = finite.ntk_drift(steps)
        identity = torch.eye(drift.shape[-1], dtype=drift.dtype, device=drift.device)
        initial = torch.einsum("ab,ij->abij", finite.initial_ntk(), identity)
        sizes["|H1| / |Theta|"] = relative_size(initial + drift, order_0.ntk_mean)
        changes["ntk_mean"], changes["ntk_drift"] = order_0.ntk_mean + initial + drift, drift
        changes["ntk_truncation"] = truncation(initial + drift, order_0.ntk_mean)
        errors.append(("NTK drift", error))
    left = [name for name in CORRECTIONS if name not in corrections]
    told = f"order 1/n, n = {finite.ensemble.widths[-2]}" + f" ({', '.join(left)} at order 0)" * bool(left)
    told += order_0.provenance.removeprefix("order 0 (infinite width)")
    if finite.vertices.sampled:
        told += "; standard errors of sampled moments (rms): " + ", ".join(f"{k} {v:.2g}" for k, v in errors)
    return replace(order_0, **changes, provenance=told, validity=finite.validity(sizes, steps))
