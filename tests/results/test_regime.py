"""The two badges: where the bounds lie, what decides, and that the worst of several forecasts counts."""

import math

import pytest

from torch_eft.results.regime import Badge, latest, regime, theory, turn
from torch_eft.results.tags import tag

VALID = {"level": "ensemble, order 1", "flag": "valid", "reason": "r = 0.01; all is small"}


@pytest.mark.parametrize(
    ("drift", "features", "name"),
    [
        (0.05, 0.045, "lazy"),
        (0.0999, None, "lazy"),
        (0.1, 0.01, "weakly moving"),
        (0.01, 0.12, "weakly moving"),
        (0.3, 0.1, "moving"),
        (1.0, 0.1, "rich"),
        (None, 2.0, "rich"),
        (0.0, 0.0, "not moved"),
        (None, None, "not measured"),
    ],
)
def test_the_larger_change_decides(drift, features, name):
    values = {"ntk_drift": drift, "representation_change": features}
    assert regime({key: value for key, value in values.items() if value is not None}).name == name


def test_an_ntk_that_only_grew_is_not_rich():
    """H = 8 H_0 has drift 7 and no change of direction."""
    grown = regime({"ntk_drift": 7.0, "ntk_kernel_distance": 0.0, "representation_change": 0.2})
    assert grown.name == "moving" and "hardly turned" in grown.reason
    assert regime({"ntk_drift": 7.0, "ntk_kernel_distance": 0.3}).name == "rich"
    assert regime({"ntk_drift": 7.0, "ntk_kernel_distance": 0.0, "representation_change": 1.2}).name == "rich"


@pytest.mark.parametrize("angle", [0.0, 0.05, 0.5, 1.5])
def test_turning_is_what_no_factor_takes_away(angle):
    """In the plane, H_0 = (1, 0) and H = (cos, sin): min over c of |H - c H_0| / |c H_0| is the tangent."""
    assert turn(1 - math.cos(angle)) == pytest.approx(math.tan(angle), abs=1e-7)
    assert turn(1.0) == turn(1.4) == math.inf and turn(None) is None


def test_the_reason_knows_batch_norm_and_the_optimizer():
    reason = regime({"ntk_drift": 3.0, "ntk_batch_norm_share": 0.8}, "Adam, lr 0.001").reason
    assert "BatchNorm" in reason and "Adam does not follow this NTK" in reason
    plain = regime({"ntk_drift": 3.0, "ntk_batch_norm_share": 0.2}, "SGD, lr 0.1").reason
    assert "BatchNorm" not in plain and "does not follow" not in plain


def of(*claims, **more):
    return theory({"level": "measurements only", "claims": list(claims), **more})


def test_the_worst_forecast_counts():
    rough = {"level": "instance, order 1", "flag": "caution", "reason": "order 1 is a rough correction; 4 % is missing"}
    wrong = {**rough, "flag": "invalid", "reason": "order 1 is not a small correction"}
    none = {"level": "measurements only", "flag": "invalid", "reason": "not an MLP"}
    assert of(VALID) == Badge("to 1/n", "good", "r = 0.01")
    assert of(VALID, rough) == Badge("to 1/n", "caution", "with caution: order 1 is a rough correction")
    assert of(rough, wrong, VALID).name == "beyond 1/n"
    assert of(VALID, none).tone == "good"  # what forecasts nothing judges nothing
    assert of(none, validity={"flag": "invalid", "reason": "not an MLP; no"}).reason == "no forecast: not an MLP"
    assert theory({}).name == "measured only"


def test_infinite_width_alone_is_order_0():
    info = {"level": "ensemble, order 0", "validity": {"flag": "valid", "reason": "r is small"}}
    assert theory(info).name == "order 0" and theory(info).tone == "caution"


def test_a_forecast_of_the_outputs_alone_says_so():
    assert theory({"claims": [VALID]}, ["ntk_drift"]).tone == "good"
    outputs = theory({"claims": [VALID]}, ["output_projection"])
    assert outputs.name == "to 1/n" and outputs.tone == "caution" and "outputs alone" in outputs.reason


def test_divergence_outdoes_all():
    assert theory({"claims": [VALID]}, diverged=13).to_dict() == {
        "name": "diverged",
        "tone": "bad",
        "reason": "the numbers are not finite at step 13: nothing holds from there on",
        "meaning": "",
    }


def test_the_last_measured_values_are_read():
    history = {0: {tag("ntk_drift"): 0.0}, 9: {tag("ntk_drift"): 0.2}, 10: {tag("dntk"): 1.0}}
    assert latest(history, ["ntk_drift", "representation_change"]) == {"ntk_drift": 0.2}
