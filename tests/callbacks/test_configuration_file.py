"""The monitor from a LightningCLI configuration file, and the probe as the first samples of the training data."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from tests.callbacks.trainings import PROBE, Training, dataset, digest, normed_net, run, sgd
from torch_eft.callbacks import EFTMonitor, MeasurementWarning, logarithmic


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(dataset(), batch_size=8, shuffle=True)


class Model(Training):
    def __init__(self, rate: float = 0.05):
        super().__init__(normed_net(), sgd)


CONFIGURATION = """
seed_everything: 0
trainer:
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  accelerator: cpu
  callbacks:
    - class_path: torch_eft.callbacks.EFTMonitor
      init_args:
        {arguments}
"""


def command_line(folder: Path, *arguments, run=True, monitor="EFTMonitor"):
    path = folder / "config.yaml"
    text = CONFIGURATION.replace("callbacks.EFTMonitor", f"callbacks.{monitor}")
    path.write_text(text.format(arguments="\n        ".join(arguments)))
    given = ["fit", "--config", str(path)] if run else ["--config", str(path)]
    return LightningCLI(Model, Data, args=given, run=run, save_config_callback=None)


def monitor_of(cli):
    (monitor,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, EFTMonitor)]
    return monitor


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_file_trains_with_it(tmp_path):
    torch.save(PROBE, tmp_path / "probe.pt")
    cli = command_line(
        tmp_path, f"probe: {tmp_path / 'probe.pt'}", "preset: light", "every: log:3", "budget: null", "on_error: raise"
    )
    monitor = monitor_of(cli)
    assert list(monitor.history) == [0, 1, 2, 5, 6]
    assert torch.equal(monitor.observer.network.probe.inputs, PROBE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("line", "attribute", "value"),
    [
        ("every: 100", "every", 100),
        ("every: epoch", "every", "epoch"),
        (
            "every: {class_path: torch_eft.callbacks.logarithmic, init_args: {per_decade: 5}}",
            "every",
            logarithmic(5),
        ),
    ],
)
def test_schedules_in_a_configuration_file(tmp_path, line, attribute, value):
    cli = command_line(tmp_path, "probe: first_batch:4", line, run=False)
    assert getattr(monitor_of(cli).observer, attribute) == value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("preset: heavy", "preset"),
        ("bugdet: 0.1", "bugdet"),
        ("budget: much", "budget"),
        ("every: cubic:3", "every"),
        ("every: [1, 2]", "every"),
        ("on_error: ignore", "on_error"),
        ("jsonl: 3", "jsonl"),
        ("extra: 7", "extra"),
        ("module: [net]", "module"),
        ("output_fn: torch.nowhere", "output_fn"),
    ],
)
def test_typos_and_wrong_types_are_rejected(tmp_path, capsys, line, message):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        command_line(tmp_path, "probe: first_batch:4", line, run=False)
    assert message in capsys.readouterr().err + str(stopped.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("monitor", "own"),
    [
        ("EFTMonitor", "instruments: [ntk]"),
        ("NTKMonitor", "outputs: trace"),
        ("RepresentationMonitor", "per_layer: true"),
        ("TheoryComparison", "activation: tanh"),
    ],
)
def test_shared_arguments_of_every_monitor(tmp_path, capsys, monitor, own):
    shared = ["probe: first_batch:4", own, "every: 7", "extra: [taylor]", "keep_theta_0: none"]
    observer = monitor_of(command_line(tmp_path, *shared, run=False, monitor=monitor)).observer
    assert (observer.every, observer.keep_theta_0) == (7, "none")
    assert [instrument.name for instrument in observer.instruments][1:] == ["taylor"]
    with pytest.raises((SystemExit, ValueError)) as stopped:
        command_line(tmp_path, *shared, "bugdet: 0.1", run=False, monitor=monitor)
    assert "bugdet" in capsys.readouterr().err + str(stopped.value)
    if monitor != "EFTMonitor":
        with pytest.raises((SystemExit, ValueError)):
            command_line(tmp_path, *shared, "preset: full", run=False, monitor=monitor)


def test_the_first_samples_of_the_training_data_and_the_same_bits():
    reference = digest(*run())
    monitor = EFTMonitor("first_batch:4", preset="light", every=1, budget=None, on_error="raise")
    assert digest(*run([monitor])) == reference
    assert torch.equal(monitor.observer.network.probe.inputs, dataset().tensors[0][:4])
    assert len(monitor.history) == 10


def test_several_loaders_are_refused_in_words():
    class Several(Training):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    module = Several(normed_net(), sgd)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[EFTMonitor("first_batch:4")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    with pytest.warns(MeasurementWarning, match="measures nothing.*'first_batch:4' needs one training DataLoader, not"):
        trainer.fit(module, {"a": DataLoader(dataset(), batch_size=8)})
