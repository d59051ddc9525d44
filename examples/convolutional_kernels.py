"""A residual CNN before training: how much its seeds will differ and which layer makes them differ; exact kernels.

The network's graph is read, and what infinite width and order 1/n say of it is printed beside networks drawn anew:
the spread of the NTK from seed to seed, and the part of it that the channels of every layer make, which no ensemble
tells. Then regression on digits with the kernels of an infinitely wide CNN: its NTK, as gradient descent ends, and its
NNGP, as Bayes has it.

Run: python examples/convolutional_kernels.py [--channels 32] [--networks 40] [--digits 100]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import torch_eft as eft


class Block(nn.Module):
    """x + conv(gelu(norm(conv(gelu(norm(x))))))."""

    def __init__(self, n):
        super().__init__()
        self.layers = nn.Sequential(
            *[layer for _ in range(2) for layer in (nn.GroupNorm(1, n), nn.GELU(), nn.Conv2d(n, n, 3, padding=1))]
        )

    def forward(self, x):
        return x + self.layers(x)


def residual(n):
    """Two stages of 4 x 4 and 2 x 2 positions, as PyTorch initializes it."""
    first, second = nn.Conv2d(1, n, 3, stride=2, padding=1), nn.Conv2d(n, 2 * n, 3, stride=2, padding=1)
    last = nn.GroupNorm(1, 2 * n), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * n, 10)
    return nn.Sequential(first, Block(n), second, Block(2 * n), *last)


def plain(n):
    """A CNN with ReLU."""
    convolutions = nn.Conv2d(1, n, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(n, n, 3, padding=1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * n, 10))


def digits(count):
    """Images (N, 1, 8, 8) of mean 0 and variance 1, and classes."""
    data = load_digits()
    x = torch.from_numpy(data.images[:count]).float()[:, None]
    return (x - x.mean()) / x.std(), torch.from_numpy(data.target[:count])


def predicted_spread(x, channels):
    """What is derived of the network: its spread over seeds, and shares."""
    model = residual(channels)
    return eft.theory.architecture_statistics(eft.theory.read_architecture(model, x), x)


def measured_spread(x, channels, networks):
    """Relative standard deviation of H_11 of the first output over networks drawn anew, and its standard error."""
    found = []
    for seed in range(networks):
        torch.manual_seed(seed)
        found.append(eft.measure.ntk(residual(channels), x)[0, 0, 0, 0])
    H = torch.stack(found).double()
    squares = (H / H.mean() - 1).square()
    sd = float(squares.mean().sqrt())
    return float(H.mean()), sd, float(squares.std()) / networks**0.5 / (2 * sd)


def regression(count, tests=50):
    """Share of test digits told right by the kernels of an infinitely wide CNN, by kernel."""
    x, classes = digits(count + tests)
    y = torch.nn.functional.one_hot(classes, 10).double() - 0.1
    network = eft.theory.read_architecture(plain(64), x)
    right = {}
    for kernel in ("ntk", "nngp"):
        found = eft.theory.predict_kernel_regression(
            network, x[:count], y[:count], x[count:], kernel=kernel, ridge=1e-3
        )
        right[kernel] = float((found.mean.argmax(1) == classes[count:]).float().mean())
    return right


def main(channels=32, networks=40, count=100):
    """Print all, and return it."""
    x, _ = digits(1)
    theory = predicted_spread(x, channels)
    mean, sd, error = measured_spread(x, channels, networks)
    print(f"NTK of one output       predicted {float(theory.Theta):.1f}, {networks} seeds {mean:.1f}")
    print(
        f"its spread over seeds   predicted {100 * float(theory.ntk_relative_sd):.1f} %, seeds {100 * sd:.1f} %", end=""
    )
    print(f" +- {100 * error:.1f} %")
    for name, share in theory.shares.items():
        print(f"    {100 * share:5.1f} % of its variance by the channels of {name}")
    right = regression(count)
    for kernel, share in right.items():
        print(
            f"{kernel.upper()} of an infinitely wide CNN, {count} digits: {100 * share:.0f} % of 50 others told right"
        )
    return theory, (mean, sd, error), right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--digits", type=int, default=100)
    options = parser.parse_args()
    main(options.channels, options.networks, options.digits)
