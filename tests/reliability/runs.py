"""Trainings of every kind, small, and all that they leave behind in one hash."""

import hashlib
import random
import warnings

import lightning.pytorch as pl
import numpy
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.callbacks.trainings import Training, adamw, dataset, digest, normed_net, plain_sgd, sgd, simple_mlp


class Watched(Training):
    """Remembers the batches in the order in which they came."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].detach().double().sum().item())
        return super().training_step(batch, batch_idx)


class Manual(Watched):
    """Two optimizers, stepped by hand."""

    automatic_optimization = False

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [sgd(self.net[0].parameters()), adamw(self.net[4:].parameters())]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss


class SharpnessAware(Manual):
    """Two passes a step, by an optimizer that Lightning does not see step."""

    def configure_optimizers(self):
        return sgd(self.net.parameters())

    def training_step(self, batch, batch_idx):
        optimizer, parameters = self.optimizers(use_pl_optimizer=False), list(self.net.parameters())
        optimizer.zero_grad()
        self.manual_backward(Watched.training_step(self, batch, batch_idx))
        with torch.no_grad():
            before = [p.clone() for p in parameters]
            torch._foreach_add_(parameters, [0.05 * p.grad for p in parameters])
        optimizer.zero_grad()
        self.manual_backward(Training.training_step(self, batch, batch_idx))
        for p, value in zip(parameters, before, strict=True):
            p.data = value
        optimizer.step()


class Changing(Watched):
    """Clips in the module, changes gradients after the backward, projects weights after the batch."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    def on_after_backward(self):
        for p in self.parameters():
            p.grad.add_(1e-3 * torch.randn_like(p))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.5, 0.5)


class Scheduled(Watched):
    """Another learning rate at every step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Checkpointed(nn.Module):
    """Activations of the body are recomputed in the backward."""

    def __init__(self):
        super().__init__()
        self.body, self.head = normed_net()[:6], nn.Linear(8, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.training else self.body(x))


class Caching(nn.Module):
    """Keeps an activation, counts its calls, draws random numbers of three kinds while it is trained."""

    def __init__(self):
        super().__init__()
        self.net, self.last = normed_net(), None
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        if self.training:
            x = x + 1e-3 * (random.random() + numpy.random.rand())
        self.last = self.net(x)
        return self.last


def train(
    callbacks=(),
    kind=Watched,
    net=normed_net,
    optimizer=sgd,
    batch_size=8,
    epochs=3,
    workers=0,
    freeze_norm=False,
    compiled=None,
    validate=False,
    extra=lambda: [],
    logger=False,
    ckpt_path=None,
    **trainer_options,
):
    """Train from one seed; returns the trainer and the module."""
    pl.seed_everything(0, verbose=False)
    module = kind(net(), optimizer, freeze_norm=freeze_norm)
    if compiled:
        module.compile(backend=compiled)
    loader = DataLoader(dataset(), batch_size=batch_size, shuffle=True, num_workers=workers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", module=r"torch\.")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = pl.Trainer(
            **{
                "max_epochs": epochs,
                "callbacks": [*callbacks, *extra()],
                "logger": logger,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "accelerator": "cpu",
                "log_every_n_steps": 1,
            }
            | trainer_options
        )
        validation = DataLoader(dataset(), batch_size=8) if validate else None
        trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    return trainer, module


def left_behind(trainer, module):
    """SHA-256 of weights, buffers, optimizer and random states (torch, NumPy, Python) and of the order of the data."""
    total = hashlib.sha256(digest(trainer, module).encode())
    total.update(repr(module.seen).encode())
    total.update(repr(random.getstate()).encode())
    kind, keys, *rest = numpy.random.get_state()
    total.update(repr((kind, rest)).encode() + keys.tobytes())
    total.update(repr([m.training for m in module.modules()]).encode())
    total.update(repr([p.grad is None for p in module.parameters()]).encode())
    return total.hexdigest()


def averaging():
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return [EMAWeightAveraging(decay=0.9)]


CONFIGURATIONS = {
    "batch norm, dropout, momentum": {},
    "AdamW": {"optimizer": adamw},
    "plain gradient descent, full batch": {"net": simple_mlp, "optimizer": plain_sgd, "batch_size": 24},
    "accumulation over 3 batches": {"accumulate_grad_batches": 3, "batch_size": 4},
    "gradient checkpointing": {"net": Checkpointed},
    "bfloat16 mixed": {"precision": "bf16-mixed"},
    "bfloat16 throughout": {"precision": "bf16-true"},
    "64-bit": {"precision": "64-true"},
    "frozen batch norm": {"freeze_norm": True},
    "exponential average of the weights, validated": {"extra": averaging, "validate": True},
    "LightningModule.compile(), eager": {"compiled": "eager"},
    "LightningModule.compile(), inductor": {"compiled": "inductor", "epochs": 1},
    "shuffled by 2 workers": {"workers": 2},
    "two optimizers, by hand": {"kind": Manual},
    "sharpness-aware, by hand": {"kind": SharpnessAware},
    "gradients and weights changed by the module, full batch": {
        "kind": Changing,
        "net": simple_mlp,
        "optimizer": plain_sgd,
        "batch_size": 24,
    },
    "detect_anomaly": {"detect_anomaly": True},
    "a schedule by steps": {"kind": Scheduled},
    "clipping and validation": {"gradient_clip_val": 0.1, "validate": True},
    "a forward that caches, counts and draws": {"net": Caching},
}
