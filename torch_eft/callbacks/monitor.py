"""The Lightning side of every monitor: hooks, ranks, loggers. What is measured, and when, is the observer's.

Hooks. ``setup`` checks probe and model. theta_0 is taken in ``on_train_start`` (after the sanity check and
after a checkpoint is loaded). Measurements follow in ``on_train_batch_end`` or ``on_train_epoch_end``, never in
validation hooks, where weights may be averaged ones. Only rank 0 measures, and without collectives, unless
``distributed="sharded"`` or ``unsharded_model=`` asks for the other ranks.
"""

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.callbacks.averages import which_weights
from torch_eft.callbacks.loggers import log_directory, logger_sinks
from torch_eft.callbacks.steps import StepCounter
from torch_eft.callbacks.training_data import first_inputs, full_batch
from torch_eft.callbacks.workers import WorkerResults
from torch_eft.live.config.presets import Preset
from torch_eft.live.config.probes import ProbeLike, first_count, same_probe
from torch_eft.live.config.schedule import AUTO, Every
from torch_eft.live.instrument import Event, Instrument, MeasurementWarning, Obstacle
from torch_eft.live.observer import Observer
from torch_eft.live.record.history import RunHistory
from torch_eft.live.run.measured_network import Distributed
from torch_eft.live.run.reference import KeepTheta
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.measure.network.ranks import Ranks
from torch_eft.results.choices import nearest
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import ActivationLike


class EFTMonitor(Callback):
    """NTK drift, representation change and the theory beside them, in one callback: ``EFTMonitor(x[:16])``.

    What is logged, with formula, unit and source: ``torch_eft.tensorboard.QUANTITIES``. The network is visited once for
    everything. ``NTKMonitor``, ``RepresentationMonitor`` and ``TheoryComparison`` are this with one instrument each,
    and take the arguments from ``every`` on but for ``preset``, ``instruments`` and ``forecast_seconds``.

    Args:
        probe: Fixed inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments of the forward; the
            path of a file that holds one (``torch.save``); or ``"first_batch:N"``, the first N samples of the training
            data set.
        preset: ``"light"``: NTK and hidden kernels; ``"standard"``: the theory beside them; ``"full"``: everything.
            None: ``"standard"``, or those that ``instruments`` names.
        every: When to measure besides the first and the last weights: ``"auto"``: at twelve or more steps 1, 2, 4, 8,
            ... whatever the budget (a training of unknown length, of an iterable data set, say, has as many from step
            64 on), and beyond them, as it allows, after every epoch and at ten steps a decade;
            ``"epoch"``, a number of optimizer steps, ``"log:10"`` (10 per decade of steps), or a function of the step.
        budget: Time that measuring may take, as a share of the training's own. The schedule is thinned to stay within,
            but for twelve or more of the measurements, with even distances on a logarithmic axis; and the end says how
            much was left out. The start (theta_0 and the first measurement after it) and forecasts are not in it, and
            shown apart. None: no limit.
        instruments: The instruments in place of the preset's: names, or ``torch_eft.live.Instrument`` of your own.
        extra: Instruments beyond the preset's, likewise.
        ensemble: C_b and C_W, if known (lambda is the optimizer's in any case); None estimates them.
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
        module: Name of the submodule to measure; empty means the LightningModule itself.
        jsonl: Write every measurement to ``eft.jsonl`` too, next to the first logger's files.
        on_error: ``"warn"`` or ``"raise"``.
        name: Distinguishes several monitors of this class in checkpoints; and in loggers, where they measure the same
            quantities: the run, or the beginning of the tags, of all but the first.
        distributed: In a training on several devices: ``"rank_zero"``: rank 0 measures, the others wait for it in their
            next collective; ``"sharded"``: every rank takes its share of the samples (outputs and NTK), wherever
            ``every``, which must be the same on all ranks, may ask for it; it pays where a sample's passes are
            expensive (convolutions, attention).
        unsharded_model: For a model whose parameters are sharded (FSDP2): the same architecture built plainly. The
            parameters are gathered into it for every measurement, and it needs that much memory on every rank; batches
            and gradients are not looked at, so that there are measurements only.
        keep_theta_0: Where the parameters of theta_0 are kept for a resumed training, if something needs them (Taylor
            terms do): ``"checkpoint"``; ``"file"``, ``eft-theta_0.pt`` next to ``eft.jsonl``, to which checkpoints
            point; ``"none"``.

    Attributes:
        observer: The observer that measures.
        history: ``{optimizer step: {tag: value}}``, everything measured so far.
        events: Quantities that left their band, predictions that left their validity.
        skipped: ``[(step, what went wrong)]``.
        origin: A phrase saying where theta_0 was taken.
        seconds: Time spent measuring.
        validity: Where the theory holds for this run, or why it does not apply; None before the first step.

    Raises:
        ValueError: Here or in ``setup``, if an argument or the model is not usable. What shows when training starts is
            warned of, and training goes on without.

    Example:
        >>> import lightning, torch
        >>> from torch_eft.callbacks import EFTMonitor
        >>> monitor = EFTMonitor(torch.zeros(4, 3), preset="light", extra=["taylor"])
        >>> [instrument.name for instrument in monitor.observer.instruments]
        ['ntk', 'representation', 'taylor']
        >>> trainer = lightning.Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        probe: ProbeLike,
        *,
        preset: Preset | None = None,
        every: Every = AUTO,
        budget: float | None = 0.05,
        instruments: Sequence[str | Instrument] | None = None,
        extra: Sequence[str | Instrument] = (),
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        forecast_seconds: float = 10.0,
        seeds: int = 0,
        outputs: str = "auto",
        output_fn: OutputFn | None = None,
        memory: int = DEFAULT_MEMORY,
        module: str = "",
        jsonl: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
        distributed: Distributed = "rank_zero",
        unsharded_model: nn.Module | None = None,
        keep_theta_0: KeepTheta = "checkpoint",
    ) -> None:
        self._observer = Observer(
            None,
            probe,
            preset=preset,
            every=every,
            budget=budget,
            instruments=instruments,
            extra=extra,
            ensemble=ensemble,
            activation=activation,
            forecast_seconds=forecast_seconds,
            seeds=seeds,
            outputs=outputs,
            output_fn=output_fn,
            memory=memory,
            distributed=distributed,
            unsharded_model=unsharded_model,
            keep_theta_0=keep_theta_0,
            on_error=on_error,
            name=type(self).__name__,
        )
        self.module = module
        self.jsonl = jsonl
        self.name = name
        self._key: tuple[str | None, str] = (None, "")
        self._first, self._output_fn = first_count(probe), output_fn
        self._timeout: float | None = None
        self._error: Exception | None = None
        self._attached = False
        self._counter, self._workers = StepCounter(), WorkerResults()

    @property
    def observer(self) -> Observer:
        """The observer that measures."""
        self._workers.fetch(self._observer)
        return self._observer

    @property
    def history(self) -> RunHistory:
        """``{optimizer step: {tag: value}}``; ``.plot()``, ``.to_pandas()``, ``.save()``."""
        return self.observer.history

    @property
    def events(self) -> list[Event]:
        """Quantities that left their band, predictions that left their validity."""
        return self.observer.events

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """``[(step, what went wrong)]``."""
        return self.observer.skipped

    @property
    def origin(self) -> str:
        """A phrase saying where theta_0 was taken."""
        return self.observer.origin

    @property
    def seconds(self) -> float:
        """Time spent measuring."""
        return self.observer.budget.seconds if self._workers.overhead is None else self._workers.seconds

    @property
    def validity(self) -> Validity | None:
        """Where the theory holds for this run, or why it does not apply; None before the first step."""
        return self.observer.validity if self._workers.overhead is None else self._workers.validity

    def overhead(self) -> str:
        """One sentence on what measuring has cost, and on what was left out."""
        own = self.observer.overhead()
        return own if self._workers.overhead is None else self._workers.overhead

    # ---- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the model can be measured on the probe; a ``ValueError`` here stops before training."""
        self._attached = True
        if stage != "fit":
            return
        self._error = None
        self._workers.forget()
        if trainer.global_step == trainer.current_epoch == 0:  # else a fit that goes on
            self._counter.uncounted = 0
        if self._first is None and not is_overridden("configure_model", pl_module):
            self._check(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same check for models built in ``configure_model``."""
        if self._first is None and is_overridden("configure_model", pl_module):
            self._check(pl_module)

    def _check(self, pl_module: LightningModule) -> None:
        """Refuse what a ``ValueError`` explains; keep any other error to report when training starts."""
        network = self._network(pl_module)
        try:
            self.observer.check(network)
        except ValueError:
            raise
        except Exception as error:
            if self.observer.recorder.on_error == "raise":
                raise
            self._error = error

    def _network(self, pl_module: LightningModule) -> nn.Module:
        if not self.module:
            return pl_module
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            hint = nearest(self.module, [name for name, _ in pl_module.named_modules()])
            raise ValueError(f"module: {self.module!r} is no submodule{hint}; the top level has {names}") from None

    # ---- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take theta_0, or go on from a restored one."""
        network = self._network(pl_module)
        if self._first is not None:  # the data set is there by now
            try:
                self.observer.check(network, first_inputs(trainer, pl_module, self._first))
            except Exception as error:
                self._error = error
        if self._error is not None and self.observer.collective:  # other ranks would wait for this one
            raise self._error
        if self._takes_part(trainer):
            leads, file, label = trainer.is_global_zero, self._file(trainer), self._label(trainer)
            directory = log_directory(trainer) if leads else None
            sinks = logger_sinks(trainer, file if self.jsonl else None, label) if leads else ()
            if label and sinks:
                self.observer.recorder.announce(
                    f"{type(self).__name__}: another monitor of this Trainer logs the same names; the results of this "
                    f"one are the run {label!r} in TensorBoard, {label}/... in other loggers, and {file}"
                )
            step = self._counter.begin(trainer, network)
            if self._error is not None:
                self.observer.refuse(self._error, sinks)
                return
            waiting = leads and trainer.world_size > 1 and dist.is_initialized()
            self._timeout = Ranks().timeout if waiting else None
            with self._waited_for():
                self.observer.begin(
                    step,
                    obstacle=obstacle(trainer, pl_module),
                    total_steps=_planned_steps(trainer),
                    full_batch=full_batch(trainer, pl_module),
                    model=network,
                    optimizers=trainer.optimizers,
                    place=(trainer.global_rank, trainer.world_size),
                    sinks=sinks,
                    theta_file=None if directory is None else directory / f"{Path(file).stem}-theta_0.pt",
                )
            if leads and (said := which_weights(trainer)) is not None:
                self.observer.recorder.pages({"weights": said})

    def _takes_part(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero or self._observer.collective

    @contextmanager
    def _waited_for(self) -> Iterator[None]:
        """Rank 0 works and the others wait in their next collective: warn once, long before they give up."""
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        if self._timeout is not None and seconds > self._timeout / 4:
            warnings.warn(
                f"{type(self).__name__}: one measurement took {seconds:.1f} s, more than a quarter of the "
                f"{self._timeout:g} s after which the other ranks give up waiting and the training dies; use fewer "
                "samples or a lighter preset, or give the process group a longer timeout",
                MeasurementWarning,
                stacklevel=3,
            )
            self._timeout = None

    def _before(self, trainer: Trainer) -> "list[EFTMonitor]":
        """The monitors of this Trainer that have more to say, or come first."""
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, EFTMonitor)]  # type: ignore[attr-defined]
        ordered = sorted(monitors, key=lambda each: -len(each.observer.instruments))
        return ordered[: ordered.index(self)]

    def _file(self, trainer: Trainer) -> str:
        """Name of its JSONL file: two monitors never write to the same one."""
        place = len(self._before(trainer))
        return "eft.jsonl" if place == 0 else f"eft-{place + 1}.jsonl"

    def _label(self, trainer: Trainer) -> str:
        """A name that sets its results apart, where they would go under the tags of an earlier monitor."""
        before = self._before(trainer)
        if not any(self._collides(other) for other in before):
            return ""
        label = self.name or type(self).__name__
        return f"{label}-{len(before) + 1}" if label in [other._label(trainer) for other in before] else label

    def _collides(self, other: "EFTMonitor") -> bool:
        """Monitors of different instruments share their tags only where they measure the same on the same inputs."""
        names = {instrument.name for instrument in self.observer.instruments}
        return (
            (self.module, self._first, self._output_fn) != (other.module, other._first, other._output_fn)
            or not same_probe(self.observer.probe, other.observer.probe)
            or any(instrument.name in names for instrument in other.observer.instruments)
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the batch to the instruments."""
        if trainer.is_global_zero:
            self._observer.observe_batch(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Show the loss to the instruments."""
        if trainer.is_global_zero:
            self._observer.observe_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Show the gradient, and the learning rates in force, to the instruments."""
        if trainer.is_global_zero:
            self._observer.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if an optimizer step was made and the schedule says so."""
        if self._takes_part(trainer):
            with self._waited_for():
                self._observer.measure(self._steps(trainer, pl_module), epoch=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if the schedule is by epochs, and the final weights before anything averages or restores others."""
        if self._takes_part(trainer):
            by_epoch = self._observer.every in (AUTO, "epoch")
            ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
            with self._waited_for():
                step = self._steps(trainer, pl_module)
                self._observer.measure(step, due_now=by_epoch, last=ends, epoch=trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights if that was not done, draw, and say what it cost."""
        if self._takes_part(trainer):
            self.observer.finish(self._steps(trainer, pl_module))
            if trainer.is_global_zero:
                with self.observer.recorder.guard():
                    self._workers.leave(trainer, self.observer)

    def _steps(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """Optimizer steps so far; a sentence when the first one comes that Lightning does not count."""
        before, steps = self._counter.uncounted, self._counter.steps(trainer, self._network(pl_module))
        if self._counter.uncounted > before == 0 and trainer.is_global_zero:
            self._observer.recorder.announce(
                f"{type(self).__name__}: weights move without a step that Lightning counts (a raw optimizer, or one "
                "inside another); every batch after which they have moved is taken for one step"
            )
        return steps

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring everything to disk."""
        if trainer.is_global_zero:
            self.observer.flush()

    # ---- state

    @property
    def state_key(self) -> str:
        """The key in checkpoints, which ``name`` makes different for monitors of one class."""
        name, key = self._key
        if name != self.name:  # Lightning asks at every hook of every step
            key = self._generate_state_key(name=self.name)
            self._key = self.name, key
        return key if self._attached else _Key(key, self)

    def state_dict(self) -> dict[str, Any]:
        """History, theta_0's measurements and where they were taken: plain types and tensors."""
        return self.observer.state_dict() | {"uncounted": self._counter.uncounted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's theta_0 and history."""
        self.observer.load_state_dict(state_dict)
        self._counter.uncounted = int(state_dict.get("uncounted", 0))


class _Key(str):
    """A key that says what to do where a Trainer finds it twice, which it looks for before anything else."""

    owner: "EFTMonitor"

    def __new__(cls, key: str, owner: "EFTMonitor") -> "_Key":
        made = super().__new__(cls, key)
        made.owner = owner
        return made

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Key) or other.owner is self.owner:
            return str.__eq__(self, other)
        if not str.__eq__(self, other):
            return False
        kind, name = type(self.owner).__name__, self.owner.name
        raise ValueError(
            f"callbacks: two {kind} named {name!r} given; give each a name of its own, {kind}(probe, name='first') and "
            f"{kind}(probe, name='second')"
        )


def _planned_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole training, as far as the Trainer's arguments say; with one optimizer."""
    if not trainer.lightning_module.automatic_optimization:
        return None  # how many steps a batch takes is the module's own affair
    planned = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs and trainer.max_epochs > 0 and isinstance(trainer.num_training_batches, int):
        planned.append(trainer.max_epochs * -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
    return min(planned) if planned and len(trainer.optimizers) == 1 else None


def obstacle(trainer: Trainer, pl_module: LightningModule) -> Obstacle | None:
    """Return why the loop is not plain full-batch training on one device, as far as the Trainer knows, or None."""
    if not pl_module.automatic_optimization:
        return Obstacle("manual optimization: the steps taken are not known")
    if trainer.world_size > 1:
        return Obstacle(f"{trainer.world_size} processes share the batch; the theory is compared on one")
    if trainer.gradient_clip_val:
        return Obstacle(f"gradient clipping at {trainer.gradient_clip_val}")
    if trainer.accumulate_grad_batches not in (1, trainer.num_training_batches):  # else one step takes all batches
        return Obstacle(f"gradient accumulation over {trainer.accumulate_grad_batches} batches", minibatches=True)
    # Of an iterable's batches the first two show what they are.
    if trainer.num_training_batches not in (trainer.accumulate_grad_batches, 1, math.inf):
        reason = f"mini-batches ({trainer.num_training_batches} per epoch): order 0 covers full-batch training"
        return Obstacle(reason, minibatches=True)
    return None
