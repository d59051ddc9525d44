"""A measurement leaves no trace: in the module, in its gradients, in any random state, in any mode."""

import random

import numpy
import pytest
import torch
from torch import nn

from tests.models import ConvNet, mlp
from torch_eft import measure
from torch_eft.measure.isolation import isolated


def measure_everything(model, x):
    probe = measure.Probe(x)
    return measure.take_snapshot(model, probe, measure.Plan(ntk=True, hidden=True))


def test_parameters_buffers_gradients_and_flags_are_left_alone():
    torch.manual_seed(0)
    model, x = ConvNet(), torch.randn(4, 1, 8, 8)
    model.norm.eval()  # frozen by the user, the rest trains
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    flags = [module.training for module in model.modules()]
    measure_everything(model, x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert [module.training for module in model.modules()] == flags


class Chancy(nn.Module):
    """Draws from every generator there is, whatever the mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        torch.rand(1), numpy.random.rand(), random.random()
        return self.layer(x)


def test_random_states_are_restored():
    model = Chancy()
    states = torch.get_rng_state(), numpy.random.get_state()[2], random.getstate()
    model(torch.ones(2, 3))
    assert not torch.equal(states[0], torch.get_rng_state())
    assert states[1] != numpy.random.get_state()[2]
    assert states[2] != random.getstate()
    states = torch.get_rng_state(), numpy.random.get_state()[2], random.getstate()
    measure.output(model, torch.ones(2, 3))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == numpy.random.get_state()[2]
    assert states[2] == random.getstate()


class Caching(nn.Module):
    """Keeps an activation, with its graph, between calls; counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = self.layer(x)
        return self.last


def test_attributes_set_in_forward_stay_those_of_the_training():
    model, x = Caching(), torch.ones(2, 3)
    kept = model(x)
    measure.output(model, x)
    assert model.last is kept
    assert float(model.calls) == 1
    model.last.sum().backward()  # its graph is alive


def test_surrounding_modes_do_not_reach_the_measurement():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(3, 5)
    expected = measure.ntk(model, x)
    with torch.no_grad():
        assert torch.equal(measure.ntk(model, x), expected)
    with torch.inference_mode():
        assert torch.equal(measure.ntk(model, x), expected)
        assert torch.is_inference_mode_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(measure.ntk(model, x), expected)
        assert torch.is_autocast_enabled("cpu")


def test_a_compiled_module_is_measured_with_its_own_parameters():
    torch.manual_seed(0)
    plain, x = mlp(), torch.randn(3, 5)
    expected = measure.ntk(plain, x)
    wrapped = torch.compile(plain, backend="eager")
    torch.testing.assert_close(measure.ntk(wrapped, x), expected)
    plain.compile(backend="eager")
    with isolated(plain) as network:
        doubled = {name: 2 * value for name, value in network.params.items()}
        assert not torch.allclose(network(doubled, x), network(network.params, x))


def test_errors_inside_restore_the_states_too():
    model = mlp()
    states = torch.get_rng_state(), torch.is_grad_enabled()
    with pytest.raises(ValueError, match="rejects"):
        measure.output(model, torch.ones(2, 99))
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.is_grad_enabled() == states[1]


def test_no_parameter_is_copied():
    model = mlp()
    with isolated(model) as network:
        for name, parameter in model.named_parameters():
            assert network.params[name].data_ptr() == parameter.data_ptr()
