"""Several monitors of one Trainer: what would go under one name is told apart, and said to be."""

import csv

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.callbacks.trainings import PROBE, run, simple_mlp
from torch_eft.callbacks import EFTMonitor, NTKMonitor, RepresentationMonitor
from torch_eft.results.tags import tag
from torch_eft.tensorboard.run_info import read_jsonl

DRIFT = tag("ntk_drift")


def light(probe=PROBE, **options):
    return EFTMonitor(probe, preset="light", budget=None, on_error="raise", **options)


def columns(logger):
    """``{column: values}`` of a CSVLogger, without empty ones."""
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def drifts(monitor):
    return [pytest.approx(scalars[DRIFT], rel=1e-6) for scalars in monitor.history.values()]


def test_two_probes_are_two_runs(tmp_path):
    seen, unseen = light(name="seen"), light(3 * PROBE, name="unseen")
    said = []
    unseen.observer.recorder.announce = said.append
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    run([seen, unseen], net=simple_mlp, logger=loggers)
    found = columns(loggers[0])
    assert found[DRIFT] == drifts(seen) and found[f"unseen/{DRIFT}"] == drifts(unseen)
    assert found[DRIFT] != found[f"unseen/{DRIFT}"]
    for folder, monitor in ((loggers[1].log_dir, seen), (f"{loggers[1].log_dir}/unseen", unseen)):
        events = EventAccumulator(folder).Reload()
        assert [event.value for event in events.Scalars(DRIFT)] == drifts(monitor)
        assert "eft/run" in events.Tags()["tensors"]
    assert read_jsonl(tmp_path / "csv/lightning_logs/version_0/eft-2.jsonl").measurements == unseen.history
    assert len(said) == 1 and "the run 'unseen' in TensorBoard, unseen/... in other loggers, and eft-2.jsonl" in said[0]


def test_monitors_of_different_quantities_on_one_probe_share_a_run(tmp_path):
    logger = CSVLogger(tmp_path)
    run([NTKMonitor(PROBE, budget=None), RepresentationMonitor(PROBE.clone(), budget=None)], logger=logger)
    found = columns(logger)
    assert DRIFT in found and tag("representation_change") in found
    assert not [name for name in found if "Monitor" in name]


@pytest.mark.parametrize(
    "second",
    [
        lambda: light(),
        lambda: RepresentationMonitor(PROBE + 1, budget=None),
        lambda: RepresentationMonitor("first_batch:4", budget=None),
        lambda: RepresentationMonitor(PROBE, budget=None, module="net"),
    ],
)
def test_whatever_else_they_measure_is_told_apart(tmp_path, second):
    logger = CSVLogger(tmp_path)
    first = NTKMonitor(PROBE, budget=None, extra=["taylor", "interval"])
    run([second(), first], logger=logger)
    found = columns(logger)
    assert found[DRIFT] == drifts(first)  # the one with more to say has the plain tags
    assert [name for name in found if name.startswith(type(second()).__name__ + "/eft")]
