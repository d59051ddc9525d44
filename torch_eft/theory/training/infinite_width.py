"""Training at infinite width: the NTK is delta_ij Theta and frozen, and the dynamics of the squared error linear.

PDLT 10.1-10.2; Lee et al. 2019. With Theta_AA = U diag(lambda) U^T on the training points and the error e = z - y,
    e_m(t) = g_m^t e_m(0),   z_x(t) = z_x(0) - Theta_xA U phi(t) U^T e(0),   phi_m(t) = (1 - g_m^t) / lambda_m,
g = 1 - eta lambda for gradient descent, exp(-eta lambda) for gradient flow; with momentum and schedules phi is as in
``time_sums``. z(0) ~ N(0, K), so that z(t) is Gaussian with mean Theta_xA U phi U^T y and covariance delta_ij J K J^T,
J = (1, -Theta_xA U phi U^T). The corrections of order 1/n are integrals along this path.
"""

from typing import Literal

import torch
from torch import Tensor

from torch_eft.results.training import Training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.architecture.chains.chain import chain_of
from torch_eft.theory.architecture.chains.vertices import chain_kernels, check_vertices
from torch_eft.theory.architecture.kernels import architecture_kernels
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.architecture.statistics import architecture_statistics
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width
from torch_eft.theory.signal_propagation.regimes import EDGE, TOO_DEEP, infinite_width_validity
from torch_eft.theory.training.time_sums import ModePropagator, Sums, moving_modes

_MATRICES = 8
"""Float64 matrices over all points that are alive at once, at the peak of the recursion."""

_JUDGED, _NEURONS = 2, 2048
"""Inputs on which the fluctuations of an architecture are found, and neurons that are drawn for it."""


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

    def check_stable(self, training: Training) -> None:
        """Raise ``UnstableError`` if a learning rate is beyond the stability bound; the training as it was given."""
        if len(self.eigenvalues):
            scale = 1.0 if training.reduction == "sum" else 2.0 / (self.train.numel() * self.outputs)
            training.check_stable(scale * float(self.eigenvalues[-1]), "at infinite width")


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
        _check_training(training, "theory.predict_training takes other losses and minibatches, by draws of the outputs")
        x_train = check_inputs("x_train", x_train, ensemble)
        x_probe = check_inputs("x_probe", x_probe, ensemble).to(x_train.device)
        y_train = checked_targets(y_train, len(x_train), ensemble.widths[-1]).to(x_train)
        check_points(len(x_train), len(x_probe), memory)
        self.ensemble, self.x_train, self.y_train, self.x_probe = ensemble, x_train, y_train, x_probe
        self.x = torch.cat([x_probe, x_train])
        self.layers = infinite_width(ensemble, self.x)
        """K and Theta at layers 1 .. L, and two-point moments at 1 .. L-1, over all points."""
        super().__init__(self.layers[0][-1], self.layers[1][-1], y_train, training)
        self.check_stable(training)
        self.validity = infinite_width_validity(ensemble, self.x)


class FrozenArchitecture(InfiniteWidthPath):
    """Training at infinite width of any architecture that is read: convolutions, skips, norms.

    Args:
        architecture: The architecture.
        x_train: Training inputs, (N, ...).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, ...).
        training: As ``FrozenTraining`` takes it.
        memory: Bytes allowed for kernel matrices over all points.

    Raises:
        ValueError: As ``FrozenTraining`` does, or if the architecture has no closed form.

    Example:
        >>> import torch
        >>> from torch_eft import Training, theory
        >>> layers = torch.nn.Conv1d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 1)
        >>> x = torch.eye(8)[:3, None]
        >>> architecture = theory.read_architecture(torch.nn.Sequential(*layers), x)
        >>> training = Training(learning_rate=0.1, steps=1, reduction="sum")
        >>> frozen = theory.FrozenArchitecture(architecture, x, torch.ones(3, 1), x, training)
        >>> frozen.output(torch.tensor([0, 10**6]))[0][1, :, 0].round(decimals=6)
        tensor([1., 1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        architecture: Architecture,
        x_train: Tensor,
        y_train: Tensor,
        x_probe: Tensor,
        training: Training,
        *,
        memory: int = 4 * 2**30,
    ) -> None:
        _check_training(training, "predict_from_networks takes other losses and minibatches, by networks drawn")
        for name, given in (("x_train", x_train), ("x_probe", x_probe)):
            if not isinstance(given, Tensor) or given.ndim < 2 or given.shape[1:] != x_train.shape[1:]:
                found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"{name}: {found} given; give inputs (N, ...) of one shape for training and probe")
        y_train = checked_targets(y_train, len(x_train), architecture.output).to(x_train.device, torch.float64)
        check_points(len(x_train), len(x_probe), memory)
        self.ensemble, self.x_train, self.y_train, self.x_probe = architecture, x_train, y_train, x_probe
        x = torch.cat([x_probe.to(x_train), x_train])
        super().__init__(*architecture_kernels(architecture, x), y_train, training)
        self.check_stable(training)
        self.validity = architecture_validity(architecture, x)


class FrozenChain(FrozenArchitecture):
    """The same of a chain of convolutions and dense layers, with what the corrections of order 1/n take.

    Args:
        architecture: The chain.
        x_train: Training inputs, (N, ...).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, ...).
        training: As ``FrozenTraining`` takes it.
        memory: Bytes allowed for tensors over four labels (sample, position).

    Raises:
        ValueError: As ``FrozenArchitecture`` does, or if it is no such chain, or the tensors do not fit.

    Example:
        >>> import torch
        >>> from torch_eft import Training, theory
        >>> layers = torch.nn.Conv1d(1, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(16, 1)
        >>> x = torch.eye(4)[:2, None]
        >>> architecture = theory.read_architecture(torch.nn.Sequential(*layers), x)
        >>> training = Training(learning_rate=0.01, steps=1, reduction="sum")
        >>> theory.FrozenChain(architecture, x, torch.ones(2, 1), x[:1], training).hyperparameters.widths
        (3, 8, 1)
    """

    def __init__(
        self,
        architecture: Architecture,
        x_train: Tensor,
        y_train: Tensor,
        x_probe: Tensor,
        training: Training,
        *,
        memory: int = 4 * 2**30,
    ) -> None:
        super().__init__(architecture, x_train, y_train, x_probe, training, memory=memory)
        self.x = torch.cat([x_probe.to(x_train), x_train]).double()
        self.chain = chain_of(architecture, self.x)
        check_vertices(self.chain, memory)
        self.hyperparameters = self.chain.ensemble
        self.layers = chain_kernels(self.chain)
        # Biases that are not Gaussian count in these.
        InfiniteWidthPath.__init__(self, self.layers[0][-1], self.layers[1][-1], self.y_train, training)


def architecture_validity(architecture: Architecture, x: Tensor) -> Validity:
    """Judge infinite width (order 0) for an architecture by its fluctuations on the first inputs.

    Args:
        architecture: The architecture.
        x: Inputs, (N, ...).

    Returns:
        A ``Validity`` whose numbers are ``epsilon`` and ``ntk_relative_sd``.
    """
    found = architecture_statistics(architecture, x[:_JUDGED], num_samples=_NEURONS)
    epsilon, sd = found.epsilon, float(found.ntk_relative_sd.diagonal().max())
    numbers = {"epsilon": epsilon, "ntk_relative_sd": sd}
    size = f"relative variances over seeds: output variance {epsilon:.3g}, NTK of one output {sd**2:.3g}"
    if max(epsilon, sd**2) >= TOO_DEEP:
        return Validity("invalid", f"infinite width does not describe this network: {size}. Use wider layers", numbers)
    flag: Literal["valid", "caution"] = "valid" if max(epsilon, sd**2) < EDGE else "caution"
    remark = "In training the NTK of a real network moves, at order 0 it does not: read it against the measured drift"
    return Validity(flag, f"infinite width (order 0): {size}. {remark}", numbers)


def checked_targets(y: Tensor, points: int, outputs: int) -> Tensor:
    """Return targets, (points, outputs).

    Raises:
        ValueError: If the shape or the values are not usable.
    """
    if tuple(y.shape) != (points, outputs):
        classes = y.ndim == 1 and not y.is_floating_point()
        hint = "; for classes use one-hot targets, F.one_hot(y).double(), or loss='cross_entropy'" * classes
        raise ValueError(f"y_train: shape {tuple(y.shape)} given; x_train and widths ask for {(points, outputs)}{hint}")
    if not bool(torch.isfinite(y).all()):
        raise ValueError("y_train: contains NaN or infinite values; targets must be finite")
    return y


def check_points(points: int, probes: int, memory: int) -> None:
    """Raise if kernel matrices over so many points, training and probe, do not fit.

    Raises:
        ValueError: With what they need.
    """
    needed = _MATRICES * 8 * (points + probes) ** 2
    if needed > memory:
        raise ValueError(
            f"x_train: {points} points need about {needed / 2**30:.1f} GiB, memory allows {memory / 2**30:.1f} GiB; "
            "give fewer points or more memory"
        )


def _check_training(training: Training, otherwise: str) -> None:
    if training.loss != "mse" or not training.is_full_batch:
        raise ValueError(
            f"training: {training} given; the closed form is for the squared error on full batches. {otherwise}"
        )
