"""Small networks of several kinds, for tests."""

import torch
from torch import nn


def mlp(widths=(5, 12, 9, 3), activation=nn.Tanh):
    layers = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


class ConvNet(nn.Module):
    """Convolution, BatchNorm, dropout; functional activation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x)))
        return self.head(self.dropout(x).flatten(1))


class Recurrent(nn.Module):
    """A GRU, which has no batching rule under vmap."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class TwoInputs(nn.Module):
    """Positional and keyword arguments."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, a, b):
        return {"logits": self.left(a) * torch.tanh(self.right(b))}
