"""The law of what one network's training changes, at leading order: a quadratic form of Gaussian variables.

(z(0), n dH) is to leading order one centred Gaussian field, and along the path at infinite width the parameters move by
a part linear and a part quadratic in a = z(0) - y. A drift, or any sum of drifts, is therefore (derived here)

    F = scale sum_k { - eta_k . Phi a_k + a_k . M a_k },        (z_k, eta_k), k = 1 .. n_L, independent and Gaussian,
    Cov(z, z) = K    Cov(eta_c, z_d) = C_cd    Cov(eta_c, eta_d) = X_cd    M = sym { phi A phi + psi o B },

in modes of Theta on the training points, phi and psi of ``time_sums``, whatever the optimizer. By Wick's theorem, with
Y = y y^T and G = n_L K + Y,

    E F / scale = - n_L tr(Phi C) + tr(M G)
    Var F / scale^2 = <Phi X Phi, G> + n_L { 2 tr[(M K - Phi C / 2)^2] + tr[(Phi C)^2] / 2 - 2 tr(M C^T Phi K) }
                      + 4 <M K M - Phi C M, Y>.

With e = g a the dNTK along the gradient, (dH + transpose) e, is minus the rate of change of the drift under gradient
flow, at the parameters reached by any optimizer: the same form with derivatives of phi and psi; the ddNTK along it has
M alone (``Motion``).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.training.infinite_width import InfiniteWidthPath

_CHUNK = 2**26
"""Bytes of psi at once."""

Motion = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From g, phi (modes,) and psi (modes, modes) at one time: the factors of eta, of A and of B in the form."""


def drift(g: Tensor, phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of a drift H(t) - H(0)."""
    return phi, torch.outer(phi, phi), psi


def dntk(g: Tensor, phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of (dH + transpose) e at time t."""
    change = torch.outer(g, phi)
    return -g, -change - change.T, -change


def ddntk(g: Tensor, phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of (ddI + transpose + 2 ddII) e e at time t."""
    return torch.zeros_like(g), 2 * torch.outer(g, g), torch.zeros_like(psi)


@dataclass(frozen=True)
class DriftForms:
    """The quadratic forms of several drifts.

    Args:
        scale: What multiplies the forms.
        C: Cov(eta, z), (forms, modes, modes).
        A: The part of M on phi phi, likewise.
        B: The part of M on psi.
        X: Cov(eta, eta).
    """

    scale: float
    C: Tensor
    A: Tensor
    B: Tensor
    X: Tensor

    def moments(self, path: InfiniteWidthPath, steps: Tensor, motion: Motion = drift) -> tuple[Tensor, Tensor]:
        """Mean and variance over initializations, (T, forms) each."""
        K, Y, G, n_L = path.K_modes, path.target_gram, path.error_gram, path.outputs
        diagonal = self.C.diagonal(dim1=1, dim2=2)
        means, variances = [], []
        for phi, pp, psi in times(path, steps, motion):
            M, moved = self.quadratic(pp, psi), phi[:, None] * self.C
            MK, MY = M @ K, M @ Y
            apart, outer = MK - moved / 2, torch.outer(phi, phi) * G
            means.append((M * G).sum((1, 2)) - n_L * diagonal @ phi)
            same = 2 * _trace(apart, apart) + _trace(moved, moved) / 2 - 2 * (MK.mT * moved).sum((1, 2))
            variances.append((self.X * outer).sum((1, 2)) + n_L * same + 4 * _trace(MK - moved, MY))
        return self.scale * torch.stack(means), self.scale**2 * torch.stack(variances).clamp_min(0.0)

    def conditional_moments(self, path: InfiniteWidthPath, steps: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over networks with the training outputs z at initialization.

        Args:
            path: The path at infinite width.
            steps: (T,).
            z: In modes, (modes, n_L).

        Returns:
            (T, forms) each.
        """
        a = z - path.y
        to_z = self.C @ torch.linalg.pinv(path.K_modes, hermitian=True)
        left = self.X - to_z @ self.C.mT
        means, variances = [], []
        for phi, pp, psi in times(path, steps, drift):
            moved = phi[:, None] * a
            means.append(((self.quadratic(pp, psi) @ a) * a - (to_z @ z) * moved).sum((1, 2)))
            variances.append(((left @ moved) * moved).sum((1, 2)))
        return self.scale * torch.stack(means), self.scale**2 * torch.stack(variances).clamp_min(0.0)

    def quadratic(self, pp: Tensor, psi: Tensor) -> Tensor:
        """M at one time, (forms, modes, modes)."""
        M = pp * self.A + psi * self.B
        return (M + M.mT) / 2

    def draws(self, path: InfiniteWidthPath, step: Tensor, count: int, seed: int) -> Tensor:
        """Draws of the law at one time, each form by itself, (count, forms)."""
        generator = torch.Generator(self.C.device).manual_seed(seed)
        ((phi, pp, psi),) = times(path, step.reshape(1), drift)
        M, modes, n_L = self.quadratic(pp, psi), len(phi), path.outputs
        K = path.K_modes.expand_as(self.C)
        joint = torch.cat([torch.cat([K, self.C.mT], 2), torch.cat([self.C, self.X], 2)], 1)
        values, vectors = torch.linalg.eigh((joint + joint.mT) / 2)
        root = vectors * values.clamp_min(0.0).sqrt()[:, None, :]  # sampled moments: tiny negative eigenvalues
        found = []
        for factor, form in zip(root, M, strict=True):
            u = torch.randn(2 * modes, count * n_L, generator=generator, dtype=form.dtype, device=form.device)
            z, eta = (factor @ u).reshape(2, modes, count, n_L)
            a = z - path.y[:, None, :]
            quadratic = torch.einsum("mdk,mn,ndk->d", a, form, a)
            found.append(self.scale * (quadratic - (eta * phi[:, None, None] * a).sum((0, 2))))
        return torch.stack(found, 1)


@dataclass(frozen=True)
class FullKernelForms:
    """What the drift of the NTK of every pair of outputs takes beyond its mean over outputs.

    With n D_ij = - sum_kc eta_ijk;c phi_c a_kc + delta_ij sum_k a_k M1 a_k + a_i M2 a_j and
    E[eta_ijk;c z_k'd] = delta_ij delta_kk' gamma + delta_ik delta_jk' .. (alpha, beta), X the covariance of eta summed
    over i and j.

    Args:
        scale: 1 / n.
        alpha: P(xycd) + Q(ycxd), (pairs, modes, modes), as all that follow.
        beta: P(yxcd) + Q(xcyd).
        gamma: Q(xycd) + Q(yxcd).
        Cpp: Of M1, on phi phi.
        Cqq: Of M1, on psi.
        Cij: Of M2, on phi phi.
        Sij: Of M2, on psi.
        Sji: Of M2 transposed, on psi.
        X: Covariance.
    """

    scale: float
    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    Cpp: Tensor
    Cqq: Tensor
    Cij: Tensor
    Sij: Tensor
    Sji: Tensor
    X: Tensor

    def mean_squares(self, path: InfiniteWidthPath, steps: Tensor, motion: Motion = drift) -> Tensor:
        """E sum_ij D_ij^2, (T, pairs)."""
        K, Y, G, n = path.K_modes, path.target_gram, path.error_gram, path.outputs
        al, be, ga = self.alpha, self.beta, self.gamma
        found = []
        for phi, pp, psi in times(path, steps, motion):
            M1 = pp * self.Cpp + psi * self.Cqq
            M1 = (M1 + M1.mT) / 2
            M2 = pp * self.Cij + psi * self.Sij + (psi * self.Sji).mT
            M2s = (M2 + M2.mT) / 2
            al_, be_, ga_ = (phi[:, None] * part for part in (al, be, ga))
            C = al_ + be_ + n * ga_
            trace = C.diagonal(dim1=1, dim2=2).sum(1)
            GM2, M2G, M1K, M2K = G @ M2, M2 @ G, M1 @ K, M2 @ K
            on_K, on_Y, on_G = (_inner(M2, part) for part in (K, Y, G))
            M1_G, M2sK, M1Y = _inner(M1, G), M2s @ K, M1 @ Y
            linear = (self.X * (torch.outer(phi, phi) * G)).sum((1, 2)) + n * trace**2
            linear = linear + n * (_trace(al_, al_) + 2 * _trace(al_, ga_) + _trace(be_, be_) + 2 * _trace(be_, ga_))
            linear = linear + n**2 * (2 * _trace(al_, be_) + _trace(ga_, ga_))
            mixed = trace * (n * M1_G + on_G) + 2 * _inner(C, (M1 @ G).mT)
            mixed = mixed + _inner(n * al_ + be_ + ga_, M2G.mT) + _inner(al_ + n * be_ + ga_, GM2)
            square = n * (2 * n * _trace(M1K, M1K) + 4 * _trace(M1K, M1Y) + M1_G**2)
            square = square + 2 * (
                2 * n * _trace(M1K, M2sK) + 2 * (_trace(M1K, M2s @ Y) + _trace(M2sK, M1Y)) + M1_G * on_G
            )
            square = square + _inner(GM2, M2G) + n * on_K**2 + 2 * on_K * on_Y
            square = square + n * _trace(M2K, M2K) + 2 * _trace(M2 @ Y, M2K)
            found.append(linear - 2 * mixed + square)
        return self.scale**2 * torch.stack(found).clamp_min(0.0)


def times(path: InfiniteWidthPath, steps: Tensor, motion: Motion) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Factors of eta, A and B, one time after the other."""
    for some in steps.split(max(1, _CHUNK // (8 * max(1, len(path.eigenvalues)) ** 2))):
        g, phi, psi, _ = path.double(some)
        yield from (motion(*at) for at in zip(g, phi, psi, strict=True))


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((1, 2))


def _trace(first: Tensor, second: Tensor) -> Tensor:
    """Trace of a product."""
    return (first * second.mT).sum((1, 2))
