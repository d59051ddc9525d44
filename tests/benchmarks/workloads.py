"""The five networks whose NTK is timed: float32, random initialization and inputs, fixed seeds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn


def mlp(widths, activation=nn.Tanh):
    layers = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(outputs=10):
    """3x32x32: four 3x3 convolutions 32-32-64-64, the third of stride 2, GELU, mean over 4x4 windows, linear head."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(1024, outputs),
    )


class Block(nn.Module):
    """ResNet's basic block with GroupNorm."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, n_out)
        self.shortcut = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.GroupNorm(8, n_out))

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18's layout for 32x32: a 3x3 stem, no max pool, widths w, 2w, 4w, 8w, two blocks each."""

    def __init__(self, width=16, outputs=10):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(8, width)
        stages, n_in = [], width
        for stage in range(4):
            n_out = width * 2**stage
            stages += [Block(n_in, n_out, 1 if stage == 0 else 2), Block(n_out, n_out, 1)]
            n_in = n_out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(n_in, outputs)

    def forward(self, x):
        x = self.stages(torch.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """A pre-LN encoder over bytes: learned positions, mean over tokens, linear head."""

    def __init__(self, depth=2, width=128, heads=4, tokens=32, outputs=10, vocabulary=256):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        x = self.embedding(x) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def _images(count):
    return torch.randn(count, 3, 32, 32)


@dataclass(frozen=True)
class Workload:
    """A network and its probe.

    Args:
        title: What it is, for the table.
        network: Builds the network.
        inputs: Builds the probe.
        widths: n_0 .. n_L of an MLP, for counting; None for others.
    """

    title: str
    network: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    widths: tuple[int, ...] | None = None

    def build(self):
        """The network, without gradients, in evaluation mode, and its inputs; the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.network().eval(), self.inputs()


def perceptron(count, widths, activation=nn.Tanh):
    title = f"MLP {'-'.join(str(n) for n in _runs(widths))} N={count}"
    return Workload(title, partial(mlp, widths, activation), partial(torch.randn, count, widths[0]), tuple(widths))


def _runs(widths):
    """784, 512, 512, 512, 10 -> 784, 512x3, 10."""
    out = [[widths[0], 1]]
    for n in widths[1:]:
        if n == out[-1][0]:
            out[-1][1] += 1
        else:
            out.append([n, 1])
    return [f"{n}x{times}" if times > 1 else n for n, times in out]


WORKLOADS = {
    "a": perceptron(64, [784, 512, 512, 512, 10]),
    "b": perceptron(128, [64, *[256] * 16, 1]),
    "c": Workload("CNN 32-32-64-64 N=32", cnn, partial(_images, 32)),
    "d": Workload("ResNet-18 layout, w=16, GN, N=16", ResNet18, partial(_images, 16)),
    "e": Workload("transformer L=2 d=128 T=32 N=16", Transformer, partial(torch.randint, 256, (16, 32))),
}
