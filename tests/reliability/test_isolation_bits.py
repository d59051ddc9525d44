"""Training is sacred: with the callbacks it ends in the same bits as without, in every configuration people use."""

import shutil

import pytest

from tests.callbacks.trainings import PROBE
from tests.reliability.runs import CONFIGURATIONS, left_behind, train
from torch_eft.callbacks import EFTMonitor, NTKMonitor, RepresentationMonitor, TheoryComparison

SLOW = {"LightningModule.compile(), inductor", "shuffled by 2 workers"}


def monitors():
    return [
        EFTMonitor(PROBE, preset="standard", budget=None, every=2, forecast_seconds=0.1, on_error="raise"),
        NTKMonitor(PROBE, budget=None, on_error="raise"),
        RepresentationMonitor(PROBE, budget=None, every=2, on_error="raise"),
        TheoryComparison(PROBE, budget=None, every=3, forecast_seconds=0.1, on_error="raise"),
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    [  # every second one in the fast suite
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW or index % 2 == 1))
        for index, name in enumerate(CONFIGURATIONS)
    ],
)
def test_the_training_is_the_same_with_and_without(name):
    options = {"epochs": 2} | CONFIGURATIONS[name]
    if options.get("compiled") == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler, and there is none on this machine")
    reference, attached = left_behind(*train(**options)), monitors()
    same = left_behind(*train(attached, **options)) == reference
    assert same, f"reproducible without the monitors: {left_behind(*train(**options)) == reference}"
    for monitor in attached:
        assert len(monitor.history) > 1
        assert not monitor.skipped
