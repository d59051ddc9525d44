"""Steps taken again by Taylor models: errors of order 1, 2 and 3, and the band: python -m tests.benchmarks.replay

scikit-learn's digits in batches of 64 by cross-entropy: a CNN with GroupNorm by AdamW over 5 epochs, a residual network
with BatchNorm by SGD with momentum and a cosine schedule, a GELU MLP by Adam; a transformer on associative recall by
AdamW; each at three widths. One line for each interval of T steps: the relative errors of the predicted change of the
outputs, and of the NTK, by order; half the width of the band over the change. Costs are in training steps.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from torch_eft.live import Observer, Obstacle
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.live.instruments.trained_beside.replay import ReplayInstrument
from torch_eft.results.tags import tag

PROBE, BATCH = 16, 64


def cnn(width):
    channels = (1, width, 2 * width, 4 * width)
    layers = []
    for index, (n_in, n_out) in enumerate(zip(channels, channels[1:], strict=False)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1, stride=1 + (index == 1)), nn.GroupNorm(4, n_out), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


class Block(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        stride = 1 + (n_in != n_out)
        self.first, self.second = nn.Conv2d(n_in, n_out, 3, stride, 1), nn.Conv2d(n_out, n_out, 3, 1, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)])
        self.skip = nn.Conv2d(n_in, n_out, 1, stride) if stride == 2 else nn.Identity()

    def forward(self, x):
        h = F.silu(self.norms[0](self.first(x)))
        return F.silu(self.skip(x) + self.norms[1](self.second(h)))


def resnet(width):
    n = width // 2
    layers = [nn.Conv2d(1, n, 3, padding=1), nn.BatchNorm2d(n), nn.SiLU(), Block(n, n), Block(n, 2 * n)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * n, 10))


def mlp(width):
    hidden = 16 * width
    layers = [nn.Flatten(), nn.Linear(64, hidden), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 10))


class Transformer(nn.Module):
    """Pre-LN, two layers; the output is that of the last token."""

    def __init__(self, width):
        super().__init__()
        d = 2 * width
        self.embedding, self.positions = nn.Embedding(16, d), nn.Parameter(0.1 * torch.randn(9, d))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(d, 4, 2 * d, **options) for _ in range(2)])
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 16))

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, -1])


def digits():
    """Probe, and a function that draws a batch."""
    loaded = load_digits()
    x, y = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16, torch.tensor(loaded.target)

    def batch():
        samples = torch.randint(PROBE, len(x), (BATCH,))
        return x[samples], y[samples]

    return x[:PROBE], batch


def recall():
    """Four pairs of a key (of 8) and a value (of 8), and a key: the value that goes with it."""

    def batch(count=BATCH):
        keys = torch.stack([torch.randperm(8)[:4] for _ in range(count)])
        values = torch.randint(8, 16, (count, 4))
        asked = torch.randint(4, (count, 1))
        pairs = torch.stack([keys, values], 2).flatten(1)
        return torch.cat([pairs, keys.gather(1, asked)], 1), values.gather(1, asked)[:, 0]

    return batch(PROBE)[0], batch


@dataclass(frozen=True)
class Training:
    """A training: network by width, optimizer, steps, data, and whether the learning rate follows a cosine."""

    make: Callable
    optimizer: Callable
    steps: int
    data: Callable = digits
    cosine: bool = False


TRAININGS = {
    "CNN, AdamW": Training(cnn, lambda p: torch.optim.AdamW(p, lr=1e-3), 110),
    "ResNet, SGD": Training(resnet, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), 220, cosine=True),
    "transformer, AdamW": Training(Transformer, lambda p: torch.optim.AdamW(p, lr=1e-3), 400, recall),
    "GELU MLP, Adam": Training(mlp, lambda p: torch.optim.Adam(p, lr=1e-3), 110),
}


def log_spaced(steps, count=9):
    """Steps from 0 on, further and further apart, with room for 10 between them."""
    visits = {0}
    for index in range(1, count):
        visits.add(max(round(steps ** (index / count)), max(visits) + 11))
    return visits


def intervals(training, length, width=16, seed=0, visits=None):
    """``[(step, errors by order or None, those of the NTK or None, band or None)]``, and the cost in training steps."""
    torch.manual_seed(seed)
    probe, batch = training.data()
    model = training.make(width)
    optimizer = training.optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps) if training.cosine else None
    visits = log_spaced(training.steps) if visits is None else visits
    replay = ReplayInstrument(steps=length)
    instruments = [NTKInstrument("trace"), replay]
    observer = Observer(
        model, probe, optimizer, every=lambda step: step in visits, budget=None, instruments=instruments
    )
    observer.begin(obstacle=Obstacle("mini-batches", minibatches=True), total_steps=training.steps)
    own, costs, before = [], [], math.nan
    for step in range(1, min(training.steps, max(visits) + length) + 1):
        x, y = batch()
        begun = time.perf_counter()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        seconds = time.perf_counter() - begun
        observer.observe_batch((x, y))
        observer.observe_loss(loss.detach())
        observer.before_step()
        begun = time.perf_counter()
        optimizer.step()
        own.append(seconds + time.perf_counter() - begun)
        if schedule is not None:
            schedule.step()
        observer.measure(step)
        if math.isfinite(replay.latest_seconds) and replay.latest_seconds != before:
            before = replay.latest_seconds
            costs.append(before)
    observer.finish()
    found = []
    for step, scalars in observer.history.items():
        if (moved := scalars.get(tag("replay_output"))) is None:
            continue
        errors, of_ntk = (
            [scalars.get(tag(f"{quantity}_error", f"order_{order}")) for order in (1, 2, 3)]
            for quantity in ("replay_output", "replay_ntk")
        )
        band = None
        if errors[2] is not None:
            low, high = (scalars[tag("replay_output", f"truncation_{end}")] for end in ("low", "high"))
            band = (high - low) / 2 / moved
        found.append((step, errors, of_ntk, band))
    return found, statistics.median(costs) / statistics.median(own) if costs else float("nan")


def _line(errors):
    return " ".join("   - " if error is None else f"{error:5.3f}" for error in errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--widths", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--lengths", type=int, nargs="*", default=[5])
    parser.add_argument("--trainings", nargs="*", default=list(TRAININGS))
    parser.add_argument("--visits", type=int, nargs="*", help="steps; default: log-spaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    drawn, hidden = [], 0
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.trainings:
            for width in options.widths:
                for length in options.lengths:
                    visits = None if options.visits is None else set(options.visits)
                    found, cost = intervals(TRAININGS[name], length, width, seed, visits)
                    for step, errors, of_ntk, band in found:
                        text = "hidden"
                        if band is not None:
                            drawn.append((*errors, band))
                            text = f"{_line(errors)}  band {band:5.3f}  NTK {_line(of_ntk)}"
                        hidden += band is None
                        print(f"{name:18} x{width / 16:<3g} T {length:2}  step {step:3}  {text}", flush=True)
                    print(f"{name:18} x{width / 16:<3g} T {length:2}  costs {cost:.0f} training steps", flush=True)
    inside = sum(three <= band for _, _, three, band in drawn)
    print(
        f"{len(drawn)} drawn, {hidden} hidden; error of order 3 below its band in {inside}, at most "
        f"{max(three for _, _, three, _ in drawn):.3f}; medians by order "
        f"{', '.join(f'{statistics.median(row[k] for row in drawn):.3f}' for k in range(3))}"
    )


if __name__ == "__main__":
    main()
