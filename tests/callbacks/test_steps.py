"""Optimizer steps, whoever takes and counts them."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.callbacks.trainings import PROBE, dataset, simple_mlp
from torch_eft.callbacks import EFTMonitor
from torch_eft.callbacks.averages import which_weights
from torch_eft.results.tags import tag


class ByHand(pl.LightningModule):
    """Manual optimization; subclasses take the step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.net, self.steps = False, simple_mlp(), 0

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05)

    def gradients(self, batch):
        self.zero_grad()
        self.manual_backward(F.mse_loss(self(batch[0]), batch[1]))

    def training_step(self, batch, batch_idx):
        self.gradients(batch)
        self.step(batch_idx)


class Raw(ByHand):
    def step(self, batch_idx):
        self.optimizers(use_pl_optimizer=False).step()
        self.steps += 1


class EverySecond(Raw):
    """Gradients of two batches are added up."""

    def gradients(self, batch):
        self.manual_backward(F.mse_loss(self(batch[0]), batch[1]) / 2)

    def step(self, batch_idx):
        if batch_idx % 2:
            super().step(batch_idx)
            self.zero_grad()


class Data(ByHand):
    """The step of old tutorials, which no version counter sees."""

    def step(self, batch_idx):
        for p in self.net.parameters():
            p.data -= 0.05 * p.grad
        self.steps += 1


class SharpnessAware(ByHand):
    """Up the gradient, and down from where it came by that at the top (SAM); Lightning's wrapper is not asked."""

    def training_step(self, batch, batch_idx):
        self.gradients(batch)
        parameters = list(self.net.parameters())
        with torch.no_grad():
            before = [p.clone() for p in parameters]
            for p in parameters:
                p.add_(0.05 * p.grad)
        self.gradients(batch)
        for p, value in zip(parameters, before, strict=True):
            p.data = value
        self.optimizers(use_pl_optimizer=False).step()
        self.steps += 1


class AfterTheBatch(ByHand):
    def step(self, batch_idx):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.optimizers(use_pl_optimizer=False).step()
        self.steps += 1


def fit(module, *monitors, epochs=2, **options):
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(monitors),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(module, DataLoader(dataset(), batch_size=6))
    return trainer


def monitor(every=1):
    return EFTMonitor(PROBE, preset="light", every=every, budget=None, on_error="raise")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [Raw, EverySecond, Data, SharpnessAware, AfterTheBatch])
def test_steps_that_lightning_does_not_count_are_counted(kind):
    torch.manual_seed(0)
    watching, module = monitor(), kind()
    start = [p.detach().clone() for p in module.net.parameters()]
    trainer = fit(module, watching)
    assert trainer.global_step == 0 and module.steps > 3
    assert list(watching.history) == list(range(module.steps + 1))
    # The last measurement is that of the last weights.
    again = monitor()
    final = [p.detach().clone() for p in module.net.parameters()]
    with torch.no_grad():
        for p, value in zip(module.net.parameters(), start, strict=True):
            p.copy_(value)
        again.observer.begin(model=module.net)
        for p, value in zip(module.net.parameters(), final, strict=True):
            p.copy_(value)
    drift = again.observer.measure(1)[tag("ntk_drift")]
    assert watching.history[module.steps][tag("ntk_drift")] == pytest.approx(drift, rel=1e-5)


class TwoOptimizers(ByHand):
    """The first batch takes one step, every later one two."""

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.net[0], self.net[2:])]

    def step(self, batch_idx):
        first, second = self.optimizers()
        first.step()
        if self.trainer.global_step > 1:
            second.step()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_multiple_that_is_stepped_over_is_due_at_once():
    watching = monitor(every=4)
    trainer = fit(TwoOptimizers(), watching, epochs=4)
    assert trainer.global_step == 31
    assert list(watching.history) == [0, 5, 9, 13, 17, 21, 25, 29, 31]
    assert tag("ntk_drift") in watching.history[31]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_steps_go_on_after_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    first, module = monitor(), Raw()
    fit(module, first).save_checkpoint(tmp_path / "half.ckpt")
    second = monitor()
    trainer = pl.Trainer(
        max_epochs=3, callbacks=[second], logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module, DataLoader(dataset(), batch_size=6), ckpt_path=tmp_path / "half.ckpt")
    assert list(second.history) == list(range(13))
    assert second.history[8] == first.history[8]


def test_where_weights_are_averaged_it_says_which_are_measured():
    from types import SimpleNamespace

    from lightning.pytorch import callbacks

    kinds = {name: getattr(callbacks, name, None) for name in ("StochasticWeightAveraging", "EMAWeightAveraging")}
    for name, kind in kinds.items():
        if kind is not None:
            average = kind(swa_lrs=0.1) if name == "StochasticWeightAveraging" else kind()
            said = which_weights(SimpleNamespace(callbacks=[callbacks.Callback(), average]))
            assert f"not their average, which {name} keeps" in said
    assert which_weights(SimpleNamespace(callbacks=[callbacks.Callback()])) is None
