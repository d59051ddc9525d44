"""Trainings that stop, by an exception or by SIGKILL, and what they left in their log directory."""

import csv
import multiprocessing
import os
import signal
import warnings
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from tests.callbacks.trainings import PROBE, Training, dataset, plain_sgd, simple_mlp
from torch_eft.callbacks import EFTMonitor
from torch_eft.tensorboard import tag

DRIFT = tag("ntk_drift")
EPOCHS = 4


def light(**options):
    return EFTMonitor(PROBE, **{"preset": "light", "budget": None, "on_error": "raise"} | options)


class StopAt(pl.Callback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *unused):
        if trainer.global_step == self.step:
            self.action()


class Stopped(Exception):
    pass


def stop():
    raise Stopped


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fit(callbacks, loggers=(), net=simple_mlp, epochs=EPOCHS, ckpt_path=None, kind=Training, batch_size=8):
    """Three batches an epoch, always in one order, so that every training passes through the same weights."""
    pl.seed_everything(0, verbose=False)
    module = kind(net(), plain_sgd)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            logger=list(loggers) or False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            accelerator="cpu",
            log_every_n_steps=1,
        )
        trainer.fit(module, DataLoader(dataset(), batch_size=batch_size), ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


def loggers(folder, purge_step=None):
    return [
        TensorBoardLogger(folder, name="tb", version=0, purge_step=purge_step),
        CSVLogger(folder, name="csv", version=0),
    ]


def in_tensorboard(folder):
    """``{step: how often}`` of the drift, and its value by step."""
    events = EventAccumulator(str(folder / "tb" / "version_0"), size_guidance={"scalars": 0}).Reload()
    points = events.Scalars(DRIFT)
    return Counter(point.step for point in points), {point.step: point.value for point in points}


def in_csv(folder):
    with open(folder / "csv" / "version_0" / "metrics.csv") as file:
        points = [(int(row["step"]), float(row[DRIFT])) for row in csv.DictReader(file) if row.get(DRIFT)]
    return Counter(step for step, _ in points), dict(points)


def in_a_process_of_its_own(*arguments):
    torch.set_num_threads(1)  # a fork has none of the threads that its parent's OpenMP counts on
    first_part(*arguments)


def first_part(folder, every, checkpoint, stop_at, action, kind=Training):
    saver = ModelCheckpoint(folder / "ckpt", filename="{step}", save_top_k=-1, **checkpoint)
    fit([light(every=every), saver, StopAt(stop_at, action)], loggers(folder), kind=kind)


def _a_second_earlier(folder):
    """Event files are read in the order of the second in their names: those there now before what comes next."""
    for path in folder.rglob("events.out.tfevents.*"):
        events, out, tfevents, second, rest = path.name.split(".", 4)
        path.rename(path.with_name(f"{events}.{out}.{tfevents}.{int(second) - 1}.{rest}"))


def interrupted(folder, every, checkpoint, stop_at, action, kind=Training):
    """A training that stopped; its checkpoints by step."""
    if action is kill:
        child = multiprocessing.get_context("fork").Process(
            target=in_a_process_of_its_own, args=(folder, every, checkpoint, stop_at, action, kind)
        )
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    else:
        with pytest.raises(Stopped):
            first_part(folder, every, checkpoint, stop_at, action, kind)
    _a_second_earlier(folder)
    return {int(path.stem.split("=")[1]): path for path in (folder / "ckpt").glob("*.ckpt")}
