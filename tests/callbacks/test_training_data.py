"""The probe "first_batch:N": what the network is fed, read without a trace."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.callbacks.trainings import Training, dataset, digest, plain_sgd, simple_mlp
from torch_eft.callbacks import EFTMonitor
from torch_eft.callbacks.training_data import full_batch
from torch_eft.live import MeasurementWarning

X = dataset().tensors[0]


class Fed(Training):
    """Shifted before the transfer, scaled after it, noisy in training; it counts its calls."""

    def __init__(self):
        super().__init__(simple_mlp(), plain_sgd)
        self.calls, self.register = [0], None
        self.register_buffer("shift", torch.tensor(0.5))

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.calls[0] += 1
        return batch[0] + self.shift, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert self.trainer.training and self.training
        self.shift.add_(0.01)
        return batch[0] / 50 + 1e-3 * torch.randn(1), batch[1]


class Data(pl.LightningDataModule):
    """The hooks of a data module take the place of the module's."""

    def __init__(self):
        super().__init__()
        self.seen, self.noise = [], torch.Generator().manual_seed(1)

    def train_dataloader(self):
        return DataLoader(dataset(), batch_size=8, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.seen.append(float(torch.rand((), generator=self.noise)))
        return batch[0] * 3, batch[1]


def fit(make, monitor=None, data=None, **options):
    pl.seed_everything(0, verbose=False)
    module = make()
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[] if monitor is None else [monitor],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(module, DataLoader(dataset(), batch_size=8, shuffle=True) if data is None else data)
    return trainer, module


def monitor(**options):
    return EFTMonitor("first_batch:3", preset="light", every=1, budget=None, **options)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_probe_goes_through_the_hooks_of_the_module_and_leaves_no_trace():
    alone, watching = fit(Fed), monitor(on_error="raise")
    watched = fit(Fed, watching)
    noise = torch.randn(1, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(watching.observer.network.probe.inputs, (X[:3] + 0.5) / 50 + 1e-3 * noise)
    assert digest(*watched) == digest(*alone)
    assert watched[1].calls == alone[1].calls == [6]
    assert list(watching.history) == list(range(7))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_hooks_of_a_data_module_come_first():
    alone, data, watching = Data(), Data(), monitor(on_error="raise")
    fit(Fed, None, alone)
    fit(Fed, watching, data)
    assert torch.allclose(watching.observer.network.probe.inputs, (X[:3] + 0.5) * 3)
    assert data.seen == alone.seen and len(data.seen) == 6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_double_precision_is_fed_as_in_training():
    watching = monitor(on_error="raise")
    fit(lambda: Training(simple_mlp(), plain_sgd), watching, precision="64-true")
    assert watching.observer.network.probe.inputs.dtype == torch.float64


class Stream(IterableDataset):
    def __iter__(self):
        yield from dataset()


class Batches:
    """A loader of its own kind."""

    def __len__(self):
        return 3

    def __iter__(self):
        yield from [dataset().tensors] * 3


def by_name(samples):
    x, y = torch.utils.data.default_collate(samples)
    return {"x": x, "y": y}


class ByName(Training):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


@pytest.mark.parametrize(
    ("module", "data", "reason"),
    [
        (Training, lambda: DataLoader(Stream(), batch_size=8), "needs a data set that is read by index, not Stream"),
        (
            ByName,
            lambda: DataLoader(dataset(), batch_size=8, collate_fn=by_name),
            "they are dict here: give the inputs",
        ),
        (Training, Batches, "needs one training DataLoader, not Batches"),
    ],
)
def test_batches_without_inputs_cost_the_measurements_not_the_training(module, data, reason):
    watching = monitor()
    with pytest.warns(MeasurementWarning, match=f"measures nothing of this training.*{reason}"):
        trainer, _ = fit(lambda: module(simple_mlp(), plain_sgd), watching, data())
    assert trainer.global_step == 2 * len(list(data())) and watching.history == {}


class Listed(torch.utils.data.Dataset):
    """May return anything."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return tuple(tensor[index] for tensor in dataset().tensors)


class Scaled(Training):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


@pytest.mark.parametrize(
    ("loader", "module", "options", "expected"),
    [
        (lambda: DataLoader(dataset(), batch_size=24, shuffle=True), Training, {}, True),
        (lambda: DataLoader(dataset(), batch_size=100), Training, {}, True),
        (lambda: DataLoader(torch.utils.data.Subset(dataset(), range(9)), batch_size=9), Training, {}, True),
        (lambda: DataLoader(dataset(), batch_size=8), Training, {}, False),
        (lambda: DataLoader(dataset(), batch_size=16, drop_last=True), Training, {}, False),
        (lambda: DataLoader(dataset(), batch_size=8, shuffle=True), Training, {"limit_train_batches": 1}, False),
        (lambda: DataLoader(dataset(), batch_size=8), Training, {"overfit_batches": 1}, False),
        (lambda: DataLoader(Listed(), batch_size=24), Training, {}, False),  # two batches show it
        (lambda: DataLoader(dataset(), batch_size=24), Scaled, {}, False),
    ],
)
def test_full_batches_are_known_from_tensors_in_one_batch(loader, module, options, expected):
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(full_batch(trainer, pl_module))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1,
            callbacks=[Look()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            accelerator="cpu",
            **options,
        )
        trainer.fit(module(simple_mlp(), plain_sgd), loader())
    assert seen == [expected]
