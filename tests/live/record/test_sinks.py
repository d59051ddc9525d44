"""The JSONL file and the TensorBoard writer as sinks."""

import json
import math
import os
import warnings

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from torch_eft.live import Event, JSONLSink, MeasurementWarning, TensorBoardSink
from torch_eft.live.instrument import RunFacts
from torch_eft.live.record.run_summary import described, run_summary
from torch_eft.tensorboard.run_info import read_jsonl


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_on_disk_at_once(tmp_path):
    sink = JSONLSink(tmp_path / "new" / "eft.jsonl")
    sink.run_info({"network": "MLP", "r": math.nan})
    sink.scalars(3, {"eft/ntk_drift/measured": 0.5}, epoch=1)
    sink.event(Event(3, "ntk_drift", "left"))
    sink.text("diagnosis", "# all well", 3)
    run, measurement, event, page = lines_of(sink.path)  # before anything is closed
    assert run == {"kind": "run", "schema": 1, "network": "MLP", "r": None}
    assert measurement.pop("time") > 1.6e9
    assert measurement == {
        "kind": "measurement",
        "step": 3,
        "epoch": 1,
        "scalars": {"eft/ntk_drift/measured": 0.5},
    }
    assert event == {"kind": "event", "step": 3, "quantity": "ntk_drift", "text": "left"}
    assert page == {"kind": "page", "name": "diagnosis", "text": "# all well", "step": 3}


def test_it_appends_and_heals_half_a_line(tmp_path):
    path = tmp_path / "eft.jsonl"
    first = JSONLSink(path)
    first.scalars(1, {"eft/ntk_drift/measured": 0.5})
    first.close()
    with open(path, "a") as file:
        file.write('{"kind": "measurement", "st')  # killed while writing
    second = JSONLSink(path)
    second.scalars(1, {"eft/ntk_drift/measured": 0.75})
    second.close()
    assert len(path.read_text().splitlines()) == 3
    records = read_jsonl(path)
    assert records.measurements == {1: {"eft/ntk_drift/measured": 0.75}}  # the last line of a step holds
    assert records.corrupt == 1


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["a file in the way", "disk full"])
def test_what_cannot_be_written_is_one_sentence(tmp_path, kind):
    if kind == "disk full":
        path = tmp_path / "eft.jsonl"
        path.symlink_to("/dev/full")
    else:
        (tmp_path / "blocked").write_text("")
        path = tmp_path / "blocked" / "eft.jsonl"
    sink = JSONLSink(path)
    with pytest.warns(MeasurementWarning, match=r"eft.jsonl cannot be written .*training and the other loggers go on"):
        sink.scalars(1, {"eft/ntk_drift/measured": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink.scalars(2, {"eft/ntk_drift/measured": 0.5})
        sink.close()


def test_tensorboard_takes_everything(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(writer)
    sink.scalars(3, {"eft/ntk_drift/measured": 0.5, "eft-theory/ntk_drift/order_1": 0.4})
    sink.text("diagnosis", "all well", 3)
    sink.histogram("eft/ntk_spectrum/log10_eigenvalues", torch.tensor([-1.0, 0.0, 0.5]), 3)
    sink.run_info({"network": "MLP"})
    sink.event(Event(3, "ntk_drift", "left"))
    sink.flush()
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert tags["scalars"] == ["eft/ntk_drift/measured"]
    assert tags["histograms"] == ["eft/ntk_spectrum/log10_eigenvalues"]
    assert {"eft/diagnosis/text_summary", "eft-theory/ntk_drift/order_1", "eft/run"} == set(tags["tensors"])


def test_optimizers_are_told_in_few_digits():
    weights = [torch.nn.Parameter(torch.ones(1))]
    assert described(torch.optim.SGD(weights, lr=0.3991127631592157)) == "SGD, lr 0.399113"
    adam = torch.optim.AdamW(weights, lr=torch.tensor(0.25))
    assert described(adam) == "AdamW, lr 0.25, betas (0.9, 0.999), weight_decay 0.01"


def test_the_summary_says_why_a_quantity_has_no_prediction():
    first, second = {"dntk": "no room"}, {"dntk": "other", "ntk_drift": "ReLU has kinks"}
    facts = [RunFacts(unpredicted=first), RunFacts(), RunFacts(unpredicted=second)]
    summary = run_summary(facts, torch.nn.Linear(1, 1), [], [1, 1], "", {}, [], [], {})
    assert summary["unpredicted"] == {"dntk": "no room", "ntk_drift": "ReLU has kinks"}
