"""What training changes in one network, against the law over seeds: medians and bands, from before the first step on.

The compared quantities are those that are logged of a measured network, relative to its own kernels at theta_0:

* ``ntk_drift``: ||H - H_0|| / ||H_0||, with all pairs of outputs or averaged over them, as it is measured;
* ``representation_change``: the mean over hidden layers of ||K - K_0|| / ||K_0||, and each layer;
* ``dntk`` and ``ddntk`` along a displacement or along the gradient.

All are drawn for the same networks of the ensemble (``theory.NetworkDraws``), of all seeds; drift and change also of
those that start with this network's outputs on the training inputs. What was found not to hold is left out. Of 60 tanh
networks with n = 256, one start leaves a twentieth of the variance of the NTK drift at the first steps, a fifth at step
50, and its 90 % band covers 88 to 95 % of them; but 82 to 92 % for hidden kernels (75 to 92 % at n = 128), where only
the median is drawn, and 45 to 82 % for sizes along a displacement, which depends on the eigenvalues of one network's
own NTK. Bands of the ddNTK over all seeds cover 50 to 100 % at n = 128: it has a median. Work is counted, not timed, so
that the same is drawn on any machine.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torch_eft.forecast.comparison.compared import Banded
from torch_eft.forecast.comparison.work import shown
from torch_eft.measure.kernels.metrics import relative_change
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.seed_spread import seed_spread
from torch_eft.theory.hierarchy.drift.joint import NetworkDraws
from torch_eft.theory.hierarchy.drift.predict import predict_drift, single_pairs_work

NUM_DRAWS, NUM_GIVEN = 600, 200
"""Networks drawn of all seeds, and of those with this network's start; 5 % is right to 0.9 %, and to 1.5 %."""

_NUM_SAMPLES = 2048
_MOST_POINTS = 8
_SUMMED_AT_MOST = 4000
"""Steps with momentum, whose sums over time are made step by step at every measurement."""

LAW = "the law of the drift"
_SENSITIVE = 0.25
"""Relative difference between one network's displacement and the ensemble's beyond which dNTK has no line: up to there
the 90 % band covered 82 % or more of trained networks (tanh, n = 256), 69 % at 0.35 (measured)."""

_QUANTILES = (0.05, 0.16, 0.5, 0.84, 0.95)


class DriftComparison:
    """The law of an ensemble's drift, and one network beside it.

    Args:
        ensemble: The ensemble from which the network is drawn; smooth.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        training: The training, full batch on the squared error.
        z: The network's outputs on the training inputs at theta_0, (N, n_L).
        seconds: Work allowed, in seconds of one core: it is counted by the numbers of points.

    Attributes:
        validity: Where it holds.
        description: What is drawn, and how.

    Raises:
        ValueError: If the law does not cover the training, or takes more work than allowed.
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        x_train: Tensor,
        y_train: Tensor,
        x_probe: Tensor,
        training: Training,
        z: Tensor,
        *,
        seconds: float = 10.0,
    ) -> None:
        if training.loss != "mse" or not training.is_full_batch:
            raise ValueError(
                f"training: {training} given; beside a training the law of the drift is drawn for the squared error on "
                "full batches, where it is closed: theory.predict_drift takes others, before training"
            )
        points = joint_points(ensemble, len(x_train), len(x_probe), seconds)
        self._last = float(training.steps) if training.momentum else math.inf
        if training.momentum and training.steps > _SUMMED_AT_MOST:
            raise ValueError(
                f"with momentum the law of the drift is summed step by step, for up to {_SUMMED_AT_MOST} steps; "
                f"{training.steps:g} are asked for"
            )
        law = predict_drift(
            ensemble,
            x_train,
            y_train,
            x_probe,
            training,
            at_steps=[0, training.steps],
            hidden_ntk=False,
            num_samples=_NUM_SAMPLES,
            joint_points=points,
        )
        self._reference = law.ntk.reference
        self._outputs = y_train.shape[1]
        self._hidden = [drift.reference for _, drift in sorted(law.hidden.items())]
        seeds, given = law.draws(NUM_DRAWS), law.given(z).draws(NUM_GIVEN)
        assert isinstance(seeds, NetworkDraws) and isinstance(given, NetworkDraws)
        self._seeds, self._given = seeds, given
        self._spread = seed_spread(ensemble, x_probe).ntk
        self.validity: Validity = law.validity
        some = "" if points >= len(x_probe) else f", correlated as between {points} of the {len(x_probe)} probe inputs"
        self.description = (
            "NTK drift, dNTK, ddNTK (its median only) and change of hidden kernels at order 1/n, with bands over "
            f"{NUM_DRAWS} networks drawn from the law of the drift{some}; sizes of dNTK and ddNTK as long as "
            f"displacements are those of the ensemble up to {_SENSITIVE:g} of their size, as eigenvalues of the NTK "
            f"vary by {100 * self._spread:.2g} % over networks"
        )

    def kernels(
        self, step: int, ntk: Tensor, ntk_0: Tensor, hidden: Sequence[Tensor], hidden_0: Sequence[Tensor]
    ) -> tuple[dict[str, Banded], list[Banded]]:
        """Compare the drift of the NTK and of the hidden layers.

        Args:
            step: Optimizer steps since theta_0.
            ntk: Measured NTK on the probe, (N_p, N_p, n_L, n_L) or (N_p, N_p).
            ntk_0: The same at theta_0.
            hidden: Measured hidden kernels, layer by layer; empty where they are not known to be these layers.
            hidden_0: The same at theta_0.

        Returns:
            ``{quantity: comparison}``, and that of each layer's change; empty beyond the steps that are summed.
        """
        if step > self._last:
            return {}, []
        full, scale = self._scale(ntk_0)
        seeds, given = (draws.ntk_drift(step, full=full) * scale for draws in (self._seeds, self._given))
        found = {"ntk_drift": _banded(seeds, given, float(relative_change(ntk, ntk_0)))}
        if len(hidden) != len(self._hidden) or not hidden:
            return found, []
        scales = [float(whole.norm()) / float(K_0.norm()) for whole, K_0 in zip(self._hidden, hidden_0, strict=True)]
        measured = [float(relative_change(K, K_0)) for K, K_0 in zip(hidden, hidden_0, strict=True)]
        seeds, given = (
            torch.stack([scales[i] * draws.hidden_change(layer, step) for i, layer in enumerate(draws.layers)])
            for draws in (self._seeds, self._given)
        )
        found["representation_change"] = _banded(seeds.mean(0), given.mean(0), sum(measured) / len(measured))
        layers = [_banded(*drawn) for drawn in zip(seeds, given, measured, strict=True)]
        # The layers' kernels are drawn independently given z(0): a median, but no band.
        found["representation_change"] = replace(found["representation_change"], given_90=None)
        return found, [replace(layer, given_90=None) for layer in layers]

    def expected_drift(self, step: int, ntk_0: Tensor) -> tuple[float, float] | None:
        """Return the band of 90 % of networks in which the NTK's drift will be at a step, or None beyond the last one.

        Args:
            step: Optimizer steps since theta_0.
            ntk_0: The measured NTK at theta_0, (N_p, N_p, n_L, n_L) or (N_p, N_p).
        """
        if step > self._last:
            return None
        full, scale = self._scale(ntk_0)
        drawn = self._seeds.ntk_drift(step, full=full) * scale
        low, *_, high = torch.quantile(drawn, torch.tensor(_QUANTILES, dtype=drawn.dtype, device=drawn.device)).tolist()
        return low, high

    def displacement(self, start: int, end: int, ntk: Tensor, dntk: float, ddntk: float | None) -> dict[str, Banded]:
        """Compare dNTK and ddNTK along the displacement from one step to another.

        Args:
            start: The earlier step, at whose parameters they are taken.
            end: The later step.
            ntk: The NTK at theta_0.
            dntk: Measured size.
            ddntk: Measured size; None where it was not measured.

        Returns:
            ``{quantity: comparison}``.
        """
        if end > self._last or not self._sure(start, end):
            return {}
        full, scale = self._scale(ntk)
        drawn = self._seeds.along_displacement(start, end, full=full)
        return _sizes(("dntk", "ddntk"), (dntk, ddntk), drawn, scale)

    def gradient(self, step: int, ntk: Tensor, dntk: float, ddntk: float | None) -> dict[str, Banded]:
        """Compare dNTK and ddNTK along the gradient at a step; arguments and result as in ``displacement``."""
        if step > self._last or not self._sure(step):
            return {}
        full, scale = self._scale(ntk)
        drawn = self._seeds.along_gradient(step, full=full)
        return _sizes(("dntk_along_gradient", "ddntk_along_gradient"), (dntk, ddntk), drawn, scale)

    def _sure(self, start: int, end: int | None = None) -> bool:
        """Whether a displacement is the ensemble's, up to how much eigenvalues of the NTK vary over networks."""
        return self._spread * self._seeds.rate_sensitivity(start, end) <= _SENSITIVE

    def _scale(self, ntk_0: Tensor) -> tuple[bool, float]:
        """Whether all pairs of outputs are measured, and the infinite-width norm over the network's own."""
        full = ntk_0.ndim == 4
        whole = float(self._reference.norm()) * (self._outputs**0.5 if full else 1.0)
        return full, whole / float(ntk_0.norm())


def joint_points(ensemble: MLPEnsemble, train: int, probe: int, seconds: float) -> int:
    """Count the work of the law, and return how many probe points can be drawn together within what is allowed.

    Args:
        ensemble: The ensemble.
        train: N.
        probe: N_p.
        seconds: Work allowed, in seconds of one core.

    Returns:
        At most 8 points, at least 2 (or the only one).

    Raises:
        ValueError: If there is more work; the message says how much.
    """
    least = min(2, probe)
    for points in range(min(_MOST_POINTS, probe), least - 1, -1):
        needed = _work(ensemble, train, probe, points)
        if needed <= seconds:
            return points
    raise ValueError(
        f"the law of the drift for {train} training and {probe} probe inputs takes about {shown(needed)} of one core, "
        f"{seconds:g} s are allowed: give fewer probe inputs, or forecast_seconds={math.ceil(1.2 * needed)}"
    )


def law_work(ensemble: MLPEnsemble, train: int, probe: int, seconds: float) -> float:
    """Count the work of the law for as many joint points as ``seconds`` allow, or for the fewest; as ``joint_points``.

    Returns:
        Seconds of one core.
    """
    try:
        points = joint_points(ensemble, train, probe, seconds)
    except ValueError:
        points = min(2, probe)
    return _work(ensemble, train, probe, points)


def _work(ensemble: MLPEnsemble, train: int, probe: int, points: int) -> float:
    """Labels of every layer, entries of the law of single pairs, those of the joint law, and its eigenvectors."""
    layers, modes = ensemble.depth - 1, points * (points + 1) // 2 * train
    joint = layers * 4.5e-6 * points**4 * train**2 + 3e-10 * (1 + layers) * modes**3
    return single_pairs_work(ensemble, train, probe) + joint


def _sizes(
    names: tuple[str, str], measured: tuple[float, float | None], drawn: tuple[Tensor, Tensor], scale: float
) -> dict[str, Banded]:
    """Of the dNTK with its bands, and of the ddNTK, whose fluctuation given z(0) is of the next order, without."""
    if not all(bool(torch.isfinite(seeds).all()) for seeds in drawn):
        return {}
    found = {names[0]: _banded(scale * drawn[0], None, measured[0])}
    if measured[1] is not None:
        found[names[1]] = Banded(measured[1], scale * float(drawn[1].quantile(0.5)))
    return found


def _banded(seeds: Tensor, given: Tensor | None, measured: float) -> Banded:
    """Bands over seeds, and over those with this network's start."""
    q = torch.tensor(_QUANTILES, dtype=seeds.dtype, device=seeds.device)
    rows = torch.stack([torch.quantile(each, q) for each in (seeds, given) if each is not None]).tolist()
    below = float((seeds < measured).double().mean())
    low, lower, median, upper, high = rows[0]
    found = Banded(measured, median, (lower, upper), (low, high), below)
    return found if given is None else replace(found, given=rows[1][2], given_90=(rows[1][0], rows[1][4]))
