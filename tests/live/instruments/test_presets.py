"""Which instruments of the physics belong to which preset."""

import pytest

from torch_eft.live.config.presets import Options, chosen_instruments
from torch_eft.live.instruments.trained_beside.replay import ReplayInstrument

LIGHT = ["ntk", "representation"]
MEASURED, FORECAST = [*LIGHT, "batch_norm", "interval", "expansion", "taylor"], ["theory", "instance"]
STANDARD = [*MEASURED, *FORECAST, "replay"]


@pytest.mark.parametrize(
    ("preset", "extra", "names"),
    [
        ("light", [], LIGHT),
        ("light", ["taylor"], [*LIGHT, "taylor"]),
        ("standard", [], STANDARD),
        ("full", [], [*MEASURED, "dntk", *FORECAST, "replay"]),
        ("standard", ["shadow"], [*MEASURED, *FORECAST, "shadow", "replay"]),
        ("full", ["shadow"], [*MEASURED, "dntk", *FORECAST, "shadow", "replay"]),
    ],
)
def test_presets(preset, extra, names):
    assert [instrument.name for instrument in chosen_instruments(preset, None, extra, Options())] == names


def test_steps_are_taken_again_at_every_measurement_where_that_was_asked_for():
    (by_budget,) = (each for each in chosen_instruments("standard", None, [], Options()) if each.name == "replay")
    (always,) = (each for each in chosen_instruments("standard", None, ["replay"], Options()) if each.name == "replay")
    assert always.always and not by_budget.always
    own = ReplayInstrument(steps=3)
    assert [each for each in chosen_instruments("standard", None, [own], Options()) if each.name == "replay"] == [own]
