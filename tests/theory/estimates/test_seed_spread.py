"""The spread from seed to seed: scalar recursions against the tensor ones, exact results and drawn networks."""

import math

import pytest
import torch

from torch_eft.theory import MLPEnsemble, exact_statistics, initial_statistics, sample_ntk
from torch_eft.theory.estimates.seed_spread import _to_first_order, seed_spread, single_input_statistics
from torch_eft.theory.signal_propagation.preactivations import input_moments

NAMES = ("K", "Theta", "G1", "V", "D", "F", "A", "B")
WIDTHS = [6, 20, 35, 25, 3]


@pytest.mark.parametrize("name", ["tanh", "gelu", "elu", "relu", "linear"])
def test_scalar_recursions_are_the_tensor_ones(name):
    """Two independent codes of PDLT 4.3 and 8.2-8.3; both integrate to about 1e-9."""
    ensemble = MLPEnsemble(WIDTHS, name, C_b=0.1, C_W=[1.3, 0.9, 1.8, 1.1], lambda_b=0.7, lambda_W=[6, 2, 3, 1.5])
    x = torch.linspace(-1, 2, 6, dtype=torch.float64)[None]
    expected = initial_statistics(ensemble, x, statistics=NAMES[2:])[-1]
    found = _to_first_order(ensemble, *input_moments(ensemble, x))
    for field in NAMES:
        assert float(getattr(found, field)) == pytest.approx(float(getattr(expected, field).flatten()[0]), rel=1e-8)


def test_two_slopes_are_exact():
    ensemble = MLPEnsemble(WIDTHS, "relu", C_b=0.1, C_W=2.0)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = single_input_statistics(ensemble, x)
    assert found.exact
    for a in range(2):
        expected = exact_statistics(ensemble, x[a : a + 1])[-1]
        for field in NAMES:
            assert float(getattr(found, field)[a]) == float(getattr(expected, field).flatten()[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "C_W"), [("relu", 2.0), ("tanh", 1.0)])
def test_drawn_networks_differ_by_it(name, C_W):
    """3000 networks, the error of a variance from its fourth moment; tanh leaves out terms of relative order r."""
    ensemble = MLPEnsemble([6, 64, 64, 64, 2], name, C_W=C_W, lambda_W=[6, 64, 64, 64])
    x = torch.ones(1, 6, dtype=torch.float64)
    found = seed_spread(ensemble, x)
    H = torch.stack([H[0, 0] for H in sample_ntk(ensemble, x, num_networks=3000)])
    for value, predicted in ((H[:, 0, 0], found.ntk), (H.diagonal(dim1=1, dim2=2).mean(1), found.ntk_trace)):
        relative = value / value.mean()
        squares = (relative - 1).square()
        error = float(squares.std()) / math.sqrt(len(squares))
        truncation = 0.0 if found.exact else predicted**4 + 4 / 64 * predicted**2
        assert abs(float(squares.mean()) - predicted**2) < 4 * error + truncation


def test_zero_inputs_and_networks_without_spread():
    assert seed_spread(MLPEnsemble([4, 2], "tanh")).ntk == 0
    still = seed_spread(MLPEnsemble([4, 20, 2], "tanh", lambda_b=0.0, lambda_W=0.0))
    assert (still.ntk, still.ntk_trace) == (0, 0)
    dead = seed_spread(MLPEnsemble([4, 20, 2], "tanh"), torch.zeros(1, 4))
    assert dead.output == 0


def test_validity_follows_the_size():
    assert seed_spread(MLPEnsemble([4, 300, 300, 2], "tanh")).validity.flag == "valid"
    assert seed_spread(MLPEnsemble([4, 6, 6, 6, 2], "tanh")).validity.flag == "caution"
    assert seed_spread(MLPEnsemble([4, *[4] * 9, 2], "tanh")).validity.flag == "invalid"
    heavy = seed_spread(MLPEnsemble([4, *[6] * 9, 2], "relu", C_W=2.0))
    assert heavy.exact
    assert "heavy tail" in heavy.validity.reason


def test_a_spread_beyond_float64_is_refused():
    with pytest.raises(ValueError, match="beyond float64; use fewer or wider layers"):
        seed_spread(MLPEnsemble([4, *[2] * 600, 2], "relu", C_W=2.0))
