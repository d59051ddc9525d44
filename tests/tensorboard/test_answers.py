"""What the first screen says of a run: how it ended, where it lies against the theory, what would change it."""

import json

import pytest

from tests.tensorboard.eft_runs import run_info
from torch_eft.results.regime import theory
from torch_eft.tensorboard.answers import EDGE, TOO_DEEP, summary
from torch_eft.tensorboard.run_info import parse_run_info
from torch_eft.theory.signal_propagation import regimes

STEPS = (0, 10, 25)


def line(*values):
    return [[step, value] for step, value in zip(STEPS, values, strict=True)]


def forecast(measured, low=0.0, high=0.2, share=0.5):
    """A measured line beside a median and a band that widen from 0, at quantile ``share``."""
    return {
        "measured": line(0.0, measured / 2, measured),
        "order_1": line(0.0, (low + high) / 4, (low + high) / 2),
        "band_90_low": line(0.0, low / 2, low),
        "band_90_high": line(0.0, high / 2, high),
        "quantile": line(share, share, share),
    }


def of(info=None, **quantities):
    return summary(run_info(**(info or {})), quantities)


@pytest.mark.parametrize(
    ("progress", "state", "words"),
    [
        ({"state": "ended", "step": 25, "planned": 25}, "ended", "ended at step 25"),
        ({"state": "ended", "step": 25, "planned": None}, "ended", "ended at step 25"),
        ({"state": "ended", "step": 25, "planned": 300}, "early", "ended early at step 25 of 300"),
        ({"state": "interrupted", "step": 25, "planned": None}, "early", "ended early at step 25"),
        ({"state": "running", "step": None, "planned": 300}, "running", "at step 25 of 300"),
        ({"state": "ended", "step": 60, "diverged": 26}, "diverged", "diverged at step 26; charts end at 25"),
        (None, "running", "last measured at step 25"),
    ],
)
def test_how_a_run_ended(progress, state, words):
    ending = of({"progress": progress}, ntk_drift={"measured": line(0.0, 0.1, 0.2)})["ending"]
    assert (ending["state"], ending["words"]) == (state, words)


@pytest.mark.parametrize("bad", [None, 1e9])
def test_numbers_that_are_not_finite_are_a_divergence(bad):
    found = of(ntk_drift={"measured": line(0.0, 0.1, bad)})
    assert found["ending"]["state"] == "diverged" and found["ending"]["diverged"] == 25
    assert found["theory"]["name"] == "diverged"
    assert found["advice"] == ["Lower the learning rate (here: SGD) until the numbers stay finite."]


def test_a_lazy_run_on_theory():
    found = of(ntk_drift=forecast(0.05, 0.03, 0.07, 0.6), representation_change=forecast(0.04, 0.03, 0.07, 0.2))
    assert found["regime"]["name"] == "lazy" and found["theory"]["name"] == "to 1/n"
    assert found["drift"] == {"measured": 0.05, "predicted": 0.05, "low": 0.03, "high": 0.07}
    assert found["compared"]["words"] == "inside the 90 % band"
    inside = "inside the 90 % band"
    assert found["compared"]["rows"] == [
        ["NTK drift", "+0.3 σ", inside],
        ["features", "\N{MINUS SIGN}0.8 σ", inside],
    ]
    assert found["compared"]["left"] == "outside at 0 of 4 measurements; one in ten is by chance"
    # r = 0.023: a quarter of the width is still below the edge.
    assert found["advice"] == [
        "Nothing is wrong.",
        "To be lazier: hidden widths x2 → drift about 2.5 %.",
        "To learn features: hidden widths / 4 → drift about 20 %.",
    ]


def test_a_moving_run_off_theory():
    found = of(ntk_drift=forecast(0.5, 0.1, 0.3, 1.0))
    assert found["regime"]["name"] == "moving"
    assert found["compared"]["words"] == "NTK drift outside the 90 % band"
    assert found["compared"]["rows"] == [["NTK drift", "above 3 σ", "above the 90 % band since step 10"]]
    assert "2 of 2 measurements: train other seeds" in found["advice"][0]
    assert found["advice"][1] == "To be lazy: hidden widths x8 → drift about 6.2 %."


def test_infinite_width_alone_is_no_success():
    order_0 = {"level": "ensemble, order 0", "flag": "valid", "reason": "r is small"}
    lines = {"measured": line(0.0, 0.1, 0.2), "order_0": line(0.0, 0.0, 0.0), "taylor_2": line(0.0, 0.1, 0.21)}
    found = of({"level": "ensemble, order 0", "claims": [order_0]}, ntk_drift=lines)
    assert found["theory"]["name"] == "order 0"
    assert found["compared"]["words"] == "infinite width predicts no change of NTK and features"
    expanded = ["NTK drift, expansion", "\N{MINUS SIGN}5 % at step 25", "beside the expansion about theta_0"]
    assert found["compared"]["rows"] == [expanded]
    assert found["advice"] == ["To be lazy: hidden widths x4 → drift about 5.0 %."]


def test_one_of_several_outside_is_named():
    found = of(ntk_drift=forecast(0.05, 0.03, 0.07), dntk=forecast(0.5, 0.1, 0.3, 1.0))
    assert found["compared"]["words"] == "inside the 90 % band; dNTK outside"


@pytest.mark.parametrize(
    ("r", "depth", "words"),
    [
        (0.5, 8, "Deep for order 1/n: hidden widths x2.5 bring r and ε to 0.2 or below; so does L = 3."),
        (1.25, 30, "Too deep for order 1/n: hidden widths x6.3 bring r and ε to 0.2 or below; so does L = 4."),
        (2.0, 4, "Too deep for order 1/n: hidden widths x10 bring r and ε to 0.2 or below."),
    ],
)
def test_too_deep_is_said_first_with_both_remedies(r, depth, words):
    found = of({"r": r, "depth": depth, "epsilon": 0.1}, ntk_drift=forecast(0.05))
    assert found["advice"][0] == words
    assert found["size"]["edge"] == EDGE


def test_the_edge_follows_the_larger_of_r_and_epsilon():
    size = of({"r": 0.1, "epsilon": 0.4})["size"]
    assert size.pop("remedy").startswith("Deep for order 1/n: hidden widths x2 ")
    assert size == pytest.approx({"larger": 0.4, "edge": 0.05, "too_deep": 0.25})
    assert (EDGE, TOO_DEEP) == (regimes.EDGE, regimes.TOO_DEEP)


def test_what_has_no_theory_says_why_and_promises_no_law():
    none = {"level": "measurements only", "validity": {"flag": "invalid", "reason": "not an MLP: Conv2d; more"}}
    found = of(none | {"r": None}, ntk_drift={"measured": line(0.0, 1.0, 3.0)})
    assert found["theory"]["name"] == "measured only"
    assert found["compared"] == {"state": "none", "words": "no forecast: not an MLP: Conv2d", "rows": [], "left": ""}
    assert found["advice"] == [
        "No law of the width is known for this kind of network: train it at twice the width and compare."
    ]
    adam = of({"optimizer": "Adam, lr 0.001"}, ntk_drift={"measured": line(0.0, 0.1, 0.3)})
    assert "law is of gradient descent" in adam["advice"][-1]


def test_a_band_of_a_forecast_that_does_not_hold_is_no_success():
    wrong = {"level": "ensemble, order 1", "flag": "invalid", "reason": "what is neglected is not smaller; more"}
    found = of({"claims": [wrong]}, ntk_drift=forecast(0.05))
    assert found["compared"]["state"] == "doubtful"
    assert found["compared"]["words"] == "the forecast does not hold: what is neglected is not smaller"
    assert "Do not rely on the bands" in found["advice"][0]


def test_a_run_without_description_is_summarized_from_its_numbers():
    found = summary(None, {"ntk_drift": {"measured": line(0.0, 0.1, 0.2)}})
    assert found["regime"]["name"] == "weakly moving" and found["theory"]["name"] == "not known"
    assert summary(None, {})["ending"]["words"] == "nothing measured yet"
    assert json.dumps(summary(None, {}), allow_nan=False)


def test_absurd_numbers_of_a_damaged_file_are_no_error():
    for absurd in ({"r": 10**400, "epsilon": 0.1}, {"r": -1.0}, {"r": 1e-320, "depth": 10**400}):
        found = of(absurd, ntk_drift={"measured": line(0.0, 0.1, 1e308)})
        assert json.dumps(found, allow_nan=False)


def test_damaged_claims_and_progress_are_no_run_info():
    for damaged in (
        {"left_out": 3},
        {"left_out": [3]},
        {"expected_drift": [0.1, "x"]},
        {"expected_drift": [0.1]},
        {"claims": {}},
        {"claims": [3]},
        {"progress": [1]},
        {"progress": {"step": "x"}},
    ):
        assert parse_run_info(json.dumps(damaged)) is None, damaged
    assert theory(parse_run_info(json.dumps({"claims": [{}], "progress": {"state": None}}))).name == "measured only"
