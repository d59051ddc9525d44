"""Names of what is logged: built, taken apart, and refused where they are not known."""

import pytest

from torch_eft.results.tags import (
    BAND_68,
    BAND_90,
    EXPANSIONS,
    GIVEN_START,
    GIVEN_START_BAND,
    ORDERS,
    QUANTILE,
    SERIES,
    compared_quantities,
    layer_theory_tag,
    quantity_of,
    split_tag,
    tag,
)


def test_every_series_has_a_name_and_is_described():
    assert {*ORDERS, *EXPANSIONS, *BAND_68, *BAND_90, GIVEN_START, *GIVEN_START_BAND, QUANTILE} <= set(SERIES)
    for series, description in SERIES.items():
        assert description
        assert split_tag(tag("ntk_drift", series)) == ("ntk_drift", series)


def test_a_layers_theory_is_told_from_the_layer_itself():
    name = layer_theory_tag("representation_change", "net.2/a", "band_90_low")
    assert name == "eft-layers-theory/representation_change/net.2/a/band_90_low"
    assert split_tag(name) == ("representation_change", "layer-theory/net.2/a/band_90_low")
    assert quantity_of(name) == "representation_change"
    # A layer may have any name.
    assert split_tag("eft-layers/representation_change/a/order_1") == ("representation_change", "layer/a/order_1")
    with pytest.raises(ValueError, match="series: 'measured' given; give one of order_0"):
        layer_theory_tag("representation_change", "1", "measured")
    with pytest.raises(ValueError, match="'weight' is not registered"):
        layer_theory_tag("weight", "1", "order_1")


def test_an_expansion_about_the_start_is_a_theory_too():
    assert compared_quantities({5: {tag("ntk_drift", "taylor_1"), tag("dntk")}}) == ["ntk_drift"]
