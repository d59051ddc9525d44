"""The trained distribution of an MLP ensemble: full-batch training on squared error, at order 0.

At infinite width the NTK is delta_ij Theta and frozen, and the dynamics is linear (PDLT 10.1-10.2;
Lee et al. 2019). With Theta_AA = U diag(lambda) U^T on the training points and the error e = z - y,
    e_m(t) = g_m^t e_m(0),   z_x(t) = z_x(0) - Theta_xA U phi(t) U^T e(0),   phi_m(t) = (1 - g_m^t) / lambda_m,
g = 1 - eta lambda for gradient descent, exp(-eta lambda) for gradient flow. z(0) ~ N(0, K), so that z(t) is
Gaussian with mean Theta_xA U phi U^T y and covariance delta_ij J K J^T, J = (1, -Theta_xA U phi U^T).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from torch_eft.theory.blocks import check_inputs
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.statistics import initial_statistics
from torch_eft.theory.validity import infinite_width_validity
from torch_eft.trajectory import Trajectory

Dynamics = Literal["gradient_descent", "gradient_flow"]
Reduction = Literal["sum", "mean"]


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

    Raises:
        ValueError: If shapes do not fit, the learning rate is beyond 2 / lambda_max for gradient descent, or the
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
        last = initial_statistics(ensemble, torch.cat([x_probe, x_train]), ("K", "Theta"))[-1]
        probe = len(x_probe)
        self.K = last.K
        self.Theta_probe = last.Theta[:probe, :probe]
        eigenvalues, self._U = torch.linalg.eigh(last.Theta[probe:, probe:])
        self.eigenvalues = eigenvalues.clamp_min(0.0)
        self._coupling = last.Theta[:probe, probe:] @ self._U
        self.rate = learning_rate * (1.0 if reduction == "sum" else 2.0 / self.y_train.numel())
        largest = self.rate * float(self.eigenvalues[-1])
        if dynamics == "gradient_descent" and largest >= 2:
            raise ValueError(
                f"learning_rate: {learning_rate:g} given, beyond the linear stability bound "
                f"{learning_rate * 2 / largest:.4g} (2 / lambda_max of the loss's Hessian at infinite width)"
            )
        self.validity = infinite_width_validity(ensemble, torch.cat([x_probe, x_train]))

    def output(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the probe outputs at the given steps.

        Args:
            steps: (T,), >= 0; whole numbers for gradient descent.

        Returns:
            The mean (T, N_p, n_L) and the covariance (T, N_p, N_p) of one output; different
            outputs are uncorrelated and alike at infinite width.
        """
        phi = self._phi(steps.to(self.eigenvalues))
        mean = torch.einsum("xm,tm,mi->txi", self._coupling, phi, self._U.T @ self.y_train)
        response = -torch.einsum("xm,tm,am->txa", self._coupling, phi, self._U)
        identity = torch.eye(len(self.Theta_probe), dtype=self.K.dtype, device=self.K.device).expand(len(steps), -1, -1)
        J = torch.cat([identity, response], 2)
        return mean, J @ self.K @ J.mT

    def first_direction(self) -> Tensor:
        """Theta_PA y, (N_p, n_L): the direction in which the mean output starts to move."""
        return self._coupling @ (self._U.T @ self.y_train)

    def _phi(self, steps: Tensor) -> Tensor:
        """(1 - g^t) / lambda, (T, N), accurate also where eta lambda t is tiny."""
        t, x = steps[:, None], self.rate * self.eigenvalues
        if self.dynamics == "gradient_flow":
            decayed = -torch.expm1(-x * t)
        else:
            slow = -torch.expm1(t * torch.log1p(-x.clamp_max(0.5)))
            decayed = torch.where(x < 0.5, slow, 1 - (1 - x) ** t)
        positive = self.eigenvalues > 0
        return torch.where(positive, decayed / torch.where(positive, self.eigenvalues, 1.0), self.rate * t)


def predict_training(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    y_train: Tensor,
    x_probe: Tensor,
    learning_rate: float,
    steps: int,
    reduction: Reduction = "mean",
    order: Literal[0] = 0,
    dynamics: Dynamics = "gradient_descent",
    at_steps: Sequence[int] | None = None,
) -> Trajectory:
    """The trained distribution over initialisations, before anything is trained.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        steps: Number T of optimizer steps.
        reduction: ``"sum"``: L = (1/2) sum (z - y)^2 (PDLT); ``"mean"``: torch's ``MSELoss``.
        order: 0, infinite width.
        dynamics: Full-batch ``"gradient_descent"`` or ``"gradient_flow"`` (time in units of the learning rate).
        at_steps: The steps to return; None means 0, 1, .. T.

    Returns:
        A ``Trajectory``. At order 0 ``ntk_mean`` is constant and ``ntk_drift`` zero: both are
        expanded views that hold one copy.

    Raises:
        ValueError: If shapes do not fit, the learning rate is beyond the stability bound, or
            ``order`` or ``steps`` is out of range.
    """
    if order != 0:
        raise ValueError(f"order: {order} given; this version predicts order 0 (infinite width)")
    wanted = range(steps + 1) if at_steps is None else at_steps
    if steps < 0 or len(wanted) == 0 or min(wanted) < 0 or max(wanted) > steps:
        raise ValueError(f"steps: {steps}, at_steps: {at_steps} given; need 0 <= at_steps <= steps")
    training = InfiniteWidthTraining(ensemble, x_train, y_train, x_probe, learning_rate, reduction, dynamics)
    dynamics_name = dynamics.replace("_", " ")
    times = torch.tensor(list(wanted), device=training.K.device)
    mean, covariance = training.output(times)
    outputs = torch.eye(ensemble.widths[-1], dtype=training.K.dtype, device=training.K.device)
    Theta = torch.einsum("ab,ij->abij", training.Theta_probe, outputs).expand(len(times), -1, -1, -1, -1)
    return Trajectory(
        steps=times,
        output_mean=mean,
        output_covariance=torch.einsum("tab,ij->tabij", covariance, outputs),
        ntk_mean=Theta,
        ntk_drift=Theta.new_zeros(1).expand(Theta.shape),
        provenance=f"order 0 (infinite width), {ensemble}, full-batch {dynamics_name}, reduction {reduction}",
        validity=training.validity,
    )
