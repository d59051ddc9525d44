"""Training at infinite width: the NTK is delta_ij Theta and frozen, and the dynamics of the squared error linear.

PDLT 10.1-10.2; Lee et al. 2019. With Theta_AA = U diag(lambda) U^T on the training points and the error e = z - y,
    e_m(t) = g_m^t e_m(0),   z_x(t) = z_x(0) - Theta_xA U phi(t) U^T e(0),   phi_m(t) = (1 - g_m^t) / lambda_m,
g = 1 - eta lambda for gradient descent, exp(-eta lambda) for gradient flow; with momentum and schedules phi is as in
``time_sums``. z(0) ~ N(0, K), so that z(t) is Gaussian with mean Theta_xA U phi U^T y and covariance delta_ij J K J^T,
J = (1, -Theta_xA U phi U^T). The corrections of order 1/n are integrals along this path.
"""

import torch
from torch import Tensor

from torch_eft.results.training import Training
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width
from torch_eft.theory.signal_propagation.regimes import infinite_width_validity
from torch_eft.theory.training.time_sums import ModePropagator, Sums, moving_modes

_MATRICES = 8
"""Float64 matrices over all points that are alive at once, at the peak of the recursion."""


class FrozenModes:
    """Modes of training under given kernels, whatever the loss.

    Null modes are left out, at order 0 and in every correction, by one rule: see ``moving_modes``.

    Args:
        K: Kernel on all points, probe before train, (N_all, N_all).
        Theta: NTK at infinite width, likewise.
        points: Number N of training points.
        outputs: n_L.
    """

    def __init__(self, K: Tensor, Theta: Tensor, points: int, outputs: int) -> None:
        train = slice(len(K) - points, None)
        self.probes, self.outputs = len(K) - points, outputs
        self.eigenvalues, self.U = moving_modes(Theta[train, train])
        self.K, self.Theta = K, Theta
        self.coupling = Theta[:, train] @ self.U  # (N_all, modes)
        self.K_modes = self.U.T @ K[train, train] @ self.U

    @property
    def train(self) -> Tensor:
        """Index of the training points among all points."""
        return torch.arange(self.probes, len(self.K), device=self.K.device)


class InfiniteWidthPath(FrozenModes):
    """The path of the squared error, and the Gaussian moments of the initial error in its modes.

    Args:
        K: Kernel on all points, probe before train, (N_all, N_all).
        Theta: NTK at infinite width, likewise.
        y: Targets, (N, n_L), of the last N points.
        training: The training, on full batches of the squared error.
    """

    def __init__(self, K: Tensor, Theta: Tensor, y: Tensor, training: Training) -> None:
        super().__init__(K, Theta, *y.shape)
        self.training = training.summed(y.numel())
        """In terms of L = (1/2) sum (z - y)^2."""
        self.propagator = ModePropagator(self.eigenvalues, self.training)
        self.y = self.U.T @ y.to(K)  # (modes, n_L)
        self.target_gram = self.y @ self.y.T
        self.error_gram = self.outputs * self.K_modes + self.target_gram
        """E sum_k e_k e_k^T at initialization, (modes, modes)."""

    def single(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Decay g and phi, (T, modes)."""
        return self.propagator.single(steps)

    def double(self, steps: Tensor) -> Sums:
        """Decay g and phi, (T, modes); psi and f, (T, modes, modes)."""
        return self.propagator.double(steps)

    def response(self, steps: Tensor, points: int | None = None) -> Tensor:
        """J = dz(t) / dz(0) of the first points, or of all, (T, points, N_all)."""
        _, phi = self.single(steps)
        coupling = self.coupling[:points]
        J = torch.eye(len(coupling), len(self.K), dtype=self.K.dtype, device=self.K.device).repeat(len(steps), 1, 1)
        J[:, :, self.probes :] -= torch.einsum("xm,tm,am->txa", coupling, phi, self.U)
        return J

    def mean_output(self, steps: Tensor, points: int | None = None) -> Tensor:
        """E z(t) at infinite width on the first points, or on all, (T, points, n_L)."""
        _, phi = self.single(steps)
        return torch.einsum("xm,tm,mi->txi", self.coupling[:points], phi, self.y)


class FrozenTraining(InfiniteWidthPath):
    """Training of an ensemble at infinite width, in closed form at any step, without integrating up to it.

    Null modes are dropped, see ``InfiniteWidthPath``. The corrections of order 1/n (``FiniteWidthTraining``) use this
    same object.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        training: The training, on full batches of the squared error; at one learning rate without momentum its number
            of steps does not matter here.
        memory: Bytes allowed for kernel matrices over all points.

    Raises:
        ValueError: If shapes do not fit, the training is not of this kind, its learning rate is beyond the stability
            bound for gradient descent, or the points do not fit into ``memory``.

    Example:
        >>> import torch
        >>> from torch_eft import Training, theory
        >>> ensemble = theory.MLPEnsemble([2, 64, 1], "linear")
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> training = Training(learning_rate=0.1, steps=1, reduction="sum")
        >>> frozen = theory.FrozenTraining(ensemble, x, torch.ones(2, 1), x, training)
        >>> mean, covariance = frozen.output(torch.tensor([0, 10**6]))
        >>> mean[:, :, 0].round(decimals=6)  # nothing is known at the start, the targets at the end
        tensor([[0., 0.],
                [1., 1.]], dtype=torch.float64)
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        x_train: Tensor,
        y_train: Tensor,
        x_probe: Tensor,
        training: Training,
        *,
        memory: int = 4 * 2**30,
    ) -> None:
        if training.loss != "mse" or not training.is_full_batch:
            raise ValueError(
                f"training: {training} given; the closed form is for the squared error on full batches. "
                "theory.predict_training takes other losses and minibatches, by draws of the initial outputs"
            )
        x_train = check_inputs("x_train", x_train, ensemble)
        x_probe = check_inputs("x_probe", x_probe, ensemble).to(x_train.device)
        shape = (len(x_train), ensemble.widths[-1])
        if tuple(y_train.shape) != shape:
            classes = y_train.ndim == 1 and not y_train.is_floating_point()
            hint = "; for classes use one-hot targets, F.one_hot(y).double(), or loss='cross_entropy'" * classes
            raise ValueError(f"y_train: shape {tuple(y_train.shape)} given; x_train and widths ask for {shape}{hint}")
        y_train = y_train.to(x_train)
        if not bool(torch.isfinite(y_train).all()):
            raise ValueError("y_train: contains NaN or infinite values; targets must be finite")
        needed = _MATRICES * 8 * (len(x_train) + len(x_probe)) ** 2
        if needed > memory:
            raise ValueError(
                f"x_train: {len(x_train)} points need about {needed / 2**30:.1f} GiB, memory allows "
                f"{memory / 2**30:.1f} GiB; give fewer points or more memory"
            )
        self.ensemble, self.x_train, self.y_train, self.x_probe = ensemble, x_train, y_train, x_probe
        self.x = torch.cat([x_probe, x_train])
        self.layers = infinite_width(ensemble, self.x)
        """K and Theta at layers 1 .. L, and two-point moments at 1 .. L-1, over all points."""
        super().__init__(self.layers[0][-1], self.layers[1][-1], y_train, training)
        if len(self.eigenvalues):
            scale = 1.0 if training.reduction == "sum" else 2.0 / y_train.numel()
            training.check_stable(scale * float(self.eigenvalues[-1]), "at infinite width")
        self.validity = infinite_width_validity(ensemble, self.x)

    def output(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the probe outputs at the given steps.

        Args:
            steps: (T,), >= 0; whole numbers for gradient descent.

        Returns:
            The mean (T, N_p, n_L) and the covariance (T, N_p, N_p) of one output; different
            outputs are uncorrelated and alike at infinite width.
        """
        J = self.response(steps, self.probes)
        return self.mean_output(steps, self.probes), J @ self.K @ J.mT

    def first_direction(self) -> Tensor:
        """Theta_PA y, (N_p, n_L): the direction in which the mean output starts to move."""
        return self.coupling[: self.probes] @ self.y
