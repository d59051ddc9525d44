"""Training of an ensemble at order 1/n: mean output and its covariance, and the drift of the NTK.

``derivation`` says which vertex contributes to which observable, and why. For squared error an output depends on
z(0) linearly at infinite width: the average over z(0) is then exact by Wick contraction, outputs reduce to n_L as a
number and to the Gram matrix of the targets, and nothing grows with n_L. Full-batch gradient descent, with momentum
(heavy ball or Nesterov) and any schedule, and gradient flow: time enters through sums over steps alone
(``time_sums``). Optimizers that are not linear in gradients are outside this derivation; other losses, and minibatches,
which mix modes, are in ``sampled``.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from torch_eft.results.training import Training
from torch_eft.results.trajectory import Trajectory, Validity
from torch_eft.theory.architecture.chains.vertices import ChainVertices, chain_validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.initialization.estimators import VertexReplicas
from torch_eft.theory.initialization.vertex_tiles import SingleNeuronTiles, VertexTiles
from torch_eft.theory.training.corrections.correction import Correction, corrected, provenance, sizes
from torch_eft.theory.training.corrections.mean_output import mean_output
from torch_eft.theory.training.corrections.ntk_change import ntk_change
from torch_eft.theory.training.corrections.output_covariance import output_covariance
from torch_eft.theory.training.corrections.validity import chain_movement, neuron_movement, training_validity
from torch_eft.theory.training.infinite_width import FrozenChain, FrozenTraining, InfiniteWidthPath

_SAME = 1e-7
"""Training inputs closer than this, relative to their length, have the same Theta to the accuracy of float64."""
_ARRAYS = 110


class FiniteWidthTraining:
    """The corrections of order 1/n to the trained distribution, each at all steps at once.

    Args:
        frozen: The same training at infinite width.
        num_samples: Sample size of moments with three and four labels; its error falls as 1/sqrt(num_samples).
        num_replicas: Independent samples it is shared by, at least 2, to estimate the error.
        seed: Seed; the global random state is left alone.
        memory: Bytes allowed for four-label arrays.

    Raises:
        ValueError: If the activation has a kink, or two training inputs coincide.

    Example:
        >>> import torch
        >>> from torch_eft import Training, theory
        >>> ensemble = theory.MLPEnsemble([2, 50, 1], "linear")
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> training = Training(learning_rate=0.1, steps=1, reduction="sum")
        >>> finite = theory.FiniteWidthTraining(theory.FrozenTraining(ensemble, x, torch.ones(2, 1), x, training))
        >>> finite.ntk_change(torch.tensor([0, 5]))
        Correction(
          value: (2, 2, 2, 1, 1) float64
          error: 0
          infinite_width: (2, 2, 2, 1, 1) float64
          initial: (2, 2, 1, 1) float64
        )
    """

    def __init__(
        self,
        frozen: FrozenTraining | FrozenChain,
        *,
        num_samples: int = 4096,
        num_replicas: int = 2,
        seed: int = 0,
        memory: int = 4 * 2**30,
    ) -> None:
        self.ensemble = frozen.hyperparameters if isinstance(frozen, FrozenChain) else frozen.ensemble
        check_smooth(self.ensemble)
        if num_replicas < 2:
            raise ValueError(f"num_replicas: {num_replicas} given; at least 2 are needed to estimate the error")
        check_distinct(frozen.x_train.flatten(1), frozen.y_train)
        self.x, self.probes = frozen.x, frozen.probes
        self.vertices: VertexReplicas
        if isinstance(frozen, FrozenChain):
            self.vertices = ChainVertices(frozen.chain, frozen.layers, num_samples, num_replicas, seed)
        else:
            self.vertices = VertexTiles(self.ensemble, frozen.layers, num_samples, num_replicas, seed, x=frozen.x)
        self.path = frozen
        self._memory = memory
        self._n = self.ensemble.widths[-2]
        uneven = EXCESS_KURTOSIS[self.ensemble.weight_law[-1]] != 0
        self._single = SingleNeuronTiles(self.vertices) if uneven else None
        # What the read-out's weights add where they are not Gaussian: each output by itself, with its own targets.
        self._alone = [
            InfiniteWidthPath(frozen.K, frozen.Theta, y[:, None], frozen.training)
            for y in (frozen.y_train.T if self._single is not None else ())
        ]

    def ntk_change(self, steps: Tensor) -> Correction:
        """Return E H(t) - E H(0) on the probe points, (T, N_p, N_p, n_L, n_L), with Theta1 / n as its initial part.

        Args:
            steps: (T,).
        """
        drift, error = ntk_change(self.vertices, self.path, self.probes, steps)
        drift, error = self._with_single(lambda v, path: ntk_change(v, path, self.probes, steps), drift, error, 2)
        outputs = torch.eye(self.path.outputs, dtype=drift.dtype, device=drift.device)
        Theta = self.path.Theta[: self.probes, : self.probes, None, None] * outputs
        initial = self.initial_ntk()[..., None, None] * outputs
        return Correction(drift / self._n, error / self._n, Theta.expand(drift.shape), initial)

    def ntk_trace_drift(self, steps: Tensor) -> tuple[Tensor, float]:
        """As ``ntk_change``, the mean over outputs i = j: at a cost that does not grow with n_L.

        Args:
            steps: (T,).

        Returns:
            (T, N_p, N_p), and the standard error of its entries (rms).
        """
        mean, error = ntk_change(self.vertices, self.path, self.probes, steps, trace=True)
        for path in self._alone:
            assert self._single is not None
            added, other = ntk_change(self._single, path, self.probes, steps, trace=True)
            mean, error = mean + added / len(self._alone), math.hypot(error, other / len(self._alone))
        return mean / self._n, error / self._n

    def mean_output(self, steps: Tensor) -> Correction:
        """Return the correction of E z(t) on all points, probe before train, (T, N_all, n_L).

        Args:
            steps: (T,).
        """
        self._check_memory()
        value, error = mean_output(self.vertices, self.path, steps)
        value, error = self._with_single(lambda v, path: mean_output(v, path, steps), value, error, 1)
        return Correction(value / self._n, error / self._n, self.path.mean_output(steps))

    def covariance(self, steps: Tensor) -> Correction:
        """Return the correction of the covariance on the probe points, (T, N_p, N_p, n_L, n_L).

        Args:
            steps: (T,).
        """
        self._check_memory()
        value, error = output_covariance(self.vertices, self.path, self.probes, steps)
        value, error = self._with_single(
            lambda v, path: output_covariance(v, path, self.probes, steps), value, error, 2
        )
        J = self.path.response(steps, self.probes)
        outputs = torch.eye(self.path.outputs, dtype=value.dtype, device=value.device)
        infinite_width = (J @ self.path.K @ J.mT)[..., None, None] * outputs
        return Correction(value / self._n, error / self._n, infinite_width)

    def initial_ntk(self) -> Tensor:
        """Theta1 / n_{L-1} on the probe points, (N_p, N_p)."""
        probe = torch.arange(self.probes, device=self.x.device)
        source = next(self.vertices.replicas({"x": probe, "y": probe}).members)
        array = source.array("Theta1", self.vertices.depth, "xy").double()
        return array.expand(self.probes, self.probes) / self._n

    def validity(self, term_sizes: dict[str, float], steps: Tensor) -> Validity:
        """Return where order 1/n holds, judged by its own size.

        Args:
            term_sizes: ``{"|z1| / |z0|": largest ratio over time, ..}``.
            steps: (T,).
        """
        if isinstance(self.path, FrozenChain):
            moved, start = chain_movement(self.path, steps), self._chain_start(self.path)
        else:
            moved, start = neuron_movement(self.ensemble, self.path.layers, self.path, steps), None
        error = self.path.error_gram.trace()
        return training_validity(self.ensemble, self.x, self.path, term_sizes, float(moved.max()), error, start)

    def _chain_start(self, path: FrozenChain) -> Validity:
        """Where order 1/n holds at initialization."""
        points = path.train.new_tensor(range(len(path.K)))
        value = next(self.vertices.replicas({"a": points}).members).array("V", self.vertices.depth, "aaaa")
        return chain_validity(path.chain, path.K, value)

    def trajectory(self, infinite_width: Trajectory, training: Training, names: Iterable[str]) -> Trajectory:
        """Return the trajectory with some corrections.

        Args:
            infinite_width: At infinite width.
            training: For the provenance.
            names: Out of ``CORRECTIONS``.
        """
        methods = {"mean": self.mean_output, "covariance": self.covariance, "ntk": self.ntk_change}
        steps = infinite_width.steps
        corrections = {name: method(steps) for name, method in methods.items() if name in names}
        notes = []
        if self.vertices.sampled:
            errors = (f"{_TITLES[name]} {correction.error:.2g}" for name, correction in corrections.items())
            notes.append("standard errors of sampled moments (rms): " + ", ".join(errors))
        return corrected(
            infinite_width,
            corrections,
            slice(0, self.probes),
            slice(self.probes, None),
            provenance(self.ensemble, training, list(corrections), notes),
            self.validity(sizes(corrections, steps), steps),
        )

    def _with_single(
        self,
        correction: Callable[[SingleNeuronTiles, InfiniteWidthPath], tuple[Tensor, float]],
        value: Tensor,
        error: float,
        axes: int,
    ) -> tuple[Tensor, float]:
        """Add to a correction what single neurons of the read-out do, on the diagonal of its axes of outputs."""
        if self._single is None:
            return value, error
        added, errors = zip(*(correction(self._single, path) for path in self._alone), strict=True)
        diagonal = torch.cat([one[..., 0] if axes == 2 else one for one in added], -1)
        share = len(added) ** ((1 - axes) / 2)  # of the entries
        error = math.hypot(error, share * math.hypot(*errors) / len(added) ** 0.5)
        return value + (torch.diag_embed(diagonal) if axes == 2 else diagonal), error

    def _check_memory(self) -> None:
        train = len(self.path.U)
        needed = 4 * _ARRAYS * train**3
        if self.vertices.sampled and needed > self._memory:
            raise ValueError(
                f"x_train: {train} points need about {needed / 2**30:.1f} GiB for vertices with three training labels, "
                f"memory allows {self._memory / 2**30:.1f} GiB; give fewer points, more memory, or ask for the NTK "
                'alone with corrections=("ntk",), which has two'
            )


_TITLES = {"mean": "mean output", "covariance": "covariance", "ntk": "NTK drift"}


def check_smooth(ensemble: MLPEnsemble) -> None:
    """Refuse activations with a kink, for which training has no expansion in 1/n.

    Raises:
        ValueError: If the activation has a kink.
    """
    if ensemble.activation.kinked:
        raise ValueError(
            f"activation: {ensemble.activation.name} has a kink; its ddNTK contains products of delta functions, "
            "and the expansion of training in 1/n does not exist. Use a smooth activation, or order=0"
        )


def check_distinct(x: Tensor, y: Tensor) -> None:
    """Refuse training inputs that coincide: the expansion is in |e|^2 / (n lambda_min).

    Raises:
        ValueError: With the closest two, and what their targets differ by.
    """
    squares = x.square().sum(1)
    length = (squares[:, None] + squares[None, :]).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / length
    distance.fill_diagonal_(torch.inf)
    if len(x) > 1 and float(distance.min()) < _SAME:
        a, b = divmod(int(distance.argmin()), len(x))
        between = float((y[a] - y[b]).norm())
        kind = f"conflicting targets (they differ by {between:.3g})" if between > 0 else "equal targets"
        raise ValueError(
            f"x_train: points {a} and {b} coincide (relative distance {float(distance.min()):.2g}), with {kind}; "
            "lambda_min = 0, and order 1/n is an expansion in |e|^2 / (n lambda_min). Keep one of them, or use order=0"
        )
