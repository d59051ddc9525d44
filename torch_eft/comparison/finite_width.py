"""What order 1/n adds to the observables that are compared, on a grid of steps, bounded in cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_eft.comparison.affordable import TooDearError, within
from torch_eft.measure.metrics import as_trace
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.prediction import predict_training
from torch_eft.theory.representation_drift import predict_representation
from torch_eft.trajectory import Trajectory, Validity

MOST_POINTS = 64
"""Training points up to which order 1/n is computed beside a training."""

_EVERY = 32
_RATIO = 1.08


def time_grid(steps: int) -> list[int]:
    """Every step up to 32, then steps 8 % apart, up to ``steps``.

    Corrections are interpolated between them by straight lines, which over intervals of 0.08 in log t are wrong by
    0.08^2 / 8 = 0.1 % of the second derivative in log t.
    """
    grid = list(range(min(steps, _EVERY) + 1))
    while grid[-1] < steps:
        grid.append(min(steps, max(grid[-1] + 1, round(grid[-1] * _RATIO))))
    return grid


@dataclass(frozen=True)
class Problem:
    """A full-batch training on (1/2) sum (z - y)^2, and where it is looked at.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        learning_rate: eta.
        options: Of the optimizer, as ``predict_training`` takes them (momentum).
    """

    ensemble: MLPEnsemble
    x_train: Tensor
    y_train: Tensor
    x_probe: Tensor
    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)

    def predicted(self, steps: Sequence[int], order: int, points: int | None = None, **options: Any) -> Trajectory:
        """``predict_training`` at some steps, on all or the first few training points."""
        kept = slice(0, points)
        return predict_training(
            self.ensemble,
            self.x_train[kept],
            self.y_train[kept],
            self.x_probe,
            self.learning_rate,
            max(steps),
            "sum",
            order,  # type: ignore[arg-type]
            at_steps=steps,
            **self.options,
            **options,
        )


@dataclass(frozen=True)
class AtStep:
    """Corrections of order 1/n at one step; None where there are none.

    Args:
        mean: Of the mean output on the probe, (N_p, n_L).
        variances: Of the variance of every output, (N_p, n_L).
        projected_variance: Of the variance of the output along the compared direction, 0-d.
        ntk: Drift E H(t) - E H(0), mean over outputs, (N_p, N_p).
        kernels: Drift of every hidden kernel, (N_p, N_p).
        gauge: The largest size, up to this step, of terms of order 1/n over those of order 0.
    """

    mean: Tensor | None = None
    variances: Tensor | None = None
    projected_variance: Tensor | None = None
    ntk: Tensor | None = None
    kernels: tuple[Tensor, ...] = ()
    gauge: float | None = None


@dataclass
class FiniteWidth:
    """Corrections on a grid of steps.

    Args:
        steps: The grid.
        values: ``{name of AtStep's field: (T, ...)}``; hidden layers by ``"kernels"``, a list.
        initial_ntk: Theta1 / n_{L-1} on the probe, (N_p, N_p); None without the NTK's correction.
        kernels_0: Hidden kernels at infinite width.
        validity: The worst of what was computed; a covariance that is not valid makes it "caution": the band is rough.
        spread_validity: Of the covariance.
        words: What was computed, and what was not and why.
    """

    steps: list[int]
    values: dict[str, Tensor] = field(default_factory=dict)
    kernels: list[Tensor] = field(default_factory=list)
    initial_ntk: Tensor | None = None
    kernels_0: tuple[Tensor, ...] = ()
    validity: Validity | None = None
    spread_validity: Validity | None = None
    words: list[str] = field(default_factory=list)

    def at(self, step: int) -> AtStep:
        """Interpolated to a step within the grid."""
        upper = next(index for index, value in enumerate(self.steps) if value >= step)
        lower = max(upper - 1, 0)
        share = 0.0 if upper == lower else (step - self.steps[lower]) / (self.steps[upper] - self.steps[lower])

        def between(value: Tensor) -> Tensor:
            return value[lower] + share * (value[upper] - value[lower])

        found = {name: between(value) for name, value in self.values.items()}
        gauge = found.pop("gauge", None)
        return AtStep(
            **found,
            kernels=tuple(between(value) for value in self.kernels),
            gauge=None if gauge is None else float(gauge),
        )


def finite_width(problem: Problem, steps: int, direction: Tensor, seconds: float) -> FiniteWidth:
    """All corrections that can be had within ``seconds``: the NTK first, then hidden layers, mean and covariance.

    Args:
        problem: The training.
        steps: The last step.
        direction: The compared direction of the output, (N_p, n_L).
        seconds: Allowed in all.
    """
    found = FiniteWidth(time_grid(steps))
    points = len(problem.x_train)
    if points > MOST_POINTS:
        found.words.append(
            f"{points} training points: order 1/n is for up to {MOST_POINTS} beside a training; order 0 is drawn"
        )
        return found
    work = _Work(points, seconds, found.words)

    def training(few: int, correction: str) -> Trajectory:
        return problem.predicted(found.steps, 1, few, corrections=(correction,))

    zeroth = problem.predicted(found.steps, 0)
    Theta = as_trace(zeroth.ntk_mean[0])
    gauges, verdicts = [], []
    ntk = work.attempt("the NTK", 1.0, lambda few: training(few, "ntk"))
    if ntk is not None:
        found.initial_ntk = as_trace(ntk.ntk_mean[0]) - Theta
        found.values["ntk"] = torch.stack([as_trace(value) for value in ntk.ntk_drift])
        gauges.append((found.initial_ntk + found.values["ntk"]).flatten(1).norm(dim=1) / Theta.norm())
        verdicts.append(ntk.validity)
    if not problem.options:
        hidden = work.attempt("hidden kernels", 1.0, lambda few: _hidden(problem, found.steps, few))
        if hidden is not None:
            found.kernels_0 = tuple(layer.kernel_order0 for layer in hidden.layers)
            found.kernels = [layer.kernel_drift for layer in hidden.layers]
            verdicts.append(hidden.validity)
    mean = work.attempt("the mean output", 2.0, lambda few: training(few, "mean"))
    if mean is not None:
        found.values["mean"] = mean.output_mean - zeroth.output_mean
        moved = zeroth.output_mean.flatten(1).norm(dim=1)
        size = found.values["mean"].flatten(1).norm(dim=1)
        gauges.append(torch.where(moved > 0, size / torch.where(moved > 0, moved, 1.0), 0.0))
        verdicts.append(mean.validity)
        spread = work.attempt("the covariance", 2.0, lambda few: training(few, "covariance"))
        if spread is not None:
            change = spread.output_covariance - zeroth.output_covariance
            found.values["projected_variance"] = torch.einsum("ai,tabij,bj->t", direction, change, direction)
            found.values["variances"] = torch.einsum("taaii->tai", change)
            found.spread_validity = spread.validity
    if gauges:
        found.values["gauge"] = torch.stack(gauges).amax(0).cummax(0)[0]
    levels = ("valid", "caution", "invalid")
    found.validity = max(verdicts, key=lambda value: levels.index(value.flag), default=None)
    if found.validity is not None and found.spread_validity is not None:
        found.validity = _with_band(found.validity, found.spread_validity)
    return found


def _with_band(validity: Validity, band: Validity) -> Validity:
    if band.flag == "valid" or validity.flag == "invalid":
        return validity
    return Validity("caution", f"{validity.reason}. The band is rough: {band.reason}")


def _hidden(problem: Problem, steps: Sequence[int], few: int) -> Any:
    return predict_representation(
        problem.ensemble,
        problem.x_train[:few],
        problem.y_train[:few],
        problem.x_probe,
        problem.learning_rate,
        max(steps),
        "sum",
        steps,
        ntk=False,
        samples=4096,
        replicas=2,
    )


class _Work:
    """One attempt after another, out of one allowance."""

    def __init__(self, points: int, seconds: float, words: list[str]) -> None:
        self.points, self.left, self.words = points, seconds, words

    def attempt(self, name: str, growth: float, compute: Callable[[int], Any]) -> Any:
        """The result, or None; ``words`` says which and why."""
        try:
            result, spent = within(self.left, self.points, compute, growth)
        except (TooDearError, ValueError) as error:
            self.words.append(f"{name} at order 0: {error}")
            self.left -= error.spent if isinstance(error, TooDearError) else 0.0
            return None
        self.left -= spent
        self.words.append(f"{name} at order 1/n")
        return result
