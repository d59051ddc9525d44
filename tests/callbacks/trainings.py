"""Ordinary trainings, small enough to run twice and compare bit by bit."""

import hashlib
import logging
import warnings

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.oracles.models import mlp

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Training(pl.LightningModule):
    """A network, a loss, an optimizer."""

    def __init__(self, net, optimizer, loss=F.mse_loss, freeze_norm=False):
        super().__init__()
        self.net, self.loss, self.make_optimizer = net, loss, optimizer
        if freeze_norm:
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.eval().requires_grad_(False)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


def normed_net():
    return nn.Sequential(
        nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def dataset(count=24):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 5, generator=generator), torch.randn(count, 3, generator=generator))


PROBE = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))


def run(
    callbacks=(),
    net=normed_net,
    optimizer=sgd,
    loss=F.mse_loss,
    batch_size=8,
    epochs=3,
    workers=0,
    freeze_norm=False,
    logger=False,
    validate=False,
    shuffle=True,
    **trainer_options,
):
    """Train from one seed; returns the trainer and the module."""
    pl.seed_everything(0, verbose=False)
    module = Training(net(), optimizer, loss, freeze_norm)
    loader = DataLoader(dataset(), batch_size=batch_size, shuffle=shuffle, num_workers=workers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=trainer_options.pop("enable_checkpointing", False),
            accelerator="cpu",
            log_every_n_steps=1,
            **trainer_options,
        )
        trainer.fit(module, loader, DataLoader(dataset(), batch_size=8) if validate else None)
    return trainer, module


def digest(trainer, module):
    """SHA-256 of weights, buffers, optimizer state and the random state that is left behind."""
    total = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            total.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                total.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            total.update(repr(value).encode())

    add(module.state_dict())
    add([optimizer.state_dict() for optimizer in trainer.optimizers])
    add(torch.get_rng_state())
    return total.hexdigest()


def simple_mlp():
    return mlp((5, 16, 16, 3))
