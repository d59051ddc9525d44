"""Steps taken again by Taylor models: errors of order 1, 2 and 3, and the band: python -m tests.benchmarks.replay

scikit-learn's digits, batches of 64, cross-entropy: a CNN with GroupNorm and GELU by AdamW and by SGD with momentum, a
GELU MLP by Adam, at three widths and over 2, 5 and 10 steps. One line for each interval: the relative errors of the
predicted change of the outputs by order, half the width of the band over the change, and the cost in training steps.
"""

import argparse
import statistics
import time

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


def mlp(width):
    hidden = 8 * width
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 10)
    )


TRAININGS = {
    "CNN, AdamW": (cnn, lambda p: torch.optim.AdamW(p, lr=1e-3), 110),
    "CNN, SGD momentum": (cnn, lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), 60),
    "GELU MLP, Adam": (mlp, lambda p: torch.optim.Adam(p, lr=1e-3), 60),
}


def intervals(make, optimizer, steps, length, width=16, seed=0, every=12):
    """``[(step, errors by order or None, band or None)]``, and the cost of a replay in training steps."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = make(width)
    optimizer = optimizer(model.parameters())
    replay = ReplayInstrument(steps=length)
    observer = Observer(
        model, x[:PROBE], optimizer, every=every, budget=None, instruments=[NTKInstrument("trace"), replay]
    )
    observer.begin(obstacle=Obstacle("mini-batches", minibatches=True), total_steps=steps)
    own = []
    for step in range(1, steps + 1):
        samples = torch.randint(PROBE, len(x), (BATCH,))
        begun = time.perf_counter()
        loss = F.cross_entropy(model(x[samples]), y[samples])
        optimizer.zero_grad()
        loss.backward()
        own.append(time.perf_counter() - begun)
        observer.observe_batch((x[samples], y[samples]))
        observer.observe_loss(loss.detach())
        observer.before_step()
        optimizer.step()
        observer.measure(step)
    observer.finish()
    found = []
    for step, scalars in observer.history.items():
        if (moved := scalars.get(tag("replay_output"))) is None:
            continue
        errors = [scalars.get(tag("replay_output_error", f"order_{order}")) for order in (1, 2, 3)]
        band = None
        if errors[2] is not None:
            low, high = (scalars[tag("replay_output", f"truncation_{end}")] for end in ("low", "high"))
            band = (high - low) / 2 / moved
        found.append((step, errors, band))
    return found, replay.latest_seconds / statistics.median(own)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="*", default=[16, 32])
    options = parser.parse_args()
    torch.set_num_threads(1)
    drawn, hidden = [], 0
    for seed in range(options.seeds):
        for name, (make, optimizer, steps) in TRAININGS.items():
            for width in options.widths:
                for length in (2, 5, 10):
                    found, cost = intervals(make, optimizer, steps, length, width, seed)
                    for step, errors, band in found:
                        text = "hidden"
                        if band is not None:
                            drawn.append((*errors, band))
                            text = "  ".join(f"{error:.3f}" for error in errors) + f"  band {band:.3f}"
                        hidden += band is None
                        print(f"{name:18} x{width // 16}  T {length:2}  step {step:3}  {text}", flush=True)
                    print(f"{name:18} x{width // 16}  T {length:2}  costs {cost:.0f} training steps")
    inside = sum(three <= band for _, _, three, band in drawn)
    print(
        f"{len(drawn)} drawn, {hidden} hidden; error of order 3 below its band in {inside}, at most "
        f"{max(three for _, _, three, _ in drawn):.3f}; medians by order "
        f"{', '.join(f'{statistics.median(row[k] for row in drawn):.3f}' for k in range(3))}"
    )


if __name__ == "__main__":
    main()
