"""Where the law of the drift says that it holds, it does: no false confidence (the whole grid: a benchmark)."""

import pytest

from tests.theory.hierarchy.drift_grid import Laws


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "depth", "close", "scale"),
    [
        ("tanh", 3, None, 1.0),
        ("tanh", 2, 0.1, 3.0),
        ("gelu", 3, 0.3, 0.3),
        ("gelu", 4, None, 1.0),
        ("tanh", 4, 0.3, 1.0),
    ],
)
def test_no_false_confidence(name, depth, close, scale):
    laws, checked = Laws(name, depth, close), 0
    for n in (16, 64):
        for step, found in laws.compared(scale, n, 1000 if n < 64 else 600).items():
            if found.flag != "invalid":
                checked += 1
                assert found.beyond < 1, f"n = {n}, t = {step}: {found}"
    assert checked
