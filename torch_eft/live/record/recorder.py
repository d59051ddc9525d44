"""The memory of a run: history, events, pages and failures, and their way to the sinks."""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from torch_eft.live.budget import Budget
from torch_eft.live.part import Event, History, Instrument, MeasurementWarning, Reading
from torch_eft.live.record.events import BandWatch, deviations
from torch_eft.live.record.outlet import Outlet, run_info
from torch_eft.results.trajectory import Validity

_log = logging.getLogger("torch_eft")

LOADING = 1.0
"""Seconds that the first figure takes, as matplotlib is loaded with it (measured: 0.6)."""


class Recorder:
    """What is known of a run, told to the sinks as it comes.

    Args:
        name: Who measures, for warnings.
        budget: The clock on which everything runs.
        on_error: ``"warn"``: warn of the first failure, count all; ``"raise"``.

    Attributes:
        history: ``{optimizer step: {tag: value}}``.
        events: Quantities that left their band, predictions that left their validity.
        skipped: ``[(step, what went wrong)]``.
        undrawn: Figures (or all of a part) that the budget left out.
        drawing: Seconds that the next figure is taken to cost: those of the latest.
        step: The optimizer steps taken so far.
        say: Prints a sentence.
    """

    def __init__(self, name: str, budget: Budget, on_error: Literal["warn", "raise"]) -> None:
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error: {on_error!r} given; give 'warn' or 'raise'")
        self.name = name
        self.budget = budget
        self.on_error = on_error
        self.say: Callable[[str], None] = _log.info
        self.outlet = Outlet(self.guard)
        self.step = 0
        self.forget()

    def forget(self) -> None:
        """A new run."""
        self.history: History = {}
        self.events: list[Event] = []
        self.skipped: list[tuple[int, str]] = []
        self.undrawn: list[str] = []
        self.drawing = LOADING
        self._pages: dict[str, str] = {}
        self._watch = BandWatch()
        self._said: Validity | None = None

    def recall(self, history: History, events: list[Event]) -> None:
        """Go on from what an earlier process knew; what is outside its band already is not told again."""
        self.history, self.events = history, events
        for step, scalars in sorted(history.items()):
            self._watch.events(step, scalars)

    def guard(self, action: Callable[[], Any]) -> None:
        """Run on the observer's own clock; go on without what fails, and warn the first time."""
        with self.budget.counting():
            try:
                action()
            except Exception as error:
                self.failed(error)

    def failed(self, error: Exception) -> None:
        """Count a failure, and warn of the first.

        Raises:
            Exception: ``error`` itself, if that is wanted.
        """
        if self.on_error == "raise":
            raise error
        reason = f"{type(error).__name__}: {error}"
        if not self.skipped:
            warnings.warn(
                f"{self.name} could not measure at step {self.step} and goes on without ({reason}). Further failures "
                "are counted in .skipped, not shown",
                MeasurementWarning,
                stacklevel=4,
            )
        self.skipped.append((self.step, reason))

    def each(self, parts: Sequence[Instrument], action: Callable[[Instrument], None]) -> None:
        """Let every part do something."""
        for part in parts:
            self.guard(lambda part=part: action(part))  # type: ignore[misc]

    def ask_each(self, parts: Sequence[Instrument], question: Callable[[Instrument], Reading]) -> None:
        """The reports of several parts, of which only pages, events and late numbers are wanted."""
        for part in parts:
            self.ask(lambda part=part: question(part))  # type: ignore[misc]

    def ask(self, question: Callable[[], Reading]) -> Reading:
        """A part's report, with its pages, events and late numbers told; an empty one if it fails."""
        answers: list[Reading] = []
        self.guard(lambda: answers.append(question()))
        if not answers:
            return Reading()
        (report,) = answers
        for at_step, scalars in report.late.items():
            known = self.history.get(at_step, {})
            self.record(at_step, {name: value for name, value in scalars.items() if name not in known})
        self._pages |= report.pages
        self.outlet.pages(report.pages, self.step)
        self.outlet.histograms(report.histograms, self.step)
        self.happened(report.events)
        return report

    def record(self, step: int, scalars: dict[str, float], epoch: int | None = None) -> None:
        """Numbers of one step, those that are finite, with how far they are from the theory beside them."""
        scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}
        known = self.history.setdefault(step, {})
        scalars |= deviations(known | scalars)
        known.update(scalars)
        self.outlet.scalars(step, scalars, epoch)
        self.happened(self._watch.events(step, known))

    def happened(self, events: Sequence[Event]) -> None:
        """Marks on the time axis."""
        self.events += events
        self.outlet.events(events, self.events, self.step)

    def tell(
        self, parts: Sequence[Instrument], model: nn.Module, optimizers: Sequence[Optimizer], probe: list[int]
    ) -> None:
        """What is known of the run, if it has changed."""
        validity = validity_of(parts)
        if validity is not None and validity != self._said:
            self.say(f"torch_eft: {_spoken(validity)}")
        self._said = validity
        diagnosis = self._pages.get("diagnosis", "")
        info = run_info(parts, model, optimizers, probe, diagnosis, self.history, self.events, self.skipped)
        self.outlet.info(info, self.history)

    def draw(self, parts: Sequence[Instrument], figures_of: Callable[[Instrument], dict[str, Any]]) -> None:
        """The parts' figures, as long as the budget has room; if anyone wants them and matplotlib is there."""
        for part in parts if self.outlet.draws else ():
            if not self.budget.room(self.drawing):
                self.undrawn.append(part.name)
                continue
            try:
                figures = figures_of(part)
            except ImportError:
                self.say("torch_eft: no figures, matplotlib is not installed (pip install 'torch-eft[demo]')")
                return
            except Exception as error:
                self.failed(error)
                continue
            for name, figure in figures.items():
                if not self.budget.room(self.drawing):
                    self.undrawn.append(name)
                    continue
                begun = self.budget.clock()
                self.outlet.each(
                    lambda sink, name=name, figure=figure: sink.figure(name, figure, self.step)  # type: ignore[misc]
                )
                self.drawing = self.budget.clock() - begun


def validity_of(parts: Sequence[Instrument]) -> Validity | None:
    """Where the first prediction that holds is valid, or why the first does not hold; None before that is known."""
    claims = [info["validity"] for part in parts if (info := part.info()).get("validity")]
    holding = [claim for claim in claims if claim["flag"] != "invalid"]
    claim = next(iter(holding or claims), None)
    return None if claim is None else Validity(claim["flag"], claim["reason"])


def _spoken(validity: Validity) -> str:
    if validity.flag == "invalid":
        return f"no prediction for this run, measurements only: {validity.reason}"
    return f"predicted before training, {validity}"
