"""Which instruments of the physics belong to which preset."""

import pytest

from torch_eft.live.config.presets import Options, chosen_instruments

LIGHT = ["ntk", "representation"]
MEASURED, FORECAST = [*LIGHT, "batch_norm", "interval", "expansion", "taylor"], ["theory", "instance"]
STANDARD = [*MEASURED, *FORECAST]


@pytest.mark.parametrize(
    ("preset", "extra", "names"),
    [
        ("light", [], LIGHT),
        ("light", ["taylor"], [*LIGHT, "taylor"]),
        ("standard", [], STANDARD),
        ("full", [], [*MEASURED, "dntk", *FORECAST]),
        ("standard", ["shadow"], [*STANDARD, "shadow"]),
        ("full", ["shadow"], [*MEASURED, "dntk", *FORECAST, "shadow"]),
    ],
)
def test_presets(preset, extra, names):
    assert [instrument.name for instrument in chosen_instruments(preset, None, extra, Options())] == names
