"""What the callback costs, by its own account and by an outside clock. Run by hand: python -m tests.benchmarks.overhead

Trains examples/attach_to_your_training.py's network with and without the callback, in turn, and prints medians.
"""

import logging
import statistics
import time
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from examples.attach_to_your_training import Classifier
from torch_eft.callbacks import EFTMonitor


def train(callbacks, epochs):
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    loader = DataLoader(TensorDataset(x[16:], torch.tensor(digits.target[16:])), batch_size=64)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier()
    begun = time.perf_counter()
    trainer.fit(model, loader)
    return time.perf_counter() - begun


def main(rounds=5, epochs=10):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    probe = torch.tensor(load_digits().images[:16], dtype=torch.float32)[:, None] / 16
    train([EFTMonitor(probe)], 1)  # first use loads and compiles what is lazily loaded
    bare, attached, reported = [], [], []
    for _ in range(rounds):
        bare.append(train([], epochs))
        monitor = EFTMonitor(probe, every="epoch")
        attached.append(train([monitor], epochs))
        reported.append(monitor.seconds)
    without, with_, own = (statistics.median(times) for times in (bare, attached, reported))
    print(f"{rounds} rounds of {epochs} epochs, torch {torch.__version__}, {torch.get_num_threads()} threads; medians")
    print(f"without the callback {without:.2f} s, with it {with_:.2f} s: {100 * (with_ / without - 1):.1f} % more")
    each = 1000 * own / (epochs + 1)
    print(f"its own account {own:.2f} s, outside {with_ - without:.2f} s, {each:.0f} ms a measurement")


if __name__ == "__main__":
    main()
