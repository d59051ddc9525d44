"""Sums over time along the path at infinite width, mode by mode, which its corrections take too.

With Theta_AA = U diag(lambda) U^T on the training points and e = z - y, every mode decays by itself (PDLT 10.1):
e_m(t) = g_m e_m(0). An optimizer that is linear in gradients moves a coefficient with gradient x(s) by
- W x, W x (t) = sum_{s<t} W(t, s) x(s): eta sum_{s<t} x(s) for gradient descent, the integral for gradient flow,
eta sum_s (1 - m^(t-s)) / (1 - m) x(s) for the heavy ball. In terms of it

    phi_m = W g_m        g_m = 1 - lambda_m phi_m        psi_cd = W (g_c phi_d)        f_mc = W (g_c - lambda_m f_mc)

f_mc, mode m driven by mode c, is the divided difference (g_c - g_m) / (lambda_m - lambda_c) (derived here).
Descent at one rate is summed by doubling the number of steps: positive terms below the critical learning rate
1 / lambda_max, so that nothing cancels at tiny eta lambda t or equal modes. Momentum and schedules go step by step.
"""

import math

import torch
from torch import Tensor

from torch_eft.results.progress.work import worked
from torch_eft.results.training import Training
from torch_eft.theory.gaussian.quadrature import gauss_legendre
from torch_eft.theory.training.optimizer import SGDState

Sums = tuple[Tensor, Tensor, Tensor, Tensor]
"""g, phi, (T, modes), psi and f, (T, modes, modes)."""

_LAST = 800.0
"""exp(-800) is 0 in double precision."""


def moving_modes(Theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigensystem of an NTK without its null modes.

    Null modes (inputs whose tangents depend linearly on one another) have eigenvalues of N eps lambda_max at most: the
    rounding of ``eigh`` and of Theta itself. No network of the ensemble moves along them; kept with their rounded
    eigenvalues they would let rounding grow with t, without bound at t = infinity. A mode that moves, of two inputs at
    a small distance d, has about d^2 lambda_max, so that only inputs closer than sqrt(N eps), 1e-7 or so of their size,
    are taken for one; of their difference probes feel at most sqrt(N eps) eta t lambda_max.

    Args:
        Theta: The NTK on the training points, (N, N).

    Returns:
        Eigenvalues (modes,), ascending, and eigenvectors (N, modes).

    Raises:
        ValueError: If there is none: the NTK is zero, or not finite.
    """
    eigenvalues, U = torch.linalg.eigh(Theta)
    kept = eigenvalues > len(Theta) * torch.finfo(Theta.dtype).eps * eigenvalues[-1]
    if not bool(kept.any()):
        raise ValueError(
            f"the ensemble's NTK on the training points is zero or not finite (largest eigenvalue "
            f"{float(eigenvalues[-1]):g}), so that nothing moves; look at lambda_b, lambda_W and the inputs"
        )
    return eigenvalues[kept], U[:, kept]


class ModePropagator:
    """g, phi, psi and f at any times.

    Args:
        eigenvalues: lambda > 0, (modes,), ascending.
        training: The training on L = (1/2) sum (z - y)^2 (``Training.summed``).
    """

    def __init__(self, eigenvalues: Tensor, training: Training) -> None:
        self.eigenvalues, self._training = eigenvalues, training
        rates = training.learning_rates[:1] if training.schedule is not None else (training.learning_rate,)
        self.rate = float(rates[0] or 0.0) if rates else 0.0
        self._reached: dict[bool, SGDState] = {}  # sums step by step, with those of pairs and without

    def single(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Decay g and phi, (T, modes); steps may be infinite at one rate."""
        g, phi, *_ = self._at(steps, pairs=False)
        return g, phi

    def double(self, steps: Tensor) -> Sums:
        """Decay g and phi, (T, modes); psi and f, (T, modes, modes)."""
        return self._at(steps, pairs=True)

    def _at(self, steps: Tensor, pairs: bool) -> Sums:
        if len(self.eigenvalues) == 0:  # nothing moves
            none = self.eigenvalues.new_zeros(len(steps), 0)
            return none, none, none[..., None], none[..., None]
        if self._training.flows:
            return self._flow(steps, pairs)
        return self._doubled(steps, pairs) if self._training.is_plain else self._stepped(steps, pairs)

    def _doubled(self, steps: Tensor, pairs: bool) -> Sums:
        factor = 1 - self.rate * self.eigenvalues
        slowest = float(-factor.abs().clamp(1e-300, 1 - 1e-16).log().max())
        count = torch.round(steps.double().clamp_max(math.ceil(_LAST / slowest))).long()
        modes, empty = len(self.eigenvalues), factor.new_zeros(0)
        shape = (len(steps), modes, modes) if pairs else (0,)
        done = (
            factor.new_ones(len(steps), modes),
            factor.new_zeros(len(steps), modes),
            factor.new_zeros(shape),
            factor.new_zeros(shape),
        )
        block = (
            factor,
            torch.full_like(factor, self.rate),
            factor.new_zeros(modes, modes) if pairs else empty,
            factor.new_full((modes, modes), self.rate) if pairs else empty,
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

    def _stepped(self, steps: Tensor, pairs: bool) -> Sums:
        """Coefficients with the gradients g, g_c phi_d and g_c - lambda_m f_mc, up to the last step."""
        rates, wanted = self.eigenvalues, torch.round(steps).long().tolist()
        coefficients = self._reached.get(pairs)
        if coefficients is None or coefficients.step > min(wanted):  # else on from where the last call ended
            starts = [torch.zeros_like(rates)]
            if pairs:
                starts += [rates.new_zeros(len(rates), len(rates)) for _ in range(2)]
            self._reached[pairs] = coefficients = SGDState(self._training, *starts)
        sums: dict[int, list[Tensor]] = {}
        for step in range(coefficients.step, max(wanted) + 1):
            phi, *others = (-value for value in coefficients.values)
            g = 1 - rates * phi
            if step in wanted:
                sums[step] = [g, phi, *others]
            if step < max(wanted):
                gradients = [g]
                if pairs:
                    gradients += [torch.outer(g, phi), g - rates[:, None] * others[1]]
                coefficients.update(*gradients)
                worked(sum(value.numel() for value in gradients))
        g, phi, *others = (torch.stack(parts) for parts in zip(*(sums[step] for step in wanted), strict=True))
        psi, f = others if pairs else (g, phi)
        return g, phi, psi, f

    def _flow(self, steps: Tensor, pairs: bool) -> Sums:
        slowest = self.rate * float(self.eigenvalues[0])
        steps = steps.to(self.eigenvalues)
        t = self.rate * (steps.clamp_max(_LAST / slowest) if slowest > 0 else steps)[:, None]
        g, phi = torch.exp(-self.eigenvalues * t), _exponential_integral(self.eigenvalues, t)
        if not pairs:
            return g, phi, g, phi
        first, second = self.eigenvalues[:, None], self.eigenvalues[None, :]
        t = t[:, :, None]
        total = first + second
        closed = (phi[:, :, None] - g[:, :, None] * phi[:, None, :]) / total
        # The difference cancels where the sum of both exponents is small: there a Gauss rule is exact.
        nodes, weights = gauss_legendre(12, t)
        summed = torch.zeros_like(closed)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            s = t * (1 + node) / 2
            summed += weight * t / 2 * torch.exp(-first * s) * _exponential_integral(second, s)
        f = torch.exp(-torch.minimum(first, second) * t) * _exponential_integral((first - second).abs(), t)
        return g, phi, torch.where(total * t < 1, summed, closed), f


def _joined(first: tuple[Tensor, ...], then: tuple[Tensor, ...], pairs: bool) -> Sums:
    """Join the sums over a stretch of time and over the one after it."""
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
