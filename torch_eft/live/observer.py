"""The observer: measures a network while something else trains it. No trainer, no logger, no mathematics.

    observer = Observer(model, x_probe, optimizer, logdir="runs/1")
    observer.begin()
    for step, (x, y) in enumerate(loader, start=1):
        loss = F.mse_loss(model(x), y)
        observer.observe_batch((x, y))       # these three let the theory see what kind of training it is;
        observer.observe_loss(loss)          # without them there are measurements only
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
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.budget import Budget
from torch_eft.live.config.presets import Options, Preset, parts_of
from torch_eft.live.config.probes import ProbeLike, probe_from
from torch_eft.live.config.schedule import Every, checked_every, due
from torch_eft.live.costs import cost_page, cost_sentence
from torch_eft.live.part import Event, History, Instrument, MeasurementWarning, Start
from torch_eft.live.record.outlet import skipped_page
from torch_eft.live.record.recorder import LOADING, Recorder, validity_of
from torch_eft.live.record.sinks import JSONLSink, Sink, TensorBoardSink
from torch_eft.live.run.reference import Reference
from torch_eft.live.run.subject import Distributed, MeasuredNetwork
from torch_eft.live.run.theta_file import KeepTheta, load_theta_0, save_theta_0
from torch_eft.live.run.visits import Visits
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.results.trajectory import Validity
from torch_eft.tensorboard.run_info import JSONL_NAME
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import ActivationLike


class Observer:
    """Measures a network during its training, and lays the theory beside it.

    Args:
        model: The network; its output is (N, C), or becomes so by ``output_fn``.
        probe: Fixed inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments of the forward, or
            the path of a file that holds one (``torch.save``).
        optimizer: That of the training, or several; gives the learning-rate tensor lambda. None: lambda = 1.
        preset: ``"light"``, ``"standard"`` or ``"full"``: which parts (``torch_eft.live.config.presets``).
        every: When to measure besides the first and the last time (``torch_eft.live.config.schedule``).
        budget: Time that measuring may take, as a share of the training's own; the schedule is thinned to stay within.
            None: no limit.
        logdir: Where TensorBoard files and ``eft.jsonl`` go; None: nowhere, results are in ``history``.
        also: Names of parts beyond the preset's.
        ensemble: C_b and C_W, if known; None estimates them.
        activation: The activation, where it is none of the registered ones.
        forecast_seconds: Time that each forecast of the theory may take before the first step, at any budget; what is
            dearer is left out, in words.
        output_fn: Turns what the model returns into (N, C).
        distributed: In a training by several processes: ``"rank_zero"``, where rank 0 measures and the others do
            nothing; or ``"sharded"``, where every rank takes its share of the snapshot's samples, wherever ``every``
            (which must be the same on all ranks) may ask for one. What else the parts compute, rank 0 does alone.
        twin: A plain network like the model, for a model whose parameters are sharded (FSDP2): they are gathered into
            it for every measurement, on all ranks. What parts learn from batches and gradients is left out then.
        keep_theta_0: Where the parameters of theta_0 are kept for a resumed training, if a part needs them:
            ``"checkpoint"``; ``"file"``, written once to ``theta_file``, to which checkpoints point; or ``"none"``.
        on_error: ``"warn"`` or ``"raise"``.
        parts: The parts themselves, instead of a preset's.
        sinks: More places where results go.

    Attributes:
        subject: What is looked at.
        theta_file: ``eft-theta_0.pt`` in ``logdir``; None: ``"file"`` is as ``"checkpoint"``.
        history: ``{optimizer step: {tag: value}}``, everything measured so far.
        events: Quantities that left their band, predictions that left their validity.
        skipped: ``[(step, what went wrong)]``.
        budget: The account of what measuring has cost.

    Raises:
        ValueError: If an argument is not usable; from ``begin``, if the model is not.
    """

    def __init__(
        self,
        model: nn.Module | None,
        probe: ProbeLike,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        preset: Preset = "standard",
        every: Every = "log:10",
        budget: float | None = 0.05,
        logdir: str | Path | None = None,
        also: Sequence[str] = (),
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        forecast_seconds: float = 3.0,
        output_fn: OutputFn | None = None,
        distributed: Distributed = "rank_zero",
        twin: nn.Module | None = None,
        keep_theta_0: KeepTheta = "checkpoint",
        on_error: Literal["warn", "raise"] = "warn",
        parts: Sequence[Instrument] | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
        self.subject = MeasuredNetwork(model, probe_from(probe), optimizers, output_fn, distributed, twin)
        if keep_theta_0 not in ("checkpoint", "file", "none"):
            raise ValueError(f"keep_theta_0: {keep_theta_0!r} given; give 'checkpoint', 'file' or 'none'")
        self.keep_theta_0 = keep_theta_0
        self.theta_file = None if logdir is None else Path(logdir) / "eft-theta_0.pt"
        self.every = checked_every(every)
        self.budget = Budget(budget)
        chosen = parts_of(preset, also, Options(ensemble, activation, output_fn, forecast_seconds))
        self.parts = chosen if parts is None else list(parts)
        self.sinks = list(sinks)
        if logdir is not None and self.subject.leads:
            self.sinks += [_tensorboard(logdir), JSONLSink(Path(logdir) / JSONL_NAME)]
        self.recorder = Recorder(type(self).__name__, self.budget, on_error)
        self._visits = Visits(self.subject, self.parts, self.recorder)
        self._checking = 0.0
        self._begun = False
        self._drawn = False
        self._listening: dict[str, list[Instrument]] = {}
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.recorder.forget()
        self._visits.forget()
        self._theta_records: dict[str, dict[str, Any]] = {}

    @property
    def origin(self) -> str:
        """Where theta_0 was taken, in words."""
        return self._visits.beginning.origin

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
        return validity_of(self.parts)

    # ---- before training

    def check(self) -> None:
        """See that the model can be measured on the probe; ``begin`` does it if it was not done.

        Raises:
            ValueError: If it cannot, with the reason.
        """
        started = self.budget.clock()
        self.subject.check(self.parts, self.recorder.name)
        self._checking = self.budget.clock() - started

    def begin(self, step: int = 0, outside: str | None = None, total_steps: int | None = None) -> None:
        """Take theta_0, or go on from a restored one.

        Args:
            step: Optimizer steps taken so far.
            outside: Why the loop is no plain full-batch training on one device, if that is known.
            total_steps: Optimizer steps to be taken in all, if that is known: costs that fall once are spread over
                them, and at the last of them a measurement is always made.

        Raises:
            ValueError: If the model cannot be measured; the message says why.
        """
        if not self.subject.checked:
            self.check()
        self.budget.restart(self._checking)
        self._checking, self._begun = 0.0, True
        self._visits.first_step, self._visits.total_steps = step, total_steps
        self.recorder.step = step
        if not self.subject.leads:
            self.recorder.guard(self.subject.follow)
            return
        self.recorder.outlet.open(self.sinks)
        with self.subject.awaited():
            self.recorder.guard(lambda: self._begin(step, outside))
        self.budget.settle()

    def _begin(self, step: int, outside: str | None) -> None:
        network, probe = self.subject.network, self.subject.inputs
        restored = self._visits.beginning.restored
        going_on = restored or step > 0
        unlike = self._visits.beginning.unlike(network, probe)
        if unlike and going_on:
            warnings.warn(
                f"{self.recorder.name}: {unlike}, whose measurements cannot be compared with; training goes on, "
                "measured from here as from a new start",
                MeasurementWarning,
                stacklevel=2,
            )
        goes_on = self._visits.beginning.snapshot is not None and going_on and unlike is None
        if not goes_on:
            self._start_afresh()
            self.recorder.each(self.parts, lambda part: part.forget())  # what a checkpoint told them of another theta_0
            where = "initialization" if step == 0 else f"resumed at step {step} without a recorded theta_0"
            self._visits.beginning.origin = where
            # Learning rates are part of the NTK; those of theta_0 are kept, a schedule is no drift.
            self._visits.beginning.lambdas = self.subject.learning_rates()
        self._visits.beginning.belongs_to(network, probe)
        lacking = [part.name for part in self.parts if part.needs_theta_0]
        if goes_on and lacking and self._visits.beginning.theta_0 is None:
            warnings.warn(
                f"{self.recorder.name}: the parameters of theta_0 were not kept or are not to be had, so that "
                f"what needs them ({', '.join(lacking)}) is left out from here; the rest goes on",
                MeasurementWarning,
                stacklevel=2,
            )
        fresh = not goes_on and step == 0
        if step > 0 and (restored or not goes_on):
            known = {at: dict(scalars) for at, scalars in self.history.items() if at <= step}
            latest = step if step in known else step - 1  # else this step is measured in a moment
            self.recorder.outlet.each(lambda sink: sink.resume(latest, known))
        if self.subject.twin is not None:
            outside = outside or "its parameters are sharded over the ranks"
        start = Start(
            network,
            probe,
            list(self.subject.optimizers),
            step,
            fresh,
            outside,
            dict(self._visits.beginning.lambdas),
            self.subject.output_fn,
            self._visits.total_steps,
        )
        self.recorder.ask_each(self.parts, lambda part: part.begin(start))
        if step not in self.history:
            self._visits.visit(step, last=False, epoch=None, start=True)
        elif restored and any(part.looks_back for part in self.parts):
            self._visits.look(step)
        self._drawn = goes_on
        if self.recorder.outlet.draws:
            self.budget.reserve = LOADING
        self._draw_start()
        self._tell()
        self.flush()

    def _draw_start(self) -> None:
        """Figures of theta_0, as soon as the budget has room for them."""
        reference = self._visits.beginning.snapshot
        if self._drawn or reference is None or not self.budget.room(self.recorder.drawing):
            return
        self._drawn = True
        self.recorder.draw(self.parts, lambda part: part.first_figures(reference))
        self.budget.settle()

    def _listeners(self, hook: str) -> list[Instrument]:
        """The parts that do something at a hook: most do nothing at most, and there are many steps."""
        if self._visits.beginning.snapshot is None or not self.subject.leads or self.subject.twin is not None:
            return []
        if hook not in self._listening:
            self._listening[hook] = [p for p in self.parts if getattr(type(p), hook) is not getattr(Instrument, hook)]
        return self._listening[hook]

    # ---- training

    def observe_batch(self, batch: Any) -> None:
        """Show a training batch to the parts, before its forward."""
        self.recorder.each(self._listeners("on_batch"), lambda part: part.on_batch(batch))

    def observe_loss(self, loss: Tensor) -> None:
        """Show the batch's loss to the parts, before its backward."""
        self.recorder.each(self._listeners("on_loss"), lambda part: part.on_loss(loss.detach()))

    def before_step(self, optimizer: Optimizer | None = None) -> None:
        """Show the gradients, and the learning rates in force, to the parts.

        Args:
            optimizer: The one that is about to take a step; None: the only one.
        """
        chosen = optimizer if optimizer is not None else next(iter(self.subject.optimizers), None)
        listeners = self._listeners("on_gradient")
        if listeners and chosen is not None:
            step = self.recorder.step
            first = step == self._visits.first_step
            with self.budget.forecasting() if first else nullcontext():
                self.recorder.ask_each(listeners, lambda part: part.on_gradient(step, chosen))
            if first:
                self.recorder.guard(self._tell)

    def measure(
        self, step: int, due_now: bool | None = None, last: bool = False, epoch: int | None = None
    ) -> dict[str, float]:
        """Measure if it is due; to be called after every optimizer step.

        Args:
            step: Optimizer steps taken.
            due_now: Whether a measurement is due; None asks the schedule.
            last: Whether these are the final weights: they are measured in any case.
            epoch: Where the training counts them.

        Returns:
            ``{tag: value}``; empty if nothing was measured.
        """
        if not self._begun:
            self.begin(step)
        if step != self.recorder.step:
            self._after_step(step)
        last = last or step == self._visits.total_steps
        if not last and not (self._due(step) if due_now is None else due_now):
            return {}
        found: dict[str, float] = {}
        if not self.subject.leads:
            self.recorder.guard(self.subject.follow)
            return found
        with self.subject.awaited():
            if step == self._visits.latest_step:
                return found
            if torch.cuda.is_initialized():  # the measurement itself waits for the device: its queue is not its cost
                torch.cuda.synchronize()
            self.recorder.guard(lambda: found.update(self._visits.visit(step, last, epoch)))
        if found:
            self.recorder.guard(self._tell)
            self.flush()
            if not last:
                self.recorder.guard(self._draw_start)
        return found

    def _due(self, step: int) -> bool:
        try:
            return due(self.every, step)
        except Exception as error:  # a function of the user's
            self.recorder.failed(error)
            return False

    def _after_step(self, step: int) -> None:
        first, self.recorder.step = self.recorder.step == self._visits.first_step, step
        network = self.subject.network
        self.recorder.ask_each(self._listeners("on_step"), lambda part: part.on_step(step, network))
        if first:  # what the theory needed to know before the first step is in
            self.budget.settle()

    def finish(self, step: int | None = None, epoch: int | None = None) -> None:
        """Measure the final weights, draw, and say what it cost.

        Args:
            step: Optimizer steps taken; None: those of the last call of ``measure``.
            epoch: Where the training counts them.
        """
        if not self._begun:
            return
        step = self.recorder.step if step is None else step
        self.measure(step, last=True, epoch=epoch)
        self._begun = False
        if not self.subject.leads:
            return
        self.recorder.guard(self._finish)
        self.budget.stop()
        self.recorder.outlet.each(lambda sink: sink.close())
        self.recorder.say(self.overhead())

    def _finish(self) -> None:
        reference, last = self._visits.beginning.snapshot, self._visits.latest
        self._draw_start()
        if reference is not None and last is not None:
            self.recorder.draw(self.parts, lambda part: part.last_figures(self.history, reference, last))
        pages = {"overhead": cost_page(self.budget, len(self.history))}
        if self.skipped:
            pages["skipped"] = skipped_page(self.skipped)
        self.recorder.outlet.pages(pages, self.recorder.step)
        self._tell()
        self.flush()

    def flush(self) -> None:
        """Bring everything to disk, as after an exception."""
        self.recorder.outlet.each(lambda sink: sink.flush())

    def overhead(self) -> str:
        """What measuring has cost, and what was left out, in a sentence."""
        return cost_sentence(self.budget, len(self.history), len(self.skipped), len(self.recorder.undrawn))

    def _tell(self) -> None:
        subject = self.subject
        self.recorder.tell(self.parts, subject.network, subject.optimizers, subject.probe_shape)

    # ---- state: plain types and tensors, so that it loads with weights_only=True

    def state_dict(self) -> dict[str, Any]:
        """History, theta_0's measurements and where they were taken, and the parts' own."""
        states: dict[str, Any] = {}
        self.recorder.each(self.parts, lambda part: states.update({part.name: part.state()}))
        beginning = self._visits.beginning.state()
        if self.keep_theta_0 == "none" or (self.keep_theta_0 == "file" and self.theta_file is not None):
            beginning = self._put_aside("", beginning)
            holding = [name for name, kept in states.items() if isinstance(kept, dict) and kept.get("theta_0")]
            states |= {name: self._put_aside(name, states[name]) for name in holding}
        return {
            "history": {step: dict(scalars) for step, scalars in self.history.items()},
            "events": [[event.step, event.quantity, event.text] for event in self.events],
            **beginning,
            "parts": states,
        }

    def _put_aside(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        """A state (that of a part, if it has a name) without theta_0, which is written to a file once, or nowhere."""
        theta_0, records, file = state["theta_0"], self._theta_records, self.theta_file
        if self.keep_theta_0 == "file" and theta_0 is not None and name not in records and self.subject.leads:
            assert file is not None
            path = file.with_stem(f"{file.stem}-{name}") if name else file
            self.recorder.guard(lambda: records.update({name: save_theta_0(path, theta_0)}))
        return state | {"theta_0": None, "theta_0_file": records.get(name)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's theta_0 and history; one that cannot be read is left alone, with a warning."""
        self._start_afresh()
        try:
            self._load(state)
        except Exception as error:  # a corrupt checkpoint is corrupt in many ways
            self._start_afresh()
            for part in self.parts:
                part.forget()
            warnings.warn(
                f"{self.recorder.name}: its state in the checkpoint cannot be read ({type(error).__name__}: {error}); "
                "training goes on, measured from here as from a new start",
                MeasurementWarning,
                stacklevel=2,
            )

    def _load(self, state: dict[str, Any]) -> None:
        self.recorder.recall(
            {int(step): dict(scalars) for step, scalars in state["history"].items()},
            [Event(int(step), quantity, text) for step, quantity, text in state["events"]],
        )
        self._visits.beginning = Reference.from_state(self._fetched("", state))
        self._visits.latest_step = max(self.history, default=None)
        for part in self.parts:
            part.forget()
            part.load_state(self._fetched(part.name, dict(state["parts"].get(part.name, {}))))

    def _fetched(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        """A state with the theta_0 that it points to, if that is to be had."""
        record, found = state.get("theta_0_file"), dict(state)
        if record is not None:
            self._theta_records[name] = record
            self.recorder.guard(lambda: found.update(theta_0=load_theta_0(record)))
        return found


def _tensorboard(logdir: str | Path) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardSink(SummaryWriter(str(logdir)))
