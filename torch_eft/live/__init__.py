"""The live comparison without a trainer: an observer, its instruments, and the sinks that it writes to."""

from torch_eft.live.config.schedule import linear, logarithmic
from torch_eft.live.instrument import (
    Event,
    Instrument,
    Measurement,
    MeasurementWarning,
    Obstacle,
    Reading,
    TrainingStart,
)
from torch_eft.live.observer import Observer
from torch_eft.live.record.history import RunHistory
from torch_eft.live.record.saved_run import SavedRun, load_run
from torch_eft.live.record.sinks import JSONLSink, Sink, TensorBoardSink

__all__ = [
    "Event",
    "Instrument",
    "JSONLSink",
    "Measurement",
    "MeasurementWarning",
    "Observer",
    "Obstacle",
    "Reading",
    "RunHistory",
    "SavedRun",
    "Sink",
    "TensorBoardSink",
    "TrainingStart",
    "linear",
    "load_run",
    "logarithmic",
]
