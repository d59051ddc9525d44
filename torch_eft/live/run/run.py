"""One training under observation: what the parts of its observer share."""

from collections.abc import Sequence
from pathlib import Path

from torch_eft.live.instrument import Instrument
from torch_eft.live.record.recorder import Recorder, RunState
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

    def draw_first(self) -> None:
        """Draw the figures of theta_0 as soon as the budget has room for them."""
        reference = self.reference.snapshot
        if self.drawn or reference is None or not self.budget.room(self.recorder.drawing):
            return
        self.drawn = True
        with self.recorder.guard(), self.budget.once():
            self.recorder.draw(self.instruments, lambda instrument: instrument.first_figures(reference))
