"""Recorded trajectories of networks and Taylor models: against measurements by hand, and beside their forecast."""

from functools import partial

import pytest
import torch

from tests.forecast.trained import F64, network, train
from tests.oracles.recorder import recorded
from torch_eft import measure, predict_from_network
from torch_eft.measure import PerturbativeTaylorModel, TaylorModel
from torch_eft.results.trajectory import Validity, trajectory_from_records

STEPS, RATE = 20, 0.05


def case(n=128):
    generator = torch.Generator().manual_seed(3)
    model, lambdas = network([3, n, n, 2], generator, C_b=0.1)
    x = torch.randn(5, 3, dtype=F64, generator=generator)
    return model, lambdas, x[2:], torch.randn(3, 2, dtype=F64, generator=generator), x[:2]


def squared(y):
    return lambda z: (z - y).square().sum() / 2


def sgd(model, lambdas):
    return torch.optim.SGD([dict(params=[p], lr=RATE * lambdas[name]) for name, p in model.named_parameters()])


def test_a_measured_run_is_a_trajectory():
    model, lambdas, x, y, x_probe = case()
    forecast = predict_from_network(
        model, x, y, x_probe, learning_rate=RATE, steps=STEPS, reduction="sum", lambdas=lambdas
    )
    optimizer, loss = sgd(model, lambdas), squared(y)

    def step():
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()

    found = recorded(model, step, 5, STEPS, x_probe, x, lambdas)
    again = case()
    real = train(*again[:3], lambda z, samples: squared(y[samples])(z), x_probe, RATE, STEPS, range(0, STEPS + 1, 5))
    assert found.steps.tolist() == [0, 5, 10, 15, 20]
    torch.testing.assert_close(found.output_mean, real.outputs[::5, :2], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.train_output_mean, real.outputs[::5, 2:], rtol=0, atol=1e-12)
    H = torch.stack(list(real.ntks.values()))
    torch.testing.assert_close(found.ntk_mean, H, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.ntk_change, H - H[0], rtol=1e-8, atol=1e-9)
    assert found.output_covariance is None and found.output_truncation is None and found.output_error is None
    assert found.validity.flag == "valid"
    # Order 1 is twice closer than the frozen forecast, which errs by the whole drift.
    assert float((found.ntk_change[-1] - forecast.ntk_change[-1]).norm()) < float(found.ntk_change[-1].norm()) / 2


@pytest.mark.parametrize("kind", [partial(TaylorModel, taylor_order=1), TaylorModel, PerturbativeTaylorModel])
def test_taylor_models_are_beside_their_forecasts(kind):
    """At order 1 the NTK stands still and outputs are those of the frozen forecast; at order 3 it moves as order 1."""
    model, lambdas, x, y, x_probe = case()
    shadow = kind(model)
    order = 0 if shadow.taylor_order == 1 else 1
    forecast = predict_from_network(
        model,
        x,
        y,
        x_probe,
        learning_rate=RATE,
        steps=STEPS,
        reduction="sum",
        lambdas=lambdas,
        order=order,
        tolerance=1e-8,
    )
    own = shadow.optimizer_like(sgd(model, lambdas))
    perturbative = isinstance(shadow, PerturbativeTaylorModel)  # its NTK is not one matrix
    found = recorded(
        shadow, lambda: shadow.step(x, squared(y), own), 5, STEPS, x_probe, lambdas=lambdas, with_ntk=not perturbative
    )
    moved = float((found.output_mean[-1] - found.output_mean[0]).norm())
    # Estimated within a factor of a few, counted as five as in test_forecast.
    next_order = 0.0 if order == 0 else 5 * float(forecast.output_truncation[-1].norm())
    off = float((found.output_mean - forecast.output_mean[::5]).norm(dim=(1, 2)).max())
    assert found.train_output_mean is None and found.output_covariance is None
    if perturbative:
        assert found.ntk_mean is None and found.ntk_change is None
        assert off < next_order  # dNTK twice is in one, not in the other
        return
    torch.testing.assert_close(found.ntk_mean[0], measure.ntk(model, x_probe, lambdas=lambdas), rtol=1e-10, atol=1e-10)
    if shadow.taylor_order == 1:
        assert off < 1e-9 * moved
        assert float(found.ntk_change.abs().max()) < 1e-12
        return
    assert off < next_order
    drift = forecast.ntk_change[-1]
    assert float((found.ntk_change[-1] - drift).norm()) < float(drift.norm()) / 2


VALID = Validity("valid", "")
Z = [torch.zeros(2, 1)] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trajectory_from_records([], [], "", VALID), r"steps: \[\] given"),
        (lambda: trajectory_from_records([1, 1], Z, "", VALID), r"steps: \[1, 1\] given"),
        (
            lambda: trajectory_from_records([0, 1, 2], Z, "", VALID),
            r"outputs: 2 records of shapes \[\(2, 1\)\] given for 3",
        ),
        (lambda: trajectory_from_records([0, 1], [Z[0], Z[0].T], "", VALID), r"outputs: 2 records of shapes"),
        (lambda: trajectory_from_records([0, 1], Z, "", VALID, [torch.zeros(3, 3, 1, 1)] * 2), r"ntks: \(3, 3, 1, 1\)"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
