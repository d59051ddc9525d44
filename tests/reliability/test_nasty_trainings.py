"""Trainings that go wrong if a measurement leaves the least trace end in the same bits, watched or not."""

import random

import pytest
import torch

from tests.reliability.nasty import INPUTS, NASTY, REFUSED, train


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_training_ends_in_the_same_bits(name):
    alone, _ = train(name, watched=False)
    assert train(name, watched=False)[0] == alone  # reproducible at all
    watched, observer = train(name, watched=True)
    assert watched == alone
    if name in REFUSED:
        assert observer.history == {} and observer.skipped
    else:
        assert 8 in observer.history, observer.skipped


def _touched(net):
    with torch.no_grad():
        net[0].weight.add_(0)


CARELESS = {
    "a forward of the live network": lambda net: net(INPUTS[:3]),
    "a version of a parameter": _touched,
    "a random number": lambda net: random.random(),
    "another": lambda net: torch.rand(()),
    "a mode": lambda net: net[1].eval(),
    "a hook": lambda net: net[1].register_forward_hook(lambda *unused: None),
    "an attribute": lambda net: setattr(net[1], "seen", 1),
    "gradients": lambda net: net[0].bias.grad.zero_(),
}


@pytest.mark.parametrize("what", CARELESS)
def test_the_hash_sees_the_least_trace(what):
    name = "dropout"
    assert train(name, watched=False, careless=CARELESS[what])[0] != train(name, watched=False)[0]
