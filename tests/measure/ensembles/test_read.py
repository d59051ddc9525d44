"""Reading the ensemble off a network: what is recognized, with which errors, and what is refused."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.oracles.models import ConvNet, Tied, mlp
from torch_eft import measure
from torch_eft.theory import MLPEnsemble, available_activations, get_activation, initial_statistics
from torch_eft.theory.architecture.reading.weight_laws import weight_statistics


def test_widths_moments_and_lambda():
    torch.manual_seed(0)
    model = mlp((6, 200, 300, 4))
    for index, (C_W, C_b) in zip((0, 2, 4), ((1.5, 0.3), (0.7, 0.1), (2.0, 0.0)), strict=True):
        nn.init.normal_(model[index].weight, std=math.sqrt(C_W / model[index].in_features))
        nn.init.normal_(model[index].bias, std=math.sqrt(C_b))
    groups = [{"params": model[:3].parameters(), "lr": 0.2}, {"params": model[4].parameters(), "lr": 0.05}]
    ensemble = measure.read_ensemble(model, optimizer=torch.optim.SGD(groups))
    assert ensemble.widths == (6, 200, 300, 4)
    assert ensemble.activation.name == "tanh"
    assert ensemble.lambda_b == (1.0, 1.0, 0.25)
    assert ensemble.lambda_W == (6.0, 200.0, 0.25 * 300)
    for actual, expected, error in zip(ensemble.C_W, (1.5, 0.7, 2.0), ensemble.errors["C_W"], strict=True):
        assert abs(actual - expected) < 4 * error < 0.4 * expected
    for actual, expected, error in zip(ensemble.C_b, (0.3, 0.1, 0.0), ensemble.errors["C_b"], strict=True):
        assert abs(actual - expected) <= 4 * error
    assert ensemble.C_b[2] == 0


def test_standard_errors_cover_the_truth():
    """400 draws of a small Gaussian layer: the z-scores of C_W have unit variance."""
    scores = []
    for seed in range(400):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 20))
        nn.init.normal_(model[0].weight, std=math.sqrt(1.5 / 20))
        read = measure.read_ensemble(model)
        scores.append((read.C_W[0] - 1.5) / read.errors["C_W"][0])
    variance = torch.tensor(scores).var()
    assert abs(float(variance) - 1) < 4 * math.sqrt(2 / 400)


def test_default_initialization_is_a_third_and_uniform():
    torch.manual_seed(0)
    model = mlp((100, 400, 400, 10), nn.ReLU)
    read = measure.read_ensemble(model)
    assert read.activation.name == "relu"
    assert list(read.C_W) == pytest.approx([1 / 3] * 3, rel=1e-12)
    assert list(read.C_b) == pytest.approx([1 / 300, 1 / 1200, 1 / 1200], rel=1e-12)
    assert read.errors["C_W"] == (0.0,) * 3
    narrower = mlp((100, 400, 400, 10), nn.ReLU)
    with torch.no_grad():
        for layer in narrower[::2]:
            layer.weight.mul_(0.95)  # uniform too, and no draw of nn.Linear
    for C_W, error in zip((other := measure.read_ensemble(narrower)).C_W, other.errors["C_W"], strict=True):
        assert abs(C_W - 0.95**2 / 3) < 4 * error
    assert weight_statistics(model[2].weight).excess_kurtosis == pytest.approx(-1.2, abs=0.02)


def test_laws_are_read_and_few_numbers_drawn_by_torch_are_known():
    """Two output biases say nothing of C_b; that layers are as nn.Linear draws them does."""
    torch.manual_seed(0)
    read = measure.read_ensemble(mlp((20, 200, 200, 2)))
    assert read.C_b[2] == pytest.approx(1 / 600)
    assert read.errors["C_b"] == (0.0,) * 3
    model = mlp((20, 200, 200, 2))
    for layer in model[::2]:
        nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
        nn.init.zeros_(layer.bias)
    laws = measure.read_ensemble(model).weight_law
    assert laws[:2] == ("truncated normal",) * 2  # the 400 weights of the last layer may be Gaussian as well
    for layer in model[::2]:
        nn.init.orthogonal_(layer.weight)
        nn.init.normal_(layer.bias)
    read = measure.read_ensemble(model)
    assert read.weight_law == ("orthogonal",) * 3
    assert read.bias_law == ("gaussian",) * 3


def test_the_theory_takes_what_was_read():
    """The ensemble read off a network is one like any other; what it knows of its estimate does not matter to ==."""
    torch.manual_seed(0)
    read = measure.read_ensemble(mlp((6, 30, 30, 2)))
    assert read.weight_law == read.bias_law == ("uniform",) * 3
    names = ("C_b", "C_W", "lambda_b", "lambda_W", "weight_law", "bias_law")
    plain = MLPEnsemble(read.widths, "tanh", **{name: getattr(read, name) for name in names})
    assert read == plain
    assert read.remarks and read.errors and not plain.remarks
    x = torch.randn(2, 6, dtype=torch.float64)
    for found, expected in zip(initial_statistics(read, x), initial_statistics(plain, x), strict=True):
        assert torch.equal(found.K, expected.K)
        assert torch.equal(found.Theta, expected.Theta)


class Functional(nn.Module):
    def __init__(self, function, norm=False):
        super().__init__()
        self.inner = nn.ModuleDict({"b": nn.Linear(7, 8), "a": nn.Linear(4, 7)})
        self.last = nn.Linear(8, 2, bias=False)
        self.function = function

    def forward(self, x):
        x = self.function(self.inner["a"](x.flatten(1)))
        return self.last(self.function(self.inner["b"](x)))


@pytest.mark.parametrize("name", available_activations())
def test_functional_activations_are_found_by_what_they_do(name):
    read = measure.read_ensemble(Functional(get_activation(name).function), x=torch.randn(16, 2, 2))
    z = torch.linspace(-3, 3, 20)
    torch.testing.assert_close(read.activation(z), get_activation(name)(z))
    assert read.widths == (4, 7, 8, 2)  # in the order of execution, not of definition
    assert read.C_b[2] == 0
    assert read.lambda_b[2] == 0


def test_any_leaky_slope_is_found():
    read = measure.read_ensemble(mlp(activation=lambda: nn.LeakyReLU(0.2)))
    assert read.activation.slopes == pytest.approx((0.2, 1.0), rel=1e-5)


MODULES = {
    "elu": nn.ELU,
    "selu": nn.SELU,
    "mish": nn.Mish,
    "softsign": nn.Softsign,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "leaky_relu(0.2)": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "linear": nn.Identity,
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activation_modules(name, dtype):
    read = measure.read_ensemble(mlp((3, 6, 5, 2), MODULES[name]).to(dtype))
    assert read.activation.name == name


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "sin", "tanh"])
def test_small_inputs_tell_activations_apart_too(name):
    """GELU and its tanh form differ by 3e-4 z^4."""
    torch.manual_seed(0)
    read = measure.read_ensemble(Functional(get_activation(name).function), x=1e-2 * torch.randn(16, 4))
    assert read.activation.name == name


def test_inputs_on_one_side_tell_activations_apart_too():
    """All preactivations positive: ReLU, abs and linear look the same."""
    model = mlp((2, 3, 2, 1), nn.ReLU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        model[-1].weight[0, 0] *= 2
    assert measure.read_ensemble(model, x=torch.rand(8, 2)).activation.name == "relu"


def test_infinite_outputs_are_no_mlp():
    model = mlp()
    torch.nn.init.constant_(model[-1].weight, math.inf)
    with pytest.raises(measure.NotAnMLPError, match=r"its outputs are not finite"):
        measure.read_ensemble(model)


def test_an_unregistered_activation_can_be_named():
    model = Functional(lambda z: z + 0.1 * z**3)
    with pytest.raises(measure.NotAnMLPError, match=r"pass activation= if it is another one"):
        measure.read_ensemble(model, x=torch.randn(8, 4))
    assert measure.read_ensemble(model, x=torch.randn(8, 4), activation=lambda z: z + 0.1 * z**3).depth == 3


def test_frozen_layers_do_not_learn():
    model = mlp()
    model[0].requires_grad_(False)
    ensemble = measure.read_ensemble(model, optimizer=torch.optim.SGD(model[2:].parameters(), lr=0.1))
    assert ensemble.lambda_W[0] == ensemble.lambda_b[0] == 0
    assert ensemble.lambda_W[1] == 12


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return h + self.second(h)


class Preprocessing(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(F.normalize(x))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (ConvNet(), torch.randn(2, 1, 8, 8), r"the parameter 'conv.weight' \(Conv2d\) belongs to no nn.Linear"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), torch.randn(4, 3), r"BatchNorm1d"),
        (Residual(), torch.randn(4, 3), r"the output is not that of its last layer 'second'"),
        (Preprocessing(), torch.randn(4, 5), r"does not act on the flattened inputs"),
        (Shared(), torch.randn(4, 3), r"the layer 'layer' is used 2 times"),
        (Tied(), torch.randn(4, 4), r"layers share a parameter"),
        (nn.ReLU(), torch.randn(4, 4), r"has no nn.Linear"),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)), None, r"not the same"),
    ],
)
def test_other_networks_are_refused_with_the_reason(model, x, message):
    with pytest.raises(measure.NotAnMLPError, match=message):
        measure.read_ensemble(model, x=x)
