"""What the forecast of hidden layers says of itself, against small trained ensembles: no false confidence.

What is neglected of a neuron's movement is at most 5 u of it, u the largest squared movement of any layer (where sigma'
jumps, sqrt(u), or by how much the difference between two inputs moves); of a kernel's drift, whose terms may cancel, as
much times that. Called valid, that is a quarter.
"""

import math

import pytest

from tests.theory.hidden_layers.representation_grid import Forecast

pytestmark = pytest.mark.slow

STEPS = (5, 125)
PAIRS = {8: 1024, 32: 1024, 64: 512}


@pytest.mark.parametrize(
    ("name", "depth", "close"),
    [("tanh", 2, None), ("gelu", 2, 0.1), ("gelu", 3, None), ("relu", 2, 0.1), ("relu", 3, None)],
)
def test_no_false_confidence_in_hidden_layers(name, depth, close):
    counts, false = {"valid": 0, "caution": 0, "invalid": 0}, []
    for scale in (0.3, 3.0):
        forecast = Forecast(name, depth, close, scale, STEPS)
        for n, pairs in PAIRS.items():
            changes = forecast.measured(n, pairs, seed=n)
            for step in STEPS:
                layers, validity, parted = forecast.at(n, step)
                counts[validity.flag] += 1
                u = max(layer.relative_movement for layer in layers) ** 2
                jumps = max(u, parted) ** 0.5 if name == "relu" else 0.0
                canceling = max(layer.uncertainty for layer in layers)
                for layer in layers:
                    for what, expected, share in (
                        ("activations", layer.kernel_change[-1], max(5 * canceling, jumps)),
                        ("ds", layer.movement[-1], max(5 * u, jumps)),
                    ):
                        change = changes[what, layer.layer, step]
                        error = float((change.var(0) / len(change)).sum().sqrt())
                        beyond = float((change.mean(0) - expected).norm())
                        size = float(expected.norm())
                        bound = 0.25 + jumps if validity.flag == "valid" else math.inf
                        if not beyond < min(share, bound) * size + 3 * error and validity.flag != "invalid":
                            told = f"layer {layer.layer}, {what}, y {scale}, n = {n}, t = {step}, {validity.flag}"
                            false.append(f"{told}: {beyond / size:.2f} +- {error / size:.2f}, told {share:.2f}")
    print(f"{name}, depth {depth}, close {close}: {counts}")
    assert not false, "; ".join(false)
    assert counts["valid"] + counts["caution"] >= 4
