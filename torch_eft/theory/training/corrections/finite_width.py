"""Training of an ensemble at order 1/n: mean output and its covariance, and the drift of the NTK.

Which vertex contributes to which observable, and why, is told in ``derivation``. For squared error an output depends on
z(0) linearly at order 0: the average over z(0) is then exact by Wick contraction, outputs reduce to n_L as a number and
to the Gram matrix of the targets, and nothing grows with n_L. Full-batch gradient descent, with momentum (heavy ball or
Nesterov) and any schedule, and gradient flow: time enters through sums over steps alone (``time_sums``). Optimizers
that are not linear in gradients are outside this derivation; other losses, and minibatches, which mix modes, are in
``sampled_training``.
"""

import torch
from torch import Tensor

from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.training.corrections.infinite_width_path import OrderZeroPath
from torch_eft.theory.training.corrections.mean_output import mean_output
from torch_eft.theory.training.corrections.ntk_drift import ntk_drift
from torch_eft.theory.training.corrections.output_covariance import output_covariance
from torch_eft.theory.training.corrections.validity import neuron_movement, training_validity
from torch_eft.theory.training.optimizer import Descent
from torch_eft.theory.training.time_sums import Dynamics

_SAME = 1e-7
"""Training inputs closer than this, relative to their length, cannot be told apart by Theta in float64."""
_ARRAYS = 110


class FiniteWidthTraining:
    """The corrections of order 1/n to the trained distribution, divided by n_{L-1}; each at all steps at once.

    Args:
        ensemble: The ensemble.
        x_probe: Checked probe inputs, (N_p, n_0).
        x_train: Checked training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        rate: eta for L = (1/2) sum (z - y)^2.
        dynamics: ``"gradient_descent"`` or ``"gradient_flow"``.
        samples: Sample size of moments with three and four labels; its error falls as 1/sqrt(samples).
        replicas: Independent samples it is shared by, at least 2, to estimate the error.
        seed: Seed; the global random state is left alone.
        memory: Bytes allowed for four-label arrays.
        optimizer: Momentum or a schedule, whose learning rates stand in for ``rate``.

    Raises:
        ValueError: If the activation has a kink, or two training inputs coincide.
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        x_probe: Tensor,
        x_train: Tensor,
        y_train: Tensor,
        rate: float,
        dynamics: Dynamics,
        samples: int = 4096,
        replicas: int = 2,
        seed: int = 0,
        memory: int = 4 * 2**30,
        optimizer: Descent | None = None,
    ) -> None:
        if ensemble.activation.kinked:
            raise ValueError(
                f"activation: {ensemble.activation.name} has a kink; its ddNTK contains products of delta functions, "
                "and the expansion of training in 1/n does not exist. Use a smooth activation, or order=0"
            )
        if replicas < 2:
            raise ValueError(f"replicas: {replicas} given; at least 2 are needed to estimate the error")
        check_distinct(x_train, y_train)
        x = torch.cat([x_probe, x_train])
        self.ensemble, self.x, self.probes = ensemble, x, len(x_probe)
        self.vertices = VertexTiles(ensemble, x, samples, replicas, seed)
        self.path = OrderZeroPath(self.vertices.K, self.vertices.Theta, y_train, rate, dynamics, optimizer)
        self._memory = memory
        self._n = ensemble.widths[-2]

    def ntk_drift(self, steps: Tensor, trace: bool = False) -> tuple[Tensor, float]:
        """E H(t) - E H(0) on the probe points.

        Args:
            steps: (T,).
            trace: Whether only the mean over i = j is wanted: at a cost that does not grow with n_L.

        Returns:
            (T, N_p, N_p, n_L, n_L), or (T, N_p, N_p); and the standard error of its entries (rms).
        """
        mean, off, error = ntk_drift(self.vertices, self.path, self.probes, steps, trace)
        return (mean if off is None else _with_outputs(mean, off)) / self._n, error / self._n

    def mean_output(self, steps: Tensor) -> tuple[Tensor, float]:
        """The correction of E z(t) on all points, probe before train, (T, N_all, n_L), and its standard error (rms)."""
        self._check_memory()
        value, error = mean_output(self.vertices, self.path, steps)
        return value / self._n, error / self._n

    def covariance(self, steps: Tensor) -> tuple[Tensor, float]:
        """The correction of the covariance on the probe points, (T, N_p, N_p, n_L, n_L), and its standard error."""
        self._check_memory()
        mean, off, error = output_covariance(self.vertices, self.path, self.probes, steps)
        return _with_outputs(mean, off) / self._n, error / self._n

    def initial_ntk(self) -> Tensor:
        """Theta1 / n_{L-1} on the probe points, (N_p, N_p)."""
        probe = torch.arange(self.probes, device=self.x.device)
        sets = {"x": probe, "y": probe}
        array = next(self.vertices.replicas(sets).members).array("Theta1", self.vertices.depth, "xy").double()
        return array.expand(self.probes, self.probes) / self._n

    def validity(self, sizes: dict[str, float], steps: Tensor) -> Validity:
        """Where order 1/n holds, judged by its own size.

        Args:
            sizes: ``{"|z1| / |z0|": largest ratio over time, ..}``.
            steps: (T,).
        """
        moved = neuron_movement(self.ensemble, self.vertices.layers, self.path, steps)
        return training_validity(self.ensemble, self.x, self.path, sizes, float(moved.max()))

    def _check_memory(self) -> None:
        train = len(self.path.U)
        needed = 4 * _ARRAYS * train**3
        if self.vertices.sampled and needed > self._memory:
            raise ValueError(
                f"x_train: {train} points need about {needed / 2**30:.1f} GiB for vertices with three training labels, "
                f"memory allows {self._memory / 2**30:.1f} GiB; give fewer points, more memory, or ask for the NTK "
                'alone with corrections=("ntk",), which has two'
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


def _with_outputs(mean: Tensor, off: Tensor) -> Tensor:
    identity = torch.eye(off.shape[-1], dtype=mean.dtype, device=mean.device)
    return mean[..., None, None] * identity + off
