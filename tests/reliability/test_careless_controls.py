"""What a careless callback would do must be seen by the same hash, or the hash would see nothing."""

import random

import lightning.pytorch as pl
import pytest
import torch

from tests.callbacks.trainings import PROBE
from tests.reliability.runs import CONFIGURATIONS, left_behind, train


class Careless(pl.Callback):
    def __init__(self, action):
        self.action = action

    def on_train_batch_end(self, trainer, pl_module, *unused):
        self.action(trainer, pl_module)


def forward_in_training_mode(trainer, module):
    with torch.no_grad():
        module(PROBE)


def eval_then_train(trainer, module):
    module.eval()
    with torch.no_grad():
        module(PROBE)
    module.train()


def backward(trainer, module):
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    module(PROBE).sum().backward()
    for part, flag in flags:
        part.training = flag


def iterate_the_loader(trainer, module):
    next(iter(trainer.train_dataloader))


def draw(trainer, module):
    torch.randn(3)


def draw_in_python(trainer, module):
    random.random()


def touch_a_parameter(trainer, module):
    with torch.no_grad():
        next(module.parameters()).mul_(1 + 1e-6)


CONTROLS = {
    "forward in training mode": (forward_in_training_mode, "batch norm, dropout, momentum"),
    "eval() then train() thaws a frozen batch norm": (eval_then_train, "frozen batch norm"),
    "backward() while gradients accumulate": (backward, "accumulation over 3 batches"),
    "iterating the loader": (iterate_the_loader, "batch norm, dropout, momentum"),
    "drawing a random number": (draw, "batch norm, dropout, momentum"),
    "drawing from Python's own": (draw_in_python, "a forward that caches, counts and draws"),
    "touching a parameter": (touch_a_parameter, "batch norm, dropout, momentum"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_it_is_seen(name):
    action, configuration = CONTROLS[name]
    options = CONFIGURATIONS[configuration]
    assert left_behind(*train([Careless(action)], **options)) != left_behind(*train(**options))
