"""Cost of a training step of the shadow in ordinary steps. Run by hand: python -m tests.benchmarks.shadow

SGD with momentum on cross-entropy, float32, one thread, processor time; each round times every contender in turn; a
ratio is to that round's ordinary step, and medians over rounds are printed.
"""

import os
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from torch_eft.measure.taylor.model import TaylorModel
from torch_eft.measure.taylor.perturbative import PerturbativeTaylorModel


def mlp(width, activation):
    return nn.Sequential(
        nn.Linear(64, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 10)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


WORKLOADS = {
    "MLP 64-256-256-10 tanh": (lambda: mlp(256, nn.Tanh), (64,)),
    "MLP 64-256-256-10 GELU": (lambda: mlp(256, nn.GELU), (64,)),
    "MLP 64-1024-1024-10 tanh": (lambda: mlp(1024, nn.Tanh), (64,)),
    "MLP 64-1024-1024-10 GELU": (lambda: mlp(1024, nn.GELU), (64,)),
    "CNN 16-32-32, 1x28x28 tanh": (cnn, (1, 28, 28)),
}


def contenders(build, x, y):
    """Name -> one training step."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def ordinary():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    found = {"ordinary": ordinary}
    shadows = {
        "k = 1": TaylorModel(model, taylor_order=1),
        "k = 3": TaylorModel(model),
        "perturbative": PerturbativeTaylorModel(model),
    }
    for name, shadow in shadows.items():
        own = shadow.optimizer_like(optimizer)
        found[name] = lambda shadow=shadow, own=own: shadow.step(x, lambda z: F.cross_entropy(z, y), own)
    return found


def ratios(build, shape, batch, rounds):
    """Name -> median ratio to an ordinary step, and the latter's median milliseconds."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, *shape, generator=generator), torch.randint(10, (batch,), generator=generator)
    steps = contenders(build, x, y)
    repeats = 3
    times = {name: [] for name in steps}
    for turn in range(rounds + 2):
        order = list(steps)[turn % len(steps) :] + list(steps)[: turn % len(steps)]
        for name in order:
            begun = time.process_time()
            for _ in range(repeats):
                steps[name]()
            if turn >= 2:  # the first two warm up
                times[name].append((time.process_time() - begun) / repeats)
    base = times.pop("ordinary")
    found = {name: statistics.median(a / b for a, b in zip(own, base, strict=True)) for name, own in times.items()}
    return found, 1e3 * statistics.median(base)


def main(rounds=21):
    torch.set_num_threads(1)
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, one thread, {rounds} rounds, medians; {load}")
    for title, (build, shape) in WORKLOADS.items():
        for batch in (64, 256):
            found, milliseconds = ratios(build, shape, batch, rounds)
            text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items())
            print(f"{title}, batch {batch}: ordinary step {milliseconds:.2f} ms; x {text}", flush=True)


if __name__ == "__main__":
    main()
