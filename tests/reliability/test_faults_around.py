"""Faults beside the measurements: in what the user gives, in hooks, states and figures of instruments, in files.

As in ``test_faults``: the training ends as without the callback, one warning says what was skipped, nothing is lost.
"""

import os
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import record_writer
from torch.utils.data import DataLoader

from tests.callbacks.trainings import PROBE, Training, dataset, normed_net, sgd
from tests.reliability.runs import left_behind, train
from torch_eft.callbacks import EFTMonitor, MeasurementWarning
from torch_eft.live import Instrument
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.tensorboard import tag
from torch_eft.tensorboard.run_info import find_jsonl, read_jsonl

ALL = list(range(10))
DRIFT = tag("ntk_drift")


def outcome(monitor, **options):
    """The hash of a training with a monitor, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        left = left_behind(*train([monitor], **options))
    return left, [str(warning.message) for warning in caught if isinstance(warning.message, MeasurementWarning)]


def test_a_schedule_that_raises():
    def every(step):
        if step > 4:
            raise KeyError(step)
        return True

    monitor = EFTMonitor(PROBE, preset="light", budget=None, every=every)
    left, said = outcome(monitor)
    assert left == left_behind(*train())
    assert len(said) == 1 and "KeyError: 5" in said[0]
    assert list(monitor.history) == [*ALL[:5], 9]  # the last in any case


HOOKS = [
    "begin",
    "observe",
    "observe_batch",
    "observe_loss",
    "before_step",
    "after_step",
    "state",
    "facts",
    "first_figures",
]
HOOKS += ["last_figures"]


def fail(*unused):
    raise ArithmeticError("no such luck")


@pytest.mark.parametrize(
    "hook", [pytest.param(hook, marks=[pytest.mark.slow] * (index % 2 == 1)) for index, hook in enumerate(HOOKS)]
)
def test_a_part_that_fails_in_a_hook(tmp_path, hook):
    broken = type("Broken", (Instrument,), {hook: fail, "name": "broken"})()
    monitor = EFTMonitor(PROBE, instruments=[broken, NTKInstrument()], every=1, budget=None)
    logger = TensorBoardLogger(tmp_path)
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_top_k=-1, every_n_train_steps=4)
    left, said = outcome(monitor, logger=logger, extra=lambda: [saver], enable_checkpointing=True)
    assert left == left_behind(*train())
    assert len(said) == 1 and "ArithmeticError: no such luck" in said[0]
    assert list(monitor.history) == ALL and all(DRIFT in scalars for scalars in monitor.history.values())
    records = read_jsonl(find_jsonl(logger.log_dir)[0])
    assert records.measurements == monitor.history
    assert {"overhead", "skipped"} <= set(records.pages)
    for path in (tmp_path / "ckpt").glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["callbacks"][monitor.state_key]
        assert state["history"] and state["reference"] is not None


def writing_until_full(monkeypatch, records):
    """The disk takes so many records of event files; then the writer's thread dies."""
    genuine, written = record_writer.RecordWriter.write, [0]

    def write(self, data):
        written[0] += 1
        if written[0] > records:
            raise OSError(28, "No space left on device")
        return genuine(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", write)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_disk_is_full_when_events_are_written(tmp_path, monkeypatch):
    reference = left_behind(*train())
    logger = TensorBoardLogger(tmp_path)
    writing_until_full(monkeypatch, 60)
    monkeypatch.setattr(TensorBoardLogger, "finalize", lambda *unused: None)  # the next test
    monitor = EFTMonitor(PROBE, preset="light", budget=None, every=1)
    left, said = outcome(monitor, logger=logger)
    assert left == reference
    # Said by the writer, or by Lightning's logger from it: which depends on when the writer's thread dies.
    assert len(said) == 1 and "No space left on device" in said[0]
    assert list(monitor.history) == ALL
    assert read_jsonl(find_jsonl(logger.log_dir)[0]).measurements == monitor.history
    monkeypatch.undo()
    points = EventAccumulator(logger.log_dir).Reload().Scalars(DRIFT)
    assert 0 < len(points) < 10
    assert all(point.value == pytest.approx(monitor.history[point.step][DRIFT]) for point in points)


@pytest.mark.xfail(
    raises=OSError,
    strict=True,
    reason="after the last step Lightning's TensorBoardLogger.finalize flushes its writer, whose thread died of our "
    "events: fit ends in the disk's error although the training is done, as it does if the training logs itself",
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_no_error_at_the_end_of_a_training_that_logs_nothing(tmp_path, monkeypatch):
    writing_until_full(monkeypatch, 60)
    outcome(EFTMonitor(PROBE, preset="light", budget=None, every=1), logger=TensorBoardLogger(tmp_path))


class Dying(torch.utils.data.Dataset):
    """Its worker exits without a word at the 13th sample asked for."""

    def __init__(self):
        self.data, self.asked = dataset(), 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.asked += 1
        if self.asked == 13 and torch.utils.data.get_worker_info() is not None:
            os._exit(1)
        return self.data[index]


def until_it_dies(callbacks, logger=False):
    pl.seed_everything(0, verbose=False)
    module = Training(normed_net(), sgd)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=3,
            callbacks=callbacks,
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            accelerator="cpu",
        )
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            trainer.fit(module, DataLoader(Dying(), batch_size=4, num_workers=1, prefetch_factor=1))
    return trainer.global_step, module.state_dict()


@pytest.mark.slow
def test_a_worker_that_exits(tmp_path):
    steps, weights = until_it_dies([])
    monitor = EFTMonitor(PROBE, preset="light", budget=None, every=1)
    same_steps, same_weights = until_it_dies([monitor], CSVLogger(tmp_path))
    if same_steps == steps:  # how far the training comes before it notices is the system's affair
        assert all(torch.equal(value, same_weights[name]) for name, value in weights.items())
    assert list(monitor.history) == list(range(same_steps + 1))
    assert read_jsonl(find_jsonl(tmp_path)[0]).measurements == monitor.history
