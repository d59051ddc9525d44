"""The Lightning side of every monitor: hooks, ranks, loggers. What is measured, and when, is the observer's.

Hooks. ``setup`` checks probe and model. theta_0 is taken in ``on_train_start`` (after the sanity check and
after a checkpoint is loaded). Measurements follow in ``on_train_batch_end`` or ``on_train_epoch_end``, never in
validation hooks, where weights may be averaged ones. Only rank 0 measures, and without collectives, unless
``distributed="sharded"`` or a twin asks for the other ranks.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.callbacks.applicability import outside_the_theory
from torch_eft.callbacks.loggers import log_directory, logger_sinks
from torch_eft.live.config.probes import ProbeLike, first_count, first_samples
from torch_eft.live.config.schedule import Every
from torch_eft.live.observer import Observer
from torch_eft.live.part import Event, History, Instrument, MeasurementWarning
from torch_eft.live.run.subject import Distributed
from torch_eft.live.run.theta_file import KeepTheta
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.network.ranks import Ranks
from torch_eft.results.trajectory import Validity


class Monitor(Callback):
    """Base of the monitors; use ``EFTMonitor``, ``NTKMonitor``, ``RepresentationMonitor`` or ``TheoryComparison``.

    Attributes:
        observer: What measures.
        history: ``{optimizer step: {tag: value}}``, everything measured so far.
        events: Quantities that left their band, predictions that left their validity.
        skipped: ``[(step, what went wrong)]``.
        origin: Where theta_0 was taken, in words.
        seconds: Time spent measuring.
        validity: Where the theory holds for this run, or why it does not apply; None before the first step.

    Logged besides the parts' own scalars: ``eft/overhead_percent/measured``, the time spent measuring in % of the
    training's own time.
    """

    def __init__(
        self,
        probe: ProbeLike,
        parts: Sequence[Instrument],
        every: Every = "epoch",
        budget: float | None = 0.05,
        output_fn: OutputFn | None = None,
        module: str = "",
        jsonl: bool = True,
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
        distributed: Distributed = "rank_zero",
        twin: nn.Module | None = None,
        keep_theta_0: KeepTheta = "checkpoint",
    ) -> None:
        self.observer = Observer(
            None,
            probe,
            every=every,
            budget=budget,
            output_fn=output_fn,
            distributed=distributed,
            twin=twin,
            keep_theta_0=keep_theta_0,
            on_error=on_error,
            parts=parts,
        )
        self.observer.recorder.name = type(self).__name__
        self.observer.recorder.say = rank_zero_info
        self.module = module
        self.jsonl = jsonl
        self.name = name
        self._first = first_count(probe)
        self._timeout: float | None = None

    @property
    def history(self) -> History:
        """``{optimizer step: {tag: value}}``."""
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
        """Where theta_0 was taken, in words."""
        return self.observer.origin

    @property
    def seconds(self) -> float:
        """Time spent measuring."""
        return self.observer.budget.seconds

    @property
    def validity(self) -> Validity | None:
        """Where the theory holds for this run, or why it does not apply; None before the first step."""
        return self.observer.validity

    def overhead(self) -> str:
        """What measuring has cost, and what was left out, in a sentence."""
        return self.observer.overhead()

    # ---- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the model can be measured on the probe; errors here stop before training."""
        if stage == "fit" and self._first is None and not is_overridden("configure_model", pl_module):
            self._check(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same check for models built in ``configure_model``."""
        if self._first is None and is_overridden("configure_model", pl_module):
            self._check(pl_module)

    def _check(self, pl_module: LightningModule) -> None:
        self.observer.subject.model = self._network(pl_module)
        self.observer.check()

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
        if self._first is not None:  # the data set is there by now
            loader = trainer.train_dataloader
            dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
            if dataset is None or collate is None:
                raise ValueError(
                    f"probe: 'first_batch:{self._first}' needs one training DataLoader, not {type(loader).__name__}; "
                    "give the inputs as a tensor or a .pt file"
                )
            self.observer.subject.probe = first_samples(dataset, self._first, collate)
            self._check(pl_module)
        if self._takes_part(trainer):
            self.observer.subject.place = (trainer.global_rank, trainer.world_size)
            self.observer.subject.model = self._network(pl_module)
            self.observer.subject.optimizers = list(trainer.optimizers)
            if trainer.is_global_zero:
                self.observer.sinks = logger_sinks(trainer, self._file(trainer) if self.jsonl else None)
                directory = log_directory(trainer)
                stem = Path(self._file(trainer)).stem
                self.observer.theta_file = None if directory is None else directory / f"{stem}-theta_0.pt"
            waiting = trainer.is_global_zero and trainer.world_size > 1 and dist.is_initialized()
            self._timeout = Ranks().timeout if waiting else None
            with self._waited_for():
                self.observer.begin(
                    trainer.global_step, outside_the_theory(trainer, pl_module), _planned_steps(trainer)
                )

    def _takes_part(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero or self.observer.subject.shared

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

    def _file(self, trainer: Trainer) -> str:
        """The name of its JSONL file: two monitors do not write to one."""
        others = [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]  # type: ignore[attr-defined]
        place = sorted(others, key=lambda each: -len(each.observer.parts)).index(self)
        return "eft.jsonl" if place == 0 else f"eft-{place + 1}.jsonl"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the batch to the parts."""
        if trainer.is_global_zero:
            self.observer.observe_batch(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Show the loss to the parts."""
        if trainer.is_global_zero:
            self.observer.observe_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Show the gradient, and the learning rates in force, to the parts."""
        if trainer.is_global_zero:
            self.observer.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if an optimizer step was made and the schedule says so."""
        if self._takes_part(trainer):
            with self._waited_for():
                self.observer.measure(trainer.global_step, epoch=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if the schedule is by epochs, and the final weights before anything averages or restores others."""
        if self._takes_part(trainer):
            by_epoch = self.observer.every == "epoch"
            ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
            with self._waited_for():
                self.observer.measure(trainer.global_step, due_now=by_epoch, last=ends, epoch=trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights if that was not done, draw, and say what it cost."""
        if self._takes_part(trainer):
            self.observer.finish(trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring everything to disk."""
        if trainer.is_global_zero:
            self.observer.flush()

    # ---- state

    @property
    def state_key(self) -> str:
        """Monitors of one class are told apart by ``name``."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """History, theta_0's measurements and where they were taken: plain types and tensors."""
        return self.observer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's theta_0 and history."""
        self.observer.load_state_dict(state_dict)


def _planned_steps(trainer: Trainer) -> int | None:
    """Optimizer steps in all, as far as the Trainer's arguments say; with one optimizer."""
    planned = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs and trainer.max_epochs > 0 and isinstance(trainer.num_training_batches, int):
        planned.append(trainer.max_epochs * -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
    return min(planned) if planned and len(trainer.optimizers) == 1 else None
