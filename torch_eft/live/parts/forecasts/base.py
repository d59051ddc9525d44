"""A forecast of the whole training, made at theta_0 before the first step, as a part: how it begins, goes on and ends.

After a checkpoint it goes on if learning rates, optimizer, loss and data are those it was made for: seen at the first
step after the resume as they were at the very first, by their numbers. Else it ends there, in words.
"""

import math
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from torch_eft.live.part import Event, Instrument, Measurement, Reading, Start
from torch_eft.live.parts.forecasts.full_batch import UNSHOWN, FullBatch, sgd_options
from torch_eft.live.parts.forecasts.gauge import GaugeWatch
from torch_eft.results.trajectory import Validity

if TYPE_CHECKING:
    from torch_eft.live.part import History


class Comparison(Protocol):
    """The forecast, and what it is compared with."""

    @property
    def level(self) -> str:
        """Level and order, in words."""

    def state(self) -> dict[str, Any]:
        """What brings it back: plain types and tensors."""


class ForecastPart(Instrument):
    """What all forecasts of full-batch gradient descent have in common; ``_forecast`` and ``_compared`` are their own.

    Attributes:
        validity: Where it holds, or why there is none; None before that is known.
        what: Of what it is the forecast, in words.
        page: Where what it says is logged.
    """

    what = "Forecast"
    page = "forecast"

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self.validity: Validity | None = None
        self._comparison: Comparison | None = None
        self._seen: FullBatch | None = None
        self._waiting: list[Measurement] = []
        self._watch = GaugeWatch(self.what)
        self._kept: dict[str, Any] = {}
        self._terms: dict[str, Any] = {}

    # ---- its own

    def _forecast(self, x: Any, y: Tensor, optimizer: Optimizer, options: dict[str, Any]) -> dict[str, str]:
        """Make it, or bring back what ``_kept`` holds, and say so.

        Raises:
            ValueError: If there is none of this training; the message says why.
        """
        raise NotImplementedError

    def _compared(self, visit: Measurement) -> Reading:
        """It and the measurement."""
        raise NotImplementedError

    def _none(self, reason: str) -> str:
        """That there is none, in words."""
        raise NotImplementedError

    # ---- the training

    def _goes_on(self, start: Start) -> bool:
        """Whether it is there already, as in a second fit; else forget all but what a checkpoint kept of it."""
        if not start.fresh and self._comparison is not None:
            return True
        kept = {} if start.fresh else self._kept
        self.forget()
        self._kept = kept
        return False

    def _look(self, start: Start) -> str | None:
        """Why there can be none, as far as the beginning shows, in words; None: batches and losses are looked at."""
        if not start.fresh and not self._kept:
            return f"training starts at step {start.step}, the theory at initialization"
        if "ended" in self._kept:
            return str(self._kept["ended"])
        seen = FullBatch(start)
        reason = seen.refusal()
        if reason is None:
            options = sgd_options(start.optimizers[0], at_rest=not self._kept)
            reason = options if isinstance(options, str) else None
        if reason is None:
            self._seen = seen
        return reason

    def on_batch(self, batch: Any) -> None:
        """Keep the first batch; compare the others with it."""
        if self._seen is not None:
            self._seen.on_batch(batch)

    def on_loss(self, loss: Tensor) -> None:
        """Keep the first loss."""
        if self._seen is not None and self._comparison is None:
            self._seen.loss = loss

    def on_gradient(self, step: int, optimizer: Optimizer) -> Reading:
        """Decide, before the first step is taken; later, see that learning rates stay."""
        if self._seen is None:
            return Reading()
        if self._comparison is not None:
            reason = self._seen.end(step, optimizer)
            return Reading() if reason is None else self._ended(step, reason)
        try:
            pages = self._decide(self._seen, optimizer)
        except ValueError as error:  # unrecognized, unstable, too dear, conflicting points, no derivatives
            return self._ended(step, str(error)) if self._kept else Reading(pages=self._stop(str(error)))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if self._kept:
                return self._ended(step, f"what the checkpoint holds of it cannot be read ({reason})")
            self._stop(reason)
            raise
        self._kept = {}
        late: History = {visit.step: self._compared(visit).scalars for visit in self._waiting}
        self._waiting = []
        return Reading(late=late, pages=pages)

    def _decide(self, seen: FullBatch, optimizer: Optimizer) -> dict[str, str]:
        if seen.batch is None or seen.loss is None:
            raise ValueError("the batch is not a pair (inputs, targets) of tensors")
        kept = self._kept
        options = sgd_options(optimizer, at_rest=not kept)
        if isinstance(options, str):
            raise ValueError(options)
        if kept:
            reason = seen.unlike(kept["batches"], optimizer)
            if reason is None and options != kept["options"]:
                reason = f"the optimizer is another after the resume: {options}, it was {kept['options']}"
            if reason is not None:
                raise ValueError(reason)
        self._terms = {"options": options}
        pages = self._forecast(*seen.batch, optimizer, options)
        seen.begin(optimizer)
        if kept:
            self._watch.told = int(kept["told"])
            pages = {
                name: f"{text}\n\nIt goes on after a resume at step {seen.start.step}." for name, text in pages.items()
            }
        return pages

    def _same_loss(self, name: str, factor: float) -> None:
        """Raise ``ValueError`` if a checkpoint kept the forecast for another loss."""
        self._terms |= {"loss": name, "factor": factor}
        then = self._kept
        if then and not (then["loss"] == name and math.isclose(then["factor"], factor, rel_tol=1e-6)):
            raise ValueError(f"the loss is another after the resume: {name}, it was {then['loss']}")

    def observe(self, visit: Measurement) -> Reading:
        """Forecast beside measurement, or nothing where there is none."""
        if self._seen is None:
            return Reading()
        if self._comparison is None:
            if visit.step > self._seen.start.step:
                return Reading(pages=self._stop(UNSHOWN))
            self._waiting.append(visit)
            return Reading()
        reason = self._seen.changed()
        return self._compared(visit) if reason is None else self._ended(visit.step, reason)

    def _stop(self, reason: str) -> dict[str, str]:
        """From here on measurements only, and why."""
        self.validity = Validity("invalid", reason)
        self._comparison = self._seen = None
        self._waiting, self._kept = [], {}
        return {self.page: self._none(reason)}

    def _ended(self, step: int, reason: str) -> Reading:
        return Reading(pages=self._stop(reason), events=[Event(step, "validity", f"{self.what}: {reason}")])

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """The forecast and what it was made for; or why it ended."""
        if self._comparison is None or self._seen is None:
            if self._kept or self.validity is None:
                return dict(self._kept)  # resumed, and no step taken since; or nothing decided yet
            return {"ended": self.validity.reason}
        reason = self._seen.changed()
        if reason is not None:
            return {"ended": reason}
        terms = {key: dict(value) if isinstance(value, dict) else value for key, value in self._terms.items()}
        return terms | {
            "batches": self._seen.state(),
            "comparison": self._comparison.state(),
            "told": self._watch.told,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """It is looked at with the first step: only then is it known whether the training is the same."""
        self._kept = dict(state)

    def info(self) -> dict[str, Any]:
        """Level and validity of the comparison."""
        validity = self.validity
        return {
            "level": "measurements only" if self._comparison is None else self._comparison.level,
            "validity": None if validity is None else {"flag": validity.flag, "reason": validity.reason},
        }
