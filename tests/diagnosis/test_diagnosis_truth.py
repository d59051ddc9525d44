"""The diagnosis against drawn and trained networks, on a part of the grid of ``tests.benchmarks.diagnosis``."""

import pytest

from tests.benchmarks import diagnosis as benchmark


@pytest.mark.slow
def test_printed_numbers_are_those_of_drawn_networks():
    """Within 25 % and three standard errors of 400 networks each, where they are called valid."""
    wrong = benchmark.compare_numbers([(2, 8), (4, 32), (8, 32), (16, 16)], ("tanh", "relu", "gelu"))
    # 24 ensembles with six numbers each: one of them in 370 is beyond three standard errors by itself, if within 25 %.
    assert wrong == []


@pytest.mark.slow
def test_vanishing_and_depth_are_what_training_shows():
    wrong = benchmark.compare_training([(2, 16), (6, 16), (12, 16)], ("tanh", "relu"), seeds=4, fractions=(0.25, 0.5))
    assert wrong == []


def test_a_deep_default_network_does_not_train_and_a_critical_one_does():
    """One pair in the fast suite: ReLU, twelve layers, 200 steps, two seeds."""
    options = {"steps": 200, "seeds": 2, "fractions": (0.25,)}
    assert benchmark.final_loss("relu", "default", 12, 32, **options) > 0.9
    assert benchmark.final_loss("relu", "critical", 12, 32, **options) < 0.5
    for initialization, codes in (("default", {"gradients vanish"}), ("critical", set())):
        found = benchmark.eft.diagnose(benchmark.ensemble_of("relu", initialization, 12, 32, 1)).warnings
        assert {finding.code for finding in found} & {"gradients vanish", "too deep"} == codes
