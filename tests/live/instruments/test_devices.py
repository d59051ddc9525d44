"""No tensor of the live comparison is made without a device: around everything, tensors without one have no data."""

import pytest
import torch
from torch.nn import functional as F

from tests.live.instruments.loop import data, mlp
from tests.measure.devices import poisoned, waits
from torch_eft import Training
from torch_eft.forecast.comparison import EnsembleComparison, InstanceComparison
from torch_eft.forecast.comparison.work import Allowance
from torch_eft.live.instruments.expansion import expansion_scalars
from torch_eft.live.instruments.forecasts.full_batch import FullBatch
from torch_eft.live.instruments.interval import interval_compared
from torch_eft.measure.network.network import Network
from torch_eft.measure.network.snapshot import Plan
from torch_eft.measure.taylor.displacement import displacement_terms, relative_dntk
from torch_eft.measure.taylor.series import taylor_sizes
from torch_eft.measure.training_loss import recognize_loss
from torch_eft.theory import MLPEnsemble


def setting(outputs=1):
    model = mlp(16, outputs)
    x, y, x_probe = data(3, 2, outputs)
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    moved = {name: p + 0.01 * torch.randn(p.shape, generator=generator) for name, p in theta.items()}
    return model, theta, moved, x, y, x_probe


def step_of(model, x, y):
    loss = F.mse_loss(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), dict(zip([name for name, _ in model.named_parameters()], gradients, strict=True))


def intervals():
    model, theta, moved, _, _, x_probe = setting()
    return lambda: interval_compared(displacement_terms(model, x_probe, theta, moved), 3)


def dntk():
    model, theta, moved, _, _, x_probe = setting()
    return lambda: relative_dntk(model, x_probe, moved, theta=theta)


def expansion():
    model, theta, moved, _, _, x_probe = setting()
    plan = Plan(ntk=True, hidden=True)

    def measured():
        with Network(model, x_probe) as network:
            start, end = (network.at(at).snapshot(plan) for at in (theta, moved))
            return expansion_scalars(network.expansion(theta, moved, plan, start, end), start)

    return measured


def taylor():
    model, theta, moved, _, _, x_probe = setting()
    return lambda: taylor_sizes(model, x_probe, theta, moved)


def ensemble():
    _, _, _, x, y, x_probe = setting()
    eye = torch.eye(2)[..., None, None]
    given = MLPEnsemble([3, 16, 16, 1], "tanh")

    training = Training(learning_rate=0.01, steps=5, reduction="sum")
    found = EnsembleComparison(given, x, y, x_probe, training, num_networks=4, allowance=Allowance(60.0))
    kernels = [torch.rand(2, 2)] * 2, [torch.rand(2, 2)] * 2
    return lambda: found.compare(4, torch.ones(2, 1, device="cpu"), 2 * eye, eye, kernels)


def instance():
    model, _, _, x, y, x_probe = setting()
    loss, gradients = step_of(model, x, y)
    eye = torch.eye(2)[..., None, None]

    lambdas = dict.fromkeys(gradients, 1.0)
    forecast = InstanceComparison(
        model,
        x,
        y,
        x_probe,
        Training(learning_rate=0.001, momentum=0.5, steps=6),
        lambdas=lambdas,
        allowance=Allowance(60.0),
    )

    def measured():
        recognize_loss(model, x, y, loss, gradients)
        return forecast.compare(5, torch.ones(2, 1, device="cpu"), 2 * eye, eye)

    return measured


@pytest.mark.parametrize("make", [intervals, expansion, dntk, taylor, ensemble, instance])
def test_tensors_are_made_where_the_model_is(make):
    measured = make()
    expected = measured()  # plans and methods of the model are verified, and remembered
    with poisoned():
        assert measured() == expected


def test_watching_batches_does_not_wait_for_the_device():
    """Every training step would; the answer is read when a measurement asks."""
    _, _, _, x, y, _ = setting()
    model = mlp(16, 1)
    seen = FullBatch(None)
    seen.observe_batch((x, y))
    seen.begin(torch.optim.SGD(model.parameters(), lr=0.1))
    assert waits(lambda: seen.observe_batch((x.flip(0), y.flip(0)))) == 0
    assert seen.changed() is None
    seen.observe_batch((x[:2], y[:2]))
    assert "other samples" in seen.changed()
