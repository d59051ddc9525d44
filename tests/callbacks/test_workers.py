"""Strategies that train in processes of their own: the caller's monitor has the results all the same."""

import tempfile
from pathlib import Path

import pytest

from tests.callbacks.trainings import PROBE, run, simple_mlp
from torch_eft.callbacks import EFTMonitor


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_the_caller_has_what_rank_0_measured(strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here, there = (EFTMonitor(PROBE, preset="light", every=1, budget=None) for _ in range(2))
    run([here], net=simple_mlp, batch_size=24, epochs=2, shuffle=False)
    run([there], net=simple_mlp, batch_size=24, epochs=2, shuffle=False, strategy=strategy, devices=1)
    assert list(there.history) == list(here.history) == [0, 1, 2]
    for step, scalars in here.history.items():
        for name, value in scalars.items():
            if "overhead" not in name:
                assert there.history[step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
    assert there.overhead().startswith("torch_eft: 3 measurements, ") and there.seconds > 0
    assert there.origin == "initialization" and not there.skipped
    assert not list(Path(tmp_path).glob("torch_eft-*"))  # read once, and taken away
