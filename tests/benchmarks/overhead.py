"""What the callback costs, by its own account and by an outside clock: python -m tests.benchmarks.overhead

The training is PyTorch's MNIST example as a stock Lightning script: two convolutions (32, 64), max-pooling, dropout and
two linear layers, cross-entropy, Adam, batches of 64, TensorBoardLogger and checkpoints as they come. As MNIST must be
downloaded, scikit-learn's 1797 digits take its place, magnified from 8 x 8 to 28 x 28 pixels. Rounds with and without
the default monitor alternate, so that a load on the machine falls on both; medians and their spread are printed, of the
wall clock and of the process's CPU time. With --clock cpu the monitor's own account, and its budget, are in CPU time
too: on a machine that others use, that is the comparison with the outside clock that means something (one thread, so
that CPU time is what the wall clock would show on an idle machine). 5 % of a training drown in the noise of such a
machine: --every 10 --budget 0 measures so much, without a limit, that both clocks can be held against each other.

--network mlp takes an MLP 784-256-256-10 in the place of the convolutions. What the defaults promise: of a training of
2000 steps (--epochs 69) at least 12 points a curve within 5 %, besides the start.
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import tempfile
import time
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.machine import keep, line, machine
from torch_eft.callbacks import EFTMonitor
from torch_eft.results.tags import tag


class MNISTExample(L.LightningModule):
    """The network of PyTorch's examples/mnist."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
            *(nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class MLPExample(MNISTExample):
    """The same training of an MLP."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        )


NETWORKS = {"cnn": MNISTExample, "mlp": MLPExample}
CURVES = ("ntk_drift", "dntk", "representation_change")


def images():
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return F.interpolate(x, size=(28, 28), mode="bilinear"), torch.tensor(digits.target)


def train(callbacks, epochs, folder, network="cnn"):
    """Seconds by the wall clock and of CPU time that ``fit`` takes."""
    L.seed_everything(0, verbose=False)
    x, y = images()
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, default_root_dir=folder, enable_model_summary=False)
    model = NETWORKS[network]()
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):  # the progress bar
        trainer.fit(model, loader)
    return time.perf_counter() - wall, time.process_time() - cpu


def main(rounds, epochs, preset, samples, clock, every, budget, network):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    probe = images()[0][:samples]
    bare, attached, own, started, made, left, points = [], [], [], [], [], [], []
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        train([], 1, folder, network)  # what is loaded and compiled at first use is not the training's
        for index in range(2 * rounds):
            if index % 4 in (0, 3):  # without, with, with, without ...: a drift of the load cancels
                bare.append(train([], epochs, folder, network))
            else:
                monitor = EFTMonitor(probe, preset=preset, every=every, budget=budget or None)
                if clock == "cpu":
                    monitor.observer.budget.clock = time.process_time
                attached.append(train([monitor], epochs, folder, network))
                own.append(monitor.observer.budget.limited)
                started.append(monitor.observer.budget.start)
                points.append([sum(tag(each) in scalars for scalars in monitor.history.values()) for each in CURVES])
                made.append(len(monitor.history))
                left.append(sum(account.left_out for account in monitor.observer.budget.accounts.values()))
            loads.append(os.getloadavg()[0])
    found = machine(packages=("lightning",))
    print(
        f"{line(found)}, {min(loads):.1f} to {max(loads):.1f} meanwhile; "
        f"{network}: {rounds} rounds of {epochs} epochs of 29 steps, probe of {samples} images, preset {preset}, "
        f"every {every}, "
        f"budget {budget or 'none'}"
    )
    account = statistics.median(own)
    for index, name in enumerate(("wall", "cpu")):
        without, with_ = ([times[index] for times in each] for each in (bare, attached))
        middle, difference = statistics.median(without), statistics.median(with_) - statistics.median(without)
        error = ((_spread(without) ** 2 + _spread(with_) ** 2) / rounds) ** 0.5
        print(
            f"{name:4}: without {middle:.2f} s, with {middle + difference:.2f} s: {100 * difference / middle:+.1f} % "
            f"({difference:.2f} +- {error:.2f} s)"
        )
    alone = statistics.median([times[clock == "cpu"] for times in bare])
    start = statistics.median(started)
    share = 100 * account / alone
    print(f"its own account ({clock} clock): {account:.2f} s, {share:.1f} %, and {start:.2f} s at the start")
    print(f"points a curve: {dict(zip(CURVES, points[0], strict=True))}")
    print(f"measurements: {statistics.median(made):g}, left out: {statistics.median(left):g} (all accounts together)")
    keep("overhead", found, {"without": bare, "with": attached, "account": own, "start": started, "points": points})


def _spread(values):
    return statistics.stdev(values) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--every", default="auto")
    parser.add_argument("--network", choices=NETWORKS, default="cnn")
    parser.add_argument("--budget", type=float, default=0.05, help="0: no limit")
    options = parser.parse_args()
    main(**vars(options))
