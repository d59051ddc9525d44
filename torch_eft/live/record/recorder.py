"""The memory of a run (history, events, pages, failures) and its way to the sinks."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer

from torch_eft.live.budget import Budget, cost_sentence, left_out
from torch_eft.live.instrument import Event, History, Instrument, MeasurementWarning, Reading
from torch_eft.live.progress import Progress
from torch_eft.live.record.events import BandWatch, deviations, events_page
from torch_eft.live.record.history import RunHistory
from torch_eft.live.record.run_summary import run_summary
from torch_eft.live.record.sinks import Sink
from torch_eft.live.record.terminal import first_lines, last_lines, place_of, terminal
from torch_eft.measure.forward.checks import NotFiniteError
from torch_eft.results.choices import check_choice
from torch_eft.results.regime import first_sentence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RunState = Literal["running", "ended", "interrupted"]

LOADING = 1.0
"""Seconds that the first figure takes, as matplotlib is loaded with it (measured: 0.6)."""


class Recorder:
    """Keeps what is known of a run, and hands it to the sinks as it comes; one that fails does not keep the others.

    Args:
        budget: The clock on which everything runs.
        progress: How far the training has come.
        on_error: ``"warn"``: warn of the first failure, count all; ``"raise"``.
        name: Name of the observer, for warnings.
        say: Prints a sentence; None: the logger ``torch_eft`` does, at level info.

    Attributes:
        history: ``{optimizer step: {tag: value}}``.
        measured: The steps at which a measurement was made; instruments may add late numbers to others.
        events: Quantities that left their band, predictions that left their validity.
        skipped: ``[(step, what went wrong)]``.
        undrawn: Figures (or all of an instrument) that the budget left out.
        diverged: The first step at which the numbers were not finite; None: never.
        drawing: Seconds that the next figure is assumed to cost: those of the latest.
        sinks: Where results go.
        say: Prints a sentence.
        announce: Prints a sentence that must not be missed: without it, missing results would be a riddle.

    Raises:
        ValueError: If ``on_error`` is something else.
    """

    def __init__(
        self,
        budget: Budget,
        progress: Progress,
        on_error: Literal["warn", "raise"],
        name: str,
        say: Callable[[str], None] | None = None,
    ) -> None:
        check_choice("on_error", on_error, ("warn", "raise"))
        self.budget, self.progress = budget, progress
        self.on_error = on_error
        self.name = name
        self.say = say or terminal.info
        self.announce = say or terminal.warning
        self.sinks: list[Sink] = []
        self.forget()

    def forget(self) -> None:
        """Start a new run."""
        self.history = RunHistory()
        self.measured: set[int] = set()
        self.events: list[Event] = []
        self.skipped: list[tuple[int, str]] = []
        self.undrawn: list[str] = []
        self.diverged: int | None = None
        self.drawing = LOADING
        self._pages: dict[str, str] = {}
        self._watch = BandWatch()
        self._summary: dict[str, Any] = {}

    def load(self, history: History, events: list[Event], measured: set[int]) -> None:
        """Restore history from a checkpoint; quantities already outside their band are not reported again."""
        self.history, self.events, self.measured = RunHistory(history), events, measured
        for step, scalars in sorted(history.items()):
            self._watch.events(step, scalars)

    def open(self, sinks: Sequence[Sink]) -> None:
        """Start a training with these sinks."""
        self.sinks = list(sinks)
        self._summary = {}
        self._told: bool | None = None  # whether there is no forecast, as was said

    # ---- failures

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run what is inside on the observer's own clock; if it fails, go on without it, and warn the first time."""
        with self.budget.counting():
            try:
                yield
            except Exception as error:
                self.failed(error)

    def failed(self, error: Exception, what: str = "") -> None:
        """Count a failure, and warn of the first; with ``on_error="raise"``, raise it.

        Args:
            error: The failure.
            what: Its consequence; empty: what was tried at this step is left out.

        Raises:
            Exception: ``error`` itself, with ``on_error="raise"``.
        """
        if self.on_error == "raise":
            raise error
        step, reason = self.progress.step, f"{type(error).__name__}: {error}"
        if isinstance(error, NotFiniteError) and self.diverged is None and not self.progress.at_start:
            self.diverged = step
        if error.__cause__ is not None:  # loggers wrap what their files say
            reason += f" (from {type(error.__cause__).__name__}: {error.__cause__})"
        if not self.skipped:
            warnings.warn(
                f"{self.name} {what or f'could not measure at step {step} and goes on without'} ({reason}). Further "
                "failures are counted in .skipped, not shown",
                MeasurementWarning,
                stacklevel=2,
            )
        self.skipped.append((step, reason))

    # ---- results

    def take(self, reading: Reading) -> None:
        """Record a reading's pages, events, histograms and late numbers; its scalars are recorded by step."""
        for step, scalars in reading.late.items():
            known = self.history.get(step, {})
            self._record(step, {name: value for name, value in scalars.items() if name not in known})
        self.pages(reading.pages)
        for tag, values in reading.histograms.items():
            for sink in self.sinks:
                with self.guard():
                    sink.histogram(tag, values, self.progress.step)
        self._happened(reading.events)

    def record(self, step: int, scalars: Mapping[str, float], epoch: int | None = None) -> None:
        """Record a measurement: its finite numbers, with how far they are from the theory beside them."""
        self.measured.add(step)
        self._record(step, scalars, epoch)

    def _record(self, step: int, scalars: Mapping[str, float], epoch: int | None = None) -> None:
        new = {name: value for name, value in scalars.items() if math.isfinite(value)}
        known = self.history.setdefault(step, {})
        new |= {name: value for name, value in deviations(known | new).items() if known.get(name) != value}
        known.update(new)
        for sink in self.sinks if new else ():
            with self.guard():
                sink.scalars(step, dict(sorted(new.items())), epoch)
        self._happened(self._watch.events(step, known))

    def pages(self, pages: Mapping[str, str]) -> None:
        """Record pages, ``{name: Markdown}``."""
        self._pages |= pages
        for name, text in pages.items():
            for sink in self.sinks:
                with self.guard():
                    sink.text(name, text, self.progress.step)

    def _happened(self, events: Sequence[Event]) -> None:
        self.events += events
        for event in events:
            for sink in self.sinks:
                with self.guard():
                    sink.event(event)
        if events:
            self.pages({"events": events_page(self.events)})

    def summarize(
        self,
        instruments: Sequence[Instrument],
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        probe: Sequence[int],
        state: RunState = "running",
    ) -> None:
        """Hand the sinks what is known of the run, where anything is new."""
        facts = [instrument.facts() for instrument in instruments]
        diagnosis = self._pages.get("diagnosis", "")
        known = self.history, self.events, self.skipped
        left = left_out(self.budget, len(self.undrawn)) if state != "running" else ""
        summary = run_summary(
            facts, model, optimizers, probe, diagnosis, *known, self._progress(state), [left] * bool(left)
        )
        if summary != self._summary:
            self._summary = summary
            for sink in self.sinks:
                with self.guard():
                    sink.run_info(summary)

    # ---- the terminal

    def say_first(self, decided: bool) -> None:
        """Say once what is expected of the training, and later that it is not any more.

        Args:
            decided: Whether the forecasts are made, or there are none.
        """
        claim = self._summary.get("validity", {})
        invalid = claim.get("flag") == "invalid"
        if self._told is None and decided:
            expected = self._summary.get("expected_drift")
            band = None if expected is None else (expected[0], expected[1])
            self._say(first_lines(self._summary, band, self._summary.get("left_out", ()), place_of(self.sinks)))
        elif self._told is False and invalid and not self.progress.at_start:
            self._say([f"step {self.progress.step}: no forecast from here on, {first_sentence(claim['reason'])}"])
        if decided:
            self._told = invalid

    def say_last(self) -> None:
        """Say what came of the training, what it cost, and what was left out."""
        cost = cost_sentence(self.budget, len(self.measured), len(self.skipped))
        self._say(last_lines(self._summary, self.history, cost, left_out(self.budget, len(self.undrawn))))

    def _say(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.say(f"torch_eft  {line}")

    def _progress(self, state: RunState) -> dict[str, Any]:
        """How far the training came; while it runs, the measurements themselves show it."""
        step = None if state == "running" else self.progress.step
        return {"state": state, "step": step, "planned": self.progress.total_steps, "diverged": self.diverged}

    def resume(self, step: int) -> None:
        """Announce that the training goes on from a checkpoint taken at a step."""
        known = {at: dict(scalars) for at, scalars in self.history.items() if at <= step}
        latest = step if step in known else step - 1  # else this step is measured in a moment
        for sink in self.sinks:
            with self.guard():
                sink.resume(latest, known)

    # ---- figures

    @property
    def draws(self) -> bool:
        """True if a sink shows figures."""
        return any(sink.draws for sink in self.sinks)

    def draw(self, instruments: Sequence[Instrument], figures_of: "Callable[[Instrument], dict[str, Figure]]") -> None:
        """Draw the instruments' figures as long as the budget has room, if a sink shows them and matplotlib is there.

        Args:
            instruments: The instruments.
            figures_of: Asks one of them for its figures, ``{name: figure}``.
        """
        for instrument in instruments if self.draws else ():
            if not self.budget.room(self.drawing):
                self.undrawn.append(instrument.name)
                continue
            try:
                figures = figures_of(instrument)
            except ImportError:
                self._without_matplotlib()
                return
            except Exception as error:
                self.failed(error)
                continue
            for name, figure in figures.items():
                if not self.budget.room(self.drawing):
                    self.undrawn.append(name)
                    continue
                begun = self.budget.clock()
                for sink in self.sinks:
                    with self.guard():
                        try:
                            sink.figure(name, figure, self.progress.step)
                        except ImportError:
                            self._without_matplotlib()
                            return
                self.drawing = self.budget.clock() - begun

    def _without_matplotlib(self) -> None:
        self.say("torch_eft  no figures: matplotlib is not installed (pip install 'torch-eft[demo]')")

    def flush(self) -> None:
        """Bring everything to disk."""
        for sink in self.sinks:
            with self.guard():
                sink.flush()

    def close(self) -> None:
        """End the training: nothing more will come."""
        for sink in self.sinks:
            with self.guard():
                sink.close()
