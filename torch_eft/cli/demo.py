"""``torch-eft demo``: a critical MLP on scikit-learn's digits, trained with the callbacks attached.

Full-batch gradient descent on 16 training images with one-hot targets and ``MSELoss``; the probe is 6 other images: as
many as leave all of order 1/n to a few seconds. What the theory says was fixed before the first step.
"""

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from torch_eft.callbacks import EFTMonitor
from torch_eft.diagnosis import diagnose
from torch_eft.live.record.sinks import local_path
from torch_eft.results.tags import sigma_of, theory_of
from torch_eft.tensorboard import QUANTITIES, compared_quantities, comparison_figure, reading, tag, verdict
from torch_eft.theory import MLPEnsemble, criticality, get_activation, initial_statistics

TRAIN_IMAGES, PROBE_IMAGES, CLASSES = 16, 6, 10
MEASUREMENTS = 20
HEADLINES = ("ntk_drift", "dntk", "representation_change")
PICTURE = (*HEADLINES, "output_projection", "output_chi_squared", "ntk_trace")
FORECAST_SECONDS = 60.0
MODULES = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "swish": nn.SiLU}
"""Activations as modules, whose outputs are the hidden layers that are measured."""


class _Function(nn.Module):
    """An activation that torch has no module for."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


class CriticalMLP(pl.LightningModule):
    """An MLP drawn from an ensemble, trained by plain gradient descent on squared error."""

    def __init__(self, ensemble: MLPEnsemble, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        name = ensemble.activation.name
        layers: list[nn.Module] = []
        for n_in, n_out, C_b, C_W in zip(
            ensemble.widths[:-1], ensemble.widths[1:], ensemble.C_b, ensemble.C_W, strict=True
        ):
            layer = nn.Linear(n_in, n_out)
            nn.init.normal_(layer.weight, std=math.sqrt(C_W / n_in))
            nn.init.normal_(layer.bias, std=math.sqrt(C_b))
            layers += [layer, MODULES[name]() if name in MODULES else _Function(ensemble.activation.function)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, n_0) to (N, n_L)."""
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """``MSELoss`` on the whole training set."""
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class _Progress(pl.Callback):
    """One bar over all steps: an epoch here is a single step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar = tqdm(total=trainer.max_steps, desc="training", unit="step")

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()


def load_digits_split(train: int | None = None, probe: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return training inputs (N, 64), one-hot targets (N, 10) and probe inputs (N_p, 64), centered, |x|^2 = n_0.

    Args:
        train: N; None: 16.
        probe: N_p; None: 6.

    Returns:
        Inputs, targets, probe.

    Raises:
        ImportError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn: pip install 'torch-eft[demo]'") from error
    train, probe = TRAIN_IMAGES if train is None else train, PROBE_IMAGES if probe is None else probe
    digits = load_digits()
    x = torch.tensor(digits.data[: train + probe], dtype=torch.float32)
    y = torch.tensor(digits.target[:train])
    x = x - x[:train].mean(0)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1])
    return x[:train], F.one_hot(y, CLASSES).float(), x[train:]


def demo_ensemble(width: int, depth: int, activation: str, n_0: int) -> MLPEnsemble:
    """Return a critical MLP whose single torch learning rate is the learning-rate tensor.

    Raises:
        ValueError: If the shape is not usable, or the activation has no critical initialization.
    """
    if depth < 2 or width < 1:
        raise ValueError(f"--depth {depth} --width {width} given; need depth >= 2 and width >= 1")
    point = criticality(activation)
    if point.C_b is None or point.C_W is None:
        raise ValueError(f"--activation {activation}: it has no critical initialization; try tanh, relu or gelu")
    widths = [n_0, *[width] * (depth - 1), CLASSES]
    return MLPEnsemble(
        widths, get_activation(activation), C_b=point.C_b, C_W=point.C_W, lambda_b=1.0, lambda_W=widths[:-1]
    )


def run_demo(width: int, depth: int, activation: str, steps: int, logdir: str | Path, seed: int) -> EFTMonitor:
    """Train, measure, compare; print a table, write a PNG and TensorBoard files.

    Args:
        width: Hidden width n.
        depth: L, number of weight matrices.
        activation: A registered activation with a critical initialization.
        steps: Full-batch gradient steps.
        logdir: Directory of the TensorBoard files and of the PNG.
        seed: Seed of the initialization.

    Returns:
        The callback, with its history.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If scikit-learn or matplotlib is missing.
    """
    if steps < 1:
        raise ValueError(f"--steps {steps} given; need at least 1")
    logdir = local_path(logdir, "--logdir")
    x_train, y_train, x_probe = load_digits_split()
    ensemble = demo_ensemble(width, depth, activation, x_train.shape[1])
    print(diagnose(ensemble, x_train), end="\n\n")
    # MSELoss is the mean over N C entries: a quarter of its bound 2 / lambda_max(2 Theta / (N C)). At half of it the
    # largest mode would be learned in a single step, up to what the network's own NTK differs from Theta.
    Theta = initial_statistics(ensemble, x_train, statistics=("K", "Theta"))[-1].Theta
    learning_rate = 0.25 * y_train.numel() / float(torch.linalg.eigvalsh(Theta)[-1])

    pl.seed_everything(seed, verbose=False)
    model = CriticalMLP(ensemble, learning_rate)
    spacing = max(1, steps // MEASUREMENTS)
    # The largest modes of Theta are learned within ten steps.
    monitor = EFTMonitor(
        probe=x_probe,
        every=lambda step: step <= 10 or step % spacing == 0,
        budget=None,
        forecast_seconds=FORECAST_SECONDS,
    )
    logger = TensorBoardLogger(logdir, name=f"{activation}-{width}x{depth}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Advice on data-loader workers and logging intervals, beside the point for one batch an epoch.
        warnings.filterwarnings("ignore", module="lightning")
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            logger=logger,
            callbacks=[monitor, _Progress()],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=1,
            accelerator="auto",
            devices=1,
        )
        trainer.fit(model, DataLoader(TensorDataset(x_train, y_train), batch_size=len(x_train)))

    print(f"\n{comparison_table(monitor)}\n")
    print(validity_lines(monitor))
    picture = Path(logger.log_dir) / "measured_against_theory.png"
    title = f"{ensemble}, {len(x_train)} digits, full batch"
    compared = compared_quantities(monitor.history)
    drawn = [quantity for quantity in PICTURE if quantity in compared]
    drawing = comparison_figure(monitor.history, drawn, title)
    drawing.savefig(picture, dpi=100)
    print(f"picture:     {picture}")
    print(f"TensorBoard: tensorboard --logdir {logdir}")
    return monitor


def validity_lines(monitor: EFTMonitor) -> str:
    """Where each prediction holds, a line each: the bands are the ensemble's, instance lines this network's."""
    claims = [instrument.facts().claim for instrument in monitor.observer.instruments]
    return "\n".join(f"theory ({claim.level}) {claim.validity}" for claim in claims if claim is not None)


def comparison_table(monitor: EFTMonitor) -> str:
    """The last measurement beside the theory, as plain text: the headlines with their bands, then all else."""
    step = max(monitor.history)
    lines = [f"{'after step ' + str(step):24}{'measured':>10}{'predicted':>11}{'90 % of networks':>22}  verdict"]
    for quantity in HEADLINES:
        judged = verdict(monitor.history, quantity)
        if judged is None:
            measured = monitor.history[step].get(tag(quantity))
            cells = "-" if measured is None else f"{measured:.3g}", "-", "-", "no prediction at finite width"
        else:
            band = "-" if judged.low is None or judged.high is None else f"{judged.low:.3g} .. {judged.high:.3g}"
            predicted = "-" if judged.predicted is None else f"{judged.predicted:.3g}"
            cells = f"{judged.measured:.3g}", predicted, band, judged.words
        lines.append(f"{quantity:24}{cells[0]:>10}{cells[1]:>11}{cells[2]:>22}  {cells[3]}")
    lines += ["", *(words for quantity in HEADLINES if (words := reading(monitor.history, quantity)))]
    lines += ["", f"{'':28}{'measured':>12}{'theory':>12}{'sigma':>12}{'deviation':>12}"]
    scalars = monitor.history[step]
    for quantity in QUANTITIES:
        measured, theory, sigma = scalars.get(tag(quantity)), theory_of(scalars, quantity), sigma_of(scalars, quantity)
        if measured is None or quantity.startswith("overhead") or quantity in HEADLINES:
            continue
        deviation = "" if sigma is None or theory is None else f"{(measured - theory) / sigma:+.1f} sigma"
        numbers = [f"{value:.4g}" if value is not None else "-" for value in (measured, theory, sigma)]
        lines.append(f"{quantity:28}{''.join(f'{number:>12}' for number in numbers)}{deviation:>12}")
    return "\n".join(lines)
