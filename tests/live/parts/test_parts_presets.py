"""Which parts of the physics belong to which preset."""

import pytest

from torch_eft.live.config.presets import Options, parts_of

LIGHT = ["ntk", "representation"]
STANDARD = [*LIGHT, "theory", "instance", "interval", "taylor"]


@pytest.mark.parametrize(
    ("preset", "also", "names"),
    [
        ("light", [], LIGHT),
        ("light", ["taylor"], [*LIGHT, "taylor"]),
        ("standard", [], STANDARD),
        ("full", [], [*STANDARD, "dntk"]),
        ("standard", ["shadow"], [*STANDARD, "shadow"]),
        ("full", ["shadow"], [*STANDARD, "dntk", "shadow"]),
    ],
)
def test_presets(preset, also, names):
    assert [part.name for part in parts_of(preset, also, Options())] == names
