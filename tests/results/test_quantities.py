"""The registry of quantities is open to users' own."""

import pytest

from torch_eft.results.quantities import HEADLINES, OTHERS, QUANTITIES, documented, register_quantity
from torch_eft.results.tags import quantity_of, tag


@pytest.fixture
def registered():
    before = dict(QUANTITIES)
    yield register_quantity("weight_norm", title="Norm of the weights", formula="||theta||")
    QUANTITIES.clear()
    QUANTITIES.update(before)


def test_a_quantity_of_ones_own_has_tags_and_words(registered):
    assert tag("weight_norm") == "eft-more/weight_norm/measured"
    assert quantity_of("eft-more/weight_norm/measured") == "weight_norm"
    assert documented(["weight_norm"])["weight_norm"]["title"] == "Norm of the weights"
    again = register_quantity("weight_norm", title="Another title", formula="||theta||")
    assert QUANTITIES["weight_norm"] is again is not registered


def test_the_packages_own_quantities_have_a_group(registered):
    assert registered.group == OTHERS
    assert {name for name, quantity in QUANTITIES.items() if quantity.group == OTHERS} == {"weight_norm"}
    assert all(name in QUANTITIES for names in HEADLINES for name in names)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a/b", "letters, digits and underscores"), ("", "letters"), ("ntk_drift", "a quantity of torch_eft itself")],
)
def test_unusable_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        register_quantity(name, title="t", formula="f")


def test_what_is_not_registered_has_no_tag():
    with pytest.raises(ValueError, match="register_quantity first"):
        tag("weight_norm")
    assert quantity_of("eft/weight_norm/measured") is None
