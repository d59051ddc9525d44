"""The forecast of this network, from its own NTK, dNTK and ddNTK at theta_0, beside its running training."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch_eft.forecast.comparison.instance import InstanceComparison, SGDOptions
from torch_eft.live.part import Measurement, Reading, Start
from torch_eft.live.parts.common import compared_scalars
from torch_eft.live.parts.forecasts.base import ForecastPart
from torch_eft.measure.ensembles.learning_rates import read_learning_rates
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.network.snapshot import Plan
from torch_eft.measure.training_loss import recognize_loss
from torch_eft.results.training import LossFunction


class InstancePart(ForecastPart):
    """This network's own forecast, as long as the training is full-batch gradient descent (with momentum or without).

    Args:
        output_fn: Turns what the network returns into (N, C).
        loss: The loss as a function of outputs (N, C) and targets, if it is neither squared error nor cross-entropy.
        seconds: Time that the forecast may take before the first step.
        largest: Outputs N C over training and probe points, at most.
    """

    name = page = "instance"
    cost = "standard"
    what = "Forecast of this network"

    def __init__(
        self,
        output_fn: OutputFn | None = None,
        loss: LossFunction | None = None,
        seconds: float = 3.0,
        largest: int = 512,
    ) -> None:
        if not seconds > 0 or largest < 1:
            raise ValueError(f"seconds: {seconds}, largest: {largest} given; both must be positive")
        self.output_fn, self.loss, self.seconds, self.largest = output_fn, loss, seconds, largest
        super().__init__()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        super().forget()
        self._comparison: InstanceComparison | None = None
        self._lambdas: dict[str, float] = {}

    def plan(self, outputs: int, samples: int) -> Plan:
        """Outputs (always there) and the NTK."""
        return Plan(ntk=True)

    def begin(self, start: Start) -> Reading:
        """Rule out what the loop already shows to be outside."""
        if self._goes_on(start):
            return Reading()
        reason = self._look(start)
        return Reading() if reason is None else Reading(pages=self._stop(reason))

    def _compared(self, visit: Measurement) -> Reading:
        assert self._comparison is not None
        extended = visit.step > self._comparison.steps
        try:
            within = self._comparison.reaches(visit.step)
        except ValueError as error:
            return self._ended(visit.step, f"it cannot be extended beyond step {self._comparison.steps}: {error}")
        if not within:
            return self._ended(visit.step, f"it ends at step {self._comparison.steps}, more would take too long")
        pages = self._page() if extended else {}
        now, then = visit.snapshot.ntk, visit.reference.ntk
        same_units = now is not None and then is not None and visit.lambdas == self._lambdas
        compared = self._comparison.compare(
            visit.step,
            visit.snapshot.output,
            now if same_units else None,
            then if same_units else None,
        )
        events = self._watch.events(visit.step, self._comparison.gauge(visit.step))
        return Reading(compared_scalars(compared), pages, events)

    def _forecast(self, x: Any, y: Tensor, optimizer: Optimizer, options: dict[str, Any]) -> dict[str, str]:
        assert self._seen is not None and self._seen.loss is not None
        start, kept = self._seen.start, self._kept
        if kept and kept.get("theta_0") is None:
            raise ValueError(
                "theta_0, of which it would be made again, was not kept (keep_theta_0) or is not to be had"
            )
        network, rates = start.network, read_learning_rates(start.network, [optimizer])
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        self._lambdas = rates.lambdas
        loss = recognize_loss(
            network, x, y, self._seen.loss, gradients, output_fn=self.output_fn, loss_function=self.loss
        )
        self._same_loss(loss.name, loss.factor)
        self._comparison = InstanceComparison(
            network,
            x,
            loss,
            start.probe,
            SGDOptions(rates.learning_rate, **options),
            rates.lambdas,
            start.total_steps,
            self.output_fn,
            self.seconds,
            self.largest,
            kept["comparison"] | {"theta_0": kept["theta_0"]} if kept else None,
        )
        return self._page(f"Loss: {loss.name}. ")

    def _page(self, before: str = "") -> dict[str, str]:
        assert self._comparison is not None
        found = self._comparison
        self.validity = found.validity
        return {
            "instance": f"{before}This network's own forecast up to step {found.steps}: {found.provenance}; "
            f"{found.words}. At the last step, {found.validity}"
        }

    def state(self) -> dict[str, Any]:
        """The forecast, by theta_0, of which it is made again."""
        state = super().state()
        if self._comparison is None or "comparison" not in state:
            return state
        return state | {"theta_0": state["comparison"].pop("theta_0")}

    def _none(self, reason: str) -> str:
        return f"No forecast of this network, measurements only: {reason}."

    def info(self) -> dict[str, Any]:
        """Level and validity, once they are known."""
        return {} if self.validity is None else super().info()
