"""Order-0 moments of training that drive hidden layers: Phi, <q> and <p p>, at any times."""

import math

import torch
from torch import Tensor

from torch_eft.results.training import Dynamics, Training
from torch_eft.theory.hidden_layers.statistics import DistinctInputs
from torch_eft.theory.training.time_sums import ModePropagator, moving_modes


class TrainingMoments:
    """Phi, E sum_k q_kk and Phi S Phi on the frozen path, at any times, infinite ones included.

    Args:
        Theta: (N, N), on the training inputs.
        S: (N, N), E sum_k e_k e_k^T at time 0.
        rate: eta, for L = (1/2) sum (z - y)^2.
        dynamics: ``"gradient_descent"`` or ``"gradient_flow"``.
        inputs: Sums the moments over repeated training inputs; None if there are none.
    """

    def __init__(
        self, Theta: Tensor, S: Tensor, rate: float, dynamics: Dynamics, inputs: DistinctInputs | None = None
    ) -> None:
        self.eigenvalues, U = moving_modes(Theta)
        self._S, self._U = U.T @ S @ U, U
        training = Training(learning_rate=rate, steps=math.inf, reduction="sum", dynamics=dynamics)
        self._sums = ModePropagator(self.eigenvalues, training)
        if inputs is not None:
            self._U = U.new_zeros(len(inputs.train), U.shape[1]).index_add(0, inputs.train_copies, U)

    @property
    def spread(self) -> float:
        """lambda_max / lambda_min of the modes that move."""
        return float(self.eigenvalues[-1] / self.eigenvalues[0])

    def at(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Phi, [psi o S] and Phi S Phi, each (T, N, N) over distinct inputs."""
        _, phi, psi, _ = self._sums.double(times)
        U = self._U
        return (
            torch.einsum("cm,tm,dm->tcd", U, phi, U),
            U @ (psi * self._S) @ U.T,
            U @ (phi[:, :, None] * self._S * phi[:, None, :]) @ U.T,
        )
