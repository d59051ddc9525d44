"""The order-0 path of training in closed form: what the 1/n corrections are integrated along.

With Theta_AA = U diag(lambda) U^T on the training points and e = z - y, every mode decays by itself (PDLT 10.1):
e_m(t) = g_m e_m(0). The corrections of order 1/n need, for gradient descent with step eta (sums over s, u < t),

    g_m = (1 - eta lambda_m)^t        phi_m = eta sum_s g_m(s)        psi_cd = eta sum_s g_c(s) phi_d(s)
    f_mc = eta sum_u g_m(t - 1 - u) g_c(u)

and for gradient flow the integrals these tend to. Descent: by doubling the number of steps, sums of positive terms
below the critical learning rate 1 / lambda_max, so that nothing cancels at tiny eta lambda t or equal modes.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from torch_eft.theory.expectations import gauss_legendre

Dynamics = Literal["gradient_descent", "gradient_flow"]

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
    """

    def __init__(self, K: Tensor, Theta: Tensor, y: Tensor, rate: float, dynamics: Dynamics) -> None:
        train = slice(len(K) - len(y), None)
        values, vectors = torch.linalg.eigh(Theta[train, train])
        kept = values > _NULL * values[-1]
        self.rate, self.dynamics = rate, dynamics
        self.step = rate if dynamics == "gradient_descent" else 0.0
        self.outputs = y.shape[1]
        self.eigenvalues, self.U = values[kept], vectors[:, kept]
        self.dropped = int((~kept).sum())
        self.K, self.Theta = K, Theta
        self.coupling = Theta[:, train] @ self.U  # (N_all, modes)
        self.y = self.U.T @ y.to(K)  # (modes, n_L)
        self.K_modes = self.U.T @ K[train, train] @ self.U
        self.target_gram = self.y @ self.y.T
        self.error_gram = self.outputs * self.K_modes + self.target_gram
        """E sum_k e_k e_k^T at initialisation, (modes, modes)."""

    @property
    def train(self) -> Tensor:
        """Index of the training points among all points."""
        count = len(self.U)
        return torch.arange(len(self.K) - count, len(self.K), device=self.K.device)

    def single(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Decay g and phi, (T, modes)."""
        g, phi, *_ = self._descent(steps, pairs=False) if self.step else self._flow(steps, pairs=False)
        return g, phi

    def double(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decay g and phi, (T, modes); psi and f, (T, modes, modes)."""
        return self._descent(steps, pairs=True) if self.step else self._flow(steps, pairs=True)

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

    def _descent(self, steps: Tensor, pairs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = torch.round(steps).long()
        modes, empty = len(self.eigenvalues), self.K.new_zeros(0)
        shape = (len(steps), modes, modes) if pairs else (0,)
        done = (
            self.K.new_ones(len(steps), modes),
            self.K.new_zeros(len(steps), modes),
            self.K.new_zeros(shape),
            self.K.new_zeros(shape),
        )
        block = (
            1 - self.step * self.eigenvalues,
            torch.full_like(self.eigenvalues, self.step),
            self.K.new_zeros(modes, modes) if pairs else empty,
            self.K.new_full((modes, modes), self.step) if pairs else empty,
        )
        for bit in range(int(count.max()).bit_length()):
            taken = ((count >> bit) & 1).bool()
            if bool(taken.any()):
                longer = _joined(tuple(part[taken] if len(part) else part for part in done), block, pairs)
                for part, value in zip(done, longer, strict=True):
                    if len(part):
                        part[taken] = value
            block = _joined(block, block, pairs)
        return done

    def _flow(self, steps: Tensor, pairs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = self.rate * steps.to(self.K)[:, None]
        g, phi = torch.exp(-self.eigenvalues * t), _exponential_integral(self.eigenvalues, t)
        if not pairs:
            return g, phi, g, phi
        first, second = self.eigenvalues[:, None], self.eigenvalues[None, :]
        t = t[:, :, None]
        total = first + second
        closed = (phi[:, :, None] - g[:, :, None] * phi[:, None, :]) / total
        # The difference cancels where the sum of both exponents is small: there a Gauss rule is exact.
        nodes, weights = gauss_legendre(12, self.K)
        summed = torch.zeros_like(closed)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            s = t * (1 + node) / 2
            summed += weight * t / 2 * torch.exp(-first * s) * _exponential_integral(second, s)
        f = torch.exp(-torch.minimum(first, second) * t) * _exponential_integral((first - second).abs(), t)
        return g, phi, torch.where(total * t < 1, summed, closed), f


def _joined(first: tuple[Tensor, ...], then: tuple[Tensor, ...], pairs: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums over a stretch of time followed by another."""
    (g, phi, psi, f), (g_2, phi_2, psi_2, f_2) = first, then
    joint_g, joint_phi = g * g_2, phi + g * phi_2
    if not pairs:
        return joint_g, joint_phi, psi, f
    after = phi[..., None, :] * phi_2[..., :, None] + g[..., None, :] * psi_2
    return joint_g, joint_phi, psi + g[..., :, None] * after, g_2[..., :, None] * f + g[..., None, :] * f_2


def _exponential_integral(rate: Tensor, t: Tensor) -> Tensor:
    """The integral of exp(-rate s) over 0 < s < t."""
    x = rate * t
    return torch.where(x < math.sqrt(torch.finfo(x.dtype).eps) / 100, t * (1 - x / 2), -torch.expm1(-x) / rate)
