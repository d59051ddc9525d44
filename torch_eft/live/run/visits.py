"""One visit to the network: a snapshot, what every part makes of it, and what the budget leaves out."""

from collections.abc import Sequence

from torch_eft.live.budget import SNAPSHOT, Account
from torch_eft.live.costs import thinning_sentence
from torch_eft.live.part import Instrument, Measurement
from torch_eft.live.record.recorder import Recorder
from torch_eft.live.run.reference import Reference
from torch_eft.live.run.subject import MeasuredNetwork
from torch_eft.measure.network.snapshot import Snapshot
from torch_eft.results.tags import tag

UNKNOWN = 6.0
"""Snapshots that a part's visit is taken to last where it is not known (dNTK along the path of a CNN: measured 6)."""


class Visits:
    """The visits of one run.

    Args:
        subject: What is visited.
        parts: What looks at it.
        recorder: Where results go; its budget decides.

    Attributes:
        beginning: theta_0, with which everything is compared.
        latest: The latest snapshot.
        latest_step: The step of the latest attempt.
        first_step: Where this training started.
        total_steps: Optimizer steps to be taken in all, if that is known.
    """

    def __init__(self, subject: MeasuredNetwork, parts: Sequence[Instrument], recorder: Recorder) -> None:
        self.subject, self.parts = subject, parts
        self.recorder, self.budget = recorder, recorder.budget
        self.first_step = 0
        self.total_steps: int | None = None
        self.forget()

    def forget(self) -> None:
        """A new run."""
        self.beginning = Reference()
        self.latest: Snapshot | None = None
        self.latest_step: int | None = None
        self._left_out_step: int | None = None

    def visit(self, step: int, last: bool, epoch: int | None, start: bool = False) -> dict[str, float]:
        """Measure, and record what was found.

        Args:
            step: Optimizer steps taken.
            last: Whether these are the final weights: the budget leaves only dear parts out.
            epoch: Where the training counts them.
            start: Whether the training starts here: nothing is left out.

        Returns:
            ``{tag: value}``; empty if the budget left it out.
        """
        first = self.beginning.snapshot is None or start
        forced = first or last
        if not forced and not self.budget.affordable(SNAPSHOT, self._progress(step)):
            if self.budget.accounts[SNAPSHOT].left_out == 1:
                self.recorder.say(thinning_sentence(self.budget, step))
            self._left_out_step = step
            return {}
        if step == self._left_out_step:  # left out first, then seen to be the last
            self.budget.accounts[SNAPSHOT].left_out -= 1
        self.latest_step = step  # also if it fails: one attempt a step
        visit = self._seen(step, last, forced)
        scalars: dict[str, float] = {}
        for part in self.parts:
            if self._affords(part, first, last, step):
                with self.budget.account(part.name, forced):
                    report = self.recorder.ask(lambda part=part: part.observe(visit))  # type: ignore[misc]
                    scalars |= report.scalars
        if step > self.first_step:  # before the first step there is no training time to compare with
            scalars[tag("overhead_percent")] = self.budget.percent
        self.recorder.record(step, scalars, epoch)
        return dict(self.recorder.history.get(step, {}))

    def look(self, step: int) -> None:
        """Show where a resumed training starts, whose numbers are recorded, to the parts that look back to it."""
        visit = self._seen(step, last=False, forced=True)
        for part in self.parts:
            if part.looks_back:
                self.recorder.ask(lambda part=part: part.observe(visit))  # type: ignore[misc]

    def _seen(self, step: int, last: bool, forced: bool) -> Measurement:
        with self.budget.account(SNAPSHOT, forced):
            # Parameters that were frozen at theta_0 may have joined: theirs are the rates they have now.
            lambdas = self.subject.learning_rates()
            lambdas |= {name: value for name, value in self.beginning.lambdas.items() if name in lambdas}
            snapshot = self.subject.take(lambdas)
            network = self.subject.network
            if self.beginning.snapshot is None:
                self.beginning.take(snapshot, network, any(part.needs_theta_0 for part in self.parts))
        assert self.beginning.snapshot is not None
        self.latest = snapshot
        return Measurement(
            step,
            network,
            self.subject.inputs,
            self.subject.output_fn,
            snapshot,
            self.beginning.snapshot,
            lambdas,
            last,
            self.beginning.theta_0,
        )

    def _affords(self, part: Instrument, first: bool, last: bool, step: int) -> bool:
        """All parts see theta_0; at the end what is light is never left out, what is dear if there is no room."""
        if first or (last and part.cost == "light"):
            return True
        if not last:
            return self.budget.affordable(part.name, self._progress(step))
        account = self.budget.accounts.setdefault(part.name, Account())
        seconds = account.latest
        if part.looks_back and account.made < 2:
            seconds = UNKNOWN * self.budget.accounts[SNAPSHOT].latest
        fits = seconds < 1e-3 or self.budget.room(seconds)
        account.left_out += not fits
        return fits

    def _progress(self, step: int) -> float | None:
        if self.total_steps is None or self.total_steps <= self.first_step:
            return None
        return (step - self.first_step) / (self.total_steps - self.first_step)
