"""Sums over time of gradient descent with momentum: taken up where the last call ended."""

import pytest
import torch

from torch_eft.results.training import Training
from torch_eft.theory.training import time_sums
from torch_eft.theory.training.time_sums import ModePropagator


@pytest.fixture
def taken(monkeypatch):
    """How many steps were summed."""
    count = [0]
    update = time_sums.SGDState.update

    def counted(self, *gradients):
        count[0] += 1
        return update(self, *gradients)

    monkeypatch.setattr(time_sums.SGDState, "update", counted)
    return count


@pytest.mark.parametrize("pairs", [False, True])
def test_later_times_are_summed_on_and_earlier_ones_anew(taken, pairs):
    training = Training(learning_rate=0.1, steps=40, momentum=0.7, dampening=0.2, reduction="sum").summed(1)
    eigenvalues = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
    whole, chunks = ModePropagator(eigenvalues, training), ModePropagator(eigenvalues, training)

    def sums(propagator, steps):
        found = propagator.double(steps) if pairs else propagator.single(steps)
        return [value for value in found if value.shape[0] == len(steps)]

    at_once = sums(whole, torch.arange(41.0))
    assert taken == [40]
    in_parts = [sums(chunks, torch.arange(start, start + 9.0).clamp_max(40)) for start in range(0, 41, 8)]
    assert taken == [80]
    for start, part in zip(range(0, 41, 8), in_parts, strict=True):
        for value, expected in zip(part, at_once, strict=True):
            length = len(expected[start : start + 9])
            assert torch.equal(value[:length], expected[start : start + 9])
    assert torch.equal(sums(chunks, torch.tensor([3.0]))[0][0], at_once[0][3])
    assert taken == [83]
