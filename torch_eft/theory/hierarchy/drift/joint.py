"""The joint law of the drifts of all pairs of probe points: draws of norms, and the component along a direction.

Each drift is a quadratic form of its own eta (``law``); the eta of two pairs of points are correlated by the dNTK's
covariance at six labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.hierarchy.drift.law import DriftForms, drift, times
from torch_eft.theory.training.infinite_width import InfiniteWidthPath


@dataclass(frozen=True)
class JointForms:
    """The forms of all pairs of probe points, with the covariances between them.

    Args:
        forms: One by one.
        X: Cov(eta, eta) of all pairs, (pairs, pairs, modes, modes).
        weights: (pairs,), 1 on the diagonal and 2 beside it, where a pair stands for two entries.
    """

    forms: DriftForms
    X: Tensor
    weights: Tensor

    def along(self, path: InfiniteWidthPath, steps: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the component along a symmetric matrix at every time.

        Args:
            path: The path at infinite width.
            steps: (T,).
            directions: (T, pairs), entries of matrices of norm 1.

        Returns:
            (T,) each.
        """
        forms, means, variances = self.forms, [], []
        for step, direction in zip(steps, directions, strict=True):
            w = self.weights * direction
            C, A, B = (torch.tensordot(w, part, 1)[None] for part in (forms.C, forms.A, forms.B))
            X = torch.tensordot(w, torch.tensordot(w, self.X, 1), 1)[None]
            mean, variance = DriftForms(forms.scale, C, A, B, X).moments(path, step.reshape(1))
            means.append(mean[0, 0])
            variances.append(variance[0, 0])
        return torch.stack(means), torch.stack(variances)

    def norms(self, path: InfiniteWidthPath, steps: Tensor, count: int, seed: int) -> Tensor:
        """Draws of the Frobenius norm at every time, the same networks at all, (T, count)."""
        generator = torch.Generator(self.X.device).manual_seed(seed)
        forms, modes = self.forms, len(path.eigenvalues)
        pairs = len(forms.C)
        joint = path.K_modes.new_empty((pairs + 1) * modes, (pairs + 1) * modes)
        joint[:modes, :modes] = path.K_modes
        joint[modes:, :modes] = forms.C.flatten(0, 1)
        joint[:modes, modes:] = joint[modes:, :modes].T
        joint[modes:, modes:] = self.X.transpose(1, 2).reshape(pairs * modes, pairs * modes)
        values, vectors = torch.linalg.eigh((joint + joint.T) / 2)
        root = vectors * values.clamp_min(0.0).sqrt()  # sampled moments leave small negative ones
        squares, linear = joint.new_zeros(count, modes, modes), joint.new_zeros(count, pairs, modes)
        for k in range(path.outputs):
            u = torch.randn(count, len(root), generator=generator, dtype=root.dtype, device=root.device)
            z, eta = (u @ root.T).split([modes, pairs * modes], 1)
            a = z - path.y[:, k]
            squares += a[:, :, None] * a[:, None, :]
            linear += eta.reshape(count, pairs, modes) * a[:, None, :]
        found = []
        for phi, pp, psi in times(path, steps, drift):
            D = squares.flatten(1) @ forms.quadratic(pp, psi).flatten(1).T - linear @ phi
            found.append(forms.scale * (D.square() @ self.weights).sqrt())
        return torch.stack(found)
