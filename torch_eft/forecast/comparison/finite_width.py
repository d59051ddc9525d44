"""What order 1/n adds to the observables that are compared, on a grid of steps, bounded in cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from torch_eft.forecast.comparison.affordable import TooDearError, within
from torch_eft.measure.kernels.metrics import as_trace
from torch_eft.results.trajectory import Trajectory, Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.hidden_layers.predict import predict_representation
from torch_eft.theory.signal_propagation.regimes import first_order_validity
from torch_eft.theory.training.predict import predict_training

MOST_POINTS = 64
"""Training points up to which order 1/n is computed beside a training."""

_EVERY = 32
_RATIO = 1.08
_LONGEST_RINGING = 512


def time_grid(steps: int, momentum: float = 0.0) -> list[int]:
    """Every step up to 32, or as long as momentum rings (to 0.1 %, at most 512), then steps 8 % apart, up to ``steps``.

    Corrections are interpolated between them by straight lines, which over intervals of 0.08 in log t are wrong by
    0.08^2 / 8 = 0.1 % of the second derivative in log t.
    """
    ringing = 0 if momentum == 0 else min(_LONGEST_RINGING, math.ceil(2 * math.log(1e-3) / math.log(momentum)))
    grid = list(range(min(steps, max(_EVERY, ringing)) + 1))
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
        options: Of the optimizer, as ``predict_training`` takes them: momentum, nesterov, dampening; empty without.
    """

    ensemble: MLPEnsemble
    x_train: Tensor
    y_train: Tensor
    x_probe: Tensor
    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)

    def of(self, points: int) -> "Problem":
        """With the first few training points."""
        return (
            self
            if points == len(self.x_train)
            else replace(self, x_train=self.x_train[:points], y_train=self.y_train[:points])
        )

    def predicted(self, steps: Sequence[int], order: Literal[0, 1], **options: Any) -> Trajectory:
        """``predict_training`` at some steps."""
        return predict_training(
            self.ensemble,
            self.x_train,
            self.y_train,
            self.x_probe,
            learning_rate=self.learning_rate,
            steps=max(steps),
            reduction="sum",
            order=order,
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

    def state(self) -> dict[str, Any]:
        """Plain types and tensors."""
        return {
            "steps": list(self.steps),
            "values": dict(self.values),
            "kernels": list(self.kernels),
            "initial_ntk": self.initial_ntk,
            "kernels_0": list(self.kernels_0),
            "validity": _plain(self.validity),
            "spread_validity": _plain(self.spread_validity),
            "words": list(self.words),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "FiniteWidth":
        """From what ``state`` returned.

        Raises:
            Exception: Of any kind, if it is something else.
        """
        initial, validity, spread = state["initial_ntk"], state["validity"], state["spread_validity"]
        return cls(
            [int(step) for step in state["steps"]],
            {name: value.to(device) for name, value in state["values"].items()},
            [value.to(device) for value in state["kernels"]],
            None if initial is None else initial.to(device),
            tuple(value.to(device) for value in state["kernels_0"]),
            None if validity is None else Validity(*validity),
            None if spread is None else Validity(*spread),
            list(state["words"]),
        )


def _plain(validity: Validity | None) -> list[str] | None:
    return None if validity is None else [validity.flag, validity.reason]


def finite_width(problem: Problem, steps: int, direction: Tensor, seconds: float) -> FiniteWidth:
    """All corrections that can be had within ``seconds``: the NTK first, then hidden layers, mean and covariance.

    Args:
        problem: The training.
        steps: The last step.
        direction: The compared direction of the output, (N_p, n_L).
        seconds: Allowed in all.
    """
    found = FiniteWidth(time_grid(steps, problem.options.get("momentum", 0.0)))
    points = len(problem.x_train)
    if points > MOST_POINTS:
        found.words.append(
            f"{points} training points: order 1/n is for up to {MOST_POINTS} beside a training; order 0 is drawn"
        )
        return found
    start = first_order_validity(problem.ensemble, torch.cat([problem.x_probe, problem.x_train]))
    if start.flag == "invalid":
        found.words.append(f"order 1/n is not drawn: {start.reason}")
        return found
    added, problem = _enough_labels(problem)
    look = slice(added, None)
    work = _Work(problem, seconds, found.words)

    def training(correction: str) -> Callable[[Problem], Trajectory]:
        return lambda some: some.predicted(found.steps, 1, corrections=(correction,))

    zeroth = problem.predicted(found.steps, 0)
    Theta = as_trace(zeroth.ntk_mean[0])[look, look]
    gauges, verdicts = [], []
    ntk = work.attempt("the NTK", 0, 2, training("ntk"))
    if ntk is not None:
        found.initial_ntk = as_trace(ntk.ntk_mean[0])[look, look] - Theta
        found.values["ntk"] = torch.stack([as_trace(value)[look, look] for value in ntk.ntk_drift])
        gauges.append((found.initial_ntk + found.values["ntk"]).flatten(1).norm(dim=1) / Theta.norm())
        verdicts.append(ntk.validity)
    if problem.options:
        found.words.append("hidden kernels at order 0: their drift is derived without momentum")
    else:
        hidden = work.attempt("hidden kernels", 0, 2, lambda some: _hidden(some, found.steps))
        if hidden is not None:
            found.kernels_0 = tuple(layer.kernel_infinite_width[look, look] for layer in hidden.layers)
            found.kernels = [layer.kernel_drift[:, look, look] for layer in hidden.layers]
            verdicts.append(hidden.validity)
    mean = work.attempt("the mean output", 1, 3, training("mean"))
    if mean is not None:
        found.values["mean"] = (mean.output_mean - zeroth.output_mean)[:, look]
        moved = zeroth.output_mean[:, look].flatten(1).norm(dim=1)
        size = found.values["mean"].flatten(1).norm(dim=1)
        gauges.append(torch.where(moved > 0, size / torch.where(moved > 0, moved, 1.0), 0.0))
        verdicts.append(mean.validity)
        spread = work.attempt("the covariance", 1, 3, training("covariance"))
        if spread is not None:
            change = (spread.output_covariance - zeroth.output_covariance)[:, look, look]
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


def _enough_labels(problem: Problem) -> tuple[int, Problem]:
    """With as many more probe points, in front, as make moments over all points sampled.

    Over three and four points they are integrated by quadrature, a minute of it; over five and more they are sampled.
    """
    different = len(torch.unique(torch.cat([problem.x_train, problem.x_probe]), dim=0))
    added = 5 - different if different in (3, 4) else 0
    scales = torch.linspace(0.5, 0.8, added, dtype=problem.x_train.dtype, device=problem.x_train.device)
    longest = problem.x_train[problem.x_train.norm(dim=1).argmax()]
    return added, replace(problem, x_probe=torch.cat([scales[:, None] * longest, problem.x_probe]))


def _hidden(problem: Problem, steps: Sequence[int]) -> Any:
    return predict_representation(
        problem.ensemble,
        problem.x_train,
        problem.y_train,
        problem.x_probe,
        learning_rate=problem.learning_rate,
        steps=max(steps),
        reduction="sum",
        at_steps=steps,
        ntk=False,
        num_samples=4096,
        num_replicas=2,
    )


class _Work:
    """One attempt after another, out of one allowance."""

    def __init__(self, problem: Problem, seconds: float, words: list[str]) -> None:
        self.problem, self.left, self.words = problem, seconds, words

    def attempt(self, name: str, over_all: int, over_train: int, compute: Callable[[Problem], Any]) -> Any:
        """The result, or None; ``words`` says which and why.

        Its largest tensors have ``over_all`` labels that run over all points and ``over_train`` over training points
        (those over probe points alone do not grow).
        """
        problem, probes = self.problem, len(self.problem.x_probe)
        if self.left <= 0:
            self.words.append(f"{name} at order 0: no time is left of what is allowed")
            return None
        try:
            result, spent = within(
                self.left,
                len(problem.x_train),
                lambda points: compute(problem.of(points)),
                lambda points: (points + probes) ** over_all * points**over_train,
            )
        except (TooDearError, ValueError) as error:
            self.words.append(f"{name} at order 0: {error}")
            self.left -= error.spent if isinstance(error, TooDearError) else 0.0
            return None
        self.left -= spent
        self.words.append(f"{name} at order 1/n")
        return result
