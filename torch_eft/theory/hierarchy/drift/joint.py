"""The joint law of the drifts of all pairs of probe points, as draws of networks, and along a direction.

Each drift is a quadratic form of its own eta (``law``); the eta of two pairs of points are correlated by the dNTK's
covariance at six labels. That of many probe points is large: pairs of some of them are drawn together, and the squared
norm of the whole is theirs times the ratio of the two expectations over all seeds, which are exact.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_eft.results.progress.work import worked
from torch_eft.theory.hierarchy.drift.law import (
    DriftForms,
    Factors,
    FullKernelForms,
    Motion,
    dntk,
    drift,
    interval,
    times,
)
from torch_eft.theory.training.infinite_width import FrozenModes, InfiniteWidthPath
from torch_eft.theory.training.time_sums import ModePropagator


@dataclass(frozen=True)
class JointForms:
    """The forms of all pairs of probe points, with the covariances between those of some points.

    Args:
        forms: One by one.
        weights: (pairs,), 1 on the diagonal and 2 beside it, where a pair stands for two entries.
        pairs: (some,), the pairs that are drawn together.
        X: Cov(eta, eta) of those, (some, some, modes, modes).
        reference: The norm of the kernel at infinite width.
    """

    forms: DriftForms
    weights: Tensor
    pairs: Tensor
    X: Tensor
    reference: Tensor
    _roots: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    @property
    def some(self) -> DriftForms:
        """The forms of the pairs that are drawn together."""
        forms, at = self.forms, self.pairs
        return DriftForms(forms.scale, forms.C[at], forms.A[at], forms.B[at], forms.X[at])

    def given_z(self, path: FrozenModes) -> tuple[Tensor, Tensor]:
        """The law of eta of the pairs drawn together, given z: a root of its covariance, and its mean as a map of z.

        Args:
            path: The modes of the frozen NTK.

        Returns:
            (some modes, some modes), the same for all z and computed once, and (some modes, modes).
        """
        if not self._roots:
            inverse = torch.linalg.pinv(path.K_modes, hermitian=True)
            C = self.some.C.flatten(0, 1)
            left = self.X.transpose(1, 2).flatten(2).flatten(0, 1) - C @ inverse @ C.T
            values, vectors = torch.linalg.eigh((left + left.T) / 2)
            root = vectors * values.clamp_min(0.0).sqrt()  # sampled moments leave small negative ones
            self._roots.append((root, C @ inverse))
            worked(5 * len(left) ** 3)
        return self._roots[0]

    def along(self, path: InfiniteWidthPath, steps: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the component along a symmetric matrix at every time, of all pairs drawn together.

        Args:
            path: The path at infinite width.
            steps: (T,).
            directions: (T, pairs), entries of matrices of norm 1.

        Returns:
            (T,) each.
        """
        means, variances = [], []
        for step, direction in zip(steps, directions, strict=True):
            mean, variance = self.contracted(direction).moments(path, step.reshape(1))
            means.append(mean[0, 0])
            variances.append(variance[0, 0])
        return torch.stack(means), torch.stack(variances)

    def contracted(self, direction: Tensor) -> DriftForms:
        """The form of the component along a symmetric matrix, its entries (pairs,), of all pairs drawn together."""
        forms, w = self.some, self.weights[self.pairs] * direction
        C, A, B = (torch.tensordot(w, part, 1)[None] for part in (forms.C, forms.A, forms.B))
        return DriftForms(forms.scale, C, A, B, torch.tensordot(w, torch.tensordot(w, self.X, 1), 1)[None])


class _Drawn:
    """Networks drawn from the law of one kernel's drift.

    Args:
        joint: The law.
        path: The path at infinite width.
        z: Training outputs at initialization, in modes, (draws, modes, n_L).
        generator: Of what z does not determine.
    """

    def __init__(self, joint: JointForms, path: InfiniteWidthPath, z: Tensor, generator: torch.Generator) -> None:
        self._joint, self._path = joint, path
        modes, a = z.shape[1], z - path.y
        root, explained = joint.given_z(path)
        self._linear = z.new_zeros(len(z), len(joint.pairs), modes)
        for k in range(path.outputs):
            u = torch.randn(len(z), len(root), generator=generator, dtype=z.dtype, device=z.device)
            eta = u @ root.T + z[:, :, k] @ explained.T
            self._linear += eta.unflatten(1, (-1, modes)) * a[:, None, :, k]
            worked(len(z) * root.numel())
        self._squares = a @ a.mT

    def entries(self, factors: Factors) -> Tensor:
        """Drifts of the pairs drawn together, (draws, pairs)."""
        first, pp, psi = factors
        forms = self._joint.some
        return forms.scale * (self._squares.flatten(1) @ forms.quadratic(pp, psi).flatten(1).T - self._linear @ first)

    def squares(self, factors: Factors) -> Tensor:
        """Squared norms, of all pairs, (draws,)."""
        joint = self._joint
        found = self.entries(factors).square() @ joint.weights[joint.pairs]
        if len(joint.pairs) == len(joint.weights):
            return found
        mean, variance = (part[0] for part in joint.forms.moments_of(self._path, [factors]))
        expected = joint.weights * (mean.square() + variance)
        part = expected[joint.pairs].sum()
        return found * torch.where(part > 0, expected.sum() / torch.where(part > 0, part, 1.0), 0.0)

    def expected(self, factors: Factors, z: Tensor) -> Tensor:
        """Expected squared norms given z (draws, modes, n_L), of all pairs, (draws,)."""
        mean, variance = self._joint.forms.conditional_moments(self._path, [factors], z)
        return (mean.square() + variance)[0] @ self._joint.weights


class NetworkDraws:
    """Networks drawn from the law of what their training changes: the same networks at all times and in all kernels.

    The drifts of a kernel averaged over outputs are drawn from their law. Of the NTK with all pairs of outputs, the
    squared norm of what is beyond that average has its exact mean given z(0), and is taken to fluctuate given z(0) as a
    chi squared of n_L (n_L + 1) / 2 - 1 degrees, one for each further pair of outputs: for two outputs, where this
    matters most, quantiles are right to 2 % of the networks. Given z(0) kernels of different layers are drawn
    independently.

    Args:
        joint: ``{(observable, layer): law}``, ``"output"``, ``"diagonal"``, ``"activations"`` or ``"ntk"``.
        full: Of the NTK with all pairs of outputs.
        path: The path at infinite width.
        z: Training outputs at initialization, (draws, N, n_L).
        seed: Seed.

    Attributes:
        layers: Numbers of the hidden layers.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
        >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
        >>> networks = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=4).draws(100)
        >>> isinstance(networks, theory.NetworkDraws), networks.layers
        (True, [1, 2])
    """

    def __init__(
        self,
        joint: dict[tuple[str, int], JointForms],
        full: FullKernelForms,
        path: InfiniteWidthPath,
        z: Tensor,
        seed: int,
    ) -> None:
        generator = torch.Generator(path.K.device).manual_seed(seed)
        self._z = path.U.T @ z
        self._starts = self._z[:1] if bool((z == z[:1]).all()) else self._z  # one, where all networks start alike
        self._joint, self._full, self._path = joint, full, path
        self._drawn = {key: _Drawn(law, path, self._z, generator) for key, law in joint.items()}
        (self._output,) = (key for key in joint if key[0] == "output")
        self.layers = [layer for observable, layer in joint if observable == "activations"]
        a = self._z - path.y
        self._squares = a @ a.mT
        shape = len(z), max(1, path.outputs * (path.outputs + 1) // 2 - 1)
        normal = torch.randn(shape, generator=generator, dtype=path.K.dtype, device=path.K.device)
        self._beyond = normal.square().mean(1)
        start = torch.zeros(1, dtype=path.K.dtype, device=path.K.device)
        self._latest: tuple[float, Motion, Factors] = (0.0, drift, next(times(path, start, drift)))

    def ntk_drift(self, step: float, *, full: bool = False) -> Tensor:
        """|H(t) - H(0)| / |H| with H at infinite width, (draws,); averaged over outputs, or ``full``."""
        return self._relative(self._factors(step), full)

    def diagonal_drift(self, step: float) -> Tensor:
        """Drift of the mean of the NTK's diagonal, (draws,)."""
        (key,) = (key for key in self._joint if key[0] == "diagonal")
        return self._drawn[key].entries(self._factors(step))[:, 0]

    def hidden_change(self, layer: int, step: float, *, ntk: bool = False) -> Tensor:
        """Relative change of the kernel of a hidden layer, or of its NTK, (draws,)."""
        key = ("ntk" if ntk else "activations", layer)
        return self._drawn[key].squares(self._factors(step)).sqrt() / self._joint[key].reference

    def along_displacement(self, start: float, end: float, *, full: bool = False) -> tuple[Tensor, Tensor]:
        """Sizes of dNTK and ddNTK along the displacement from one step to another, as measured at its start.

        Args:
            start: The earlier step.
            end: The later step.
            full: With all pairs of outputs.

        Returns:
            Relative change of the NTK per rms motion of the probe's outputs, and per its square, (draws,) each; NaN
            where nothing moves.
        """
        return self._contracted(interval(self._path, start, end), full)

    def along_gradient(self, step: float, *, full: bool = False) -> tuple[Tensor, Tensor]:
        """Sizes of dNTK and ddNTK along the gradient at a step, as in ``along_displacement``."""
        return self._contracted(self._factors(step, dntk), full)

    def rate_sensitivity(self, start: float, end: float | None = None) -> float:
        """Relative change of a displacement's effect on outputs, per relative change of the NTK's eigenvalues.

        Sizes along a displacement take that of the ensemble's NTK; the eigenvalues of one network's differ from it, and
        late in training, or where a mode is learned in a single step, what is left depends on them many times as much.

        Args:
            start: The earlier step.
            end: The later step; None: of the gradient at ``start``.

        Returns:
            Root mean square over modes and networks of the derivative by the logarithm of every eigenvalue.
        """
        path, size = self._path, 1e-4
        at = torch.tensor([start] if end is None else [start, end], dtype=path.K.dtype, device=path.K.device)

        def moved(factor: float) -> Tensor:
            g, phi = ModePropagator(factor * path.eigenvalues, path.training).single(at)
            return g[0] if end is None else phi[1] - phi[0]

        slope = (moved(1 + size) - moved(1 - size)) / (2 * size)
        weight = path.error_gram.diagonal() * path.coupling[: path.probes].square().sum(0)
        whole = (weight * moved(1.0).square()).sum()
        return math.inf if float(whole) == 0 else float(((weight * slope.square()).sum() / whole).sqrt())

    def _contracted(self, first: Factors, full: bool) -> tuple[Tensor, Tensor]:
        path, moved = self._path, first[0]
        second = torch.zeros_like(moved), torch.outer(moved, moved), torch.zeros_like(first[2])
        seen = path.coupling[: path.probes]
        motion = (self._squares * second[1] * (seen.T @ seen)).sum((1, 2)) / (path.probes * path.outputs)
        return self._relative(first, full) / motion.sqrt(), self._relative(second, full) / motion

    def _relative(self, factors: Factors, full: bool) -> Tensor:
        drawn, reference = self._drawn[self._output], self._joint[self._output].reference
        squares = drawn.squares(factors)
        if full:
            n_L, weights = self._path.outputs, self._joint[self._output].weights
            everything = self._full.conditional_mean_squares(self._path, factors, self._starts, weights)
            squares = squares + self._beyond * (everything / n_L - drawn.expected(factors, self._starts)).clamp_min(0.0)
        return squares.sqrt() / reference

    def _factors(self, step: float, motion: Motion = drift) -> Factors:
        if self._latest[:2] != (step, motion):  # every kernel is asked for at the same step
            at = torch.tensor([step], dtype=self._path.K.dtype, device=self._path.K.device)
            self._latest = step, motion, next(times(self._path, at, motion))
        return self._latest[2]
