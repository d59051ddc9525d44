"""The verdict on a quantity: inside its band, left, back, ended, without a band, not predicted."""

import pytest

from torch_eft.results.tags import tag
from torch_eft.tensorboard.verdicts import reading, verdict


def history(values, low=1.0, high=2.0, **more):
    """``values`` of the NTK's drift at steps 0, 10, 20, ..., beside a constant band."""
    series = {"order_1": 1.4, "band_90_low": low, "band_90_high": high, **more}
    return {
        10 * i: {tag("ntk_drift"): value, **{tag("ntk_drift", name): v for name, v in series.items()}}
        for i, value in enumerate(values)
    }


@pytest.mark.parametrize(
    ("values", "state", "words", "short"),
    [
        ([1.1, 1.9], "inside", "inside the 90 % band", "inside"),
        ([1.1, 2.1, 1.9], "inside", "inside the 90 % band; outside at 1 of 3 measurements", "inside"),
        ([1.1, 1.2, 2.1, 2.2], "above", "left the 90 % band at step 20 (above)", "above since 20"),
        ([0.9, 1.2, 0.9], "below", "left the 90 % band at step 20 (below)", "below since 20"),
        ([0.9, 0.8], "below", "below the 90 % band since step 0", "below since 0"),
    ],
)
def test_the_last_measurement_decides_and_the_earlier_ones_are_told(values, state, words, short):
    found = verdict(history(values, quantile=0.3, given_start_low=1.2, given_start_high=1.5), "ntk_drift")
    assert (found.state, found.words, found.short) == (state, words, short)
    assert (found.step, found.measured, found.predicted) == (10 * (len(values) - 1), values[-1], 1.4)
    assert (found.low, found.high, found.quantile) == (1.0, 2.0, 0.3)
    assert (found.given_low, found.given_high) == (1.2, 1.5)
    assert found.to_dict()["words"] == words


def test_a_band_of_no_width_decides_nothing():
    start = {0: {tag("ntk_drift"): 0.0, tag("ntk_drift", "band_90_low"): 0.0, tag("ntk_drift", "band_90_high"): 0.0}}
    found = verdict(history([9.0, 1.5]) | start, "ntk_drift")
    assert (found.words, found.compared) == ("inside the 90 % band", 1)


def test_a_prediction_that_ends_is_judged_to_its_end():
    later = {40: {tag("ntk_drift"): 9.0}}
    assert verdict(history([1.1, 1.2]) | later, "ntk_drift").words == (
        "inside the 90 % band; the prediction ends at step 10"
    )


def test_expansions_have_no_band_and_say_where_they_end():
    line = {step: {tag("ntk_drift"): 0.1, tag("ntk_drift", "taylor_2"): 0.2} for step in (0, 3)}
    found = verdict(line, "ntk_drift")
    assert (found.words, found.predicted, found.state) == ("beside the expansion about theta_0", 0.2, "no band")
    ended = verdict(line | {5: {tag("ntk_drift"): 0.3}}, "ntk_drift")
    at_once = {0: {tag("ntk_drift"): 0.0, tag("ntk_drift", "taylor_2"): 0.0}, 3: {tag("ntk_drift"): 0.3}}
    assert verdict(at_once, "ntk_drift") is None
    assert (ended.words, ended.short) == ("the expansion about theta_0 ends at step 3", "ends at 3")


def test_infinite_width_alone_is_no_prediction_of_what_it_sets_to_0():
    assert verdict({0: {tag("dntk"): 0.1, tag("dntk", "order_0"): 0.0}}, "dntk") is None
    assert verdict({}, "dntk") is None
    assert verdict({0: {tag("dntk"): 0.1, tag("dntk", "order_1"): 0.2}}, "dntk").words == "predicted, without quantiles"


@pytest.mark.parametrize(
    ("quantity", "value", "words"),
    [
        ("ntk_drift", 0.0319, "the NTK moved 3.2 %: lazy"),
        ("ntk_drift", 0.1, "the NTK moved 10 %: weakly moving"),
        ("ntk_drift", 159.2, "the NTK moved 159\N{MULTIPLICATION SIGN}: rich"),
        ("representation_change", 0.09, "the features moved 9.0 %: lazy"),
        ("representation_change", 0.471, "the features moved 47 %: moving"),
        ("representation_change", 0.0, None),
        ("ntk_trace", 3.0, None),
    ],
)
def test_a_measured_value_is_read_without_a_prediction(quantity, value, words):
    assert reading({0: {tag(quantity): 0.0}, 5: {tag(quantity): value}, 6: {}}, quantity) == words
    assert reading({0: {}}, quantity) is None
