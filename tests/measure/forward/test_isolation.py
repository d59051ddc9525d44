"""A measurement leaves no trace: in the module, in its gradients, in any random state, in any mode."""

import random

import numpy
import pytest
import torch
from torch import nn

from tests.oracles.models import ConvNet, mlp
from torch_eft import measure
from torch_eft.measure.forward.isolation import isolated


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
    with isolated(wrapped) as network:  # without compiling anything
        assert torch.compiler.is_compiling() is False
        assert torch.equal(network(network.params, x), plain(x))
    with isolated(plain) as network:
        doubled = {name: 2 * value for name, value in network.params.items()}
        assert not torch.allclose(network(doubled, x), network(network.params, x))


class Settings(nn.Module):
    """Notes the settings of the process in which its forward runs, and spoils one."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 2), []

    def forward(self, x):
        self.seen.append(settings())
        torch.set_default_dtype(torch.float64)
        return self.layer(x)


def settings():
    backends = torch.backends
    operations = ((backends.cudnn, "conv"), (backends.cudnn, "rnn"), (backends.mkldnn, "matmul"))
    switches = (backends.cuda.matmul, *(getattr(library, name, None) for library, name in operations))
    precisions = [getattr(backend, "fp32_precision", "none") for backend in switches]  # not in all versions of torch
    return {
        "default dtype": torch.get_default_dtype(),
        "fast attention": backends.mha.get_fastpath_enabled(),
        "fused attention": (backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled()),
        "float32 products": torch.get_float32_matmul_precision(),
        "older switches": (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32),
        "TF32 or bfloat16": "tf32" in precisions or "bf16" in precisions,
    }


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_settings_of_the_process_are_set_inside_and_restored_after(precision):
    model = Settings()
    torch.set_float32_matmul_precision(precision)
    try:
        before = settings()
        with isolated(model) as network:
            network(network.params, torch.ones(2, 3))
            (inside,) = network.shadow.seen
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert inside == {
        "default dtype": torch.float32,
        "fast attention": False,
        "fused attention": (False, False),
        "float32 products": "highest",
        "older switches": (False, False),
        "TF32 or bfloat16": False,
    }


def test_attention_has_second_derivatives_inside():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    with isolated(model, lambda z: z.flatten(1)) as network:
        leaves = {name: value.requires_grad_() for name, value in network.params.items()}
        first = torch.autograd.grad(network(leaves, x).sum(), list(leaves.values()), create_graph=True)
        total = sum(g.square().sum() for g in first)
        (second,) = torch.autograd.grad(total, leaves["self_attn.in_proj_weight"])
        assert float(second.norm()) > 0


@pytest.mark.parametrize("own", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_measurement_in_another_precision(own):
    """bf16-true and 64-true trainings with a float32 probe (hazards: the dtypes must be brought together)."""
    torch.manual_seed(0)
    model, probe = ConvNet().to(own), measure.Probe(torch.randn(2, 1, 8, 8))
    with isolated(model, dtype=torch.float64) as network:
        wide = network(network.params, network.place(probe))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, model.double().eval()(probe.inputs.double()))
    with isolated(model.to(own)) as network:
        assert network(network.params, network.place(probe)).dtype == torch.promote_types(own, torch.float32)
    assert all(value.dtype == own for value in model.parameters())


def test_errors_inside_restore_the_states_too():
    model = mlp()
    states = torch.get_rng_state(), torch.is_grad_enabled()
    with pytest.raises(ValueError, match="rejects"):
        measure.output(model, torch.ones(2, 99))
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.is_grad_enabled() == states[1]


@pytest.mark.parametrize("model", [mlp(), Settings()])
def test_the_copy_has_its_own_parameters_again_after_each_measurement(model):
    x = torch.ones(2, 3 if isinstance(model, Settings) else 5)
    with isolated(model) as network:
        for _ in range(2):
            own = [value for _, value in network.shadow.named_parameters()]
            measure.ntk(network, x)
            values = [value for _, value in network.module.named_parameters()]
            assert all(value is before and value.requires_grad for value, before in zip(values, own, strict=True))


def test_no_parameter_is_copied():
    model = mlp()
    with isolated(model) as network:
        for name, parameter in model.named_parameters():
            assert network.params[name].data_ptr() == parameter.data_ptr()


def test_attributes_without_copies_are_shared():
    import threading

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    expected = measure.ntk(model, torch.ones(2, 3))
    model.lock, model[0].handle = threading.Lock(), open(__file__)  # noqa: SIM115
    with model[0].handle:
        assert torch.equal(measure.ntk(model, torch.ones(2, 3)), expected)
