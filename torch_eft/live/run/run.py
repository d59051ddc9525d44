"""One training under observation: what the parts of its observer share, its visits and its end."""

from collections.abc import Sequence
from pathlib import Path

import torch

from torch_eft.live.budget import cost_page
from torch_eft.live.instrument import Instrument
from torch_eft.live.record.recorder import Recorder, RunState
from torch_eft.live.record.run_summary import skipped_page
from torch_eft.live.run.measured_network import Given, MeasuredNetwork
from torch_eft.live.run.measurements import Measurements
from torch_eft.live.run.ranks import RankProtocol
from torch_eft.live.run.reference import Reference


class Run:
    """The state of a training under observation.

    Args:
        given: What is to be measured.
        instruments: What looks at it.
        recorder: Where results go.
        folder: The observer's own directory; None: it has none.

    Attributes:
        budget: The account of what measuring has cost.
        progress: How far the training has come.
        reference: theta_0.
        measurements: The measurements, on rank 0.
        ranks: The ranks of the training.
        network: The measured network; None before it is checked.
        begun: Whether theta_0 is taken, and training goes on.
        refused: Whether the training cannot be measured.
        theta_file: Where the parameters of theta_0 are kept, if in a file.
        drawn: Whether the figures of theta_0 have been drawn.
    """

    def __init__(
        self, given: Given, instruments: Sequence[Instrument], recorder: Recorder, folder: Path | None
    ) -> None:
        self.given, self.instruments, self.recorder, self.folder = given, list(instruments), recorder, folder
        self.budget, self.progress = recorder.budget, recorder.progress
        self.reference = Reference()
        self.measurements = Measurements(self.instruments, self.reference, recorder)
        self.ranks = RankProtocol(given.collective)
        self.network: MeasuredNetwork | None = None
        self.begun = self.refused = False
        self.own_theta_file = None if folder is None else folder / "eft-theta_0.pt"
        self.theta_file = self.own_theta_file
        self.drawn = False

    def forget(self) -> None:
        """Start anew: another theta_0 is about to be taken or loaded."""
        self.recorder.forget()
        self.reference.forget()
        self.measurements.forget()

    def summarize(self, state: RunState | None = None) -> None:
        """Hand the sinks what is known of the run, where anything is new.

        Args:
            state: How the training stands; None: it goes on until it has ended.
        """
        network = self.network
        assert network is not None
        state = state or ("running" if self.begun else "ended")
        self.recorder.summarize(self.instruments, network.network, network.optimizers, network.shape, state)
        if state == "running":
            self.recorder.say_first(not any(instrument.undecided() for instrument in self.instruments))

    def visit(self, last: bool, epoch: int | None) -> dict[str, float]:
        """Measure at the step of the moment, unless that was done, and record it; ranks that do not lead take part.

        Args:
            last: Whether these are the final weights.
            epoch: Where the training counts them.

        Returns:
            ``{tag: value}``; empty if nothing was measured.
        """
        assert self.network is not None
        if not self.ranks.leads:
            with self.recorder.guard():
                self.network.follow()
            return {}
        scalars: dict[str, float] = {}
        with self.ranks.awaited():
            if self.measurements.done(self.progress.step):
                return {}
            if torch.cuda.is_initialized():  # the measurement itself waits for the device: its queue is not its cost
                torch.cuda.synchronize()
            with self.recorder.guard():
                scalars = self.measurements.measure(self.network, last=last, epoch=epoch)
        if scalars:
            if self.progress.starting and not self.progress.at_start:
                self.progress.starting = False
                self.budget.started()
            with self.recorder.guard():
                self.summarize()
            self.recorder.flush()
            if not last:
                with self.recorder.guard():
                    self.draw_first()
        return scalars

    def end(self) -> None:
        """The final weights are measured: draw, and say what came of the training and what measuring has cost."""
        self.begun = False
        if not self.ranks.leads:
            return
        with self.recorder.guard():
            self._end()
        self.budget.stop()
        self.recorder.close()
        with self.recorder.guard():
            self.recorder.say_last()

    def _end(self) -> None:
        recorder, reference, last = self.recorder, self.reference.snapshot, self.measurements.latest
        self.measurements.record_anew()
        self.draw_first()
        if reference is not None and last is not None:
            with self.budget.once():
                recorder.draw(self.instruments, lambda each: each.last_figures(recorder.history, reference, last))
        pages = {"overhead": cost_page(self.budget, len(recorder.measured))}
        if recorder.skipped:
            pages["skipped"] = skipped_page(recorder.skipped)
        recorder.pages(pages)
        self.summarize()
        recorder.flush()

    def draw_first(self) -> None:
        """Draw the figures of theta_0 as soon as the budget has room for them."""
        reference = self.reference.snapshot
        if self.drawn or reference is None or not self.budget.room(self.recorder.drawing):
            return
        self.drawn = True
        with self.recorder.guard(), self.budget.once():
            self.recorder.draw(self.instruments, lambda instrument: instrument.first_figures(reference))
