"""The monitor in a LightningCLI configuration file: nothing about it in the code.

Run: python -m examples.lightning_cli fit --config examples/lightning_cli.yaml
Needs jsonargparse: pip install 'jsonargparse[signatures]'
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from examples.attach_to_your_training import Classifier


class Digits(L.LightningDataModule):
    """scikit-learn's 1797 images of 8 x 8 pixels."""

    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        return DataLoader(TensorDataset(x, torch.tensor(digits.target)), batch_size=self.batch_size, shuffle=True)


def main(arguments: list[str] | None = None) -> LightningCLI:
    return LightningCLI(Classifier, Digits, args=arguments, save_config_callback=None)


if __name__ == "__main__":
    main()
