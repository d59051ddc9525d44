"""A network bound once: the same numbers as by the functions, and one isolated copy for all of them."""

import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.measure.zoo import randn
from torch_eft import measure
from torch_eft.measure.forward import isolation
from torch_eft.measure.forward.isolation import network as isolating


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def moved(model, scale):
    generator = torch.Generator().manual_seed(3)
    return {
        name: value.detach() + scale * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in model.named_parameters()
    }


@pytest.fixture
def copies(monkeypatch):
    """The isolated copies that were made."""
    made, shadow_of = [], isolating._shadow_of

    def counted(*arguments):
        made.append(arguments[0])
        return shadow_of(*arguments)

    monkeypatch.setattr(isolating, "_shadow_of", counted)
    return made


def test_every_measurement_on_one_copy_and_as_by_its_function(copies):
    model, x, lambdas = mlp().double(), randn(3, 5), 0.7
    theta_0, theta, e = moved(model, 0.0), moved(model, 0.1), randn(3, 3, seed=2)
    network = measure.Network(model, x, lambdas=lambdas)
    with network:
        found = [
            network.output(),
            network.ntk(),
            network.ntk(per="layer"),
            network.ntk(trace=True, other=x[:2]),
            network.dntk(e),
            tuple(network.ddntk(e)),
            network.derivatives(e, derivatives=1).dH,
            network.vector_product(e),
            network.vjp(e),
            network.eigenpairs(2).values,
            network.taylor(theta_0, theta).terms,
            network.displacement_terms(theta_0, theta).ntk_change,
            network.ntk_change(theta_0, theta).value,
            network.relative_dntk(theta_0, theta=theta).dntk,
            network.representation().K,
            network.snapshot(measure.Plan(ntk=True, hidden=True)).ntk,
            network.on(x[:2]).ntk(),
            network.at(theta).ntk(),
        ]
        assert str(network.estimate()) and str(network.coverage()) and "isolated" in repr(network)
    assert len(copies) == 1
    with torch.no_grad():
        other = mlp().double()
        other.load_state_dict(theta)
    H = measure.ntk(model, x, lambdas=lambdas)
    terms = measure.taylor_series(model, x, theta_0, theta).terms
    expected = [
        measure.output(model, x),
        H,
        measure.ntk(model, x, lambdas=lambdas, per="layer"),
        measure.ntk(model, x, lambdas=lambdas, trace=True, other=x[:2]),
        measure.dntk(model, x, e, lambdas=lambdas),
        tuple(measure.ddntk(model, x, e, lambdas=lambdas)),
        measure.ntk_derivatives(model, x, e, lambdas=lambdas).dH,
        measure.ntk_vector_product(model, x, e, lambdas=lambdas),
        measure.ntk_vjp(model, x, e, lambdas=lambdas),
        measure.ntk_eigenpairs(model, x, 2, lambdas=lambdas).values,
        terms,
        measure.ntk(other, x, lambdas=lambdas) - H,
        measure.ntk(other, x, lambdas=lambdas) - H,
        measure.relative_dntk(model, x, theta_0, theta=theta, lambdas=lambdas).dntk,
        measure.representation(model, x).K,
        H,
        H[:2, :2],
        measure.ntk(other, x, lambdas=lambdas),
    ]
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.ntk(), H, rtol=0, atol=0)  # outside of `with`, too


def test_what_a_network_is_not_open_for():
    network = measure.Network(mlp(), torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="not isolated; use it inside"):
        network.at({})
    with network, torch.no_grad():  # the caller's modes do not matter inside, either
        assert bool(network.ntk().diagonal().any())


def test_inside_another_with_is_the_same_copy_and_a_failure_leaves_it_closed(copies):
    network = measure.Network(mlp(), torch.ones(2, 5))
    with network:
        with network:
            network.ntk()
        network.output()
        assert "isolated" in repr(network)
    assert len(copies) == 1 and "not isolated" in repr(network)
    lazy = measure.Network(nn.LazyLinear(3), torch.ones(2, 5))
    with pytest.raises(ValueError, match="not initialized yet"), lazy:
        pass
    assert "not isolated" in repr(lazy)
    with pytest.raises(ValueError, match="in between"), network:
        raise ValueError("in between")
    assert "not isolated" in repr(network)


def test_every_kernel_keeps_within_the_memory_that_is_allowed():
    network = measure.Network(nn.Linear(3, 2), torch.ones(64, 3), memory=1000)
    plan, theta = measure.Plan(ntk=True), moved(network.model, 0.1)
    for measured in (network.ntk, lambda: network.snapshot(plan), lambda: network.ntk_change(theta, theta)):
        with pytest.raises(measure.MemoryLimitError):
            measured()


def test_at_other_parameters_the_output_function_is_the_same():
    network = measure.Network(mlp(), torch.ones(2, 5), output_fn=lambda z: z[:, :1])
    with network:
        assert network.at({}).output().shape == (2, 1) and network.at({}).output_fn is network.output_fn


def test_leaving_without_entering_is_refused_and_changes_nothing(copies):
    network = measure.Network(mlp(), torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="without __enter__"):
        network.__exit__(None, None, None)
    with network:
        network.output(), network.ntk()
    assert len(copies) == 1


class Stateful(nn.Module):
    """Counts its calls, in a buffer in place and in an attribute."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(5, 3), 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.calls += 1
        return self.linear(x) * (1 + 0.1 * self.count + 0.01 * self.calls)


class Random(nn.Module):
    """Draws from every generator, in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        scale = 1 + random.random() + numpy.random.rand()
        return scale * self.linear(F.dropout(x, 0.5, training=True))


@pytest.mark.parametrize("kind", [Stateful, Random])
def test_every_measurement_inside_starts_from_the_same_state_as_separate_ones(kind):
    torch.manual_seed(0)
    model, x, plan = kind(), torch.ones(4, 5), measure.Plan(hidden=True)
    separate = [measure.output(model, x), measure.take_snapshot(model, x, plan).hidden, measure.output(model, x)]
    network = measure.Network(model, x)
    with network:
        inside = [network.output(), network.snapshot(plan).hidden, network.output()]
        again = network.on(x).output(), network.at({}).output()
    torch.testing.assert_close(inside, separate, rtol=0, atol=0)
    assert all(torch.equal(value, separate[0]) for value in again)
    assert getattr(model, "calls", 0) == 0 and float(getattr(model, "count", 0)) == 0


def test_a_measurement_inside_leaves_the_random_state_alone():
    network = measure.Network(mlp(), torch.ones(2, 5))
    with network:
        first = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        with isolation.isolated(network.current):
            torch.manual_seed(5)
            random.seed(5)
            numpy.random.seed(5)
            torch.set_default_dtype(torch.float64)
        assert torch.equal(torch.get_rng_state(), first[0]) and torch.get_default_dtype() == torch.float32
        assert (random.getstate(), numpy.random.get_state()[1].tolist()) == first[1:]


def test_what_was_taken_out_of_a_with_is_refused_after_its_end():
    network = measure.Network(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), torch.ones(2, 5))
    with network:
        inner = network.current
        on, at = network.on(torch.ones(3, 5)), network.at({})
        with on:
            nested = on.current
        nested(nested.params, torch.ones(3, 5))  # the end of an inner `with` ends nothing
        assert "Sequential" in repr(on) and "no longer" not in repr(on)
    for measured in (
        on.output,
        on.ntk,
        at.ntk,
        at.representation,
        on.__enter__,
        lambda: measure.output(inner, at.probe),
    ):
        with pytest.raises(RuntimeError, match="after the end of the `with`"):
            measured()
    for model in (inner, nested):
        with pytest.raises(RuntimeError, match="after the end of the `with`"):
            model(model.params, torch.ones(3, 5))
        with pytest.raises(RuntimeError, match="after the end of the `with`"):
            model.place(on.probe)
    assert "no longer isolated" in repr(on)
    with network:  # entered anew
        assert network.on(torch.ones(3, 5)).output().shape == (3, 3)


def test_a_failure_ends_the_isolation_too():
    with pytest.raises(KeyError), isolation.isolated(mlp()) as network:
        raise KeyError
    with pytest.raises(RuntimeError, match="after the end"):
        network(network.params, torch.ones(2, 5))
