"""What a loop shows between measurements, batches, losses and steps, and who looks at it."""

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torch_eft.live.instrument import Instrument
from torch_eft.live.run.run import Run


class Hooks:
    """Shows instruments, and the calibration of BatchNorm, what they look at; on rank 0.

    Args:
        run: The training.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._listening: dict[str, list[Instrument]] = {}

    def _listeners(self, hook: str) -> list[Instrument]:
        """The instruments that do something at a hook: most do nothing at most of them, and there are many steps."""
        run, able = self._run, self._listening.get(hook)
        if able is None:
            default = getattr(Instrument, hook)
            able = [each for each in run.instruments if getattr(type(each), hook) is not default]
            self._listening[hook] = able
        listening = [each for each in able if each.listens()]
        if not listening or not run.begun or run.given.unsharded_model is not None or not run.ranks.leads:
            return []
        return listening if run.reference.snapshot is not None and run.measurements.begun else []

    def _calibrates(self) -> bool:
        return self._run.reference.calibration.wanted and self._run.begun and self._run.ranks.leads

    def batch(self, batch: Any) -> None:
        """A training batch arrived; its forward comes."""
        run = self._run
        if self._calibrates() and run.network is not None:
            with run.recorder.guard():
                run.reference.calibration.see(batch, run.network.probe, run.network.network)
        for instrument in self._listeners("observe_batch"):
            with run.recorder.guard():
                instrument.observe_batch(batch)

    def loss(self, loss: Tensor) -> None:
        """The batch's loss was computed; its backward comes."""
        for instrument in self._listeners("observe_loss"):
            with self._run.recorder.guard():
                instrument.observe_loss(loss.detach())

    def before_step(self, optimizer: Optimizer | None) -> None:
        """Gradients are there, a step comes; ``optimizer`` takes it, None: the only one."""
        run = self._run
        if self._calibrates() and run.network is not None:
            with run.recorder.guard():
                run.reference.calibration.note(run.network.network)
        listeners = self._listeners("before_step")
        if optimizer is None and listeners and run.network is not None:
            optimizer = next(iter(run.network.optimizers), None)
        if optimizer is None or not listeners:
            return
        undecided = [instrument for instrument in listeners if instrument.undecided()]
        with run.budget.forecasting() if undecided else nullcontext():
            for instrument in listeners:
                with run.recorder.guard():
                    run.recorder.take(instrument.before_step(run.progress.step, optimizer))
        if undecided or run.progress.at_start:
            with run.recorder.guard():
                run.summarize()

    def after_step(self, step: int) -> None:
        """Steps were taken, ``step`` in all."""
        run = self._run
        run.progress.step = step
        for instrument in self._listeners("after_step"):
            assert run.network is not None
            with run.recorder.guard():
                run.recorder.take(instrument.after_step(step, run.network.network))
