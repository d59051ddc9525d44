"""The observer: measures a network while something else trains it. No trainer, no logger, no mathematics.

    observer = Observer(model, x_probe, optimizer, logdir="runs/1")
    observer.begin()
    for step, (x, y) in enumerate(loader, start=1):
        observer.observe_batch((x, y))       # these three let the theory see what kind of training it is, and BatchNorm
        loss = F.mse_loss(model(x), y)       # be measured with the training's statistics; without them there are
        observer.observe_loss(loss)          # measurements only
        optimizer.zero_grad()
        loss.backward()
        observer.before_step()
        optimizer.step()
        observer.measure(step)               # measures if due
    observer.finish()

theta_0 is what the network holds at ``begin``. Measuring leaves weights, buffers, gradients, modes and random state as
they are. A failing measurement warns once and is skipped; training goes on (``on_error="raise"`` to debug).

In a distributed training every rank calls the same; rank 0 decides, records and writes.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.budget import Budget, cost_page, cost_sentence
from torch_eft.live.config.presets import Options, Preset, chosen_instruments
from torch_eft.live.config.probes import ProbeLike, probe_from
from torch_eft.live.config.schedule import Every, checked_every, due
from torch_eft.live.instrument import Event, History, Instrument, MeasurementWarning, Obstacle
from torch_eft.live.progress import Progress
from torch_eft.live.record.recorder import LOADING, Recorder
from torch_eft.live.record.run_summary import shown_claim, skipped_page
from torch_eft.live.record.sinks import JSONLSink, Sink, TensorBoardSink, local_path
from torch_eft.live.run import checkpoint
from torch_eft.live.run.measured_network import Distributed, MeasuredNetwork, checked_network, unwrapped
from torch_eft.live.run.measurements import Measurements
from torch_eft.live.run.ranks import RankProtocol
from torch_eft.live.run.reference import KeepTheta, Reference
from torch_eft.measure.forward.probe import OutputFn, Probe
from torch_eft.measure.forward.structure import has_no_shapes
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.results.choices import check_choice
from torch_eft.results.trajectory import Validity
from torch_eft.tensorboard.run_info import JSONL_NAME
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import ActivationLike

_WRITING: "WeakValueDictionary[Path, Observer]" = WeakValueDictionary()
"""The latest observer to begin in a directory."""


class Observer:
    """Measures a network during its training, and shows the theory beside it.

    Args:
        model: The network; its output is (N, C), or is converted to that by ``output_fn``. None: ``begin`` gets it.
        probe: Fixed inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments of the forward, or
            the path of a file that holds one (``torch.save``).
        optimizer: The optimizer of the training, or several; gives the learning-rate tensor lambda. None: lambda = 1.
        preset: ``"light"``, ``"standard"`` or ``"full"``: which instruments (``torch_eft.live.config.presets``).
        every: When to measure besides the first and the last time (``torch_eft.live.config.schedule``). A bare loop
            does not announce epochs, so that the default here is ``"log:10"``.
        budget: Time that measuring may take, as a share of the training's own; the schedule is thinned to stay within.
            None: no limit.
        logdir: Where TensorBoard files and ``eft.jsonl`` go; None: nowhere, results are in ``history``.
        instruments: The instruments in place of the preset's, by name or your own.
        extra: Instruments beyond the preset's, by name or your own.
        ensemble: C_b and C_W, if known; None estimates them.
        activation: The activation, where it is not a registered one.
        forecast_seconds: Work that each forecast of the theory may take before the first step, at any budget, counted
            in seconds of one core (so that every machine draws the same); what needs more is left out, and its page
            says what brings it.
        output_fn: Converts the model's output to (N, C).
        memory: Bytes allowed for the NTK, as in ``torch_eft.measure.ntk``; one that takes more is left out in words.
        distributed: In a training by several processes: ``"rank_zero"``, where rank 0 measures and the others do
            nothing; or ``"sharded"``, where every rank takes its share of the snapshot's samples, wherever ``every``
            (which must be the same on all ranks) may ask for one. All else is computed by rank 0 alone.
        unsharded_model: A plain network like the model, for a model whose parameters are sharded (FSDP2): they are
            gathered into it for every measurement, on all ranks. Batches and gradients are not looked at then.
        keep_theta_0: Where the parameters of theta_0 are kept for a resumed training, if an instrument needs them:
            ``"checkpoint"``; ``"file"``, written once to ``theta_file``, to which checkpoints point; or ``"none"``.
        on_error: ``"warn"`` or ``"raise"``.
        sinks: More places where results go.
        name: Name in warnings.
        say: Prints a sentence (validity, cost); None: the logger ``torch_eft`` does.

    Attributes:
        reference: theta_0.
        theta_file: ``eft-theta_0.pt`` in ``logdir``; None: ``"file"`` is as ``"checkpoint"``.
        history: ``{optimizer step: {tag: value}}``, everything measured so far.
        events: Quantities that left their band, predictions that left their validity.
        skipped: ``[(step, what went wrong)]``.
        budget: The account of what measuring has cost.

    Raises:
        ValueError: If an argument is not usable. A model that is not is warned of in ``begin``.

    Example:
        >>> import torch
        >>> from torch_eft.live import Observer
        >>> model, x = torch.nn.Linear(2, 1), torch.ones(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> observer = Observer(model, x, optimizer, preset="light", budget=None)
        >>> observer.begin()
        >>> for step in (1, 2):
        ...     optimizer.zero_grad()
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     _ = observer.measure(step)
        >>> observer.finish()
        >>> sorted(observer.history), observer.history[2]["eft/ntk_drift/measured"]
        ([0, 1, 2], 0.0)
    """

    def __init__(
        self,
        model: nn.Module | None,
        probe: ProbeLike,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        preset: Preset = "standard",
        every: Every = "log:10",
        budget: float | None = 0.05,
        logdir: str | Path | None = None,
        instruments: Sequence[str | Instrument] | None = None,
        extra: Sequence[str | Instrument] = (),
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        forecast_seconds: float = 10.0,
        output_fn: OutputFn | None = None,
        memory: int = DEFAULT_MEMORY,
        distributed: Distributed = "rank_zero",
        unsharded_model: nn.Module | None = None,
        keep_theta_0: KeepTheta = "checkpoint",
        on_error: Literal["warn", "raise"] = "warn",
        sinks: Sequence[Sink] = (),
        name: str = "Observer",
        say: Callable[[str], None] | None = None,
    ) -> None:
        check_choice("distributed", distributed, ("rank_zero", "sharded"))
        check_choice("keep_theta_0", keep_theta_0, ("checkpoint", "file", "none"))
        self._model, self._probe = model, probe_from(probe)
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
        self._output_fn, self._memory = output_fn, memory
        self._distributed, self._unsharded_model = distributed, unsharded_model
        self._ranks = RankProtocol(self.collective)
        self.instruments = chosen_instruments(
            preset, instruments, extra, Options(ensemble, activation, forecast_seconds)
        )
        self.every = checked_every(every)
        self.budget = Budget(budget)
        self.keep_theta_0 = keep_theta_0
        folder = None if logdir is None else local_path(logdir, "logdir")
        self.theta_file = self._own_theta_file = None if folder is None else folder / "eft-theta_0.pt"
        self.sinks = list(sinks)
        if folder is not None and self._ranks.leads:
            self.sinks += [_tensorboard(folder), JSONLSink(folder / JSONL_NAME)]
        self.progress = Progress()
        self.recorder = Recorder(self.budget, self.progress, on_error, name, say)
        self.reference = Reference()
        self._network: MeasuredNetwork | None = None
        self._measurements = Measurements(self.instruments, self.reference, self.recorder)
        self._begun = self._refused = False
        self._waiting: dict[str, Any] | None = None  # the arguments of `begin`, where the network has no shapes yet
        self._checking = 0.0
        self._drawn = False
        self._listening: dict[str, list[Instrument]] = {}

    def _forget(self) -> None:
        self.recorder.forget()
        self.reference.forget()
        self._measurements.forget()

    @property
    def collective(self) -> bool:
        """True if every rank of a distributed training must call the observer."""
        return self._distributed == "sharded" or self._unsharded_model is not None

    @property
    def origin(self) -> str:
        """A phrase saying where theta_0 was taken."""
        return self.reference.origin

    @property
    def history(self) -> History:
        """``{optimizer step: {tag: value}}``, everything measured so far."""
        return self.recorder.history

    @property
    def events(self) -> list[Event]:
        """Quantities that left their band, predictions that left their validity."""
        return self.recorder.events

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """``[(step, what went wrong)]``."""
        return self.recorder.skipped

    @property
    def validity(self) -> Validity | None:
        """Where the theory holds for this run, or why it does not apply; None before that is known."""
        claim = shown_claim([instrument.facts() for instrument in self.instruments])
        return None if claim is None else claim.validity

    @property
    def probe(self) -> Probe | None:
        """The inputs on which it measures, as they were given; None where they wait for a data set."""
        return self._probe

    @property
    def network(self) -> MeasuredNetwork:
        """The measured network, checked now if it was not before."""
        return self._network or self.check()

    # ---- before training

    def check(self, model: nn.Module | None = None, probe: Probe | None = None) -> MeasuredNetwork:
        """Check that the model can be measured on the probe; ``begin`` does it if it was not done.

        Args:
            model: The model, if it was not known before.
            probe: The probe, if it was not known before.

        Returns:
            The measured network; a ``ValueError`` with the reason if it cannot be measured.
        """
        started = self.budget.clock()
        self._network = checked_network(
            self._model if model is None else model,
            self._probe if probe is None else probe,
            self.instruments,
            self.recorder.name,
            self._output_fn,
            self._memory,
            self._ranks,
            self._distributed,
            self._unsharded_model,
        )
        self._checking = self.budget.clock() - started
        self._refused = False
        return self._network

    def refuse(self, error: Exception, sinks: Sequence[Sink] = ()) -> None:
        """Let a training that cannot be measured go on without; ``measure`` does nothing until the next ``begin``.

        Args:
            error: Why it cannot be measured; raised with ``on_error="raise"``.
            sinks: More places where the reason goes.
        """
        self._forget()
        self._network, self._begun, self._refused = None, False, True
        self.recorder.failed(error, "measures nothing of this training, which goes on")
        if self._ranks.leads:
            self.recorder.open([*self.sinks, *sinks])
            self.recorder.pages({"skipped": skipped_page(self.skipped)})
            self.flush()
            self.recorder.close()

    def begin(
        self,
        step: int = 0,
        *,
        obstacle: Obstacle | None = None,
        total_steps: int | None = None,
        model: nn.Module | None = None,
        optimizers: Sequence[Optimizer] | None = None,
        place: tuple[int, int] | None = None,
        sinks: Sequence[Sink] = (),
        theta_file: Path | None = None,
    ) -> None:
        """Take theta_0, or go on from a restored one; where the model cannot be measured, warn and go on without.

        A trainer that knows more than the observer was given says so here; the rest stays as it was. Where a lazy
        module has not seen a batch yet, this happens before the first step instead, or at the first measurement.

        Args:
            step: Optimizer steps taken so far.
            obstacle: Why the loop is not plain full-batch training on one device, if that is known.
            total_steps: Optimizer steps of the whole training, if that is known: one-off costs are spread over them,
                and the last of them is always measured.
            model: The model.
            optimizers: The optimizers of the training.
            place: (rank, number of ranks) of this process; None: in torch's default process group.
            sinks: More places where the results of this training go.
            theta_file: Where ``keep_theta_0="file"`` writes in this training; None: in ``logdir``, if there is one.

        Raises:
            ValueError: If there is no model or no probe; for any reason why the model cannot be measured with
                ``on_error="raise"``, or where other ranks would wait for this one.
        """
        given = self._model if model is None else model
        if self._network is None and given is not None and has_no_shapes(given) and not self.collective:
            self._wait(step, obstacle, total_steps, model, optimizers, place, sinks, theta_file)
            return
        self._waiting = None
        try:
            network = self._network or self.check(model)
            if model is not None and unwrapped(model) is not network.model:
                network = self.check(model, network.probe)
        except Exception as error:
            missing = self._network is None and (self._probe is None or (model is None and self._model is None))
            if missing or self.collective:
                raise
            self.refuse(error, sinks)
            return
        self._ranks = RankProtocol(self.collective, place)
        self._network = network = replace(
            network,
            optimizers=list(self._optimizers if optimizers is None else optimizers),
            ranks=self._ranks,
            calibration=self.reference.calibration,
        )
        self.theta_file = theta_file or self._own_theta_file
        self.budget.restart(self._checking)
        self._checking, self._begun = 0.0, True
        self.progress.step = self.progress.first_step = step
        self.progress.total_steps = total_steps
        if not self._ranks.leads:
            with self.recorder.guard():
                network.follow()
            return
        self._announce_company()
        self.recorder.open([*self.sinks, *sinks])
        with self._ranks.awaited(), self.recorder.guard():
            self._begin(network, obstacle)
        self.budget.settle()

    def _wait(self, *arguments: Any) -> None:
        """Begin later, when the network's lazy modules have seen a batch."""
        names = ("step", "obstacle", "total_steps", "model", "optimizers", "place", "sinks", "theta_file")
        if self._waiting is None:
            self.recorder.announce(
                f"{self.recorder.name}: the network has lazy modules that have not seen a batch yet; theta_0 is taken "
                "before the first step, if before_step is called there, else at the first measurement"
            )
        self._waiting = dict(zip(names, arguments, strict=True))

    def _begin_late(self, step: int) -> bool:
        """Begin where that was put off, if the network has shapes now; returns whether it has begun."""
        kept = self._waiting
        model = self._model if kept is None or kept["model"] is None else kept["model"]
        if kept is None or model is None or has_no_shapes(model):
            return False
        self.begin(**kept | {"step": step})
        if step > kept["step"]:
            self.reference.origin = f"step {step}, the first at which its lazy modules had seen a batch"
        return self._begun

    def _announce_company(self) -> None:
        """Say so where another observer of this process writes to the same directory."""
        if self._own_theta_file is None:
            return
        folder = self._own_theta_file.parent.resolve()
        other = _WRITING.get(folder)
        if other is not None and other is not self and other._begun:
            self.recorder.announce(
                f"{self.recorder.name}: another observer, which has not finished, writes to {folder} too, under the "
                "same names; give each a logdir of its own"
            )
        _WRITING[folder] = self

    def _begin(self, network: MeasuredNetwork, obstacle: Obstacle | None) -> None:
        step, restored, goes_on = self.progress.step, self.reference.restored, self._goes_on(network)
        if not goes_on:
            self._start_anew()
        try:
            lambdas = network.learning_rates()
        except ValueError as error:
            self.recorder.failed(error, "leaves out the NTK and whatever else takes learning rates")
            obstacle = Obstacle(str(error), rates=True)
            self._network = network = network.without_rates()
            lambdas = network.learning_rates()
        if not goes_on:  # part of the NTK; those of theta_0 are kept, a schedule does not count as drift
            self.reference.lambdas = lambdas
        self.reference.bind(network.network, network.probe)
        self.reference.calibration.norms = network.norms
        if network.norms and self.collective:
            self.reference.calibration.refuse("all ranks measure together, which see different batches")
        if goes_on:
            self._warn_without_theta_0(network)
        if step > 0 and (restored or not goes_on):
            self.recorder.resume(step)
        if network.unsharded_model is not None:
            obstacle = obstacle or Obstacle("its parameters are sharded over the ranks")
        fresh = not goes_on and step == 0
        self._measurements.begin(network, fresh=fresh, obstacle=obstacle, resumed=restored)
        self._drawn = goes_on
        if self.recorder.draws:
            self.budget.reserve = LOADING
        self._draw_first()
        self._summarize()
        self.flush()

    def _goes_on(self, network: MeasuredNetwork) -> bool:
        """Return whether the recorded theta_0 is gone on from; warn where there is one that does not fit."""
        if not (self.reference.restored or self.progress.step > 0):
            return False
        if self.reference.differs(network.network, network.probe):
            reason = self.reference.difference(network.network)
            if reason is not None:
                warnings.warn(
                    f"{self.recorder.name}: {reason}, whose measurements cannot be compared with; training goes on, "
                    "measured from here as from a new start",
                    MeasurementWarning,
                    stacklevel=4,
                )
            return False
        return self.reference.snapshot is not None

    def _start_anew(self) -> None:
        step = self.progress.step
        self._forget()
        for instrument in self.instruments:  # a checkpoint may have brought the state of another theta_0
            with self.recorder.guard():
                instrument.forget()
        self.reference.origin = "initialization" if step == 0 else f"resumed at step {step} without a recorded theta_0"

    def _warn_without_theta_0(self, network: MeasuredNetwork) -> None:
        lacking = [instrument.name for instrument in self.instruments if instrument.keeps_theta_0(network.network)]
        if lacking and self.reference.theta_0 is None:
            warnings.warn(
                f"{self.recorder.name}: the parameters of theta_0 were not kept or are not available, so that "
                f"what needs them ({', '.join(lacking)}) is left out from here; the rest goes on",
                MeasurementWarning,
                stacklevel=4,
            )

    def _draw_first(self) -> None:
        """Draw the figures of theta_0 as soon as the budget has room for them."""
        reference = self.reference.snapshot
        if self._drawn or reference is None or not self.budget.room(self.recorder.drawing):
            return
        self._drawn = True
        self.recorder.draw(self.instruments, lambda instrument: instrument.first_figures(reference))
        self.budget.settle()

    # ---- training

    def _listeners(self, hook: str) -> list[Instrument]:
        """The instruments that do something at a hook: most do nothing at most of them, and there are many steps."""
        ready = self._begun and self.reference.snapshot is not None and self._measurements.begun
        if not ready or not self._ranks.leads or self._unsharded_model is not None:
            return []
        if hook not in self._listening:
            default = getattr(Instrument, hook)
            self._listening[hook] = [each for each in self.instruments if getattr(type(each), hook) is not default]
        return self._listening[hook]

    def _calibrates(self) -> bool:
        return self._begun and self._ranks.leads and self.reference.calibration.wanted

    def observe_batch(self, batch: Any) -> None:
        """Show a training batch to the instruments, before its forward."""
        if self._calibrates():
            with self.recorder.guard():
                self.reference.calibration.see(batch, self.network.probe, self.network.network)
        for instrument in self._listeners("observe_batch"):
            with self.recorder.guard():
                instrument.observe_batch(batch)

    def observe_loss(self, loss: Tensor) -> None:
        """Show the batch's loss to the instruments, before its backward."""
        for instrument in self._listeners("observe_loss"):
            with self.recorder.guard():
                instrument.observe_loss(loss.detach())

    def before_step(self, optimizer: Optimizer | None = None) -> None:
        """Show the gradients, and the learning rates in force, to the instruments.

        Args:
            optimizer: The one that is about to take a step; None: the only one.
        """
        if self._waiting is not None:
            self._begin_late(self._waiting["step"])
        if self._calibrates():
            with self.recorder.guard():
                self.reference.calibration.note(self.network.network)
        listeners = self._listeners("before_step")
        if optimizer is None and listeners:
            optimizer = next(iter(self.network.optimizers), None)
        if optimizer is None or not listeners:
            return
        first = self.progress.at_start
        with self.budget.forecasting() if first else nullcontext():
            for instrument in listeners:
                with self.recorder.guard():
                    self.recorder.take(instrument.before_step(self.progress.step, optimizer))
        if first:
            with self.recorder.guard():
                self._summarize()

    def measure(
        self, step: int, *, due_now: bool | None = None, last: bool = False, epoch: int | None = None
    ) -> dict[str, float]:
        """Measure if it fell due since the last call; to be called after every optimizer step, or every few.

        Args:
            step: Optimizer steps taken.
            due_now: Whether a measurement is due; None asks the schedule.
            last: Whether these are the final weights: they are measured in any case.
            epoch: Where the training counts them.

        Returns:
            ``{tag: value}``; empty if nothing was measured: it was not due, or the budget left it out (said once).
        """
        if self._refused:
            return {}
        if not self._begun:
            if self._waiting is None:
                self.begin(step)
            else:
                self._begin_late(step)
            if not self._begun:
                return {}
        since, first = self.progress.step, self.progress.at_start and step != self.progress.step
        if step != self.progress.step:
            self._after_step(step)
        planned = self.progress.total_steps
        last = last or (planned is not None and min(since, step - 1) < planned <= step)
        if not last and not (self._due(step, since) if due_now is None else due_now):
            if first and self._ranks.leads and not self.collective:
                with self.recorder.guard():
                    self._measurements.look_at_first_step(self.network)
                self.budget.settle()
            return {}
        if not self._ranks.leads:
            with self.recorder.guard():
                self.network.follow()
            return {}
        scalars: dict[str, float] = {}
        with self._ranks.awaited():
            if self._measurements.done(step):
                return {}
            if torch.cuda.is_initialized():  # the measurement itself waits for the device: its queue is not its cost
                torch.cuda.synchronize()
            with self.recorder.guard():
                scalars = self._measurements.measure(self.network, last=last, epoch=epoch)
        if scalars:
            with self.recorder.guard():
                self._summarize()
            self.flush()
            if not last:
                with self.recorder.guard():
                    self._draw_first()
        return scalars

    def _due(self, step: int, since: int) -> bool:
        try:
            return due(self.every, step, since)
        except Exception as error:  # a function of the user's
            self.recorder.failed(error)
            return False

    def _after_step(self, step: int) -> None:
        first, self.progress.step = self.progress.at_start, step
        for instrument in self._listeners("after_step"):
            with self.recorder.guard():
                self.recorder.take(instrument.after_step(step, self.network.network))
        if first:  # the theory has seen what it needs before the first step
            self.budget.settle()

    def finish(self, step: int | None = None, epoch: int | None = None) -> None:
        """Measure the final weights, draw, and say what it cost.

        Args:
            step: Optimizer steps taken; None: those of the last call of ``measure``.
            epoch: Where the training counts them.
        """
        if not self._begun:
            return
        self.measure(self.progress.step if step is None else step, last=True, epoch=epoch)
        self._begun = False
        if not self._ranks.leads:
            return
        with self.recorder.guard():
            self._finish()
        self.budget.stop()
        self.recorder.close()
        self.recorder.say(self.overhead())

    def _finish(self) -> None:
        reference, last = self.reference.snapshot, self._measurements.latest
        self._draw_first()
        if reference is not None and last is not None:
            self.recorder.draw(self.instruments, lambda each: each.last_figures(self.history, reference, last))
        pages = {"overhead": cost_page(self.budget, len(self.recorder.measured))}
        if self.skipped:
            pages["skipped"] = skipped_page(self.skipped)
        self.recorder.pages(pages)
        self._summarize()
        self.flush()

    def flush(self) -> None:
        """Bring everything to disk, as after an exception."""
        self.recorder.flush()

    def overhead(self) -> str:
        """One sentence on what measuring has cost, and on what was left out."""
        return cost_sentence(self.budget, len(self.recorder.measured), len(self.skipped), len(self.recorder.undrawn))

    def _summarize(self) -> None:
        network = self.network
        self.recorder.summarize(self.instruments, network.network, network.optimizers, network.shape)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """History, theta_0's measurements and where they were taken, and the instruments' own states: plain types."""
        place = self.keep_theta_0, self.theta_file, self._ranks.leads
        return checkpoint.save(self.recorder, self.reference, self.instruments, *place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's theta_0 and history; one that cannot be read is left alone, with a warning."""
        self._forget()
        try:
            checkpoint.load(state, self.recorder, self.reference, self.instruments)
            self._measurements.restored()
        except Exception as error:  # a corrupt checkpoint is corrupt in many ways
            self._forget()
            for instrument in self.instruments:
                instrument.forget()
            warnings.warn(
                f"{self.recorder.name}: its state in the checkpoint cannot be read ({type(error).__name__}: {error}); "
                "training goes on, measured from here as from a new start",
                MeasurementWarning,
                stacklevel=2,
            )


def _tensorboard(logdir: Path) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardSink(SummaryWriter(str(logdir)))
