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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.training.infinite_width import InfiniteWidthPath

_CHUNK = 2**26
"""Bytes of psi at once."""

Factors = tuple[Tensor, Tensor, Tensor]
"""Of eta (modes,), of A and of B (modes, modes) in the form."""

Motion = Callable[[Tensor, Tensor, Tensor], Factors]
"""From g, phi (modes,) and psi (modes, modes) at one time: the factors."""


def drift(g: Tensor, phi: Tensor, psi: Tensor) -> Factors:
    """Factors of a drift H(t) - H(0)."""
    return phi, torch.outer(phi, phi), psi


def dntk(g: Tensor, phi: Tensor, psi: Tensor) -> Factors:
    """Factors of (dH + transpose) e at time t."""
    change = torch.outer(g, phi)
    return -g, -change - change.T, -change


def ddntk(g: Tensor, phi: Tensor, psi: Tensor) -> Factors:
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

    def __add__(self, other: "DriftForms") -> "DriftForms":
        """The forms of the sums, of parts of one covariance X."""
        parts = (getattr(self, name) + getattr(other, name) for name in ("C", "A", "B", "X"))
        return DriftForms(self.scale, *parts)

    def moments(self, path: InfiniteWidthPath, steps: Tensor, motion: Motion = drift) -> tuple[Tensor, Tensor]:
        """Mean and variance over initializations, (T, forms) each."""
        return self.moments_of(path, times(path, steps, motion))

    def moments_of(self, path: InfiniteWidthPath, factors: Iterable[Factors]) -> tuple[Tensor, Tensor]:
        """Mean and variance over initializations for given factors, (T, forms) each."""
        K, Y, G, n_L = path.K_modes, path.target_gram, path.error_gram, path.outputs
        diagonal = self.C.diagonal(dim1=1, dim2=2)
        means, variances = [], []
        for phi, pp, psi in factors:
            M, moved = self.quadratic(pp, psi), phi[:, None] * self.C
            MK, MY = M @ K, M @ Y
            apart, outer = MK - moved / 2, torch.outer(phi, phi) * G
            means.append((M * G).sum((1, 2)) - n_L * diagonal @ phi)
            same = 2 * _trace(apart, apart) + _trace(moved, moved) / 2 - 2 * (MK.mT * moved).sum((1, 2))
            variances.append((self.X * outer).sum((1, 2)) + n_L * same + 4 * _trace(MK - moved, MY))
        return self.scale * torch.stack(means), self.scale**2 * torch.stack(variances).clamp_min(0.0)

    def conditional_moments(
        self, path: InfiniteWidthPath, factors: Iterable[Factors], z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance over networks with given training outputs at initialization.

        Args:
            path: The path at infinite width.
            factors: One time after the other.
            z: In modes, (draws, modes, n_L).

        Returns:
            (T, draws, forms) each.
        """
        a = z - path.y
        to_z = self.C @ torch.linalg.pinv(path.K_modes, hermitian=True)
        left = (self.X - to_z @ self.C.mT).flatten(1)
        squares, crossed = (a @ a.mT).flatten(1), (a @ z.mT).flatten(1)
        means, variances = [], []
        for phi, pp, psi in factors:
            linear = crossed @ (phi[:, None] * to_z).flatten(1).T
            means.append(squares @ self.quadratic(pp, psi).flatten(1).T - linear)
            variances.append(squares @ (torch.outer(phi, phi).flatten() * left).T)
        return self.scale * torch.stack(means), self.scale**2 * torch.stack(variances).clamp_min(0.0)

    def quadratic(self, pp: Tensor, psi: Tensor) -> Tensor:
        """M at one time, (forms, modes, modes)."""
        M = pp * self.A + psi * self.B
        return (M + M.mT) / 2


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
            M1, M2 = self._quadratic(pp, psi)
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

    def _quadratic(self, pp: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """M1 and M2 at one time, (pairs, modes, modes)."""
        M1 = pp * self.Cpp + psi * self.Cqq
        return (M1 + M1.mT) / 2, pp * self.Cij + psi * self.Sij + (psi * self.Sji).mT

    def left_by_outputs(self, inverse: Tensor, weights: Tensor, outputs: int) -> Tensor:
        """Covariance of eta given z, summed over outputs and pairs, (modes, modes)."""
        al, be, ga = self.alpha, self.beta, self.gamma
        known = outputs * sum(part @ inverse @ part.mT for part in (al, be, ga))
        known = known + 2 * (ga @ inverse @ (al + be).mT + al @ inverse @ be.mT)
        return torch.tensordot(weights, self.X - known, 1)

    def conditional_mean_squares(self, path: InfiniteWidthPath, factors: Factors, z: Tensor, weights: Tensor) -> Tensor:
        """E sum_ij D_ij^2 of networks with given training outputs at initialization, summed over pairs.

        Args:
            path: The path at infinite width.
            factors: Of one time.
            z: In modes, (draws, modes, n_L).
            weights: (pairs,).

        Returns:
            (draws,).
        """
        phi, pp, psi = factors
        M1, M2 = self._quadratic(pp, psi)
        inverse = torch.linalg.pinv(path.K_modes, hermitian=True)
        al, be, ga = self.alpha, self.beta, self.gamma
        # E[eta_ijk|z] = delta_ij ga s_k + delta_jk al s_i + delta_ik be s_j with s = K^-1 z
        s, a, n = inverse @ z, z - path.y, path.outputs
        v = phi[:, None] * a
        total = torch.einsum("mn,dmk,dnk->d", self.left_by_outputs(inverse, weights, n), v, v)
        common = (a @ a.mT).flatten(1) @ M1.flatten(1).T - (v @ s.mT).flatten(1) @ ga.flatten(1).T  # (draws, pairs)
        # Single precision, 1e-6 of a sum of squares, and all pairs at once: this is most of the work of a visit.
        a, s, v = a.float(), s.float(), v.float()
        size = max(1, _CHUNK // (4 * a.numel()))
        for some in torch.arange(len(weights), device=a.device).split(size):
            bent = applied_to(M2[some], a) - phi.float()[:, None, None] * applied_to(be[some], s)
            D = (a.mT @ bent.flatten(2)).unflatten(2, (len(some), n))  # (draws, i, pairs, j)
            D = D - (v.mT @ applied_to(al[some], s).flatten(2)).unflatten(2, (len(some), n)).transpose(1, 3)
            D = D.permute(0, 2, 1, 3) + common[:, some, None, None].float() * torch.eye(n, device=a.device)
            total = total + D.square().sum((2, 3)).to(total) @ weights[some]
        return self.scale**2 * total.clamp_min(0.0)


def applied_to(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(pairs, modes, modes) applied to (draws, modes, n), in single precision: (draws, modes, pairs, n)."""
    pairs, modes, _ = matrices.shape
    draws, _, n = vectors.shape
    stacked = matrices.float().transpose(0, 1).reshape(modes * pairs, modes)
    together = stacked @ vectors.transpose(0, 1).reshape(modes, draws * n)  # one product, not one for every draw
    return together.reshape(modes, pairs, draws, n).permute(2, 0, 1, 3)


def interval(path: InfiniteWidthPath, start: float, end: float) -> Factors:
    """Compute the factors of the change to first order along the displacement from one step to another.

    The displacement is linear in a by phi(end) - phi(start), and quadratic by the same difference of psi; at its start
    the derivative has moved by phi(start).

    Args:
        path: The path at infinite width.
        start: The earlier step, at which the derivative is taken.
        end: The later step.

    Returns:
        The factors.
    """
    steps = torch.tensor([start, end], dtype=path.K.dtype, device=path.K.device)
    _, phi, psi, _ = path.double(steps)
    moved = phi[1] - phi[0]
    before = torch.outer(moved, phi[0])
    return moved, before + before.mT, psi[1] - psi[0]


def times(path: InfiniteWidthPath, steps: Tensor, motion: Motion) -> Iterator[Factors]:
    """Factors of eta, A and B, one time after the other."""
    for some in steps.split(max(1, _CHUNK // (8 * max(1, len(path.eigenvalues)) ** 2))):
        g, phi, psi, _ = path.double(some)
        yield from (motion(*at) for at in zip(g, phi, psi, strict=True))


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((1, 2))


def _trace(first: Tensor, second: Tensor) -> Tensor:
    """Trace of a product."""
    return (first * second.mT).sum((1, 2))
