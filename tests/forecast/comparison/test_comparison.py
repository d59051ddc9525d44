"""The compared quantities over an ensemble of really trained networks: unbiased, with the spread they claim."""

import math

import pytest
import torch

from tests.oracles.ensembles import draw, train
from torch_eft import Training
from torch_eft.forecast.comparison import EnsembleComparison
from torch_eft.theory import MLPEnsemble, initial_statistics, sample_ntk

WIDTHS = [3, 512, 512, 2]
ENSEMBLE = MLPEnsemble(WIDTHS, "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0)
NETWORKS = 400


def summed(rate):
    return Training(learning_rate=rate, steps=100, reduction="sum")


def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    return x[:4], y, x[4:]


@pytest.fixture(scope="module")
def deviations():
    """{quantity: z-scores of 400 networks after 20 steps}."""
    x, y, x_probe = data()
    rate = 0.5 / float(torch.linalg.eigvalsh(initial_statistics(ENSEMBLE, x, statistics=("K", "Theta"))[-1].Theta)[-1])
    comparison = EnsembleComparison(ENSEMBLE, x, y, x_probe, summed(rate), num_networks=200, order=0)
    single = [tensor.float() for tensor in (x, y, x_probe)]
    generator = torch.Generator().manual_seed(17)
    scores = {"output_projection": [], "output_chi_squared": [], "ntk_trace": []}
    kernels = sample_ntk(ENSEMBLE, x_probe, num_networks=NETWORKS, seed=99)
    for _ in range(NETWORKS // 20):
        layers = draw(WIDTHS, 0.1, 1.5, 20, generator, torch.float32)
        outputs = train(layers, *single, torch.tanh, rate, 20, 0.3, 1.0, [20])[20]
        for z in outputs:
            H = next(kernels)
            compared = comparison.compare(20, z, H, H)
            assert compared["ntk_drift"].measured == compared["ntk_drift"].theory == 0
            for quantity, values in scores.items():
                c = compared[quantity]
                values.append((c.measured - c.theory) / c.sigma)
    return {quantity: torch.tensor(values) for quantity, values in scores.items()}


@pytest.mark.slow
@pytest.mark.parametrize("quantity", ["output_projection", "output_chi_squared", "ntk_trace"])
def test_deviations_have_mean_zero_and_variance_one(deviations, quantity):
    z = deviations[quantity]
    # Standard errors: of the mean from the sample; of the variance from its fourth moment; the sigma of
    # ntk_trace is itself from 200 networks, relative error 1/sqrt(400).
    mean_error = float(z.std()) / math.sqrt(NETWORKS)
    variance_error = math.hypot(float((z - z.mean()).square().std()) / math.sqrt(NETWORKS), 2 / math.sqrt(400))
    # The order-1/n shift of these numbers is below r = 3/512 times a few, a fifth of a standard error.
    assert abs(float(z.mean())) < 4 * mean_error
    assert abs(float(z.var()) - 1) < 4 * variance_error
    assert variance_error < 0.2


def test_the_first_direction_is_where_the_mean_moves_first():
    x, y, x_probe = data()
    frozen = EnsembleComparison(ENSEMBLE, x, y, x_probe, summed(1e-4), num_networks=2, order=0).frozen
    mean, _ = frozen.output(torch.tensor([0.0, 1.0]))
    direction = frozen.first_direction()
    torch.testing.assert_close(mean[1] / mean[1].norm(), direction / direction.norm(), rtol=0, atol=1e-9)


def test_comparing_leaves_the_global_random_state_alone():
    x, y, x_probe = data()
    before = torch.get_rng_state()
    EnsembleComparison(ENSEMBLE, x, y, x_probe, summed(1e-3), num_networks=2, order=0)
    assert torch.equal(before, torch.get_rng_state())
