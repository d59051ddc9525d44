"""Deviations from the theory, and when they become events."""

import pytest

from torch_eft.live.instrument import Event
from torch_eft.live.record.events import BandWatch, deviations, events_page
from torch_eft.tensorboard import tag


def scalars(measured, order_0=1.0, sigma=None, order_1=None, truncation=None, quantity="ntk_trace"):
    found = {tag(quantity): measured, tag(quantity, "order_0"): order_0}
    center = order_0
    if order_1 is not None:
        found[tag(quantity, "order_1")] = center = order_1
    if sigma is not None:
        found |= {tag(quantity, "minus_sigma"): center - sigma, tag(quantity, "plus_sigma"): center + sigma}
    if truncation is not None:
        found[tag(quantity, "truncation")] = truncation
    return found


def test_z_score_is_taken_from_the_highest_order():
    assert deviations(scalars(2.0, sigma=0.5)) == {"eft-theory/ntk_trace/z_score": 2.0}
    assert deviations(scalars(2.0, sigma=0.5, order_1=1.5)) == {"eft-theory/ntk_trace/z_score": 1.0}


def test_the_ratio_where_there_is_no_sigma():
    assert deviations(scalars(3.0, order_0=2.0)) == {"eft-theory/ntk_trace/ratio": 1.5}
    assert deviations(scalars(3.0, order_0=0.0)) == {}
    assert deviations({tag("ntk_trace"): 1.0}) == {}


def test_leaving_the_band_is_told_once_and_again_after_coming_back():
    watch = BandWatch()
    deviations = [0, 2.9, 3.1, 4, 2.5, 3.5, 1, 3.5]
    reported = [bool(watch.events(step, scalars(1 + z, sigma=1.0))) for step, z in enumerate(deviations)]
    assert reported == [False, False, True, False, False, False, False, True]


def test_the_event_says_what_decided():
    (event,) = BandWatch().events(7, scalars(4.5, sigma=1.0, order_1=1.25))
    assert (event.step, event.quantity) == (7, "ntk_trace")
    assert "measured 4.5, theory 1.25, beyond 3 times" in event.text
    assert "sigma over initializations 1)" in event.text


def test_the_truncation_widens_the_band():
    assert BandWatch().events(0, scalars(5.5, sigma=1.0))
    assert not BandWatch().events(0, scalars(5.5, sigma=1.0, truncation=1.2))  # 3 sqrt(1 + 1.44) = 4.69
    assert BandWatch().events(0, scalars(5.5, truncation=1.2))
    assert not BandWatch().events(0, scalars(5.5))  # no uncertainty, no band


def test_of_quantiles_the_outer_band_is_left_and_the_inner_one_is_back():
    watch = BandWatch()
    names = ("band_90_low", "band_68_low", "order_1", "band_68_high", "band_90_high")
    theory = {tag("ntk_drift", name): value for name, value in zip(names, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True)}
    values = (4.9, 5.1, 4.5, 5.1, 3.9, 0.9)
    found = [watch.events(step, theory | {tag("ntk_drift"): value}) for step, value in enumerate(values)]
    assert [bool(events) for events in found] == [False, True, False, False, False, True]
    assert found[1][0].text == "NTK drift: measured 5.1, above the band of 90 % of networks, 1 .. 5"
    assert "0.9, below the band" in found[5][0].text
    flat = dict.fromkeys(theory, 0.0)
    assert not BandWatch().events(0, flat | {tag("ntk_drift"): 0.1})  # all networks start at 0


def test_the_page_is_a_table():
    page = events_page([Event(3, "ntk_drift", "||H|| moved")])
    assert page.splitlines()[2] == "| 3 | ntk_drift | &#124;&#124;H&#124;&#124; moved |"


def test_unregistered_quantities_cannot_be_logged():
    with pytest.raises(ValueError, match="register_quantity first"):
        tag("mood")
