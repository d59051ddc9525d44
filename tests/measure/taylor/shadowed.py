"""Networks, optimizers and trainings that shadows are compared on."""

import torch
from torch import nn
from torch.nn import functional as F

DTYPE = torch.float64

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5),
}


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build().double()


def deep_linear(depth=3):
    return nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(depth)])


def batches(count, features=4, size=6, outputs=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, features, generator=generator, dtype=DTYPE)
    return list(zip(x, torch.randn(count, size, outputs, generator=generator, dtype=DTYPE), strict=True))


def train(model, optimizer, data, loss=F.mse_loss):
    """The ordinary loop, which serves a network and its shadow alike."""
    for x, y in data:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


def tied_linear():
    model = deep_linear()
    model[2].weight = model[0].weight
    return model


class Polynomial(nn.Module):
    """A polynomial of degree three in its parameters, with a bias and a product of layers."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 5), nn.Linear(4, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(self.first(x) * self.gate(x))
