"""The way back from worker processes, in which strategies that spawn or fork train.

Lightning brings weights and metrics back to the caller, whose callbacks stay empty; rank 0 leaves in a file what the
caller may ask for.
"""

import os
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from torch_eft.live.observer import Observer
from torch_eft.results.trajectory import Validity


class WorkerResults:
    """Results of a training in worker processes.

    Attributes:
        overhead: What measuring has cost there, in a sentence; None where the training was in this process.
        seconds: The time spent measuring there.
        validity: The observer's there.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        with suppress(OSError):  # there may be no place for temporary files
            self._path = Path(tempfile.gettempdir(), f"torch_eft-{uuid.uuid4().hex}.pt")
        self._caller = os.getpid()
        self.forget()

    def forget(self) -> None:
        """A training begins."""
        self.overhead: str | None = None
        self.seconds = 0.0
        self.validity: Validity | None = None

    def leave(self, trainer: Trainer, observer: Observer) -> None:
        """Leave the results to the caller, if this is a worker process."""
        spawned = isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        if os.getpid() == self._caller or not spawned or self._path is None:
            return
        validity = observer.validity
        results = {
            "state": observer.state_dict(),
            "skipped": observer.skipped,
            "overhead": observer.overhead(),
            "seconds": observer.budget.seconds,
            "validity": None if validity is None else [validity.flag, validity.reason],
        }
        torch.save(results, self._path)

    def fetch(self, observer: Observer) -> None:
        """Take what a worker left, once, in the calling process."""
        if os.getpid() != self._caller or self._path is None or not self._path.exists():
            return
        results = torch.load(self._path, map_location="cpu", weights_only=True)
        self._path.unlink()
        observer.load_state_dict(results["state"])
        observer.recorder.skipped = [(int(step), str(reason)) for step, reason in results["skipped"]]
        self.overhead, self.seconds = results["overhead"], results["seconds"]
        self.validity = None if results["validity"] is None else Validity(*results["validity"])
