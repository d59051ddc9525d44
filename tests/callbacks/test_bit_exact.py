"""Training is sacred: with the callbacks attached it ends in the same bits as without.

Weights, buffers, optimizer state and the random state left behind are hashed. The controls do what a
careless measurement would do, in the same places, and must be seen to change the hash.
"""

import lightning.pytorch as pl
import pytest
import torch

from tests.callbacks.trainings import PROBE, digest, plain_sgd, run, simple_mlp
from torch_eft.callbacks import EFTMonitor, NTKMonitor, RepresentationMonitor, TheoryComparison

CONFIGURATIONS = {
    "batch norm, dropout, momentum": {},
    "16-bit mixed": {"precision": "16-mixed"},
    "2 workers": {"workers": 2},
    "full batch, the theory beside it": {"net": simple_mlp, "optimizer": plain_sgd, "batch_size": 24},
}
"""Measured at every step; twenty more in ``tests/reliability/test_isolation_bits.py``."""


def monitors():
    return [
        EFTMonitor(PROBE, budget=None, every=1, forecast_seconds=3.0, on_error="raise"),
        NTKMonitor(PROBE, budget=None, on_error="raise"),
        RepresentationMonitor(PROBE, budget=None, every=2, on_error="raise"),
        TheoryComparison(PROBE, budget=None, every=3, forecast_seconds=0.1, on_error="raise"),
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "theory" in name else ()) for name in CONFIGURATIONS],
)
def test_training_ends_in_the_same_bits(name):
    options = CONFIGURATIONS[name]
    reference, attached = digest(*run(**options)), monitors()
    same = digest(*run(attached, **options)) == reference
    assert same, f"reproducible without the monitors: {digest(*run(**options)) == reference}"
    assert all(len(monitor.history) > 1 and not monitor.skipped for monitor in attached)


class _Careless(pl.Callback):
    def __init__(self, action):
        self.action = action

    def on_train_batch_end(self, trainer, pl_module, *unused):
        self.action(trainer, pl_module)


def _train_mode_forward(trainer, module):
    with torch.no_grad():
        module(PROBE)


def _eval_then_train(trainer, module):
    module.eval()
    with torch.no_grad():
        module(PROBE)
    module.train()


def _backward(trainer, module):
    module.eval()
    module(PROBE).sum().backward()
    for child in module.net:
        child.train()


def _iterate_loader(trainer, module):
    next(iter(trainer.train_dataloader))


def _draw(trainer, module):
    torch.randn(3)


def _in_place(trainer, module):
    with torch.no_grad():
        next(module.parameters()).add_(1e-8).add_(1e-8)


CONTROLS = {
    "forward in training mode": (_train_mode_forward, {}),
    "eval() then train() thaws a frozen batch norm": (_eval_then_train, {"freeze_norm": True}),
    "backward() while gradients accumulate": (_backward, {"accumulate_grad_batches": 3, "batch_size": 4}),
    "iterating the loader": (_iterate_loader, {}),
    "drawing a random number": (_draw, {}),
    "touching a parameter": (_in_place, {}),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_careless_measurements_are_seen_by_the_same_hash(name):
    action, options = CONTROLS[name]
    assert digest(*run([_Careless(action)], **options)) != digest(*run(**options))
