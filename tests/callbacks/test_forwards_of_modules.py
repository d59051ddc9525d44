"""Forwards that use what a LightningModule has from its trainer: numbers as they are, logs and the rest left alone."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_eft.callbacks import EFTMonitor

X, Y = (torch.randn(8, size, generator=torch.Generator().manual_seed(size)) for size in (4, 2))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2)

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Annealed(Module):
    def forward(self, x):
        self.log("seen", x.sum())
        return self.net(x) * (1.0 + self.current_epoch + 0.1 * self.global_step)


class Reaching(Module):
    def forward(self, x):
        return self.net(x) * len(self.trainer.callbacks)


def fit(module):
    monitor = EFTMonitor(X[:3], preset="light", budget=None)
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(max_epochs=3, callbacks=[monitor], accelerator="cpu", **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=4))
    return trainer, monitor, [str(each.message) for each in told]


def test_the_epoch_and_the_step_are_those_of_the_training():
    """H of a linear layer with bias is (1 + |x|^2) times the square of the factor, whatever its weights are."""
    trainer, monitor, told = fit(Annealed())
    size = float((1 + X[:3].square().sum(1)).mean())
    for step, scalars in monitor.history.items():
        epoch = max(0, (step - 1) // 2)
        expected = size * (1.0 + epoch + 0.1 * step) ** 2
        assert scalars["eft/ntk_trace/measured"] == pytest.approx(expected, rel=1e-5), step
    assert len(monitor.history) >= 4 and not monitor.skipped
    assert not any("self.log" in text for text in told), told
    assert trainer.callback_metrics["seen"] == pytest.approx(float(X[4:].sum()), rel=1e-5)  # the last batch's alone


def test_what_reaches_into_the_training_is_refused_in_words():
    with pytest.raises(ValueError, match=r"its forward uses trainer.callbacks, .* let it take numbers alone"):
        fit(Reaching())
