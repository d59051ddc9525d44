"""Corrections of order 1/n to the compared observables on a grid of steps: those that an allowance of work covers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from torch_eft.forecast.comparison.work import Allowance
from torch_eft.measure.kernels.metrics import as_trace
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Trajectory, Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.hidden_layers.predict import predict_representation
from torch_eft.theory.hidden_layers.result import RepresentationForecast
from torch_eft.theory.signal_propagation.regimes import first_order_validity
from torch_eft.theory.training.corrections.work import corrections_work
from torch_eft.theory.training.predict import predict_training

T = TypeVar("T")

MOST_POINTS = 64
"""Training points up to which order 1/n is computed beside a training."""

_EVERY = 32
_RATIO = 1.08
_LONGEST_RINGING = 512


def time_grid(steps: int, momentum: float = 0.0) -> list[int]:
    """Return the steps at which corrections are computed.

    All steps up to 32, or as long as momentum rings (to 0.1 %, at most 512), then steps 8 % apart. Corrections are
    interpolated linearly between them, which over intervals of 0.08 in log t is wrong by 0.08^2 / 8 = 0.1 % of the
    second derivative in log t.

    Args:
        steps: The last step.
        momentum: Momentum of the optimizer.

    Returns:
        Increasing steps, from 0.
    """
    ringing = 0 if momentum == 0 else min(_LONGEST_RINGING, math.ceil(2 * math.log(1e-3) / math.log(momentum)))
    grid = list(range(min(steps, max(_EVERY, ringing)) + 1))
    while grid[-1] < steps:
        grid.append(min(steps, max(grid[-1] + 1, round(grid[-1] * _RATIO))))
    return grid


@dataclass(frozen=True)
class Problem:
    """A full-batch training on (1/2) sum (z - y)^2, and the probe on which it is observed.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        training: The training, with ``reduction="sum"``.
    """

    ensemble: MLPEnsemble
    x_train: Tensor
    y_train: Tensor
    x_probe: Tensor
    training: Training

    def outputs(self, steps: Sequence[int], order: Literal[0, 1], **options: Any) -> Trajectory:
        """Predict outputs and NTK at some steps."""
        return predict_training(*self._data(steps), order=order, at_steps=steps, **options)

    def hidden_layers(self, steps: Sequence[int]) -> RepresentationForecast:
        """Predict the hidden kernels at some steps."""
        data = self._data(steps)
        return predict_representation(*data, at_steps=steps, ntk=False, num_samples=4096, num_replicas=2)

    def _data(self, steps: Sequence[int]) -> tuple[MLPEnsemble, Tensor, Tensor, Tensor, Training]:
        training = replace(self.training, steps=max(steps))
        return self.ensemble, self.x_train, self.y_train, self.x_probe, training


@dataclass(frozen=True)
class Corrections:
    """Corrections of order 1/n, at one step or with a leading axis of steps; None where there are none.

    Args:
        mean: Correction of the mean output on the probe, (N_p, n_L).
        variances: Correction of the variance of each output, (N_p, n_L).
        projected_variance: Correction of the variance of the output along the compared direction, 0-d.
        ntk: Drift E H(t) - E H(0), mean over outputs, (N_p, N_p).
        kernels: Drift of the hidden kernels, (L-1, N_p, N_p).
        expansion_parameter: The largest size, up to this step, of terms of order 1/n over those of order 0, 0-d.
    """

    mean: Tensor | None = None
    variances: Tensor | None = None
    projected_variance: Tensor | None = None
    ntk: Tensor | None = None
    kernels: Tensor | None = None
    expansion_parameter: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Corrections":
        """Apply a function to all corrections."""
        return Corrections(**{name: None if value is None else function(value) for name, value in vars(self).items()})

    @property
    def any(self) -> bool:
        """True if there is any correction."""
        return any(value is not None for value in vars(self).values())


@dataclass(frozen=True)
class FiniteWidth:
    """Corrections on a grid of steps.

    Args:
        steps: The grid.
        corrections: The corrections, with a leading axis of steps.
        initial_ntk: Theta1 / n_{L-1} on the probe, (N_p, N_p); None without the NTK's correction.
        kernels_infinite_width: Hidden kernels at infinite width, (L-1, N_p, N_p).
        validity: The worst verdict on what was computed; a covariance that is not valid makes it "caution": the band is
            rough.
        notes: What was computed, and what was not and why.
    """

    steps: list[int]
    corrections: Corrections = Corrections()
    initial_ntk: Tensor | None = None
    kernels_infinite_width: Tensor | None = None
    validity: Validity | None = None
    notes: list[str] = field(default_factory=list)

    def at(self, step: int) -> Corrections:
        """Interpolate the corrections to a step within the grid."""
        upper = next(index for index, value in enumerate(self.steps) if value >= step)
        lower = max(upper - 1, 0)
        share = 0.0 if upper == lower else (step - self.steps[lower]) / (self.steps[upper] - self.steps[lower])
        return self.corrections.map(lambda value: value[lower] + share * (value[upper] - value[lower]))

    def state(self) -> dict[str, Any]:
        """Return plain types and tensors, for a checkpoint."""
        validity = self.validity
        return vars(self) | {
            "corrections": dict(vars(self.corrections)),
            "validity": None if validity is None else asdict(validity),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "FiniteWidth":
        """Restore what ``state`` returned; any exception may be raised by anything else."""
        initial, kernels, validity = (state[name] for name in ("initial_ntk", "kernels_infinite_width", "validity"))
        return cls(
            [int(step) for step in state["steps"]],
            Corrections(**state["corrections"]).map(lambda value: value.to(device)),
            None if initial is None else initial.to(device),
            None if kernels is None else kernels.to(device),
            None if validity is None else Validity(**validity),
            list(state["notes"]),
        )


NTK, HIDDEN, MEAN, COVARIANCE = "the NTK", "hidden kernels", "the mean output", "the covariance"
"""Names of the corrections, the most useful first."""


def finite_width(problem: Problem, steps: int, direction: Tensor, allowance: Allowance) -> FiniteWidth:
    """Compute the corrections that an allowance covers: the NTK first, then hidden layers, mean and covariance.

    Args:
        problem: The training.
        steps: The last step.
        direction: The compared direction of the output, (N_p, n_L).
        allowance: Work that they may take, with what else shares it.

    Returns:
        The corrections, with notes on what is missing and why.
    """
    grid = time_grid(steps, problem.training.momentum)
    points = len(problem.x_train)
    if points > MOST_POINTS:
        note = f"{points} training points: order 1/n is for up to {MOST_POINTS} beside a training; order 0 is drawn"
        return FiniteWidth(grid, notes=[note])
    start = first_order_validity(problem.ensemble, torch.cat([problem.x_probe, problem.x_train]))
    if start.flag == "invalid":
        return FiniteWidth(grid, notes=[f"order 1/n is not drawn: {start.reason}"])
    padding, problem = _with_sampled_moments(problem)
    probe = slice(padding, None)
    allowance.plan(_counted(problem, grid))
    parts = _Parts(allowance)

    def outputs(correction: str) -> Callable[[], Trajectory]:
        return lambda: problem.outputs(grid, 1, corrections=(correction,))

    zeroth = problem.outputs(grid, 0)
    Theta = as_trace(zeroth.ntk_mean[0])[probe, probe]
    values: dict[str, Tensor] = {}
    parameters, verdicts = [], []
    initial_ntk = kernels = spread = None
    ntk = parts.run(NTK, outputs("ntk"))
    if ntk is not None:
        initial_ntk = as_trace(ntk.ntk_mean[0])[probe, probe] - Theta
        values["ntk"] = torch.stack([as_trace(value)[probe, probe] for value in ntk.ntk_change])
        parameters.append((initial_ntk + values["ntk"]).flatten(1).norm(dim=1) / Theta.norm())
        verdicts.append(ntk.validity)
    if problem.training.momentum:
        parts.notes.append(f"{HIDDEN} at order 0: their drift is derived without momentum")
    else:
        hidden = parts.run(HIDDEN, lambda: problem.hidden_layers(grid))
        if hidden is not None:
            verdicts.append(hidden.validity)
            if hidden.layers:
                kernels = torch.stack([layer.kernel_infinite_width[probe, probe] for layer in hidden.layers])
                values["kernels"] = torch.stack([layer.kernel_change[:, probe, probe] for layer in hidden.layers], 1)
    mean = parts.run(MEAN, outputs("mean"))
    if mean is not None:
        values["mean"] = (mean.output_mean - zeroth.output_mean)[:, probe]
        moved = zeroth.output_mean[:, probe].flatten(1).norm(dim=1)
        size = values["mean"].flatten(1).norm(dim=1)
        parameters.append(torch.where(moved > 0, size / torch.where(moved > 0, moved, 1.0), 0.0))
        verdicts.append(mean.validity)
    spread = parts.run(COVARIANCE, outputs("covariance"))
    if spread is not None:
        change = (spread.output_covariance - zeroth.output_covariance)[:, probe, probe]
        values["projected_variance"] = torch.einsum("ai,tabij,bj->t", direction, change, direction)
        values["variances"] = torch.einsum("taaii->tai", change)
    if parameters:
        values["expansion_parameter"] = torch.stack(parameters).amax(0).cummax(0)[0]
    levels = ("valid", "caution", "invalid")
    validity = max(verdicts, key=lambda value: levels.index(value.flag), default=None)
    if validity is not None and validity.flag != "invalid" and spread is not None and spread.validity.flag != "valid":
        rough = f"the band is rough: {spread.validity.reason}"
        reasons = [rough, *validity.reasons] if validity.flag == "valid" else [*validity.reasons, rough]
        validity = Validity("caution", reasons, {**spread.validity.numbers, **validity.numbers})
    return FiniteWidth(grid, Corrections(**values), initial_ntk, kernels, validity, parts.notes)


def _with_sampled_moments(problem: Problem) -> tuple[int, Problem]:
    """Prepend enough probe points that moments are sampled instead of integrated.

    Over three and four points the theory integrates them by quadrature, which takes up to a minute; over five and more
    it samples them, in less than a second. The threshold is not an argument of the forecasts: it is chosen for
    accuracy, not for time.

    Returns:
        The number of points in front, and the problem with them.
    """
    distinct = len(torch.unique(torch.cat([problem.x_train, problem.x_probe]), dim=0))
    added = 5 - distinct if distinct in (3, 4) else 0
    scales = torch.linspace(0.5, 0.8, added, dtype=problem.x_train.dtype, device=problem.x_train.device)
    longest = problem.x_train[problem.x_train.norm(dim=1).argmax()]
    return added, replace(problem, x_probe=torch.cat([scales[:, None] * longest, problem.x_probe]))


def _counted(problem: Problem, grid: Sequence[int]) -> dict[str, float]:
    """The work of every correction, in seconds of one core."""
    momentum = bool(problem.training.momentum)
    work = corrections_work(
        len(problem.x_train),
        len(problem.x_probe),
        problem.y_train.shape[1],
        problem.ensemble.depth,
        times=len(grid),
        steps=grid[-1],
        momentum=momentum,
        gaussian=not EXCESS_KURTOSIS[problem.ensemble.weight_law[-1]],
    )
    names = {NTK: "ntk", HIDDEN: "hidden", MEAN: "mean", COVARIANCE: "covariance"}
    return {name: work[key] for name, key in names.items() if not (momentum and name == HIDDEN)}


class _Parts:
    """Makes one part after another, if the allowance covers it, with ``notes`` on each."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self.notes: list[str] = []

    def run(self, name: str, compute: Callable[[], T]) -> T | None:
        """Return the part, or None."""
        if not self._allowance.covers(name):
            self.notes.append(f"{name} at order 0: {self._allowance.refusal(name)}")
            return None
        try:
            with self._allowance.working(name):
                result = compute()
        except ValueError as error:
            self.notes.append(f"{name} at order 0: {error}")
            return None
        self.notes.append(f"{name} at order 1/n")
        return result
