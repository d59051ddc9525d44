"""The ensemble's comparison at order 1: its numbers by hand, its bounds in work, and really trained networks."""

import math

import pytest
import torch

from torch_eft import Training
from torch_eft.forecast.comparison import EnsembleComparison
from torch_eft.forecast.comparison.finite_width import time_grid
from torch_eft.forecast.comparison.work import Allowance
from torch_eft.measure.kernels.metrics import as_trace
from torch_eft.theory import MLPEnsemble, predict_representation, predict_training

F64 = torch.float64
WIDTHS = [3, 64, 64, 1]


def ensemble(activation="tanh", widths=WIDTHS):
    return MLPEnsemble(widths, activation, C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0)


def summed(steps, rate=0.05, **options):
    return Training(learning_rate=rate, steps=steps, reduction="sum", **options)


def data(points=3, probes=2, outputs=1):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(points + probes, 3, dtype=F64, generator=generator)
    y = torch.randn(points, outputs, dtype=F64, generator=generator)
    return x[:points], y, x[points:]


@pytest.mark.slow
def test_the_numbers_are_those_of_the_theory():
    """On and between the steps of the grid, with and without momentum, against predict_training called by hand."""
    x, y, x_probe = data()
    generator = torch.Generator().manual_seed(0)
    z, H, H_0 = (torch.randn(shape, dtype=F64, generator=generator) for shape in ((2, 1), (2, 2, 1, 1), (2, 2, 1, 1)))
    for options in ({}, {"momentum": 0.5}):
        training = summed(60, **options)
        found = EnsembleComparison(ensemble(), x, y, x_probe, training, num_networks=4, allowance=Allowance(60.0))
        wanted = [0, 7, 41]
        trajectory = predict_training(ensemble(), x, y, x_probe, training, at_steps=wanted)
        zeroth = predict_training(ensemble(), x, y, x_probe, training, order=0, at_steps=wanted)
        for index, step in enumerate(wanted):
            compared = found.compare(step, z, H, H_0)
            c = found.direction
            projection = compared["output_projection"]
            mean, mean_0 = trajectory.output_mean[index], zeroth.output_mean[index]
            size = float((mean - mean_0).norm())
            assert projection.order_0 == pytest.approx(float((c * mean_0).sum()), abs=1e-10)
            assert projection.order_1 == pytest.approx(float((c * mean).sum()), abs=2e-3 * size + 1e-10)
            assert projection.measured == pytest.approx(float((c * z).sum()))
            variance = torch.einsum("ai,abij,bj->", c, trajectory.output_covariance[index], c)
            assert projection.sigma == pytest.approx(float(variance.sqrt()), rel=1e-3)
            variances_0 = torch.einsum("aaii->ai", zeroth.output_covariance[index])
            ratio = torch.einsum("aaii->ai", trajectory.output_covariance[index]) / variances_0
            chi_squared = compared["output_chi_squared"]
            assert chi_squared.measured == pytest.approx(float(((z - mean_0).square() / variances_0).mean()))
            assert (chi_squared.order_0, chi_squared.order_1) == (1.0, pytest.approx(float(ratio.mean()), abs=1e-3))
            D, Theta = as_trace(trajectory.ntk_change[index]), as_trace(zeroth.ntk_mean[index])
            drift = compared["ntk_mean_drift"]
            assert drift.order_0 == 0
            assert drift.order_1 == pytest.approx(float(D.norm() / Theta.norm()), rel=2e-3)
            if step:
                along = float(((as_trace(H) - as_trace(H_0)) * D).sum() / D.norm() / Theta.norm())
                assert drift.measured == pytest.approx(along, rel=1e-2)
            trace = compared["ntk_trace"]
            assert trace.order_0 == pytest.approx(float(Theta.diagonal().mean()))
            diagonal = as_trace(trajectory.ntk_mean[index]).diagonal().mean()
            assert trace.order_1 == pytest.approx(float(diagonal), rel=1e-4)
            assert compared["ntk_drift"].order_1 is None
            assert compared["ntk_drift"].measured == pytest.approx(float((H - H_0).norm() / H_0.norm()))
        if not options:
            check_hidden_kernels(found, x, y, x_probe)
        assert found.level == "ensemble, order 1"
        assert found.expansion_parameter(0) <= found.expansion_parameter(10) <= found.expansion_parameter(60)


def check_hidden_kernels(found, x, y, x_probe):
    hidden = predict_representation(
        ensemble(), x, y, x_probe, summed(60), at_steps=[20], ntk=False, num_samples=4096, num_replicas=2
    )
    now, then = ([torch.rand(2, 2, dtype=F64) for _ in range(2)] for _ in range(2))
    H = torch.rand(2, 2, 1, 1, dtype=F64)
    compared = found.compare(20, torch.zeros(2, 1), H, H, (now, then))["representation_mean_drift"]
    layers = found.layers(20, now, then)
    for layer, K, K_0, (measured, predicted) in zip(hidden.layers, now, then, layers, strict=True):
        D, scale = layer.kernel_change[0], layer.kernel_infinite_width.norm()
        assert predicted == pytest.approx(float(D.norm() / scale), rel=1e-6)
        assert measured == pytest.approx(float(((K - K_0) * D).sum() / D.norm() / scale), rel=1e-6)
    assert compared.measured == pytest.approx(sum(m for m, _ in layers) / 2)
    assert compared.order_1 == pytest.approx(sum(p for _, p in layers) / 2)


@pytest.mark.slow
def test_the_forecast_extends_when_the_training_goes_on():
    x, y, x_probe = data()
    H = torch.rand(2, 2, 1, 1, dtype=F64)
    short = EnsembleComparison(ensemble(), x, y, x_probe, summed(20), num_networks=4, allowance=Allowance(60.0))
    expected = predict_training(ensemble(), x, y, x_probe, summed(90), at_steps=[90], corrections=("ntk",))
    D, Theta = as_trace(expected.ntk_change[0]), short.frozen.Theta[:2, :2]
    number = short.compare(90, torch.zeros(2, 1), H, H)["ntk_mean_drift"].order_1
    assert number == pytest.approx(float(D.norm() / Theta.norm()), rel=2e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(activation="relu"), r"the NTK at order 0: .*kink"),
        (dict(points=65), r"65 training points: order 1/n is for up to 64"),
        (
            dict(seconds=0.1, points=20),
            r"the NTK at order 0: about .* s of work of one core, 0.1 s are allowed: forecast_seconds=1 brings it; "
            r"hidden kernels at order 0: .*; the mean .* forecast_seconds=2 brings it; the covariance .*=4 brings it",
        ),
        (dict(widths=[3, *[3] * 12, 1]), r"order 1/n is not drawn: .*too deep for 1/n"),
        (
            dict(seconds=0.0),
            r"the NTK at order 0: about .* 0 s are allowed: forecast_seconds=1 brings it; hidden .*the mean output",
        ),
        (dict(order=0), r"^order 0 \(infinite width\)$"),
    ],
)
def test_without_order_1_it_says_why(change, words):
    import re

    options = dict(activation="tanh", points=3, seconds=60.0, order=1) | change
    x, y, x_probe = data(options.pop("points"))
    options["allowance"] = Allowance(options.pop("seconds"))
    given = ensemble(options.pop("activation"), options.pop("widths", WIDTHS))
    found = EnsembleComparison(given, x, y, x_probe, summed(10, 1e-3), num_networks=4, **options)
    assert re.search(words, found.description), found.description
    compared = found.compare(5, torch.zeros(2, 1), *(torch.eye(2, dtype=F64)[..., None, None],) * 2)
    assert all(each.order_1 is None and each.order_0 is not None for each in compared.values())
    if options["order"] == 0:
        assert found.level == "ensemble, order 0"


def test_a_wrong_order_is_refused():
    with pytest.raises(ValueError, match="order: 2 given"):
        EnsembleComparison(ensemble(), *data(), summed(10), order=2)


@pytest.mark.slow
def test_with_momentum_order_1_ends(monkeypatch):
    x, y, x_probe = data()
    monkeypatch.setattr("torch_eft.forecast.comparison.ensemble._SUMMED_AT_FIRST", 3)
    monkeypatch.setattr("torch_eft.forecast.comparison.ensemble._SUMMED_AT_MOST", 10)
    H = torch.rand(2, 2, 1, 1, dtype=F64)
    found = EnsembleComparison(
        ensemble(), x, y, x_probe, summed(100, momentum=0.5), num_networks=4, allowance=Allowance(60.0)
    )
    numbers = {step: found.compare(step, torch.zeros(2, 1), H, H)["output_projection"] for step in (3, 9, 12)}
    assert numbers[9].order_1 is not None
    assert numbers[12].order_1 is None
    exact = predict_training(ensemble(), x, y, x_probe, summed(12, momentum=0.5), order=0, at_steps=[12])
    assert numbers[12].order_0 == pytest.approx(float((found.direction * exact.output_mean[0]).sum()), rel=1e-9)
    assert "with momentum order 1/n ends at step 10" in found.description


@pytest.mark.slow
def test_few_points_are_sampled_too():
    """Two training points and one probe: of another sample than three points more, but the same theory."""
    x, y, x_probe = data(2, 1)
    found = EnsembleComparison(ensemble(), x, y, x_probe, summed(20), num_networks=4, allowance=Allowance(60.0))
    more = torch.cat([x_probe, torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))])
    expected = predict_training(ensemble(), x, y, more, summed(20), at_steps=[20], corrections=("ntk",))
    D = expected.ntk_change[0, 0, 0, 0, 0]
    H, H_0 = torch.full((1, 1, 1, 1), 2.0, dtype=F64), torch.ones(1, 1, 1, 1, dtype=F64)
    drift = found.compare(20, torch.zeros(1, 1), H, H_0)["ntk_mean_drift"]
    # 2 x 2048 points: moments to some per cent, and what is summed of them.
    assert drift.order_1 == pytest.approx(abs(float(D / found.frozen.Theta[:1, :1])), rel=0.1)
    assert drift.measured == pytest.approx(math.copysign(1, float(D)) / float(found.frozen.Theta[:1, :1]))


def test_the_grid_of_steps():
    grid = time_grid(1000)
    assert grid[:33] == list(range(33))
    assert grid[-1] == 1000
    assert all(1 <= b - a <= max(1, math.ceil(0.085 * a)) for a, b in zip(grid[:-1], grid[1:], strict=True))
    assert time_grid(300, 0.9)[:131] == list(range(131))  # 0.9^(131 / 2) = 0.001
    assert time_grid(0) == [0]
