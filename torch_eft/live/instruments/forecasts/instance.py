"""The forecast of this network, from its own NTK, dNTK and ddNTK at theta_0, beside its running training."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.forecast.comparison.instance import FIRST_HORIZON, InstanceComparison
from torch_eft.forecast.comparison.live_path import Group, LivePath
from torch_eft.forecast.comparison.work import Allowance
from torch_eft.live.instrument import Measurement, Reading, RunFacts, TrainingStart
from torch_eft.live.instruments.common import compared_scalars, one_thread, too_many
from torch_eft.live.instruments.forecasts.bar import ForecastBar
from torch_eft.live.instruments.forecasts.base import ForecastInstrument
from torch_eft.measure.ensembles.learning_rates import read_learning_rates
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.kernels.optimizers import plain_optimizer
from torch_eft.measure.network.snapshot import Plan
from torch_eft.measure.training_loss import recognize_loss
from torch_eft.results.training import LossFunction, Training, stability_in_unit

_SMALL = 1_000_000
"""Parameters of a network whose operations are too small for several threads."""


@dataclass(frozen=True)
class _Problem:
    """A training that was recognized: theta_0, inputs, targets as the loss takes them, loss, eta over lr, groups."""

    theta_0: nn.Module
    x: Any
    y: Tensor
    training: Training
    loss: str
    unit: float
    groups: tuple[Group, ...]

    @property
    def decays(self) -> bool:
        """Whether weights decay."""
        return any(group.weight_decay for group in self.groups)


class InstanceInstrument(ForecastInstrument):
    """This network's own forecast, as long as the training is full-batch gradient descent (with momentum or without).

    Weight decay, and a learning rate that changes, are followed at order 0, with the frozen NTK.

    Args:
        loss_function: The loss of outputs (N, C) and targets, if it is neither squared error nor cross-entropy.
        seconds: Work that the forecast may take before the first step, counted in seconds of one core (so that every
            machine draws the same); what needs more is left out, and the page says what brings it.
        largest: Outputs N C over training and probe points, at most.

    Raises:
        ValueError: If ``seconds`` or ``largest`` is not positive.
    """

    name = page = "instance"
    cost = "standard"
    what = "Forecast of this network"
    follows = True

    def __init__(
        self,
        *,
        loss_function: LossFunction | None = None,
        seconds: float = 10.0,
        largest: int = 512,
    ) -> None:
        if not seconds > 0 or largest < 1:
            raise ValueError(f"seconds: {seconds}, largest: {largest} given; both must be positive")
        self.loss_function, self.seconds, self.largest = loss_function, seconds, largest
        super().__init__()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        super().forget()
        self._comparison: InstanceComparison | LivePath | None = None
        self._followed: _Problem | None = None
        self._lambdas: dict[str, float] = {}
        self._left_out = ""

    def plan(self, outputs: int, samples: int) -> Plan:
        """The NTK, besides the outputs."""
        return Plan(ntk=True)

    def begin(self, start: TrainingStart) -> Reading:
        """End here if the loop is outside the theory already."""
        if self._goes_on(start):
            return Reading()
        reason = self._refusal(start)
        return Reading() if reason is None else Reading(pages=self._stop(reason))

    def _compared(self, measurement: Measurement) -> Reading:
        assert self._comparison is not None
        pages = self._live(measurement.step)
        extended = measurement.step > self._comparison.steps
        try:
            within = self._comparison.reaches(measurement.step)
        except ValueError as error:
            return self._ended(measurement.step, f"it cannot be extended beyond step {self._comparison.steps}: {error}")
        if not within:
            return self._ended(measurement.step, f"it ends at step {self._comparison.steps}, more would take too long")
        if extended and isinstance(self._comparison, InstanceComparison):
            pages = self._page()
        now, then = measurement.snapshot.ntk, measurement.reference.ntk
        same_units = now is not None and then is not None and measurement.lambdas == self._lambdas
        compared = self._comparison.compare(
            measurement.step,
            measurement.snapshot.output,
            now if same_units else None,
            then if same_units else None,
        )
        events = self._watch.events(measurement.step, self._comparison.expansion_parameter(measurement.step))
        return Reading(compared_scalars(compared), pages, events)

    def _live(self, step: int) -> dict[str, str]:
        """Go on with the learning rates that were taken, if they are not one any more; return the page that says so."""
        assert self._comparison is not None
        if isinstance(self._comparison, LivePath):
            self._comparison.rates = self._rates
            return {}
        first = next((s for s, each in enumerate(self._rates[:step]) if each != self._rates[0]), None)
        if first is None or self._followed is None:
            return {}
        self._comparison = self._path(replace(self._followed, theta_0=self._comparison.model))
        return self._page(f"The learning rate changes at step {first}: order 1, for a constant one, ends there. ")

    def _path(self, problem: _Problem) -> LivePath:
        assert self._seen is not None
        network = self._seen.start.network
        path = LivePath(
            problem.theta_0,
            problem.x,
            problem.y,
            network.probe,
            problem.training,
            problem.groups,
            factor=problem.unit,
            output_fn=network.output_fn,
            largest=self.largest,
            theta_0=self._kept.get("theta_0"),
        )
        path.rates = self._rates
        return path

    def _recognize(self, x: Any, y: Tensor, optimizer: Optimizer, options: dict[str, Any]) -> None:
        assert self._seen is not None
        start, kept = self._seen.start, self._kept
        if kept and kept.get("theta_0") is None:
            raise ValueError(
                "theta_0, of which it would be made again, was not kept (keep_theta_0) or is not available"
            )
        network, rates = start.model, read_learning_rates(start.model, [optimizer])
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        self._lambdas = rates.lambdas
        known: dict[str, Any] = {"output_fn": start.network.output_fn, "loss_function": self.loss_function}
        loss = self._recognized(lambda value: recognize_loss(network, x, y, value, gradients, **known))
        self._same_loss(loss.name, loss.factor, loss.function)
        given = loss.kind == "given"
        training = Training(
            loss=loss.function if given else loss.kind,
            reduction="mean" if given else "sum",
            learning_rate=rates.learning_rate * loss.factor,
            steps=start.total_steps or FIRST_HORIZON,
            **options,
        )
        theta_0 = network
        if not (kept or start.full_batch):  # it is to be forecast when it has moved
            refusal = too_many(network)
            if refusal is not None:
                raise ValueError(refusal)
            with isolated(network) as own:
                theta_0 = copy.deepcopy(own.shadow)
        names = {id(p): name for name, p in network.named_parameters()}
        groups = tuple(
            Group(frozenset(names[id(p)] for p in group["params"] if id(p) in names), group["weight_decay"])
            for group in plain_optimizer(optimizer).param_groups
        )
        self._problem = _Problem(theta_0, x, loss.targets, training, loss.name, loss.factor, groups)

    def _forecast(self) -> dict[str, str]:
        assert self._seen is not None
        problem: _Problem = self._problem
        self._problem = None
        start, kept = self._seen.start, self._kept
        self._followed = replace(problem, theta_0=nn.Identity())  # the comparison has a copy of theta_0
        if problem.decays or "rates" in kept.get("comparison", {}):
            self._comparison = self._path(problem)
            return self._page(f"Loss: {problem.loss}. ")
        allowance = Allowance(self.seconds)
        small = sum(p.numel() for p in problem.theta_0.parameters()) < _SMALL
        with ForecastBar(allowance), one_thread() if small else nullcontext(), stability_in_unit(problem.unit):
            self._comparison = InstanceComparison(
                problem.theta_0,
                problem.x,
                problem.y,
                start.network.probe,
                problem.training,
                lambdas=self._lambdas,
                output_fn=start.network.output_fn,
                allowance=allowance,
                largest=self.largest,
                earlier=kept["comparison"] | {"theta_0": kept["theta_0"]} if kept else None,
            )
        self._left_out = allowance.left_out
        return self._page(f"Loss: {problem.loss}. ")

    def _page(self, before: str = "") -> dict[str, str]:
        assert self._comparison is not None
        found = self._comparison
        self.validity = found.validity
        if isinstance(found, LivePath):
            text = f"{before}This network's own forecast: {found.provenance}; {found.description}. {found.validity}"
            return {"instance": text}
        return {
            "instance": f"{before}This network's own forecast up to step {found.steps}: {found.provenance}; "
            f"{found.description}. At the last step, {found.validity}"
        }

    def state(self) -> dict[str, Any]:
        """The forecast, by the theta_0 that it is made from again."""
        state = super().state()
        if self._comparison is None or "comparison" not in state:
            return state
        return state | {"theta_0": state["comparison"].pop("theta_0")}

    def _none(self, reason: str) -> str:
        return f"No forecast of this network, measurements only: {reason}."

    def facts(self) -> RunFacts:
        """Level and validity, once they are known."""
        if self.validity is None:
            return RunFacts()
        left = self._left_out if self._comparison is not None else ""
        return replace(super().facts(), left_out=left or None)
