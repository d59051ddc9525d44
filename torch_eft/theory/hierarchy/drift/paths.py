"""One network's drift given its outputs at initialization, under any loss and on minibatches.

Where e = dLoss/dz is not linear in z(0), the law of ``law`` has no closed form over seeds; given z(0) it has.
Parameters move by J p + (dJ . J) q, with p and q the optimizer's coefficients of gradients e and e p along the path at
infinite width, so that a drift is (derived here, as in ``law``, where p = -phi a and q = psi a a)

    F = scale { sum_k eta_k . p_k + <A, sum_k p_k p_k^T> + <B, sum_k q_kk> },
    eta_k given z is normal with mean C K^-1 z_k and covariance X - C K^-1 C^T.

The law over seeds is the mixture over draws of z(0).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from torch_eft.results.progress.work import worked
from torch_eft.results.training import Training
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.hierarchy.drift.law import DriftForms, FullKernelForms, applied_to
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width
from torch_eft.theory.training.infinite_width import FrozenModes
from torch_eft.theory.training.optimizer import SGDState, loss_of, sharpness

_CHUNK = 2**28
"""Bytes of one chunk of draws."""
_PAIRS_OF_OUTPUTS = 8
"""Single-precision arrays over two training points and two outputs that are alive at once."""
_STARTS = 8
"""Draws at which the stability bound is looked at."""


@dataclass(frozen=True)
class Moved:
    """What a change of a kernel is made of, for each network, in the modes of the NTK.

    Args:
        linear: Along which the dNTK is taken, (S, modes, n_L).
        squares: What multiplies A, summed over equal outputs, (S, modes, modes).
        q: What multiplies B, likewise.
        squares_full: With every two outputs, (S, modes, n_L, modes, n_L); None if not asked for.
        q_full: Likewise.
    """

    linear: Tensor
    squares: Tensor
    q: Tensor
    squares_full: Tensor | None = None
    q_full: Tensor | None = None


@dataclass(frozen=True)
class Coefficients:
    """Where networks are at one step: p and e (S, modes, n_L), q as in ``Moved``."""

    p: Tensor
    e: Tensor
    q: Tensor
    q_full: Tensor | None

    def drift(self) -> Moved:
        """Of H(t) - H(0)."""
        full = None if self.q_full is None else _outer(self.p, self.p)
        return Moved(self.p, self.p @ self.p.mT, self.q, full, self.q_full)

    def dntk(self) -> Moved:
        """Of (dH + transpose) e at time t."""
        e, p, crossed = self.e, self.p, self.e @ self.p.mT
        if self.q_full is None:
            return Moved(e, crossed + crossed.mT, crossed)
        full = _outer(e, p)
        return Moved(e, crossed + crossed.mT, crossed, full + _outer(p, e), full)

    def ddntk(self) -> Moved:
        """Of (ddI + transpose + 2 ddII) e e at time t."""
        squares, nothing = 2 * self.e @ self.e.mT, torch.zeros_like(self.q)
        if self.q_full is None:
            return Moved(torch.zeros_like(self.e), squares, nothing)
        full = 2 * _outer(self.e, self.e)
        return Moved(torch.zeros_like(self.e), squares, nothing, full, torch.zeros_like(full))


class DrawnTraining(FrozenModes):
    """Training of an ensemble at infinite width from given outputs at initialization, step by step.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, as the loss takes them.
        x_probe: Probe inputs, (N_p, n_0).
        training: The training.

    Raises:
        ValueError: If shapes do not fit, or the learning rate is beyond the stability bound.
    """

    def __init__(
        self, ensemble: MLPEnsemble, x_train: Tensor, y_train: Tensor, x_probe: Tensor, training: Training
    ) -> None:
        x_train = check_inputs("x_train", x_train, ensemble)
        x_probe = check_inputs("x_probe", x_probe, ensemble).to(x_train.device)
        training.check_batches(len(x_train))
        outputs = ensemble.widths[-1]
        self.ensemble, self.x_train, self.x_probe, self.training = ensemble, x_train, x_probe, training
        self.x = torch.cat([x_probe, x_train])
        self.loss = loss_of(training, y_train.to(x_train.device), len(x_train), outputs)
        self.layers = infinite_width(ensemble, self.x)
        super().__init__(self.layers[0][-1], self.layers[1][-1], len(x_train), outputs)
        self.inverse = torch.linalg.pinv(self.K_modes, hermitian=True)
        if training.steps:
            Theta = self.Theta[self.train][:, self.train]
            starts, batches = self.draw(_STARTS, 0), training.different_batches()
            training.check_stable(
                max(sharpness(self.loss, z, Theta, batch) for z in starts for batch in batches), "at infinite width"
            )

    def check_memory(self, memory: int) -> None:
        """Refuse what does not fit: arrays over two training points and two outputs of a single draw."""
        points = len(self.x_train)
        needed = 4 * _PAIRS_OF_OUTPUTS * (points * self.outputs) ** 2
        if needed > memory:
            raise ValueError(
                f"x_train: {points} points with {self.outputs} outputs need about {needed / 2**30:.1f} GiB for one "
                f"draw of z(0), memory allows {memory / 2**30:.1f} GiB; give fewer points or more memory"
            )

    def draw(self, count: int, seed: int) -> Tensor:
        """Draws of z(0) on the training points, in pairs z, -z, (count, N, n_L)."""
        values, vectors = torch.linalg.eigh(self.K[self.train][:, self.train])
        root = vectors * values.clamp_min(0.0).sqrt()
        generator = torch.Generator(root.device).manual_seed(seed)
        shape = ((count + 1) // 2, len(root), self.outputs)
        z = root @ torch.randn(shape, generator=generator, dtype=root.dtype, device=root.device)
        return torch.stack([z, -z], 1).flatten(0, 1)[:count]

    def chunks(self, z: Tensor, full: bool) -> Iterator[Tensor]:
        """Draws, few enough for their arrays to fit."""
        modes = len(self.eigenvalues)
        pairs = 4 * _PAIRS_OF_OUTPUTS * (modes * self.outputs) ** 2 if full else 0
        yield from z.split(max(1, _CHUNK // max(1, pairs + 8 * _PAIRS_OF_OUTPUTS * modes * (modes + self.outputs))))

    def walk(self, z: Tensor, steps: Collection[int], full: bool) -> Iterator[tuple[int, Coefficients]]:
        """The coefficients at the wanted steps.

        Args:
            z: Outputs at initialization on the training points, (S, N, n_L).
            steps: Some steps.
            full: True for q of every two outputs.

        Yields:
            Steps, ascending, with their coefficients.
        """
        modes, n_L = len(self.eigenvalues), self.outputs
        starts = [z.new_zeros(len(z), modes, n_L), z.new_zeros(len(z), modes, modes)]
        if full:  # single precision, far below the error of draws, as they are most of the work
            starts.append(torch.zeros(len(z), modes, n_L, modes, n_L, dtype=torch.float32, device=z.device))
        state, seen = SGDState(self.training, *starts), self.coupling[self.probes :]
        for step in range(max(steps) + 1):
            p, q, *rest = state.values
            e = self.U.T @ self._errors(z + seen @ p, step)
            if step in steps:
                yield step, Coefficients(p, e, q, rest[0] if full else None)
            if step < max(steps):
                state.update(e, e @ p.mT, *([_outer(e, p)] if full else []))
                worked(sum(value.numel() for value in state.values))

    def _errors(self, z: Tensor, step: int) -> Tensor:
        batch = self.training.batch(min(step, int(self.training.steps) - 1))
        found = vmap(lambda rows: self.loss.error(rows, batch))(z)
        assert isinstance(found, Tensor)
        return found


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Every two outputs, (S, modes, n_L, modes, n_L), in single precision."""
    return left.float()[:, :, :, None, None] * right.float()[:, None, None]


class GivenOutputs:
    """The law of several drifts given z, of which p, e and q follow.

    Args:
        form: The quadratic forms.
        inverse: Inverse of K in the modes.
    """

    def __init__(self, form: DriftForms, inverse: Tensor) -> None:
        to_z = form.C @ inverse
        self._scale, left = form.scale, form.X - to_z @ form.C.mT
        self._to_z, self._left, self._A, self._B = (part.flatten(1).T for part in (to_z, left, form.A, form.B))

    def moments(self, z: Tensor, moved: Moved) -> tuple[Tensor, Tensor]:
        """Mean and variance, (S, forms) each, of networks with outputs z in modes, (S, modes, n_L)."""
        linear = (moved.linear @ z.mT).flatten(1) @ self._to_z
        mean = linear + moved.squares.flatten(1) @ self._A + moved.q.flatten(1) @ self._B
        variance = (moved.linear @ moved.linear.mT).flatten(1) @ self._left
        return self._scale * mean, self._scale**2 * variance.clamp_min(0.0)


class FullGivenOutputs:
    """The same of the NTK with every two outputs: the expected squared norm, summed over pairs of probe points.

    Args:
        form: The forms.
        inverse: Inverse of K in the modes.
        weights: Of the pairs of probe points, (pairs,).
        outputs: n_L.
    """

    def __init__(self, form: FullKernelForms, inverse: Tensor, weights: Tensor, outputs: int) -> None:
        self._form, self._inverse, self._weights, self._outputs = form, inverse, weights, outputs
        self._left = form.left_by_outputs(inverse, weights, outputs)

    def mean_squares(self, z: Tensor, moved: Moved) -> Tensor:
        """E sum_ij D_ij^2, (S,)."""
        assert moved.squares_full is not None and moved.q_full is not None
        form, v, s = self._form, moved.linear, self._inverse @ z
        total = torch.einsum("mn,dmk,dnk->d", self._left, v, v)
        common = (v @ s.mT).flatten(1) @ form.gamma.flatten(1).T  # (S, pairs)
        common = common + moved.squares.flatten(1) @ form.Cpp.flatten(1).T + moved.q.flatten(1) @ form.Cqq.flatten(1).T
        one = torch.eye(self._outputs, device=v.device)[:, :, None]
        v, s = v.float(), s.float()
        # (S, i, j, pairs): E[D_ij | z]
        D = _with_outputs(moved.squares_full, form.Cij) + _with_outputs(moved.q_full, form.Sij)
        D = D + _with_outputs(moved.q_full, form.Sji).transpose(1, 2) + common[:, None, None].float() * one
        D = D + self._along(v, form.beta, s) + self._along(v, form.alpha, s).transpose(1, 2)
        total = total + D.square().sum((1, 2)).to(total) @ self._weights
        return form.scale**2 * total.clamp_min(0.0)

    def _along(self, v: Tensor, matrices: Tensor, s: Tensor) -> Tensor:
        """v_i . matrix s_j, (S, i, j, pairs)."""
        applied = (v.mT @ applied_to(matrices, s).flatten(2)).unflatten(2, (len(matrices), self._outputs))
        return applied.transpose(2, 3)


def _with_outputs(full: Tensor, matrices: Tensor) -> Tensor:
    """Sum over both modes, (S, i, j, pairs)."""
    flat = full.permute(0, 2, 4, 1, 3).flatten(3)
    worked(flat.numel() * len(matrices))
    return flat @ matrices.float().flatten(1).T
