"""Kinked operations by name, and secants of the NTK against derivatives by reverse mode in float64."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.oracles.models import ConvNet, mlp
from torch_eft import measure
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.kinks import kinked_operations
from torch_eft.measure.taylor.secant import ntk_change, ntk_finite_difference, ntk_terms_by_differences


class Around(nn.Module):
    """A function of what a linear layer gives."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 8), function

    def forward(self, x):
        return self.function(self.layer(x))


KINKED = {
    "relu": F.relu,
    "relu in place": lambda z: z.relu_(),
    "leaky_relu": F.leaky_relu,
    "prelu": lambda z: F.prelu(z, z.new_full((1,), 0.1)),
    "rrelu": F.rrelu,
    "elu": lambda z: F.elu(z, 0.5),
    "selu": F.selu,
    "hardtanh": lambda z: F.hardtanh(z, -0.2, 0.2),
    "relu6": F.relu6,
    "hardswish": lambda z: F.hardswish(z + 3),
    "hardsigmoid": lambda z: F.hardsigmoid(z + 3),
    "threshold": lambda z: F.threshold(z, 0.1, 0.0),
    "softshrink": lambda z: F.softshrink(z, 0.1),
    "hardshrink": lambda z: F.hardshrink(z, 0.1),
    "abs": abs,
    "clamp": lambda z: z.clamp(-0.2, 0.2),
    "clamp_min": lambda z: z.clamp_min(0),
    "clamp_max": lambda z: torch.clamp_max(z, 0),
    "maximum": lambda z: torch.maximum(z, -z),
    "minimum": lambda z: torch.minimum(z, 0.1 + z.flip(1)),
    "max of two": lambda z: torch.max(z, -z),
    "max along an axis": lambda z: z.max(1, keepdim=True)[0],
    "amax": lambda z: z.amax(1, keepdim=True),
    "amin along two axes": lambda z: z[:, None].amin((1, 2))[:, None],
    "topk": lambda z: z.topk(3, 1)[0],
    "sort": lambda z: z.sort(1)[0],
    "median": lambda z: z.median(1, keepdim=True)[0],
    "sign": lambda z: z + torch.sign(z),
    "round": lambda z: z + torch.round(4 * z),
    "max_pool1d": lambda z: F.max_pool1d(z[:, None], 2)[:, 0],
    "max_pool2d": lambda z: nn.MaxPool2d(2)(z.reshape(-1, 1, 2, 4)).flatten(1),
    "adaptive_max_pool1d": lambda z: F.adaptive_max_pool1d(z[:, None], 2)[:, 0],
    "where by selection": lambda z: torch.where(z > 0, z, 0.1 * z),
    "masked_fill by selection": lambda z: z.masked_fill(z < 0, 0.0),
    "mul by selection": lambda z: z * (~(z < 0)).float(),
    "gather by selection": lambda z: z.gather(1, z.argsort(1)),
}
SMOOTH = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "celu": F.celu,
    "mish": F.mish,
    "softmax": lambda z: z.softmax(1),
    "constant mask": lambda z: z * (torch.arange(8) > 3),
    "mask of the inputs' shape": lambda z: torch.where(torch.ones_like(z) > 0, z, 0 * z),
}


@pytest.mark.parametrize("case", KINKED)
def test_kinked_operations_are_named_and_their_crossings_seen(case):
    torch.manual_seed(0)
    model, x = Around(KINKED[case]), torch.randn(6, 6)
    (name,) = kinked_operations(model, x)
    assert name.split(" in ")[0] == case.split(" of two")[0].split(" along")[0].split(" in place")[0]
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    assert 0 < ntk_finite_difference(model, x, direction, distance=0.3).crossings <= 1
    assert ntk_finite_difference(model, x, direction, distance=1e-7).crossings == 0


@pytest.mark.parametrize("case", SMOOTH)
def test_smooth_operations_are_not(case):
    assert kinked_operations(Around(SMOOTH[case]), torch.randn(3, 6)) == ()


def test_modules_are_named():
    x = torch.randn(2, 1, 8, 8)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3), nn.ReLU6())
    assert kinked_operations(model, x) == ("relu in '1'", "max_pool2d in '2'", "hardtanh in '5'")  # as torch has it
    assert kinked_operations(nn.Sequential(Around(abs)), torch.ones(2, 6)) == ("abs in '0'",)
    assert kinked_operations(Around(abs), torch.ones(2, 6)) == ("abs in the forward",)
    assert kinked_operations(ConvNet(), x) == ()


def test_kinks_of_what_training_does_not_move_are_none():
    model = nn.Sequential(nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    assert kinked_operations(model, torch.ones(2, 6)) == ("relu in '2'", "relu in '4'")
    model[1].requires_grad_(False)
    assert kinked_operations(model, torch.ones(2, 6)) == ("relu in '4'",)


def test_kinks_of_attention_and_recurrent_networks():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert kinked_operations(encoder, torch.randn(2, 3, 8), output_fn=lambda z: z.flatten(1)) == (
        "relu in the forward",
    )
    last = lambda out: out[0][:, -1]  # noqa: E731
    cells = nn.RNN(3, 4, nonlinearity="relu", batch_first=True)
    assert kinked_operations(cells, torch.randn(2, 3, 3), output_fn=last) == ("rnn_relu in the forward",)
    direction = {name: torch.randn_like(p) for name, p in cells.named_parameters()}
    found = ntk_finite_difference(cells, torch.randn(2, 3, 3), direction, distance=0.1, output_fn=last)
    assert math.isnan(found.crossings) and "not seen" in found.validity.reason


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slope_by_reverse_mode(model, x, direction):
    """d/ds H(theta + s d) = sum (d_mu d_nu z_ia d_nu) d_mu z_jb + (ia <-> jb), one scalar product at a time."""
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    leaves, along = list(params.values()), [direction[name] for name in params]
    z = functional_call(model, params, (x,)).flatten()
    gradients, turned = [], []
    for value in z:
        gradient = torch.autograd.grad(value, leaves, create_graph=True)
        product = sum((g * d).sum() for g, d in zip(gradient, along, strict=True))
        gradients.append(torch.cat([g.detach().flatten() for g in gradient]))
        second = torch.autograd.grad(product, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        turned.append(torch.cat([s.flatten() for s in second]))
    half = torch.stack(turned) @ torch.stack(gradients).T
    count, channels = len(x), len(z) // len(x)
    return (half + half.T).reshape(count, channels, count, channels).permute(0, 2, 1, 3)


def network(activation, width=16):
    torch.manual_seed(1)
    model = mlp((5, width, width, 2), activation).double()
    return model, randn(4, 5), {name: randn(*p.shape, seed=3) for name, p in model.named_parameters()}


def test_secant_of_a_smooth_network_converges_as_the_square_of_the_step():
    model, x, direction = network(nn.Tanh)
    expected = slope_by_reverse_mode(model, x, direction)
    errors = []
    for step in (2e-3, 1e-3):
        found = ntk_finite_difference(model, x, direction, distance=step)
        assert found.kinked == () and found.crossings == 0 and "smooth" in found.validity.reason
        errors.append(float((found.value - expected).norm() / expected.norm()))
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(4, rel=1e-3)


def test_secant_of_relu_is_the_derivative_within_the_kinks():
    model, x, direction = network(nn.ReLU)
    expected = slope_by_reverse_mode(model, x, direction)
    found = ntk_finite_difference(model, x, direction, distance=1e-6)
    assert found.kinked == ("relu in '1'", "relu in '3'")
    assert found.crossings == 0 and "within the kinks" in found.validity.reason
    assert float((found.value - expected).norm() / expected.norm()) < 1e-9


def test_secant_of_relu_is_not_the_derivative_across_kinks():
    """At step 0.02 the smooth remainder is about 1e-3 (tanh: less than that); the kinks change the slope by a lot."""
    model, x, direction = network(nn.ReLU, width=256)
    expected = slope_by_reverse_mode(model, x, direction)
    found = ntk_finite_difference(model, x, direction, distance=0.02)
    assert 0.01 < found.crossings < 0.3 and "across kinks" in found.validity.reason
    assert float((found.value - expected).norm() / expected.norm()) > 0.3
    smooth, x, direction = network(nn.Tanh, width=256)
    expected = slope_by_reverse_mode(smooth, x, direction)
    assert (
        float((ntk_finite_difference(smooth, x, direction, distance=0.002).value - expected).norm() / expected.norm())
        < 0.05
    )


def test_secant_between_two_settings_is_the_difference_of_two_ntks():
    model, x, direction = network(nn.ReLU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = {name: p + 0.1 * direction[name] for name, p in before.items()}
    lambdas = {name: 0.5 + index for index, name in enumerate(before)}
    found = ntk_change(model, x, before, after, distance=0.1, lambdas=lambdas, trace=True)
    kernels = []
    for values in (before, after):
        model.load_state_dict(values)
        kernels.append(measure.ntk(model, x, lambdas=lambdas, trace=True))
    torch.testing.assert_close(found.value, (kernels[1] - kernels[0]) / 0.1, rtol=0, atol=1e-9)
    with torch.no_grad():
        sides = []
        for values in (before, after):
            z = F.linear(x, values["0.weight"], values["0.bias"])
            y = F.linear(z.relu(), values["2.weight"], values["2.bias"])
            sides.append(torch.cat([z, y], 1) > 0)
    assert found.crossings == pytest.approx(float((sides[0] != sides[1]).double().mean()))
    assert found.distance == 0.1


def test_weights_are_left_alone():
    model, x, direction = network(nn.ReLU)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ntk_finite_difference(model, x, direction, distance=0.1)
    kinked_operations(model, x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_direction_may_leave_parameters_out():
    model, x, direction = network(nn.Tanh)
    only = {"2.weight": direction["2.weight"]}
    padded = {name: only.get(name, torch.zeros_like(p)) for name, p in model.named_parameters()}
    torch.testing.assert_close(
        ntk_finite_difference(model, x, only, distance=0.1).value,
        ntk_finite_difference(model, x, padded, distance=0.1).value,
    )


@pytest.mark.parametrize(
    ("direction", "step", "message"),
    [
        ({"0.weight": torch.ones(3)}, 1.0, r"direction: '0.weight' has shape \(3,\), the parameter \(12, 5\)"),
        ({"weight": torch.ones(3)}, 1.0, r"direction: 'weight' is not a trainable parameter"),
        ({"0.bias": torch.ones(12)}, 0.0, r"distance: 0 given; it must be positive and finite"),
        ({"0.bias": torch.ones(12)}, -1.0, r"distance: -"),
        ({"0.bias": torch.ones(12)}, float("nan"), r"distance: nan given"),
    ],
)
def test_wrong_arguments_are_named(direction, step, message):
    with pytest.raises(ValueError, match=message):
        ntk_finite_difference(mlp(), torch.ones(2, 5), direction, distance=step)


@pytest.mark.parametrize("length", [0.003, 0.03, 0.3])
def test_terms_by_differences_are_those_by_derivatives(length):
    """In single precision, to thousandths of the change, however far the displacement goes."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten()]
    network, x = nn.Sequential(*layers, nn.Linear(32, 3)), torch.rand(5, 1, 6, 6)
    theta = {name: p.detach().clone() for name, p in network.named_parameters()}
    d = {name: length * p.norm() / p.numel() ** 0.5 * torch.randn_like(p) for name, p in theta.items()}
    exact = measure.displacement_terms(network.double(), x.double(), theta, {name: theta[name] + d[name] for name in d})
    network.float()
    with isolated(network) as own:
        reach = float(exact.ntk_change.norm() / exact.ntk.norm())
        found = ntk_terms_by_differences(own, x, theta, d, measure.ntk(own, x), reach=reach)
    error = (found - exact.ntk_terms).flatten(1).norm(dim=1) / exact.ntk_change.norm()
    assert float(error.max()) < 0.004, (reach, error)
