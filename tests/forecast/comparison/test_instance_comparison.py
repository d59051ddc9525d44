"""One network's forecast beside its training: the numbers by hand, the bounds, and really trained networks."""

import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.forecast.trained import network, train
from torch_eft import Training, measure
from torch_eft.forecast.comparison import InstanceComparison
from torch_eft.forecast.comparison.work import Allowance
from torch_eft.forecast.network import predict_from_network

F64 = torch.float64


def setting(width=24, seed=0, outputs=2):
    generator = torch.Generator().manual_seed(seed)
    model, lambdas = network([3, width, width, outputs], generator, C_b=0.1, lambda_b=0.5)
    points = torch.Generator().manual_seed(11)
    x = torch.randn(6, 3, dtype=F64, generator=points)
    y = torch.randn(4, outputs, dtype=F64, generator=points)
    return model, lambdas, x[2:], y, x[:2]


CASES = {
    "mean squared error": dict(learning_rate=0.05),
    "momentum": dict(learning_rate=0.02, momentum=0.8, reduction="sum"),
    "cross-entropy, Nesterov": dict(loss="cross_entropy", learning_rate=0.05, momentum=0.5, nesterov=True),
    "any loss": dict(loss=F.smooth_l1_loss, learning_rate=0.05, momentum=0.5, dampening=0.5),
}


def compare(model, lambdas, x, y, x_probe, steps=10, learning_rate=0.05, seconds=60, **options):
    training = Training(learning_rate=learning_rate, steps=steps)
    return InstanceComparison(model, x, y, x_probe, training, lambdas=lambdas, allowance=Allowance(seconds), **options)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_forecast(name):
    training = Training(steps=30, **CASES[name])
    model, lambdas, x, y, x_probe = setting()
    if training.loss == "cross_entropy":
        y = torch.tensor([0, 1, 1, 0])
    found = InstanceComparison(model, x, y, x_probe, training, lambdas=lambdas, allowance=Allowance(60.0))
    forecasts = [predict_from_network(model, x, y, x_probe, training, lambdas=lambdas, order=order) for order in (0, 1)]
    assert found.level == "instance, order 1"
    assert found.validity == forecasts[1].validity
    z, H, H_0 = torch.randn(2, 2), torch.randn(2, 2, 2, 2), torch.randn(2, 2, 2, 2)
    compared = found.compare(20, z, H, H_0)
    (z_0, z_1), start = (each.output_mean[20] for each in forecasts), forecasts[0].output_mean[0]
    u = (z_0 - start) / (z_0 - start).norm()
    output = compared["instance_output"]
    assert output.measured == pytest.approx(float(((z - start) * u).sum()) / 2)
    assert output.order_0 == pytest.approx(float((z_0 - start).norm()) / 2)
    assert output.order_1 == pytest.approx(float(((z_1 - start) * u).sum()) / 2)
    largest = (forecasts[0].output_mean[:21] - start).flatten(1).norm(dim=1).max()
    error = compared["instance_output_error"]
    assert error.order_0 == pytest.approx(float((z - z_0).norm() / largest))
    assert error.order_1 == pytest.approx(float((z - z_1).norm() / largest))
    D = forecasts[1].ntk_change[20]
    drift, ntk_error = compared["ntk_drift"], compared["instance_ntk_error"]
    assert (drift.order_0, drift.order_1) == (0, pytest.approx(float(D.norm() / H_0.norm()), rel=1e-6))
    assert drift.measured == ntk_error.order_0 == pytest.approx(float((H - H_0).norm() / H_0.norm()), rel=1e-6)
    assert ntk_error.order_1 == pytest.approx(float((H - H_0 - D).norm() / H_0.norm()), rel=1e-6)
    rms = forecasts[1].ntk_mean[0].square().mean().sqrt()
    g = math.sqrt(float(forecasts[1].ntk_truncation[20].max() / rms))
    assert found.expansion_parameter(20) == pytest.approx(g)
    assert drift.truncation == pytest.approx(g**2, abs=2e-6)
    assert found.compare(0, z, H, H_0) == {}
    assert set(found.compare(20, z, None, None)) == {"instance_output", "instance_output_error"}


def test_it_extends_from_theta_0_when_the_training_goes_on():
    model, lambdas, x, y, x_probe = setting()
    found = compare(model, lambdas, x, y, x_probe)
    expected = predict_from_network(model, x, y, x_probe, learning_rate=0.05, steps=40, lambdas=lambdas)
    with torch.no_grad():  # the live network has moved since
        for p in model.parameters():
            p.add_(1.0)
    assert found.steps == 10
    assert found.reaches(25)
    assert found.steps == 40
    torch.testing.assert_close(found.order_1.output_mean, expected.output_mean)


def test_a_long_training_is_forecast_piece_by_piece(monkeypatch):
    """2000 steps at first; on as long as the work for the whole stays within what is allowed."""
    model, lambdas, x, y, x_probe = setting()
    monkeypatch.setattr("torch_eft.forecast.comparison.instance._LONGEST_AT_ONCE", 20)
    found = compare(model, lambdas, x, y, x_probe, 10**6)
    assert found.steps == 20
    assert found.reaches(21)
    assert found.steps == 80
    work = {steps: found._work(steps, found._modes) for steps in (90, 100)}
    found._allowance.seconds = (work[90] + work[100]) / 2  # 4 times as many are too much, a few more are not
    assert found.reaches(90)
    assert found.steps == 90
    assert not found.reaches(100)
    assert found.steps == 90


def test_what_is_drawn_does_not_depend_on_the_clock(monkeypatch):
    """On a clock on which everything takes a quarter of an hour: the same directions."""
    model, lambdas, x, y, x_probe = setting()
    expected = compare(model, lambdas, x, y, x_probe, seconds=0.2)
    ticks = itertools.count()
    for name in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(f"time.{name}", lambda: 1e3 * next(ticks))
    found = compare(model, lambdas, x, y, x_probe, seconds=0.2)
    assert found.description == expected.description
    assert 3 <= found._modes < 24


def test_bounds():
    model, lambdas, x, y, x_probe = setting()
    with pytest.raises(ValueError, match=r"12 outputs on training and probe points; .* up to 11"):
        compare(model, lambdas, x, y, x_probe, largest=11)
    with pytest.raises(ValueError, match="beyond the linear stability bound"):
        compare(model, lambdas, x, y, x_probe, learning_rate=1e3)
    found = compare(model, lambdas, x, y, x_probe, seconds=1e-9)
    assert found.level == "instance, order 0"
    assert re.search(
        r"dNTK and ddNTK in 3 directions takes about .* 1e-09 s are allowed: forecast_seconds=1 brings",
        found.description,
    )
    assert found.expansion_parameter(5) is None
    compared = found.compare(5, torch.zeros(2, 2), torch.zeros(2, 2, 2, 2), torch.ones(2, 2, 2, 2))
    assert compared["instance_output"].order_1 is compared["instance_ntk_error"].order_1 is None


def test_a_network_with_kinks_has_no_truncation():
    model, lambdas, x, y, x_probe = setting()
    model = nn.Sequential(*[nn.ReLU() if isinstance(layer, nn.Tanh) else layer for layer in model])
    found = compare(model, lambdas, x, y, x_probe)
    compared = found.compare(5, torch.zeros(2, 2), torch.zeros(2, 2, 2, 2), torch.ones(2, 2, 2, 2))
    assert compared["ntk_drift"].order_1 is not None
    assert compared["ntk_drift"].truncation is compared["instance_output"].truncation is None
    assert "almost everywhere" in found.validity.reason


@pytest.mark.slow
def test_on_average_order_1_is_closer_in_real_trainings():
    """Errors of outputs and NTK after 60 steps at n = 96, over 24 networks: log-ratios of the two orders."""
    ratios = []
    for seed in range(24):
        model, lambdas, x, y, x_probe = setting(96, seed, outputs=1)
        found = compare(model, lambdas, x, y, x_probe, 60, 0.2)
        trained = train(model, lambdas, x, lambda z, _, y=y: F.mse_loss(z, y), x_probe, 0.2, 60, record=(0, 60))
        compared = found.compare(60, trained.outputs[-1][:2], trained.ntks[60], trained.ntks[0])
        row = [compared[name] for name in ("instance_output_error", "instance_ntk_error")]
        ratios.append([math.log(each.order_1 / each.order_0) for each in row])
    values = torch.tensor(ratios)
    mean, error = values.mean(0), values.std(0) / math.sqrt(24)
    assert (mean + 3 * error < 0).all(), (mean, error)


def test_the_network_is_left_alone():
    model, lambdas, x, y, x_probe = setting()
    model.train()
    before = [p.detach().clone() for p in model.parameters()]
    random = torch.get_rng_state()
    compare(model, lambdas, x, y, x_probe)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert measure.output(model, x).dtype == F64
