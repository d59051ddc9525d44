"""An ordinary Lightning training, mini-batches, Adam and cross-entropy, with one line added.

No forecast is derived for such a training, and the callback says so; what it measures tells all the same how far the
run is from the kernel regime. Run: python examples/attach_to_your_training.py && tensorboard --logdir lightning_logs
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_eft.callbacks import EFTMonitor


class Classifier(L.LightningModule):
    """A small convolutional network."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(2 * width * 16, 10),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(epochs: int = 5) -> EFTMonitor:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x[16:], y[16:]), batch_size=64, shuffle=True)
    monitor = EFTMonitor(probe=x[:16])  # <- the line
    trainer = L.Trainer(max_epochs=epochs, callbacks=[monitor], enable_checkpointing=False, log_every_n_steps=10)
    trainer.fit(Classifier(), loader)
    return monitor


if __name__ == "__main__":
    monitor = main()
    print(monitor.validity)
    for step, scalars in monitor.history.items():
        drift, change = scalars["eft/ntk_drift/measured"], scalars["eft/representation_change/measured"]
        print(f"step {step:4}: NTK drift {drift:.3f}, representation change {change:.3f}")
