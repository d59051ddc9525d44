"""The Lightning side of every monitor: hooks, schedule, isolation, state, logging. No mathematics.

Hooks. ``setup`` checks probe and model. theta_0 is taken in ``on_train_start`` (after the sanity check and
after a checkpoint is loaded). Measurements follow in ``on_train_batch_end`` or ``on_train_epoch_end``, never in
validation hooks, where weights may be averaged ones. Only rank 0 measures, and without collectives.

A failing measurement warns once and is skipped; training goes on (``on_error="raise"`` to debug).
"""

import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.callbacks.part import History, Part
from torch_eft.callbacks.schedule import Every, checked_every, due
from torch_eft.measure.learning_rates import read_learning_rates
from torch_eft.measure.ntk import too_large
from torch_eft.measure.output import output
from torch_eft.measure.probe import OutputFn, as_probe
from torch_eft.measure.snapshot import Plan, Snapshot, take_snapshot
from torch_eft.tensorboard.layout import comparison_layout
from torch_eft.tensorboard.tags import BAND, PREFIX, TITLES, tag


class MeasurementWarning(UserWarning):
    """A measurement failed and was skipped; training is not affected."""


class Monitor(Callback):
    """Base of the monitors; use ``NTKMonitor``, ``RepresentationMonitor``, ``TheoryComparison`` or ``EFTMonitor``.

    Attributes:
        history: ``{optimizer step: {tag: value}}``, everything measured so far.
        skipped: ``[(step, what went wrong)]``.
        origin: Where theta_0 was taken, in words.
        seconds: Time spent measuring.

    Logged besides the parts' own scalars: ``eft/overhead_percent/measured``, the time spent measuring in % of the
    training's own time.
    """

    def __init__(
        self,
        probe: Any,
        parts: list[Part],
        every: Every = "epoch",
        output_fn: OutputFn | None = None,
        module: str = "",
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
    ) -> None:
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error: {on_error!r} given; give 'warn' or 'raise'")
        self.probe = as_probe(probe)
        self.every = checked_every(every)
        self.output_fn = output_fn
        self.module = module
        self.on_error = on_error
        self.name = name
        self.parts = parts
        self.history: History = {}
        self.skipped: list[tuple[int, str]] = []
        self.origin = ""
        self.seconds = 0.0
        self._started = time.perf_counter()
        self._first_step = 0
        self._plan = Plan()
        self._lambdas: dict[str, float] = {}
        self._reference: Snapshot | None = None
        self._last: Snapshot | None = None
        self._last_step: int | None = None
        self._parameters: list[str] = []
        self._restored = False
        self._layout_written = False

    # ---- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the model can be measured on the probe; errors here stop before training."""
        if stage == "fit" and not is_overridden("configure_model", pl_module):
            self._check(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same check for models built in ``configure_model``."""
        if is_overridden("configure_model", pl_module):
            self._check(pl_module)

    def _check(self, pl_module: LightningModule) -> None:
        network = self._network(pl_module)
        samples, outputs = output(network, self.probe, self.output_fn).shape
        for part in self.parts:
            part.check(network, self.probe, outputs)
        plans = [part.plan(outputs, samples) for part in self.parts]
        ntk = any(plan.ntk for plan in plans)
        trace = any(plan.ntk_trace for plan in plans)
        refusal = too_large(network, self.probe, trace, self.output_fn) if ntk else None
        if refusal is not None:
            warnings.warn(
                f"{type(self).__name__} will not measure the NTK: {refusal}", MeasurementWarning, stacklevel=2
            )
        self._plan = Plan(
            ntk=ntk and refusal is None,
            ntk_trace=trace,
            hidden=any(plan.hidden for plan in plans),
            layers=next((plan.layers for plan in plans if plan.layers is not None), None),
        )

    def _network(self, pl_module: LightningModule) -> nn.Module:
        if not self.module:
            return pl_module
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(f"module: {self.module!r} is no submodule; the top level has {names}") from None

    # ---- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take theta_0, or go on from a restored one."""
        self._started, self.seconds = time.perf_counter(), 0.0
        self._first_step, self._layout_written = trainer.global_step, False
        if trainer.is_global_zero:
            self._attempt(trainer, lambda: self._begin(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the batch to the parts."""
        if trainer.is_global_zero and self._reference is not None:
            self._attempt(trainer, lambda: self._each(lambda part: part.on_batch(batch)))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Show the loss to the parts."""
        if trainer.is_global_zero and self._reference is not None:
            self._attempt(trainer, lambda: self._each(lambda part: part.on_loss(loss.detach())))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Show the gradient, and the learning rates in force, to the parts."""
        if trainer.is_global_zero and self._reference is not None:
            self._attempt(trainer, lambda: self._gradient(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if an optimizer step was made and the schedule says so."""
        step = trainer.global_step
        if trainer.is_global_zero and step != self._last_step and due(self.every, step):
            self._attempt(trainer, lambda: self._measure(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if the schedule is by epochs."""
        if trainer.is_global_zero and self.every == "epoch" and trainer.global_step != self._last_step:
            self._attempt(trainer, lambda: self._measure(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, draw, and say what it cost."""
        if not trainer.is_global_zero:
            return
        if trainer.global_step != self._last_step:
            self._attempt(trainer, lambda: self._measure(trainer, pl_module))
        self._attempt(trainer, lambda: self._finish(trainer))
        rank_zero_info(self.overhead())

    def overhead(self) -> str:
        """What measuring has cost, in a sentence."""
        share = f"{self._percent():.1f} % on top of the training's own time"
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"torch_eft: {len(self.history)} measurements{skipped} took {self.seconds:.2f} s, {share}"

    def _percent(self) -> float:
        own = time.perf_counter() - self._started - self.seconds
        return 100 * self.seconds / max(own, 1e-9)

    # ---- what the hooks do

    def _attempt(self, trainer: Trainer, action: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        try:
            action()
        except Exception as error:
            self._skip(trainer, error)
        finally:
            self.seconds += time.perf_counter() - begun

    def _skip(self, trainer: Trainer, error: Exception) -> None:
        """Go on without what failed; warn the first time."""
        if self.on_error == "raise":
            raise error
        reason = f"{type(error).__name__}: {error}"
        if not self.skipped:
            warnings.warn(
                f"{type(self).__name__} could not measure at step {trainer.global_step} and goes on without "
                f"({reason}). Further failures are counted in .skipped, not shown",
                MeasurementWarning,
                stacklevel=3,
            )
        self.skipped.append((trainer.global_step, reason))

    def _each(self, action: Callable[[Part], None]) -> None:
        for part in self.parts:
            action(part)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network, step = self._network(pl_module), trainer.global_step
        parameters = [f"{name} {tuple(p.shape)}" for name, p in network.named_parameters()]
        goes_on = self._reference is not None and parameters == self._parameters and (self._restored or step > 0)
        if not goes_on:
            self.history, self.skipped, self._last_step = {}, [], None
            self._reference = None
            self.origin = "initialisation" if step == 0 else f"resumed at step {step} without a recorded theta_0"
            # Learning rates are part of the NTK; those of theta_0 are kept, a schedule is no drift.
            self._lambdas = read_learning_rates(network, trainer.optimizers).lambdas
        self._parameters, self._restored = parameters, False
        pages: dict[str, str] = {}
        for part in self.parts:
            try:
                pages |= part.begin(trainer, pl_module, network, self.probe.inputs, fresh=not goes_on and step == 0)
            except Exception as error:  # theta_0 must be measured all the same
                self._skip(trainer, error)
        self._write_pages(trainer, pages, step)
        if step not in self.history:
            self._measure(trainer, pl_module)
        reference = self._reference
        if reference is not None and not goes_on:
            self._write_figures(trainer, step, lambda part: part.first_figures(reference))

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begun, spent = time.perf_counter(), self.seconds
        step = trainer.global_step
        self._last_step = step  # also if it fails: one attempt a step
        network = self._network(pl_module)
        # Parameters that were frozen at theta_0 may have joined: theirs are the rates they have now.
        lambdas = read_learning_rates(network, trainer.optimizers).lambdas
        lambdas |= {name: value for name, value in self._lambdas.items() if name in lambdas}
        snapshot = take_snapshot(network, self.probe, self._plan, lambdas, self.output_fn)
        if self._reference is None:
            self._reference = snapshot
        self._last = snapshot
        scalars: dict[str, float] = {}
        for part in self.parts:
            scalars |= part.observe(step, snapshot, self._reference)
        if step > self._first_step:  # before the first step there is no training time to compare with
            self.seconds = spent + time.perf_counter() - begun
            scalars[tag("overhead_percent", "measured")] = self._percent()
            self.seconds = spent  # _attempt adds the whole
        self._record(trainer, step, scalars)

    def _gradient(self, trainer: Trainer, optimizer: Optimizer) -> None:
        step = trainer.global_step
        for part in self.parts:
            late, pages = part.on_gradient(step, optimizer)
            for at_step, scalars in late.items():
                known = self.history.get(at_step, {})
                self._record(trainer, at_step, {name: value for name, value in scalars.items() if name not in known})
            self._write_pages(trainer, pages, step)
        if not self._layout_written:
            self._write_layout(trainer)

    def _record(self, trainer: Trainer, step: int, scalars: dict[str, float]) -> None:
        self.history.setdefault(step, {}).update(scalars)
        for logger in trainer.loggers:
            logger.log_metrics(dict(sorted(scalars.items())), step=step)

    # ---- TensorBoard

    def _writers(self, trainer: Trainer) -> list[Any]:
        return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]

    def _write_pages(self, trainer: Trainer, pages: dict[str, str], step: int) -> None:
        for writer in self._writers(trainer):
            for name, text in pages.items():
                writer.add_text(f"{PREFIX}/{name}", text, step)

    def _write_layout(self, trainer: Trainer) -> None:
        """Once theory and first measurement are known: a chart for every quantity there is."""
        self._layout_written = True
        logged = {name for scalars in self.history.values() for name in scalars}
        quantities = [q for q in TITLES if tag(q, "measured") in logged and not q.startswith("overhead")]
        with_band = [q for q in quantities if tag(q, BAND[0]) in logged]
        for writer in self._writers(trainer):
            summary = comparison_layout(with_band, [q for q in quantities if q not in with_band])
            writer.file_writer.add_summary(summary)

    def _finish(self, trainer: Trainer) -> None:
        reference, last = self._reference, self._last
        if self.skipped:
            lines = ["Measurements that failed and were skipped:", ""]
            lines += [f"- step {step}: {reason}" for step, reason in self.skipped]
            self._write_pages(trainer, {"skipped": "\n".join(lines)}, trainer.global_step)
        if reference is not None and last is not None:
            self._write_figures(
                trainer, trainer.global_step, lambda part: part.last_figures(self.history, reference, last)
            )
        for writer in self._writers(trainer):
            writer.flush()

    def _write_figures(self, trainer: Trainer, step: int, draw: Callable[[Part], dict[str, Any]]) -> None:
        writers = self._writers(trainer)
        if not writers:
            return
        try:
            figures = {name: drawing for part in self.parts for name, drawing in draw(part).items()}
        except ImportError:
            rank_zero_info("torch_eft: no figures, matplotlib is not installed (pip install 'torch-eft[demo]')")
            return
        for writer in writers:
            for name, drawing in figures.items():
                writer.add_figure(f"{PREFIX}/{name}", drawing, step, close=False)

    # ---- state: plain types and tensors, so that it loads with weights_only=True

    @property
    def state_key(self) -> str:
        """Monitors of one class are told apart by ``name``."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """History, theta_0's measurements and where they were taken."""
        reference = self._reference
        return {
            "history": {step: dict(scalars) for step, scalars in self.history.items()},
            "origin": self.origin,
            "parameters": list(self._parameters),
            "lambdas": dict(self._lambdas),
            "reference": None
            if reference is None
            else {"output": reference.output, "ntk": reference.ntk, "hidden": dict(reference.hidden)},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's theta_0 and history."""
        for part in self.parts:
            part.forget()
        self.history = {int(step): dict(scalars) for step, scalars in state_dict["history"].items()}
        self.origin = state_dict["origin"]
        self._parameters = list(state_dict["parameters"])
        self._lambdas = dict(state_dict["lambdas"])
        stored = state_dict["reference"]
        self._reference = None if stored is None else Snapshot(stored["output"], stored["ntk"], stored["hidden"])
        self._last_step = max(self.history, default=None)
        self._restored = self._reference is not None


def on_device_of(reference: Tensor, value: Tensor) -> Tensor:
    """``reference`` where ``value`` lives, after a checkpoint brought it back elsewhere."""
    with torch.no_grad():
        return reference.to(value)
