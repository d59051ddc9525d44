"""How a training under observation begins: with a new theta_0, with that of a checkpoint, later, or not at all."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from torch_eft.live.instrument import MeasurementWarning, Obstacle
from torch_eft.live.record.recorder import LOADING
from torch_eft.live.record.run_summary import skipped_page
from torch_eft.live.record.sinks import Sink
from torch_eft.live.run.measured_network import MeasuredNetwork, checked_network, unwrapped
from torch_eft.live.run.ranks import RankProtocol
from torch_eft.live.run.run import Run
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.forward.structure import has_no_shapes
from torch_eft.measure.kernels.random_outputs import random_outputs

_WRITING: "WeakValueDictionary[Path, Run]" = WeakValueDictionary()
"""The latest run to begin in a directory."""


AVERAGE = (
    "Measured is the average of weights (AveragedModel) that was given, not the weights that the optimizer moves; give "
    "the network itself for those."
)


@dataclass(frozen=True)
class Loop:
    """What a loop says of the training that begins; None where it says nothing.

    Args:
        step: Optimizer steps taken so far.
        obstacle: Why it is not plain full-batch training on one device.
        total_steps: Optimizer steps of the whole training.
        full_batch: Whether every step is known to take the same batch.
        model: The network that is trained.
        optimizers: Those of the training.
        place: (rank, number of ranks) of this process.
        sinks: Where results go.
        theta_file: Where the parameters of theta_0 are kept, if in a file.
    """

    step: int = 0
    obstacle: Obstacle | None = None
    total_steps: int | None = None
    full_batch: bool = False
    model: nn.Module | None = None
    optimizers: Sequence[Optimizer] | None = None
    place: tuple[int, int] | None = None
    sinks: Sequence[Sink] = ()
    theta_file: Path | None = None


class Beginning:
    """Takes theta_0, or goes on from a restored one.

    Args:
        run: The training.

    Attributes:
        waiting: The loop, where the network's lazy modules have not seen a batch yet; else None.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.waiting: Loop | None = None
        self._checking = 0.0

    def check(self, model: nn.Module | None = None, probe: Probe | None = None) -> MeasuredNetwork:
        """Check that the model can be measured on the probe.

        Args:
            model: The model; None: the one that was given.
            probe: The probe; None: the one that was given.

        Returns:
            The measured network; a ``ValueError`` with the reason if it cannot be measured.
        """
        run = self._run
        started = run.budget.clock()
        given = run.given
        given = replace(
            given, model=given.model if model is None else model, probe=given.probe if probe is None else probe
        )
        run.network = checked_network(given, run.instruments, run.recorder.name, run.ranks)
        self._checking = run.budget.clock() - started
        run.refused = False
        return run.network

    def refuse(self, error: Exception, sinks: Sequence[Sink]) -> None:
        """Let a training that cannot be measured go on without.

        Args:
            error: Why it cannot be measured; raised with ``on_error="raise"``.
            sinks: Where the reason goes.
        """
        run = self._run
        run.forget()
        run.network, run.begun, run.refused = None, False, True
        run.recorder.failed(error, "measures nothing of this training, which goes on")
        if run.ranks.leads:
            run.recorder.open(sinks)
            run.recorder.pages({"skipped": skipped_page(run.recorder.skipped)})
            run.recorder.flush()
            run.recorder.close()

    def begin(self, loop: Loop) -> None:
        """Take theta_0, or go on from a restored one; where the model cannot be measured, warn and go on without.

        Args:
            loop: What the loop says of the training.

        Raises:
            ValueError: If there is no model or no probe, or if other ranks would wait for this one.
        """
        run, given = self._run, self._run.given
        model = given.model if loop.model is None else loop.model
        if run.network is None and model is not None and has_no_shapes(model) and not given.collective:
            self._wait(loop)
            return
        self.waiting = None
        try:
            network = run.network or self.check(loop.model)
            if loop.model is not None and unwrapped(loop.model) is not network.model:
                network = self.check(loop.model, network.probe)
        except Exception as error:
            missing = run.network is None and (given.probe is None or model is None)
            if missing or given.collective:
                raise
            self.refuse(error, loop.sinks)
            return
        run.ranks = RankProtocol(given.collective, loop.place)
        run.network = network = replace(
            network,
            optimizers=list(given.optimizers if loop.optimizers is None else loop.optimizers),
            ranks=run.ranks,
            calibration=run.reference.calibration,
        )
        run.theta_file = loop.theta_file or run.own_theta_file
        run.budget.restart(self._checking)
        self._checking, run.begun, run.progress.starting = 0.0, True, True
        run.progress.step = run.progress.first_step = loop.step
        # All ranks must agree on it, of whom only the first one knows a checkpoint's history.
        run.progress.origin = 0 if given.collective else loop.step
        run.progress.total_steps, run.progress.full_batch, run.progress.quiet = loop.total_steps, loop.full_batch, 0
        if not run.ranks.leads:
            with run.recorder.guard():
                network.follow()
            return
        self._announce_company()
        run.recorder.open(loop.sinks)
        with run.ranks.awaited(), run.recorder.guard():
            self._begin(network, loop.obstacle)
        run.budget.started()

    # ---- networks without shapes

    def _wait(self, loop: Loop) -> None:
        """Begin later, when the network's lazy modules have seen a batch."""
        if self.waiting is None:
            self._run.recorder.announce(
                f"{self._run.recorder.name}: the network has lazy modules that have not seen a batch yet; theta_0 is "
                "taken before the first step, if before_step is called there, else at the first measurement"
            )
        self.waiting = loop

    def late(self, step: int | None = None) -> bool:
        """Begin where that was put off, if the network has shapes now.

        Args:
            step: Optimizer steps taken; None: as many as when it was put off.

        Returns:
            Whether it has begun.
        """
        loop = self.waiting
        model = self._run.given.model if loop is None or loop.model is None else loop.model
        if loop is None or model is None or has_no_shapes(model):
            return False
        self.begin(loop if step is None else replace(loop, step=step))
        if step is not None and step > loop.step:
            self._run.reference.origin = f"step {step}, the first at which its lazy modules had seen a batch"
        return self._run.begun

    # ---- theta_0

    def _begin(self, network: MeasuredNetwork, obstacle: Obstacle | None) -> None:
        run = self._run
        reference, step = run.reference, run.progress.step
        restored, goes_on = reference.restored, self._goes_on(network)
        if not goes_on:
            self._start_anew()
        try:
            lambdas = network.learning_rates()
        except ValueError as error:
            run.recorder.failed(error, "leaves out the NTK and whatever else takes learning rates")
            obstacle = Obstacle(str(error), rates=True)
            run.network = network = network.without_rates()
            lambdas = network.learning_rates()
        if not goes_on:  # part of the NTK; those of theta_0 are kept, a schedule does not count as drift
            reference.lambdas = lambdas
        reference.bind(network.network, network.probe)
        reference.calibration.norms = network.norms
        if network.norms and run.given.collective:
            reference.calibration.refuse("all ranks measure together, which see different batches")
        if goes_on:
            self._warn_without_theta_0(network)
            if not run.given.collective:
                run.progress.origin = min(run.recorder.measured, default=step)
        if step > 0 and (restored or not goes_on):
            run.recorder.resume(step)
        if (directions := random_outputs(network.plan.outputs)) is not None:  # no matter to what is trained beside it
            reason = f"the NTK is measured on {directions.count} random output directions"
            obstacle = obstacle or Obstacle(reason, minibatches=True)
        if network.unsharded_model is not None:
            obstacle = obstacle or Obstacle("its parameters are sharded over the ranks")
        fresh = not goes_on and step == 0
        run.measurements.begin(network, fresh=fresh, obstacle=obstacle, resumed=restored)
        if isinstance(network.network, AveragedModel):
            run.recorder.pages({"weights": AVERAGE})
        run.drawn = goes_on
        if run.recorder.draws:
            run.budget.reserve = LOADING
        run.draw_first()
        run.summarize()
        run.recorder.flush()

    def _goes_on(self, network: MeasuredNetwork) -> bool:
        """Return whether the recorded theta_0 is gone on from; warn where there is one that does not fit."""
        reference = self._run.reference
        if not (reference.restored or self._run.progress.step > 0):
            return False
        if reference.differs(network.network, network.probe):
            reason = reference.difference(network.network)
            if reason is not None:
                warnings.warn(
                    f"{self._run.recorder.name}: {reason}, whose measurements cannot be compared with; training goes "
                    "on, measured from here as from a new start",
                    MeasurementWarning,
                    stacklevel=5,
                )
            return False
        return reference.snapshot is not None

    def _start_anew(self) -> None:
        run, step = self._run, self._run.progress.step
        run.forget()
        for instrument in run.instruments:  # a checkpoint may have brought the state of another theta_0
            with run.recorder.guard():
                instrument.forget()
        run.reference.origin = "initialization" if step == 0 else f"resumed at step {step} without a recorded theta_0"

    def _warn_without_theta_0(self, network: MeasuredNetwork) -> None:
        run = self._run
        lacking = [instrument.name for instrument in run.instruments if instrument.keeps_theta_0(network.network)]
        if lacking and run.reference.theta_0 is None:
            warnings.warn(
                f"{run.recorder.name}: the parameters of theta_0 were not kept or are not available, so that "
                f"what needs them ({', '.join(lacking)}) is left out from here; the rest goes on",
                MeasurementWarning,
                stacklevel=5,
            )

    def _announce_company(self) -> None:
        """Say so where another observer of this process writes to the same directory."""
        run = self._run
        if run.folder is None:
            return
        folder = run.folder.resolve()
        other = _WRITING.get(folder)
        if other is not None and other is not run and other.begun:
            run.recorder.announce(
                f"{run.recorder.name}: another observer, which has not finished, writes to {folder} too, under the "
                "same names; give each a logdir of its own"
            )
        _WRITING[folder] = run
