"""Order-0 moments of training that the drift of hidden layers takes: Phi, <q> and <p p>, at any times."""

import math

import torch
from torch import Tensor

from torch_eft.theory.expectations import gauss_legendre
from torch_eft.theory.prediction import Dynamics
from torch_eft.theory.representation import Labels


class TrainingMoments:
    """Phi, E sum_k q_kk and Phi S Phi on the frozen path, at any times, without stepping up to them.

    The state (g, phi, psi) after t + t' follows from those after t and t'; doubling reaches any t. No term cancels
    while 0 <= g <= 1. Time infinity is that after which nothing is left in double precision.

    Args:
        Theta: (N, N), on the training inputs.
        S: (N, N), E sum_k e_k e_k^T at time 0.
        rate: eta, for L = (1/2) sum (z - y)^2.
        dynamics: ``"gradient_descent"`` or ``"gradient_flow"``.
        labels: Which different input each training input is; None if they stand for themselves.
    """

    def __init__(self, Theta: Tensor, S: Tensor, rate: float, dynamics: Dynamics, labels: Labels | None = None) -> None:
        eigenvalues, U = torch.linalg.eigh(Theta)
        kept = eigenvalues > len(Theta) * torch.finfo(Theta.dtype).eps * eigenvalues[-1]
        self.eigenvalues, U = eigenvalues[kept], U[:, kept]
        self._S, self._rate, self._flow = U.T @ S @ U, rate, dynamics == "gradient_flow"
        self._U = U
        if labels is not None:
            self._U = U.new_zeros(len(labels.train), U.shape[1]).index_add(0, labels.train_copies, U)

    @property
    def spread(self) -> float:
        """lambda_max / lambda_min, of the modes that move."""
        return float(self.eigenvalues[-1] / self.eigenvalues[0])

    def at(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Phi, [psi o S] and Phi S Phi, each (T, N, N) over different inputs."""
        _, phi, psi = self._flowing(times) if self._flow else self._stepping(times)
        U = self._U
        return (
            torch.einsum("cm,tm,dm->tcd", U, phi, U),
            U @ (psi * self._S) @ U.T,
            U @ (phi[:, :, None] * self._S * phi[:, None, :]) @ U.T,
        )

    def _stepping(self, times: Tensor) -> "_State":
        factor = 1 - self._rate * self.eigenvalues
        slowest = float(-factor.abs().clamp(1e-300, 1 - 1e-16).log().max())
        left = times.clamp_max(math.ceil(_LAST / slowest)).long()
        power = (factor, torch.full_like(factor, self._rate), torch.zeros_like(self._S))
        state = _expanded((torch.ones_like(factor), torch.zeros_like(factor), torch.zeros_like(self._S)), len(times))
        while bool((left > 0).any()):
            odd = left % 2 == 1
            longer = _after(state, power)
            state = (
                torch.where(odd[:, None], longer[0], state[0]),
                torch.where(odd[:, None], longer[1], state[1]),
                torch.where(odd[:, None, None], longer[2], state[2]),
            )
            power, left = _after(power, power), left // 2
        return state

    def _flowing(self, times: Tensor) -> "_State":
        slowest, fastest = self._rate * float(self.eigenvalues[0]), self._rate * float(self.eigenvalues[-1])
        times = times.clamp_max(_LAST / slowest)
        doublings = max(0, math.ceil(math.log2(max(1.0, fastest * float(times.max())))))
        h = (self._rate * times / 2**doublings)[:, None]
        x = h * self.eigenvalues  # <= 1
        psi = torch.zeros_like(x[:, :, None] * x[:, None, :])
        nodes, weights = gauss_legendre(12, x)
        for s, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
            psi += weight * torch.exp(-x * s)[:, :, None] * (h * h * s * _mean_decay(x * s))[:, None, :]
        state = (torch.exp(-x), h * _mean_decay(x), psi)
        for _ in range(doublings):
            state = _after(state, state)
        return state


_State = tuple[Tensor, Tensor, Tensor]
"""g and phi, (.., N), and psi, (.., N, N), after some time."""

_LAST = 800.0
"""exp(-800) is 0 in double precision."""


def _after(first: _State, then: _State) -> _State:
    """The state after two stretches of time."""
    (g, phi, psi), (g2, phi2, psi2) = first, then
    late = (g * phi2)[..., :, None] * phi[..., None, :]
    return g * g2, phi + g * phi2, psi + late + g[..., :, None] * g[..., None, :] * psi2


def _expanded(state: _State, count: int) -> _State:
    g, phi, psi = state
    return g.expand(count, -1), phi.expand(count, -1), psi.expand(count, -1, -1)


def _mean_decay(x: Tensor) -> Tensor:
    """(1 - exp(-x)) / x."""
    return torch.where(x > 0, -torch.expm1(-x) / torch.where(x > 0, x, 1.0), 1.0)
