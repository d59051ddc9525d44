"""A bare training loop with an observer beside it."""

import torch
from torch import nn
from torch.nn import functional as F

from torch_eft.live.observer import Observer
from torch_eft.live.record.sinks import Sink


class Pages(Sink):
    """Keeps what instruments write: ``{name: [(step, text)]}``."""

    def __init__(self):
        self.pages = {}

    def text(self, name, markdown, step):
        self.pages.setdefault(name.removeprefix("eft/"), []).append((step, markdown))


def mlp(width=48, outputs=2, seed=0, activation=nn.Tanh):
    """Critical, wide enough for order 1."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, outputs)
    )
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    return model


def data(points=5, probes=3, outputs=2):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(points + probes, 3, generator=generator)
    return x[:points], torch.randn(points, outputs, generator=generator), x[points:]


def fit(
    model,
    instruments,
    steps,
    optimizer,
    x,
    y,
    x_probe,
    loss_function=F.mse_loss,
    batch=None,
    obstacle=None,
    total_steps=None,
    every=1,
    on_step=None,
    on_error="raise",
    shown=True,
):
    """Train; returns the observer and the pages.

    ``batch``: samples a step, drawn anew every time; ``shown``: whether batches, losses and gradients are.
    """
    pages = Pages()
    observer = None
    if instruments is not None:
        observer = Observer(
            model,
            x_probe,
            optimizer,
            every=every,
            budget=None,
            instruments=instruments,
            sinks=[pages],
            on_error=on_error,
        )
        observer.begin(obstacle=obstacle, total_steps=total_steps or steps)
    for step in range(1, steps + 1):
        samples = torch.arange(len(x)) if batch is None else torch.randperm(len(x))[:batch]
        pair = (x[samples], y[samples])
        if observer is not None and shown:
            observer.observe_batch(pair)
        loss = loss_function(model(pair[0]), pair[1])
        if observer is not None and shown:
            observer.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        if observer is not None and shown:
            observer.before_step()
        optimizer.step()
        if on_step is not None:
            on_step(step)
        if observer is not None:
            observer.measure(step)
    if observer is not None:
        observer.finish()
    return observer, pages.pages
