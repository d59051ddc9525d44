"""Measurements of one training: a snapshot, what every instrument makes of it, and what the budget leaves out."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch_eft.live.budget import SNAPSHOT, Account
from torch_eft.live.instrument import Instrument, Measurement, Obstacle, Reading, TrainingStart
from torch_eft.live.record.recorder import Recorder
from torch_eft.live.run.measured_network import MeasuredNetwork
from torch_eft.live.run.reference import Reference
from torch_eft.measure.forward.checks import trusting_derivatives
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.network.network import Network
from torch_eft.measure.network.snapshot import Snapshot
from torch_eft.results.tags import BAND_90, quantity_of, tag

ROOM = 10
"""Measurements of an instrument, with all checks, for which the budget must have room that one is made."""

UNKNOWN = 6.0
"""Snapshots that an instrument's first comparison is assumed to last (dNTK along the path of a CNN: measured 6)."""


class Measurements:
    """The measurements of an observer, on rank 0: each on one isolated copy of the network.

    Args:
        instruments: What looks at the network.
        reference: theta_0, with which everything is compared; taken here if it is not there yet.
        recorder: Where results go; its budget decides.

    Attributes:
        latest: The latest snapshot.
        begun: Whether instruments have begun: not yet where the network could not be isolated when training began.
    """

    def __init__(self, instruments: Sequence[Instrument], reference: Reference, recorder: Recorder) -> None:
        self.instruments, self.reference = instruments, reference
        self.recorder, self.budget, self.progress = recorder, recorder.budget, recorder.progress
        self.forget()

    def forget(self) -> None:
        """Start a new run."""
        self.latest: Snapshot | None = None
        self.begun = True
        self._attempted: int | None = None
        self._left_out: int | None = None
        self._anew: dict[str, float] = {}
        self._explained = ""

    def done(self, step: int) -> bool:
        """Return whether this step is the latest one at which a measurement was tried, here or before a checkpoint."""
        return step == self._attempted

    def restored(self) -> None:
        """Go on from the measurements that a checkpoint brought."""
        self._attempted = max(self.recorder.measured, default=None)

    def begin(self, network: MeasuredNetwork, *, fresh: bool, obstacle: Obstacle | None, resumed: bool) -> None:
        """Begin with every instrument, and measure unless this step is measured already.

        Where the network cannot be isolated, instruments begin before the next measurement instead.

        Args:
            network: What is measured.
            fresh: Whether training starts here rather than going on from a checkpoint.
            obstacle: Why the loop is not plain full-batch training.
            resumed: Whether a checkpoint was just restored: instruments that look back must see this step again.
        """
        step = self.progress.step
        new = step not in self.recorder.measured
        asked = [instrument for instrument in self.instruments if new or (resumed and instrument.looks_back)]
        measures = new or bool(asked)
        self._attempted = step  # even if it fails: one attempt per step
        self._started = partial(
            TrainingStart,
            fresh=fresh,
            obstacle=obstacle,
            total_steps=self.progress.total_steps,
            full_batch=self.progress.full_batch,
        )
        self.begun = False
        isolated: Network | None = None
        measurement: Measurement | None = None
        with ExitStack() as stack:
            with self.recorder.guard(), self.budget.account(SNAPSHOT, forced=True) if measures else nullcontext():
                lambdas = self._lambdas(network)
                isolated, shared = stack.enter_context(network.isolated(lambdas, collective=measures))
                if measures:
                    measurement = self._taken(network, isolated, shared, lambdas)
            begun = [] if isolated is None else self._begin(network, isolated)
            observed = [] if measurement is None else self._observed(measurement, asked, forced=True)
        self._take(begun)
        scalars = self._take(observed)
        if new and measurement is not None:
            self._record(step, scalars)

    def measure(self, network: MeasuredNetwork, *, last: bool = False, epoch: int | None = None) -> dict[str, float]:
        """Measure now, and record the results.

        Args:
            network: What is measured.
            last: Whether these are the final weights: the budget leaves only expensive instruments out.
            epoch: Where the training counts them.

        Returns:
            ``{tag: value}``; empty if the budget left it out.
        """
        step, first = self.progress.step, self.reference.snapshot is None
        owed = first or last or self._owed(step)
        if not owed and (step == self._left_out or not self._affordable(SNAPSHOT)):
            self._left_out = step
            return {}
        if step == self._left_out:  # left out first, then found to be the last
            self.budget.accounts[SNAPSHOT].left_out -= 1
        self._attempted = step
        thorough = {each.name: self._thorough(each) for each in self.instruments}
        with ExitStack() as stack:
            with self.budget.account(SNAPSHOT, owed):
                lambdas = self._lambdas(network)
                isolated, shared = stack.enter_context(network.isolated(lambdas, collective=True))
                measurement = self._taken(network, isolated, shared, lambdas, last)
            begun = [] if self.begun else self._begin(network, isolated)
            readings = self._observed(
                measurement,
                [each for each in self.instruments if self._affords(each, first, owed, last)],
                owed,
                thorough,
            )
        self._take(begun)
        scalars = self._take(readings)
        if not self.progress.at_start:  # before the first step there is no training time to compare with
            scalars[tag("overhead_percent")] = self.budget.percent
        self._record(step, scalars, epoch)
        return dict(self.recorder.history.get(step, {}))

    def _owed(self, step: int) -> bool:
        """Whether it is the first measurement since a step at which one is made at any budget."""
        return self.progress.curve.passed(max(self.recorder.measured, default=self.progress.origin), step)

    def _affordable(self, name: str) -> bool:
        return self.budget.affordable(name, self.progress.fraction, self.progress.curve.left(self.progress.step))

    def _thorough(self, instrument: Instrument) -> bool:
        """Whether the budget has room for an instrument with all its checks, ten times; or it compares first."""
        account = self.budget.accounts.get(instrument.name)
        compares = instrument.looks_back or instrument.needs_theta_0  # at its second visit for the first time
        if account is None or account.made < 1 + compares or self.budget.limit is None:
            return True
        snapshot = self.budget.accounts.get(SNAPSHOT, account).latest
        return self.budget.room(ROOM * (account.thorough or UNKNOWN * snapshot))

    def _begin(self, network: MeasuredNetwork, isolated: Network) -> list[Reading]:
        """Begin with every instrument: when training begins, or at the first measurement after that failed."""
        start = self._started(network.network, isolated, list(network.optimizers), self.progress.step)
        if not self.progress.at_start:
            start = replace(start, fresh=False)
        self.begun = True
        begun = []
        for instrument in self.instruments:
            with self.recorder.guard():
                begun.append(_reading(instrument, "begin", instrument.begin(start)))
        return begun

    def _lambdas(self, network: MeasuredNetwork) -> dict[str, float]:
        """The rates at theta_0; parameters that were frozen there and have joined since have the rates of now."""
        lambdas = network.learning_rates()
        return lambdas | {name: value for name, value in self.reference.lambdas.items() if name in lambdas}

    def _taken(
        self,
        network: MeasuredNetwork,
        isolated: Network,
        shared: Snapshot | None,
        lambdas: dict[str, float],
        last: bool = False,
    ) -> Measurement:
        snapshot = isolated.snapshot(network.plan) if shared is None else shared
        self.latest = snapshot
        if self.reference.snapshot is None:
            needed = any(instrument.keeps_theta_0(network.network) for instrument in self.instruments)
            self.reference.take(snapshot, network.network, needed)
            self.reference.calibration.take(_open(isolated), self.progress.step, self.reference.theta_0)
        else:
            self._calibrate(network, isolated, lambdas)
        return Measurement(
            self.progress.step,
            network.network,
            isolated,
            snapshot,
            self.reference.snapshot or snapshot,
            lambdas,
            last,
            self.reference.theta_0,
            self.reference.calibration.statistics,
            network.plan,
            room=self.budget.room,
        )

    def _calibrate(self, network: MeasuredNetwork, isolated: Network, lambdas: dict[str, float]) -> None:
        """Measure theta_0 anew with the training batches that have come since, and what was recorded of it."""
        calibration = self.reference.calibration
        if self.progress.step > self.progress.first_step and not calibration.kept and calibration.wanted:
            calibration.refuse("the loop shows no batches")
        theta_0 = calibration.theta_0_anew(_open(isolated), network.probe)
        if theta_0 is None:
            return
        with Network(theta_0, network.probe, lambdas=lambdas, memory=network.memory) as there:
            self.reference.snapshot = snapshot = there.snapshot(network.plan)
            again = Measurement(
                calibration.step, network.network, there, snapshot, snapshot, lambdas, plan=network.plan
            )
            readings = [each.observe(again) for each in self.instruments if each.of_snapshots]
        known = self.recorder.history.get(calibration.step, {})
        scalars = {name: value for reading in readings for name, value in reading.scalars.items()}
        # What differs by rounding, as of theta_0 against itself, is not logged again.
        same = {name for name, value in known.items() if math.isclose(value, scalars.get(name, math.inf), abs_tol=1e-6)}
        self._anew = {name: value for name, value in scalars.items() if name not in same}

    def _record(self, step: int, scalars: dict[str, float], epoch: int | None = None) -> None:
        """Record a measurement, and what was measured anew of theta_0 when all batches have come."""
        if not self.reference.calibration.wanted:
            self.record_anew()
        self.recorder.record(step, scalars, epoch)
        if self.reference.calibration.norms:
            page = self.reference.calibration.sentence(len(self.latest.output) if self.latest else 0)
            if page != self._explained:
                self._explained = page
                self.recorder.pages({"batch_norm": page})

    def record_anew(self) -> None:
        """Record what was measured anew of theta_0: once, when all batches have come or no more will."""
        anew, self._anew = self._anew, {}
        if anew:
            self.recorder.record(self.reference.calibration.step, anew)

    def _observed(
        self,
        measurement: Measurement,
        instruments: Sequence[Instrument],
        forced: bool,
        thorough: Mapping[str, bool] | None = None,
    ) -> list[Reading]:
        """The readings; sinks get them after the isolation, whose random and backend state is not theirs."""
        readings = []
        for instrument in instruments:
            whole = thorough is None or thorough[instrument.name]
            seen = measurement if whole else replace(measurement, thorough=False)
            booked = self.budget.account(instrument.name, forced, thorough=whole)
            with booked, self.recorder.guard(), trusting_derivatives(not whole):
                readings.append(_reading(instrument, "observe", instrument.observe(seen)))
            if instrument.left_out and not whole:
                account = self.budget.accounts[instrument.name]
                account.shortened, account.part = account.shortened + 1, instrument.left_out
        return readings

    def _take(self, readings: Sequence[Reading]) -> dict[str, float]:
        """Record all but the scalars, which are returned."""
        scalars: dict[str, float] = {}
        for reading in readings:
            with self.recorder.guard():
                self.recorder.take(reading)
                new = {name: value for name, value in reading.scalars.items() if math.isfinite(value)}
                scalars = joined(scalars, new)
        return scalars

    def _affords(self, instrument: Instrument, first: bool, owed: bool, last: bool) -> bool:
        """All run at the start; those that draw the curves at all of their points; others if there is room."""
        if first or self.progress.starting or instrument.idle():
            return True
        if owed and (instrument.cost == "light" or instrument.draws_curves):
            return True
        if not last:
            return self._affordable(instrument.name)
        account = self.budget.accounts.setdefault(instrument.name, Account())
        seconds = account.latest
        if instrument.looks_back and account.made < 2:
            seconds = UNKNOWN * self.budget.accounts[SNAPSHOT].latest
        if self.budget.room(seconds):
            return True
        account.left_out += 1
        return False


def _open(network: Network) -> IsolatedModel:
    current = network.current
    assert isinstance(current, IsolatedModel)
    return current


def _reading(instrument: Instrument, method: str, answer: Any) -> Reading:
    """The answer, if it is a reading; a ``TypeError`` that names the instrument if it is not."""
    if not isinstance(answer, Reading):
        raise TypeError(f"instrument {instrument.name!r}: {method} returned {type(answer).__name__}, not a Reading")
    return answer


def joined(scalars: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Join the numbers of two instruments: of a quantity that both predict, the one with a band does so alone.

    Otherwise the median of one forecast would be drawn beside the band of another.

    Args:
        scalars: ``{tag: value}``.
        more: The same of another instrument; what both have is taken from here.

    Returns:
        Both.
    """
    return _beside(scalars, more) | _beside(more, scalars)


def _beside(scalars: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    """Leave out the orders of quantities that only ``others`` have a band of."""
    banded = {quantity for name in others if (quantity := quantity_of(name)) and name == tag(quantity, BAND_90[0])}
    banded = {quantity for quantity in banded if tag(quantity, BAND_90[0]) not in scalars}
    left_out = {tag(quantity, series) for quantity in banded for series in ("order_1", "truncation")}
    return {name: value for name, value in scalars.items() if name not in left_out}
