"""Base of instruments that forecast a whole training from theta_0: how they begin, go on and end.

A forecast takes time, and only one of full-batch training comes true. Where the loop knows that its training is, it is
made before the first step. Else loss and optimizer are recognized there, and the forecast is made, from the same
theta_0, when the second batch has been seen to be the first one again.

After a checkpoint a forecast goes on if learning rates, optimizer, loss and data are those it was made for: they are
compared, by their numbers, at the first step after the resume. Otherwise it ends there, and its page says why.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from torch_eft.live.instrument import Claim, Event, Instrument, Measurement, Reading, RunFacts, TrainingStart
from torch_eft.live.instruments.forecasts.full_batch import ENDED, UNSHOWN, FullBatch, ValidityWatch, rates, sgd_options
from torch_eft.live.instruments.forecasts.step_check import StepCheck, versions, without_gradients
from torch_eft.measure.training_loss import UnrecognizedLossError, loss_gradient
from torch_eft.results.trajectory import Validity

if TYPE_CHECKING:
    from torch_eft.live.instrument import History


Loss = TypeVar("Loss")


class Comparison(Protocol):
    """A forecast that can be compared with measurements."""

    @property
    def level(self) -> str:
        """Level and order, e.g. ``"ensemble, order 1"``."""

    def state(self) -> dict[str, Any]:
        """All that is needed to restore it: plain types and tensors."""


class ForecastInstrument(Instrument, ABC):
    """Common part of all forecasts of full-batch gradient descent.

    Subclasses add ``_recognize``, ``_forecast`` and ``_compared``.

    Attributes:
        validity: Where it holds, or why there is none; None before that is known.
        what: A phrase saying whose forecast it is.
        page: Name of its page.
        follows: Whether it follows weight decay, and learning rates that change.
    """

    what = "Forecast"
    follows = False
    page = "forecast"
    draws_curves = True

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self.validity: Validity | None = None
        self._comparison: Comparison | None = None
        self._seen: FullBatch | None = None
        self._steps: StepCheck | None = None
        self._loss: Callable[[Tensor, Any], Tensor] | None = None
        self._measured = False
        self._waiting: list[tuple[Measurement, int | None]] = []  # with the steps taken, once that is known
        self._taken: dict[int, int] = {}  # steps taken, by those counted at measurements
        self._idle: int | None = None
        self._watch = ValidityWatch(self.what)
        self._problem: Any = None  # what was recognized, until it is forecast
        self._kept: dict[str, Any] = {}
        self._terms: dict[str, Any] = {}
        self._rates: list[list[float]] = []  # learning rates of the steps taken

    # ---- its own

    @abstractmethod
    def _recognize(self, x: Any, y: Tensor, optimizer: Optimizer, options: dict[str, Any]) -> None:
        """Recognize the training, and keep what the forecast takes of theta_0; ``_same_loss`` is called.

        Raises:
            ValueError: If this training has none; the message says why.
        """

    @abstractmethod
    def _forecast(self) -> dict[str, str]:
        """Make the forecast, or restore the one that ``_kept`` holds; returns its pages. The network may have moved.

        Raises:
            ValueError: If this training has none; the message says why.
        """

    @abstractmethod
    def _compared(self, measurement: Measurement) -> Reading:
        """Compare the forecast with a measurement."""

    @abstractmethod
    def _none(self, reason: str) -> str:
        """The sentence shown when there is no forecast."""

    # ---- the training

    def _goes_on(self, start: TrainingStart) -> bool:
        """Return whether it is there already, as in a second fit; else forget all but what a checkpoint kept of it."""
        if not start.fresh and self._comparison is not None:
            return True
        kept = {} if start.fresh else self._kept
        self.forget()
        self._kept = kept
        return False

    def _refusal(self, start: TrainingStart) -> str | None:
        """Return why there can be no forecast, as far as the beginning shows; if None, watch batches and losses."""
        if not start.fresh and not self._kept:
            return f"training starts at step {start.step}, the theory at initialization"
        if "ended" in self._kept:
            return str(self._kept["ended"])
        seen = FullBatch(start)
        reason = seen.refusal()
        if reason is None:
            options = sgd_options(start.optimizers[0], not self._kept, self.follows)
            reason = options if isinstance(options, str) else None
        if reason is None:
            self._seen = seen
        return reason

    def listens(self) -> bool:
        """Return whether there is a forecast, or may be one."""
        return self._seen is not None

    def observe_batch(self, batch: Any) -> None:
        """Keep the first batch; compare the others with it."""
        if self._seen is not None:
            self._seen.observe_batch(batch)

    def observe_loss(self, loss: Tensor) -> None:
        """Keep the first loss."""
        if self._seen is not None and self._steps is None:
            self._seen.observe_loss(loss)

    def undecided(self) -> bool:
        """Return whether the coming step may bring the forecast."""
        return self._seen is not None and self._comparison is None

    def before_step(self, step: int, optimizer: Optimizer) -> Reading:
        """Before the first steps, decide whether there is a forecast; later, check that learning rates stay."""
        if self._seen is None:
            return Reading()
        if self._steps is not None:
            reason = self._seen.end(step, optimizer, self.follows)
            if reason is None:
                shown = self._seen.batch
                self._seen.clear()
                self._steps.before_step(step, optimizer, shown, self._measured)
                self._measured = False
                self._note_rates(optimizer)
                if self._comparison is None:
                    return self._shown(step, shown is not None)
            return Reading() if reason is None else self._ended(step, reason)
        model, before = self._seen.start.model, self._idle
        self._idle = versions(model)
        if before is not None and before != self._idle:
            return Reading(pages=self._stop("the parameters moved before a step with finite gradients"))
        if without_gradients(model):
            self._seen.clear()
            return Reading()
        seen = self._seen
        return self._tried(step, lambda: self._decide(step, seen, optimizer))

    def _tried(self, step: int, work: Callable[[], dict[str, str]]) -> Reading:
        """Decide; if there is a forecast now, compare it with what was measured so far."""
        try:
            pages = work()
        except ValueError as error:  # unrecognized, unstable, too slow, conflicting points, no derivatives
            return self._ended(step, str(error)) if self._kept else Reading(pages=self._stop(str(error)))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if self._kept:
                return self._ended(step, f"what the checkpoint holds of it cannot be read ({reason})")
            self._stop(reason)
            raise
        if self._comparison is None:
            return Reading(pages=pages)
        self._kept = {}
        late: History = {each.step: self._compared_in_time(each, taken).scalars for each, taken in self._waiting}
        self._waiting = []
        return Reading(late=late, pages=pages)

    def _decide(self, step: int, seen: FullBatch, optimizer: Optimizer) -> dict[str, str]:
        """Recognize the training at its first step; forecast, if it is known to be full-batch."""
        if seen.batch is None or not seen.losses:
            raise ValueError("the batch is not a pair (inputs, targets) of tensors")
        kept = self._kept
        options = sgd_options(optimizer, not kept, self.follows)
        if isinstance(options, str):
            raise ValueError(options)
        if kept:
            reason = seen.unlike(kept["batches"], optimizer, self.follows)
            if reason is None and options != kept["options"]:
                reason = f"the optimizer is another after the resume: {options}, it was {kept['options']}"
            if reason is not None:
                raise ValueError(reason)
        self._terms = {"options": options}
        batch = seen.batch
        self._recognize(*batch, optimizer, options)
        seen.begin(optimizer)
        self._steps = steps = self._step_check(seen.start, int(kept.get("skipped", 0)) + step - seen.start.step)
        steps.before_step(step, optimizer, batch, measured=False)
        taken = steps.begun - steps.skipped
        before = kept["batches"]["rates"] if kept else []  # of a checkpoint from before they were kept: one rate
        self._rates = [list(each) for each in kept.get("rates", [before] * taken)]
        self._note_rates(optimizer)
        self._waiting = [(each, steps.begun - steps.skipped) for each, _ in self._waiting]
        if not kept:
            return self._forecast() if seen.start.full_batch else {}
        self._watch.level = int(kept["told"])
        pages = self._forecast()
        return {name: f"{text}\n\nIt goes on after a resume at step {seen.start.step}." for name, text in pages.items()}

    def _recognized(self, recognize: Callable[[Tensor], Loss]) -> Loss:
        """Recognize the loss from its value: of a step of several parts the first one that fits."""
        assert self._seen is not None
        *others, last = self._seen.losses
        for value in others:
            try:
                return recognize(value)
            except UnrecognizedLossError:
                continue
        return recognize(last)

    def _note_rates(self, optimizer: Optimizer) -> None:
        """Note the learning rates of the coming step, in the place of those of a step that was not taken."""
        if self.follows and self._seen is not None and self._steps is not None:
            del self._rates[self._steps.begun - self._steps.skipped :]
            self._rates.append(rates(optimizer))

    def _shown(self, step: int, batch: bool) -> Reading:
        """The second batch is there: if it is the first one again, forecast."""
        reason = self._unlike() if batch else f"{UNSHOWN}; so whether it is full-batch training is not known, either"
        return self._tried(step, self._forecast) if reason is None else Reading(pages=self._stop(reason))

    def _step_check(self, start: TrainingStart, skipped: int) -> StepCheck:
        function = self._loss
        assert function is not None

        def gradient(x: Any, y: Tensor) -> dict[str, Tensor]:
            return loss_gradient(start.model, x, y, function, start.network.output_fn)

        return StepCheck(start.model, gradient, str(self._terms["loss"]), skipped)

    def _same_loss(self, name: str, factor: float, function: Callable[[Tensor, Any], Tensor]) -> None:
        """Remember the loss; raise ``ValueError`` if a checkpoint kept the forecast for another one."""
        self._terms |= {"loss": name, "factor": factor}
        self._loss = function
        then = self._kept
        if then and not (then["loss"] == name and math.isclose(then["factor"], factor, rel_tol=1e-6)):
            raise ValueError(f"the loss is another after the resume: {name}, it was {then['loss']}")

    def observe(self, measurement: Measurement) -> Reading:
        """Compare forecast and measurement, where there is a forecast."""
        if self._seen is None:
            return Reading()
        if self._steps is None:
            if measurement.step > self._seen.start.step and self._idle != versions(measurement.model):
                return Reading(pages=self._stop(UNSHOWN))
            self._waiting.append((measurement, None))
            return Reading()
        self._measured = True
        self._steps.look(measurement.step)
        taken = measurement.step - self._steps.skipped
        if self._comparison is None:
            self._waiting.append((measurement, taken))
            return Reading(pages=self._stop(ENDED)) if measurement.last else Reading()
        reason = self._unlike()
        return self._compared_in_time(measurement, taken) if reason is None else self._ended(measurement.step, reason)

    def _compared_in_time(self, measurement: Measurement, taken: int | None) -> Reading:
        """Compare with the forecast of as many steps as were taken: fewer than counted, if some were skipped."""
        taken = measurement.step if taken is None else taken
        self._taken[measurement.step] = taken
        contractions = [
            replace(each, start=self._taken[each.start], end=None if each.end is None else self._taken[each.end])
            for each in measurement.contractions
            if each.start in self._taken  # else it began before the forecast, or before a resume
        ]
        reading = self._compared(replace(measurement, step=taken, contractions=contractions))
        reading.events = [replace(event, step=measurement.step) for event in reading.events]
        return reading

    def _unlike(self) -> str | None:
        """Return why what was seen since is not the training that is forecast, or None; waits for the device."""
        reason = None if self._seen is None else self._seen.changed()
        return self._steps.reason() if reason is None and self._steps is not None else reason

    def _stop(self, reason: str) -> dict[str, str]:
        """Go on with measurements only; returns the page that says why."""
        self.validity = Validity("invalid", reason)
        self._comparison = self._seen = self._steps = self._loss = self._problem = None
        self._waiting, self._kept = [], {}
        return {self.page: self._none(reason)}

    def _ended(self, step: int, reason: str) -> Reading:
        return Reading(pages=self._stop(reason), events=[Event(step, "validity", f"{self.what}: {reason}")])

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """The forecast and the training it was made for; or why it ended."""
        if self._comparison is None or self._seen is None:
            if self._kept or self.validity is None:
                return dict(self._kept)  # resumed, and no step taken since; or nothing decided yet
            return {"ended": self.validity.reason}
        reason = self._unlike()
        if reason is not None:
            return {"ended": reason}
        terms = {key: dict(value) if isinstance(value, dict) else value for key, value in self._terms.items()}
        return terms | {
            "batches": self._seen.state(),
            "comparison": self._comparison.state(),
            "told": self._watch.level,
            "rates": [list(rates) for rates in self._rates],
            "skipped": 0 if self._steps is None else self._steps.skipped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Keep the state until the first step, which shows whether the training is the same."""
        self._kept = dict(state)

    def facts(self) -> RunFacts:
        """Level and validity of the comparison."""
        level = "measurements only" if self._comparison is None else self._comparison.level
        return RunFacts(Claim(level, self.validity))
