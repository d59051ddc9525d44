"""How many of the demo's networks are inside the 90 % band of the drift's law, as the monitors themselves log it.

python -m tests.benchmarks.drift_coverage [seeds] [first seed]

The demo's training from 40 initializations (20 s of one core each), every measurement of the three quantities; errors
are standard errors over networks, whose steps are not independent.
"""

import logging
import math
import sys
import warnings
from collections import defaultdict

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from torch_eft.callbacks import EFTMonitor
from torch_eft.cli import demo
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.live.instruments.interval import IntervalInstrument
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.live.instruments.representation import RepresentationInstrument
from torch_eft.tensorboard import tag
from torch_eft.theory import initial_statistics

STEPS = 100


def inside(seed: int) -> dict[str, list[bool]]:
    """For each quantity, whether each measurement lies in the band."""
    x, y, x_probe = demo.load_digits_split()
    ensemble = demo.demo_ensemble(256, 3, "tanh", x.shape[1])
    Theta = initial_statistics(ensemble, x, statistics=("K", "Theta"))[-1].Theta
    pl.seed_everything(seed, verbose=False)
    model = demo.CriticalMLP(ensemble, 0.25 * y.numel() / float(torch.linalg.eigvalsh(Theta)[-1]))
    instruments = [NTKInstrument(), RepresentationInstrument(), IntervalInstrument()]
    monitor = EFTMonitor(
        x_probe,
        every=lambda step: step <= 10 or step % 5 == 0,
        budget=None,
        instruments=[*instruments, TheoryInstrument(ensemble=ensemble, seconds=5.0)],
        on_error="raise",
    )
    trainer = pl.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
        devices=1,
    )
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=len(x)))
    found = defaultdict(list)
    for step, scalars in monitor.history.items():
        for quantity in demo.HEADLINES:
            names = tag(quantity), tag(quantity, "band_90_low"), tag(quantity, "band_90_high")
            if step and all(name in scalars for name in names):
                measured, low, high = (scalars[name] for name in names)
                found[quantity].append(low <= measured <= high)
    return found


def main(seeds: int, first: int) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    shares, steps = defaultdict(list), defaultdict(int)
    for seed in range(first, first + seeds):
        for quantity, values in inside(seed).items():
            shares[quantity].append(sum(values) / len(values))
            steps[quantity] += len(values)
    for quantity, values in shares.items():
        share = torch.tensor(values)
        error = float(share.std()) / math.sqrt(len(share)) if len(share) > 1 else math.nan
        print(
            f"{quantity}: {share.mean():.3f} +- {error:.3f} of {steps[quantity]} measurements of {len(share)} networks"
        )


if __name__ == "__main__":
    given = [int(value) for value in sys.argv[1:]]
    main(*given, *(40, 1000)[len(given) :])
