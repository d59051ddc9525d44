"""The live comparison without a trainer: an observer, the parts it is made of, and the sinks it writes to."""

from torch_eft.live.config.schedule import linear, logarithmic
from torch_eft.live.observer import Observer
from torch_eft.live.part import Event, Instrument, Measurement, MeasurementWarning, Reading, Start
from torch_eft.live.record.sinks import JSONLSink, Sink, TensorBoardSink

__all__ = [
    "Event",
    "Instrument",
    "JSONLSink",
    "Measurement",
    "MeasurementWarning",
    "Observer",
    "Reading",
    "Sink",
    "Start",
    "TensorBoardSink",
    "linear",
    "logarithmic",
]
