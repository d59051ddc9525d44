"""The forecast of order 1/n against ensembles of networks that were really trained.

measured / theory is the slope of the measured correction on the predicted one. It tends to 1 like 1 + a/n: the bars
are those of the neglected order, a quarter at n = 32 and half as much at twice the width, beside three standard errors.
"""

import pytest
import torch

from tests.theory.trained.trained_ensembles import measured, projection
from torch_eft import Training
from torch_eft.theory import MLPEnsemble, initial_statistics
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.infinite_width import FrozenTraining


def data(probes, train, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(probes + train, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(train, outputs, dtype=torch.float64, generator=generator)
    return x, y


class Forecast:
    """n times the corrections at one step: for equal ratios of the widths the same at any n."""

    def __init__(self, ensemble, x, y, probes, rate, steps):
        self.x, self.y, self.probes, self.rate, self.steps = x, y, probes, rate, steps
        training = Training(learning_rate=rate, steps=steps, reduction="sum")
        theory = FiniteWidthTraining(FrozenTraining(ensemble, x[probes:], y, x[:probes], training))
        at, n = torch.tensor([steps]), ensemble.widths[-2]
        self.path = theory.path
        self.predicted = {
            "mean": n * theory.mean_output(at).value[0],
            "covariance": n * theory.covariance(at).value[0],
            "ntk": n * theory.ntk_change(at).value[0],
        }
        last = initial_statistics(ensemble, x, statistics=("K", "Theta", "G1", "Theta1"))[-1]
        self.G1, self.Theta1 = last.G1, last.Theta1

    def ratios(self, ensemble, pairs, batch, seed):
        """{observable: (measured / theory, standard error)}."""
        start = (self.path, self.G1, self.Theta1)
        run = (self.x, self.y, self.probes, self.rate, (self.steps,), pairs)
        samples = measured(ensemble, *run, *start, seed, batch)
        return {key: projection(samples[key][:, 0], self.predicted[key]) for key in self.predicted}


def tanh_ensemble(n):
    return MLPEnsemble([3, n, n, 1], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0)


@pytest.fixture(scope="module")
def tanh_forecast():
    x, y = data(1, 3, 1, seed=0)
    return Forecast(tanh_ensemble(32), x, y, 1, rate=0.08, steps=30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "pairs", "batch", "bar"),
    [(32, 16000, 1000, 0.25), (64, 12000, 500, 0.15), (128, 6000, 125, 0.10), (256, 3000, 50, 0.06)],
)
def test_corrections_of_tanh_networks(tanh_forecast, n, pairs, batch, bar):
    for key, (ratio, error) in tanh_forecast.ratios(tanh_ensemble(n), pairs, batch, seed=11).items():
        print(f"n = {n}, {key}: measured / theory = {ratio:.3f} +- {error:.3f}")
        assert abs(ratio - 1) < bar + 3 * error, f"n = {n}, {key}: {ratio:.3f} +- {error:.3f}"


def gelu_ensemble(scale):
    widths = [3, 2 * scale, 3 * scale, 2 * scale, 2]
    return MLPEnsemble(widths, "gelu", C_b=0.1, C_W=1.7, lambda_b=0.3, lambda_W=1.0)


@pytest.mark.slow
def test_corrections_of_gelu_networks_with_three_hidden_layers_and_two_outputs():
    """Where nobody had looked before: the bars of the tanh case at n = 64 and 128 = 2 scale."""
    x, y = data(1, 3, 2, seed=1)
    forecast = Forecast(gelu_ensemble(32), x, y, 1, rate=0.04, steps=20)
    for scale, pairs, batch, bar in ((32, 6000, 125, 0.15), (64, 4000, 50, 0.10)):
        for key, (ratio, error) in forecast.ratios(gelu_ensemble(scale), pairs, batch, seed=12).items():
            print(f"n = {2 * scale}, {key}: measured / theory = {ratio:.3f} +- {error:.3f}")
            assert abs(ratio - 1) < bar + 3 * error, f"n = {2 * scale}, {key}: {ratio:.3f} +- {error:.3f}"
