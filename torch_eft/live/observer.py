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

theta_0 is what the network holds at ``begin``. A forecast of full-batch training is made when the second batch is seen
to be the first one again; or before the first step, where ``begin(full_batch=True)`` says that it will be. Measuring
leaves weights, buffers, gradients, modes and random state as they are. A failing measurement warns once and is skipped;
training goes on (``on_error="raise"`` to debug).

In a distributed training every rank calls the same; rank 0 decides, records and writes.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.budget import Budget, cost_sentence, left_out
from torch_eft.live.config.presets import Options, Preset, chosen_instruments
from torch_eft.live.config.probes import ProbeLike, probe_from
from torch_eft.live.config.schedule import AUTO, Every, checked_every, due, not_before
from torch_eft.live.instrument import Event, Instrument, MeasurementWarning, Obstacle
from torch_eft.live.progress import Progress
from torch_eft.live.record.history import RunHistory
from torch_eft.live.record.recorder import Recorder
from torch_eft.live.record.run_summary import shown_claim
from torch_eft.live.record.sinks import JSONLSink, Sink, TensorBoardSink, local_path
from torch_eft.live.run import checkpoint
from torch_eft.live.run.beginning import Beginning, Loop
from torch_eft.live.run.hooks import Hooks
from torch_eft.live.run.measured_network import Distributed, Given, MeasuredNetwork
from torch_eft.live.run.reference import KeepTheta, Reference
from torch_eft.live.run.run import Run
from torch_eft.measure.forward.probe import OutputFn, Probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.results.choices import check_choice
from torch_eft.results.trajectory import Validity
from torch_eft.tensorboard.run_info import JSONL_NAME
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import ActivationLike


class Observer:
    """Measures a network during its training, and shows the theory beside it.

    Args:
        model: The network; its output is (N, C), or is converted to that by ``output_fn``. None: ``begin`` gets it.
        probe: Fixed inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments of the forward, or
            the path of a file that holds one (``torch.save``).
        optimizer: The optimizer of the training, or several; gives the learning-rate tensor lambda. None: lambda = 1.
        preset: ``"light"``, ``"standard"`` or ``"full"``: which instruments (``torch_eft.live.config.presets``); None:
            ``"standard"``, or those that ``instruments`` names.
        every: When to measure besides the first and the last time (``torch_eft.live.config.schedule``). ``"auto"``:
            at twelve or more steps 1, 2, 4, 8, ... whatever the budget (a training of unknown length has as many from
            step 64 on); beyond them, as it allows, at ten steps a decade, and when an epoch is announced.
        budget: Time that measuring may take, as a share of the training's own; the schedule is thinned to stay within,
            but for twelve or more of the measurements, with even distances on a logarithmic axis. The start (theta_0
            and the first measurement after it) and forecasts are not in it, and shown apart. None: no limit.
        logdir: Where TensorBoard files and ``eft.jsonl`` go; None: nowhere, results are in ``history``.
        instruments: The instruments in place of the preset's, by name or your own.
        extra: Instruments beyond the preset's, by name or your own.
        ensemble: C_b and C_W, if known; None estimates them.
        activation: The activation, where it is not a registered one.
        forecast_seconds: Work that each forecast of the theory may take before the first step, at any budget, counted
            in seconds of one core (so that every machine draws the same); what needs more is left out, and its page
            says what brings it.
        seeds: Networks drawn anew that are trained beside this one on the same batches, to see how much NTK drift and
            representation change differ between initializations: 4, say. Every step and measurement costs as much
            again for each. 0: none.
        outputs: Which outputs the NTK is measured on: ``"full"``, ``"trace"`` (its average over them), ``"auto"``
            (full up to 1024 rows), or ``"probes:16"``: 16 fixed random directions of many outputs (1,000 classes, a
            vocabulary), with error bars, at the cost of 16 outputs.
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
        say: Prints a line of what a terminal shows; None: stderr, above progress bars (logger ``torch_eft.terminal``).

    Attributes:
        reference: theta_0.
        theta_file: ``eft-theta_0.pt`` in ``logdir``; None: ``"file"`` is as ``"checkpoint"``.
        history: ``{optimizer step: {tag: value}}``, everything measured so far.
        events: Quantities that left their band, predictions that left their validity.
        skipped: ``[(step, what went wrong)]``.
        budget: The account of what measuring has cost.

    Raises:
        ValueError: If an argument is not usable. A model that is not is warned of in ``begin``.
        TypeError: If the model is no module, or an optimizer none.

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
        preset: Preset | None = None,
        every: Every = AUTO,
        budget: float | None = 0.05,
        logdir: str | Path | None = None,
        instruments: Sequence[str | Instrument] | None = None,
        extra: Sequence[str | Instrument] = (),
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        forecast_seconds: float = 10.0,
        seeds: int = 0,
        outputs: str = "auto",
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
        _check_network(model)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else _optimizers(optimizer)
        given = Given(model, probe_from(probe), optimizers, output_fn, memory, distributed, unsharded_model)
        self.instruments = chosen_instruments(
            preset, instruments, extra, Options(ensemble, activation, forecast_seconds, seeds, outputs)
        )
        self.every = checked_every(every)
        self.budget = Budget(budget)
        self.keep_theta_0 = keep_theta_0
        folder = None if logdir is None else local_path(logdir, "logdir")
        self.progress = Progress()
        self.recorder = Recorder(self.budget, self.progress, on_error, name, say)
        self._run = run = Run(given, self.instruments, self.recorder, folder)
        self._beginning, self._hooks = Beginning(run), Hooks(run)
        self.sinks = list(sinks)
        if folder is not None and run.ranks.leads:
            self.sinks += [_tensorboard(folder), JSONLSink(folder / JSONL_NAME)]

    @property
    def collective(self) -> bool:
        """True if every rank of a distributed training must call the observer."""
        return self._run.given.collective

    @property
    def reference(self) -> Reference:
        """theta_0."""
        return self._run.reference

    @property
    def theta_file(self) -> Path | None:
        """Where the parameters of theta_0 are kept, if in a file; None: ``"file"`` is as ``"checkpoint"``."""
        return self._run.theta_file

    @property
    def origin(self) -> str:
        """A phrase saying where theta_0 was taken."""
        return self.reference.origin

    @property
    def history(self) -> RunHistory:
        """``{optimizer step: {tag: value}}``, all that was measured: ``.plot()``, ``.to_pandas()``, ``.save()``."""
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
        return self._run.given.probe

    @property
    def network(self) -> MeasuredNetwork:
        """The measured network, checked now if it was not before."""
        return self._run.network or self.check()

    # ---- before training

    def check(self, model: nn.Module | None = None, probe: Probe | None = None) -> MeasuredNetwork:
        """Check that the model can be measured on the probe; ``begin`` does it if it was not done.

        Args:
            model: The model, if it was not known before.
            probe: The probe, if it was not known before.

        Returns:
            The measured network; a ``ValueError`` with the reason if it cannot be measured.
        """
        return self._beginning.check(model, probe)

    def refuse(self, error: Exception, sinks: Sequence[Sink] = ()) -> None:
        """Let a training that cannot be measured go on without; ``measure`` does nothing until the next ``begin``.

        Args:
            error: Why it cannot be measured; raised with ``on_error="raise"``.
            sinks: More places where the reason goes.
        """
        self._beginning.refuse(error, [*self.sinks, *sinks])

    def begin(
        self,
        step: int = 0,
        *,
        obstacle: Obstacle | None = None,
        total_steps: int | None = None,
        full_batch: bool = False,
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
            full_batch: Whether every step is known to take the same batch: then forecasts are made before the first
                step. Else they wait until the second batch has been seen to be the first one again.
            model: The model.
            optimizers: The optimizers of the training.
            place: (rank, number of ranks) of this process; None: in torch's default process group.
            sinks: More places where the results of this training go.
            theta_file: Where ``keep_theta_0="file"`` writes in this training; None: in ``logdir``, if there is one.

        Raises:
            ValueError: If there is no model or no probe; for any reason why the model cannot be measured with
                ``on_error="raise"``, or where other ranks would wait for this one.
        """
        to = [*self.sinks, *sinks]
        self._beginning.begin(Loop(step, obstacle, total_steps, full_batch, model, optimizers, place, to, theta_file))

    # ---- training

    def observe_batch(self, batch: Any) -> None:
        """Show a training batch to the instruments, before its forward."""
        self._hooks.batch(batch)

    def observe_loss(self, loss: Tensor) -> None:
        """Show the batch's loss to the instruments, before its backward."""
        self._hooks.loss(loss)

    def before_step(self, optimizer: Optimizer | None = None) -> None:
        """Show the gradients, and the learning rates in force, to the instruments.

        Args:
            optimizer: The one that is about to take a step; None: the only one.
        """
        if self._beginning.waiting is not None:
            self._beginning.late()
        self._hooks.before_step(optimizer)

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
            ``{tag: value}``; empty if nothing was measured: it was not due, or the budget left it out.
        """
        run = self._run
        if run.refused or not (run.begun or self._begins(step)) or run.network is None:
            return {}
        since = self.progress.step
        if step != self.progress.step:
            self._hooks.after_step(step)
        planned = self.progress.total_steps
        last = last or (planned is not None and min(since, step - 1) < planned <= step)
        if not last and not (self._due(step, since) if due_now is None else due_now):
            return {}
        return run.visit(last, epoch)

    def _begins(self, step: int) -> bool:
        """Begin now, if the loop has not; return whether it worked."""
        if self._beginning.waiting is None:
            self.begin(step)
        else:
            self._beginning.late(step)
        return self._run.begun

    def _due(self, step: int, since: int) -> bool:
        if since < step < self.progress.quiet:
            return False
        try:
            self.progress.quiet = not_before(self.every, step, self.progress.curve)
            return due(self.every, step, since, self.progress.curve)
        except Exception as error:  # a function of the user's
            self.recorder.failed(error)
            return False

    def finish(self, step: int | None = None, epoch: int | None = None) -> None:
        """Measure the final weights, draw, and say what it cost.

        Args:
            step: Optimizer steps taken; None: those of the last call of ``measure``.
            epoch: Where the training counts them.
        """
        run = self._run
        if not run.begun:
            return
        self.measure(self.progress.step if step is None else step, last=True, epoch=epoch)
        run.end()

    def flush(self) -> None:
        """Bring everything to disk, as after an exception; a run that does not go on from here was interrupted."""
        if self._run.begun and self._run.ranks.leads:
            with self.recorder.guard():
                self._run.summarize("interrupted")
        self.recorder.flush()

    def overhead(self) -> str:
        """One sentence on what measuring has cost, and on what was left out."""
        cost = cost_sentence(self.budget, len(self.recorder.measured), len(self.skipped))
        left = left_out(self.budget, len(self.recorder.undrawn))
        return f"torch_eft: {cost}" + (f"; left out: {left}" if left else "")

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """History, theta_0's measurements and where they were taken, and the instruments' own states: plain types."""
        self._run.measurements.record_anew()
        place = self.keep_theta_0, self.theta_file, self._run.ranks.leads
        return checkpoint.save(self.recorder, self.reference, self.instruments, *place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's theta_0 and history; one that cannot be read is left alone, with a warning."""
        self._run.forget()
        try:
            checkpoint.load(state, self.recorder, self.reference, self.instruments)
            self._run.measurements.restored()
        except Exception as error:  # a corrupt checkpoint is corrupt in many ways
            self._run.forget()
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


def _check_network(model: Any) -> None:
    if isinstance(model, type):
        raise TypeError(f"model: the class {model.__name__} given; give a network, {model.__name__}(...)")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model: {type(model).__name__} given; give the network first, then its inputs: Observer(model, x)"
        )


def _optimizers(given: Any) -> list[Optimizer]:
    if isinstance(given, type):
        name = given.__name__
        raise TypeError(f"optimizer: the class {name} given; give the training's own, {name}(model.parameters(), ...)")
    each = list(given or ()) if isinstance(given, Sequence) or given is None else [given]
    wrong = next((one for one in each if not isinstance(one, Optimizer)), None)
    if wrong is not None:
        raise TypeError(f"optimizer: {type(wrong).__name__} given; give a torch.optim.Optimizer, several as a list")
    return each
