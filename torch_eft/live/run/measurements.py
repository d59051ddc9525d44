"""Measurements of one training: a snapshot, what every instrument makes of it, and what the budget leaves out."""

from collections.abc import Sequence

from torch_eft.live.budget import SNAPSHOT, Account, thinning_sentence
from torch_eft.live.instrument import Instrument, Measurement
from torch_eft.live.record.recorder import Recorder
from torch_eft.live.run.measured_network import MeasuredNetwork
from torch_eft.live.run.reference import Reference
from torch_eft.measure.network.snapshot import Snapshot
from torch_eft.results.tags import tag

UNKNOWN = 6.0
"""Snapshots that an instrument's first comparison is assumed to last (dNTK along the path of a CNN: measured 6)."""


class Measurements:
    """The measurements of an observer, on rank 0.

    Args:
        instruments: What looks at the network.
        reference: theta_0, with which everything is compared; taken here if it is not there yet.
        recorder: Where results go; its budget decides.

    Attributes:
        latest: The latest snapshot.
    """

    def __init__(self, instruments: Sequence[Instrument], reference: Reference, recorder: Recorder) -> None:
        self.instruments, self.reference = instruments, reference
        self.recorder, self.budget, self.progress = recorder, recorder.budget, recorder.progress
        self.forget()

    def forget(self) -> None:
        """Start a new run."""
        self.latest: Snapshot | None = None
        self._attempted: int | None = None
        self._left_out: int | None = None

    def done(self, step: int) -> bool:
        """Return whether this step is the latest one that was measured, here or before a checkpoint."""
        return step in (self._attempted, max(self.recorder.history, default=None))

    def measure(
        self, network: MeasuredNetwork, *, start: bool = False, last: bool = False, epoch: int | None = None
    ) -> dict[str, float]:
        """Measure now, and record the results.

        Args:
            network: What is measured.
            start: Whether the training starts here: nothing is left out.
            last: Whether these are the final weights: the budget leaves only expensive instruments out.
            epoch: Where the training counts them.

        Returns:
            ``{tag: value}``; empty if the budget left it out.
        """
        step = self.progress.step
        first = self.reference.snapshot is None or start
        forced = first or last
        if not forced and not self.budget.affordable(SNAPSHOT, self.progress.fraction):
            if self.budget.accounts[SNAPSHOT].left_out == 1:
                self.recorder.announce(thinning_sentence(self.budget, step))
            self._left_out = step
            return {}
        if step == self._left_out:  # left out first, then found to be the last
            self.budget.accounts[SNAPSHOT].left_out -= 1
        self._attempted = step  # even if it fails: one attempt per step
        measurement = self._taken(network, last, forced)
        scalars: dict[str, float] = {}
        for instrument in self.instruments:
            if self._affords(instrument, first, last):
                with self.budget.account(instrument.name, forced), self.recorder.guard():
                    reading = instrument.observe(measurement)
                    self.recorder.take(reading)
                    scalars |= reading.scalars
        if not self.progress.at_start:  # before the first step there is no training time to compare with
            scalars[tag("overhead_percent")] = self.budget.percent
        self.recorder.record(step, scalars, epoch)
        return dict(self.recorder.history.get(step, {}))

    def look_back(self, network: MeasuredNetwork) -> None:
        """Show the start of a resumed training, whose numbers are recorded, to the instruments that look back to it."""
        measurement = self._taken(network, last=False, forced=True)
        for instrument in self.instruments:
            if instrument.looks_back:
                with self.recorder.guard():
                    self.recorder.take(instrument.observe(measurement))

    def _taken(self, network: MeasuredNetwork, last: bool, forced: bool) -> Measurement:
        with self.budget.account(SNAPSHOT, forced):
            # Parameters that were frozen at theta_0 may have joined: theirs are the rates they have now.
            lambdas = network.learning_rates()
            lambdas |= {name: value for name, value in self.reference.lambdas.items() if name in lambdas}
            snapshot = network.take(lambdas)
            if self.reference.snapshot is None:
                needed = any(instrument.needs_theta_0 for instrument in self.instruments)
                self.reference.take(snapshot, network.network, needed)
        self.latest = snapshot
        return Measurement(
            self.progress.step,
            network.network,
            network.probe,
            network.output_fn,
            snapshot,
            self.reference.snapshot or snapshot,
            lambdas,
            last,
            self.reference.theta_0,
        )

    def _affords(self, instrument: Instrument, first: bool, last: bool) -> bool:
        """Every instrument runs at theta_0. At the last step light ones always run; others only if there is room."""
        if first or (last and instrument.cost == "light"):
            return True
        if not last:
            return self.budget.affordable(instrument.name, self.progress.fraction)
        account = self.budget.accounts.setdefault(instrument.name, Account())
        seconds = account.latest
        if instrument.looks_back and account.made < 2:
            seconds = UNKNOWN * self.budget.accounts[SNAPSHOT].latest
        if seconds < 1e-3 or self.budget.room(seconds):
            return True
        account.left_out += 1
        return False
