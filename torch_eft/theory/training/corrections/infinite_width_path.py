"""The order-0 path of training: its modes, and the moments of the initial error in them.

The corrections of order 1/n are integrals along this path; its time enters through ``time_sums``.
"""

import torch
from torch import Tensor

from torch_eft.theory.training.optimizer import Descent
from torch_eft.theory.training.time_sums import Dynamics, ModePropagator, Sums

_NULL = 1e-12
"""Eigenvalues of Theta_AA below this part of the largest are zero to rounding."""


class OrderZeroPath:
    """Modes of training, and the Gaussian moments of the initial error in them.

    Null modes (inputs whose tangents depend linearly on one another) are dropped: no network of the ensemble
    moves along them, at any order.

    Args:
        K: Kernel on all points, probe before train, (N_all, N_all).
        Theta: NTK at infinite width, likewise.
        y: Targets, (N, n_L), of the last N points.
        rate: eta, for L = (1/2) sum (z - y)^2.
        dynamics: ``"gradient_descent"`` or ``"gradient_flow"``.
        descent: Momentum or a schedule; its learning rates stand in for ``rate``.
    """

    def __init__(
        self, K: Tensor, Theta: Tensor, y: Tensor, rate: float, dynamics: Dynamics, descent: Descent | None = None
    ) -> None:
        train = slice(len(K) - len(y), None)
        values, vectors = torch.linalg.eigh(Theta[train, train])
        kept = values > _NULL * values[-1]
        self.outputs = y.shape[1]
        self.eigenvalues, self.U = values[kept], vectors[:, kept]
        self.sums = ModePropagator(self.eigenvalues, rate, dynamics, descent)
        self.dropped = int((~kept).sum())
        self.K, self.Theta = K, Theta
        self.coupling = Theta[:, train] @ self.U  # (N_all, modes)
        self.y = self.U.T @ y.to(K)  # (modes, n_L)
        self.K_modes = self.U.T @ K[train, train] @ self.U
        self.target_gram = self.y @ self.y.T
        self.error_gram = self.outputs * self.K_modes + self.target_gram
        """E sum_k e_k e_k^T at initialization, (modes, modes)."""

    @property
    def train(self) -> Tensor:
        """Index of the training points among all points."""
        count = len(self.U)
        return torch.arange(len(self.K) - count, len(self.K), device=self.K.device)

    def single(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Decay g and phi, (T, modes)."""
        return self.sums.single(steps)

    def double(self, steps: Tensor) -> Sums:
        """Decay g and phi, (T, modes); psi and f, (T, modes, modes)."""
        return self.sums.double(steps)

    def response(self, steps: Tensor) -> Tensor:
        """J = dz(t) / dz(0) over all points, (T, N_all, N_all)."""
        _, phi = self.single(steps)
        identity = torch.eye(len(self.K), dtype=self.K.dtype, device=self.K.device)
        J = identity.repeat(len(steps), 1, 1)
        J[:, :, len(self.K) - len(self.U) :] -= torch.einsum("xm,tm,am->txa", self.coupling, phi, self.U)
        return J

    def mean_output(self, steps: Tensor) -> Tensor:
        """E z(t) at infinite width over all points, (T, N_all, n_L)."""
        _, phi = self.single(steps)
        return torch.einsum("xm,tm,mi->txi", self.coupling, phi, self.y)
