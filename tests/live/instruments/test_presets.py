"""Which instruments of the physics belong to which preset."""

import pytest

from torch_eft.live.config.presets import Options, chosen_instruments

LIGHT = ["ntk", "representation"]
STANDARD = [*LIGHT, "batch_norm", "theory", "instance", "interval", "expansion", "taylor"]


@pytest.mark.parametrize(
    ("preset", "extra", "names"),
    [
        ("light", [], LIGHT),
        ("light", ["taylor"], [*LIGHT, "taylor"]),
        ("standard", [], STANDARD),
        ("full", [], [*STANDARD, "dntk"]),
        ("standard", ["shadow"], [*STANDARD, "shadow"]),
        ("full", ["shadow"], [*STANDARD, "dntk", "shadow"]),
    ],
)
def test_presets(preset, extra, names):
    assert [instrument.name for instrument in chosen_instruments(preset, None, extra, Options())] == names
