"""Bare loops with forecasts of the theory, saved on the way and brought back."""

import io

import pytest
import torch
from torch.nn import functional as F

from tests.live.instruments.loop import data, mlp
from torch_eft.live import Observer
from torch_eft.live.instruments.forecasts.instance import InstanceInstrument
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.tensorboard import tag

HALF, STEPS = 4, 8
SECONDS = 60.0
"""Enough for order 1 of these problems (they take about one) at any load."""


def forecasts():
    return [TheoryInstrument(seconds=SECONDS), InstanceInstrument(seconds=SECONDS)]


class Run:
    """A bare loop with an observer, that can be saved and brought back."""

    def __init__(
        self, lr=0.05, instruments=None, every=1, probe=None, seed=0, momentum=0.0, loss=F.mse_loss, total=STEPS, **more
    ):
        self.net, self.loss, self.total = mlp(24, seed=seed), loss, total
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr, momentum=momentum)
        self.x, self.y, x_probe = data(4, 2)
        self.observer = Observer(
            self.net,
            x_probe if probe is None else probe,
            self.optimizer,
            every=every,
            budget=None,
            instruments=forecasts() if instruments is None else instruments,
            on_error="raise",
            **more,
        )

    def saved(self):
        """As a file that loads without unpickling code."""
        file = io.BytesIO()
        states = [self.net.state_dict(), self.optimizer.state_dict(), self.observer.state_dict()]
        torch.save(states, file)
        return file.getvalue()

    def resume(self, saved, step=HALF, change=None, optimizer=True):
        weights, steps, state = torch.load(io.BytesIO(saved), weights_only=True)
        self.net.load_state_dict(weights)
        if optimizer:
            self.optimizer.load_state_dict(steps)
        if change is not None:
            change(state)
        self.observer.load_state_dict(state)
        self.observer.begin(step, total_steps=self.total)
        return self

    def train(self, first, last):
        if first == 1:
            self.observer.begin(total_steps=self.total)
        for step in range(first, last + 1):
            batch = (self.x, self.y)
            self.observer.observe_batch(batch)
            loss = self.loss(self.net(batch[0]), batch[1])
            self.observer.observe_loss(loss)
            self.optimizer.zero_grad()
            loss.backward()
            self.observer.before_step(self.optimizer)
            self.optimizer.step()
            self.observer.measure(step)
        return self

    @property
    def history(self):
        return self.observer.history

    def instruments(self):
        return {"ensemble": self.observer.instruments[0], "instance": self.observer.instruments[1]}


def same(resumed, whole, steps):
    for step in steps:
        expected = {name: value for name, value in whole.history[step].items() if name != tag("overhead_percent")}
        found = {name: value for name, value in resumed.history[step].items() if name != tag("overhead_percent")}
        assert found.keys() == expected.keys(), step
        for name, value in expected.items():
            # a value near zero is a difference of numbers of order 1
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7), (step, name)
