"""The forecast of this network, from its own NTK, dNTK and ddNTK at theta_0, beside its running training."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch_eft.comparison.affordable import TooDearError
from torch_eft.comparison.instance import InstanceComparison, SGDOptions
from torch_eft.live.part import Event, Part, Report, Start, Visit
from torch_eft.live.parts.full_batch import UNSHOWN, FullBatch, sgd_options
from torch_eft.live.parts.gauge import GaugeWatch
from torch_eft.live.parts.logged import compared_scalars
from torch_eft.measure.learning_rates import read_learning_rates
from torch_eft.measure.losses import LossFunction, recognise_loss
from torch_eft.measure.probe import OutputFn
from torch_eft.measure.snapshot import Plan
from torch_eft.measure.training import UnrecognisedLossError
from torch_eft.trajectory import Validity


class InstancePart(Part):
    """This network's own forecast, as long as the training is full-batch gradient descent (with momentum or without).

    Args:
        output_fn: Turns what the network returns into (N, C).
        loss: The loss as a function of outputs (N, C) and targets, if it is neither squared error nor cross-entropy.
        seconds: Time that the forecast may take before the first step.
        largest: Outputs N C over training and probe points, at most.
    """

    name = "instance"
    cost = "standard"

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
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self.validity: Validity | None = None
        self._comparison: InstanceComparison | None = None
        self._seen: FullBatch | None = None
        self._lambdas: dict[str, float] = {}
        self._watch = GaugeWatch("Forecast of this network")

    def plan(self, outputs: int, samples: int) -> Plan:
        """Outputs (always there) and the NTK."""
        return Plan(ntk=True)

    def begin(self, start: Start) -> Report:
        """Rule out what the loop already shows to be outside."""
        if not start.fresh and self._comparison is not None:
            return Report()  # a second fit goes on where the first one stopped
        self.forget()
        seen = FullBatch(start)
        reason = seen.refusal()
        if reason is None:
            options = sgd_options(start.optimizers[0])
            reason = options if isinstance(options, str) else None
        if reason is not None:
            return Report(pages=self._stop(reason))
        self._seen = seen
        return Report()

    def on_batch(self, batch: Any) -> None:
        """Keep the first batch; compare the others with it."""
        if self._seen is not None:
            self._seen.on_batch(batch)

    def on_loss(self, loss: Tensor) -> None:
        """Keep the first loss."""
        if self._seen is not None and self._comparison is None:
            self._seen.loss = loss

    def on_gradient(self, step: int, optimizer: Optimizer) -> Report:
        """Forecast, before the first step is taken; later, see that learning rates stay."""
        if self._seen is None:
            return Report()
        if self._comparison is not None:
            reason = self._seen.end(step, optimizer)
            return Report() if reason is None else self._ended(step, reason)
        try:
            return Report(pages=self._decide(optimizer))
        except Exception as error:
            self._stop(f"{type(error).__name__}: {error}")
            raise

    def observe(self, visit: Visit) -> Report:
        """Forecast beside measurement, or nothing where there is none."""
        if self._seen is None:
            return Report()
        if self._comparison is None:
            return Report(pages=self._stop(UNSHOWN)) if visit.step > self._seen.start.step else Report()
        reason = self._seen.changed()
        if reason is not None:
            return self._ended(visit.step, reason)
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
        return Report(compared_scalars(compared), pages, events)

    def _decide(self, optimizer: Optimizer) -> dict[str, str]:
        assert self._seen is not None
        if self._seen.batch is None or self._seen.loss is None:
            return self._stop("the batch is not a pair (inputs, targets) of tensors")
        (x, y), start, options = self._seen.batch, self._seen.start, sgd_options(optimizer)
        if isinstance(options, str):
            return self._stop(options)
        network, rates = start.network, read_learning_rates(start.network, [optimizer])
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        self._lambdas = rates.lambdas
        try:
            loss = recognise_loss(network, x, y, self._seen.loss, gradients, self.output_fn, self.loss)
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
            )
        except (UnrecognisedLossError, TooDearError) as error:
            return self._stop(str(error))
        except ValueError as error:  # unstable, conflicting points, too little memory, no derivatives
            return self._stop(str(error))
        self._seen.begin(optimizer)
        return self._page(f"Loss: {loss.name}. ")

    def _page(self, before: str = "") -> dict[str, str]:
        assert self._comparison is not None
        found = self._comparison
        self.validity = found.validity
        return {
            "instance": f"{before}This network's own forecast up to step {found.steps}: {found.provenance}; "
            f"{found.words}. At the last step, {found.validity}"
        }

    def _stop(self, reason: str) -> dict[str, str]:
        self.validity = Validity("invalid", reason)
        self._comparison = self._seen = None
        return {"instance": f"No forecast of this network, measurements only: {reason}."}

    def _ended(self, step: int, reason: str) -> Report:
        return Report(pages=self._stop(reason), events=[Event(step, "validity", f"Forecast of this network: {reason}")])

    def info(self) -> dict[str, Any]:
        """Level and validity."""
        if self.validity is None:
            return {}
        return {
            "level": "measurements only" if self._comparison is None else self._comparison.level,
            "validity": {"flag": self.validity.flag, "reason": self.validity.reason},
        }
