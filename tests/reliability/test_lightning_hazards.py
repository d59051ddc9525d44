"""What Lightning does behind a callback's back: logging in ``forward``, steps of several optimizers, reserved names."""

import inspect

import pytest
from lightning.pytorch import Callback

import torch_eft.callbacks
from tests.callbacks.trainings import PROBE
from tests.reliability.runs import Manual, Watched, left_behind, train
from torch_eft.callbacks import EFTMonitor, NTKMonitor


class Logging(Watched):
    """Logs from its forward, which is also what is measured."""

    def forward(self, x):
        z = super().forward(x)
        self.log("output", z.mean())
        return z


def test_a_forward_that_logs_is_measured_and_logs_what_it_would():
    """The copy that is measured has no trainer, so that its ``self.log`` does nothing."""
    reference, module = train(kind=Logging)
    monitor = EFTMonitor(PROBE, preset="standard", budget=None, every=2, on_error="raise")
    trainer, measured = train([monitor], kind=Logging)
    assert left_behind(trainer, measured) == left_behind(reference, module)
    assert len(monitor.history) > 1 and not monitor.skipped
    assert trainer.callback_metrics["output"] == reference.callback_metrics["output"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_with_two_optimizers_each_batch_is_measured_once():
    """Lightning's step, by which points are keyed, counts every optimizer's."""
    monitor = NTKMonitor(PROBE, budget=None, every=2, on_error="raise")
    trainer, _ = train([monitor], kind=Manual)
    assert trainer.global_step == 18
    assert list(monitor.history) == list(range(0, 19, 2))


@pytest.mark.parametrize("name", ["log", "log_dict"])
def test_callbacks_leave_alone_what_the_trainer_overwrites(name):
    callbacks = [
        kind for _, kind in inspect.getmembers(torch_eft.callbacks, inspect.isclass) if issubclass(kind, Callback)
    ]
    assert NTKMonitor in callbacks
    for kind in callbacks:
        assert not hasattr(kind, name)
    assert name not in vars(NTKMonitor(PROBE))
