"""A snapshot's change to second order about theta_0: exact where it is quadratic, and as autograd's derivatives say."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_eft import measure
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.network.batch_norm import batch_norms, with_batch_statistics

PLAN = measure.Plan(ntk=True, hidden=True)


def displaced(model, size, seed=3):
    """theta_0 and theta, of the trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    theta_0 = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = {name: size * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in theta_0.items()}
    return theta_0, {name: theta_0[name] + step[name] for name in theta_0}


def expanded(model, x, size, plan=PLAN, **options):
    """The expansion, theta_0 and the displacement."""
    theta_0, theta = displaced(model, size)
    prepare = options.get("prepare")
    with measure.Network(model, x) as isolated:
        ready = isolated.current if prepare is None else prepare(isolated.current)
        with measure.Network(ready, x, **options) as network:
            start, end = (network.at(at).snapshot(plan) for at in (theta_0, theta))
            expansion = network.expansion(theta_0, theta, plan, start, end)
    return expansion, theta_0, {name: theta[name] - theta_0[name] for name in theta_0}


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 2e-3)])
def test_of_a_linear_network_with_one_hidden_layer_two_orders_are_all(dtype, tolerance):
    """H and K are quadratic in its parameters; of rounding, 4 eps, differences leave eps^(1/2) / drift^(1/2)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)).to(dtype)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    expansion, _, _ = expanded(model, x, 0.03, measure.Plan(ntk=True, hidden=True, layers=["0"]))
    assert set(expansion.change.hidden) == {"0"}
    for of in (lambda snapshot: snapshot.ntk, lambda snapshot: snapshot.hidden["0"]):
        first, both, change = of(expansion.first), of(expansion.first) + of(expansion.second), of(expansion.change)
        assert relative(both, change) < tolerance < 0.05 < relative(first, change)


def convolutional():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 4, 3, stride=2), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 2)).double()


def along(value_at):
    """First derivative and half of the second one at 0 of a function of one number, by autograd."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(value_at(t), t, create_graph=True)
    (second,) = torch.autograd.grad(first, t)
    return float(first.detach()), float(second.detach()) / 2


def contracted(function, leaves, weights):
    """sum w H for H = J J^T of the outputs of ``function`` in ``leaves``, differentiable in whatever they depend on."""
    z = function(leaves).flatten()
    J = [torch.autograd.grad(each, list(leaves.values()), create_graph=True) for each in z]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in J])
    return (weights * (J @ J.T)).sum()


def test_changes_of_kernels_are_those_that_autograd_finds():
    """Contracted with random matrices; differences leave s^2 out, 1e-6, and rounding over s^2, 1e-8."""
    model = convolutional()
    x = torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    expansion, theta_0, d = expanded(model, x, 0.02)
    assert 0.01 < expansion.gauge < 1 and list(expansion.first.hidden) == ["2", "4"]
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(6, 6, generator=generator).double()

    def moved(t):
        return {name: theta_0[name].clone().requires_grad_() + t * d[name] for name in theta_0}

    def ntk(t):
        return contracted(lambda p: torch.func.functional_call(model, p, (x,)), moved(t), w)

    first, second = along(ntk)
    for found, expected in ((expansion.first, first), (expansion.second, second)):
        assert float((w * measure.as_matrix(found.ntk)).sum()) == pytest.approx(expected, rel=1e-5)
    for layer in ("2", "4"):
        cut, v = model[: int(layer) + 1], w[:3, :3]

        def kernel(t, cut=cut, v=v):
            h = torch.func.functional_call(cut, {k: p for k, p in moved(t).items() if k in cut.state_dict()}, (x,))
            return (v * (h.flatten(1) @ h.flatten(1).T)).sum() / h[0].numel()

        first, second = along(kernel)
        assert float((v * expansion.first.hidden[layer]).sum()) == pytest.approx(first, rel=1e-5)
        assert float((v * expansion.second.hidden[layer]).sum()) == pytest.approx(second, rel=1e-5)


def test_statistics_of_batch_norm_move_with_the_parameters():
    """H at theta has the statistics at theta, constants for its Jacobian only: by autograd, with two sets of leaves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()
    prepare = partial(with_batch_statistics, inputs=Probe(x), norms=batch_norms(model))
    expansion, theta_0, d = expanded(model, x, 0.03, prepare=prepare)
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double()

    def ntk(t):
        leaves, ours = ({name: theta_0[name] + t * d[name] for name in theta_0} for _ in range(2))
        h = F.linear(x, ours["0.weight"], ours["0.bias"])
        mean, variance = h.mean(0), h.var(0, correction=0)

        def function(p):
            h = (F.linear(x, p["0.weight"], p["0.bias"]) - mean) / (variance + model[1].eps).sqrt()
            return F.linear(torch.tanh(h * p["1.weight"] + p["1.bias"]), p["3.weight"], p["3.bias"])

        return contracted(function, leaves, w)

    first, second = along(ntk)
    assert float((w * measure.as_matrix(expansion.first.ntk)).sum()) == pytest.approx(first, rel=1e-5)
    assert float((w * measure.as_matrix(expansion.second.ntk)).sum()) == pytest.approx(second, rel=1e-5)


def test_no_expansion_of_what_hardly_changes_nor_outside_of_with():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    assert expanded(model, x, 1e-6)[0] is None  # the second order would be rounding
    assert expanded(model, x, 1e-2)[0] is not None
    network, snapshot = measure.Network(model, x), measure.Snapshot(torch.zeros(3, 2), torch.eye(3), {})
    with pytest.raises(RuntimeError, match="not isolated"):
        network.expansion(model, model, PLAN, snapshot, snapshot)
    with network, pytest.raises(ValueError, match="is missing; name every trainable parameter"):
        network.expansion({}, model, PLAN, snapshot, snapshot)
