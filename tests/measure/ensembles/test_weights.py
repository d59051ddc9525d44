"""Which distribution weights come from, at a stated level, and what is said of it."""

import math
import re

import pytest
import torch
from torch import nn

from tests.oracles.models import mlp
from torch_eft import measure
from torch_eft.theory.architecture.reading.weight_laws import SIGNIFICANCE, weight_statistics

DRAWS = {
    "gaussian": lambda size: torch.randn(size),
    "uniform": lambda size: torch.rand(size) * 2 - 1,
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("size", [200, 1000, 20_000])
def test_the_level_is_kept(kind, size):
    """Two tests at 1e-4 each: of 4000 draws 0.8 are rejected on average; Poisson, five standard deviations above."""
    torch.manual_seed(size)
    count = 4000 if size < 10_000 else 500
    wrong = sum(weight_statistics(DRAWS[kind](size)).distribution != kind for _ in range(count))
    expected = 2 * SIGNIFICANCE * count
    assert wrong <= expected + 5 * math.sqrt(expected) + 1


@pytest.mark.parametrize("kind", DRAWS)
def test_few_weights_are_rarely_taken_for_the_wrong_kind(kind):
    """From 20 weights on, where many are 'too few to tell'."""
    torch.manual_seed(1)
    for size in (5, 20, 60):
        found = [weight_statistics(DRAWS[kind](size)).distribution for _ in range(2000)]
        wrong = sum(name not in (kind, "too few to tell") for name in found)
        assert wrong / 2000 < 0.02
        if size == 5:
            assert set(found) == {"too few to tell"}


INITIALISATIONS = {
    "gaussian": [nn.init.normal_, nn.init.xavier_normal_, nn.init.kaiming_normal_],
    "uniform": [nn.init.uniform_, nn.init.xavier_uniform_, nn.init.kaiming_uniform_],
    "orthogonal": [nn.init.orthogonal_],
    "other": [
        lambda w: nn.init.trunc_normal_(w, a=-1.5, b=1.5),
        lambda w: nn.init.sparse_(w, 0.5),
        lambda w: w.copy_(torch.randn(w.shape).sign()),
        lambda w: w.copy_(torch.rand(w.shape)),  # its mean is not zero
        lambda w: w.copy_(torch.randn(w.shape) ** 3),
    ],
    "constant": [nn.init.ones_],
}


@pytest.mark.parametrize(
    ("kind", "initialize"), [(k, f) for k, functions in INITIALISATIONS.items() for f in functions]
)
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_torch_initializations(kind, initialize, shape):
    torch.manual_seed(0)
    weight = torch.empty(shape)
    with torch.no_grad():
        if initialize is nn.init.uniform_:
            initialize(weight, -0.3, 0.3)
        else:
            initialize(weight)
    assert weight_statistics(weight).distribution == kind


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orthogonal_weights_of_any_precision_and_only_they(dtype):
    torch.manual_seed(0)
    for shape in ((2, 4000), (3, 3), (64, 16)):
        assert weight_statistics(nn.init.orthogonal_(torch.empty(shape)).to(dtype)).distribution == "orthogonal"
        assert weight_statistics(torch.randn(shape).to(dtype)).distribution != "orthogonal"
    assert (
        weight_statistics(nn.init.orthogonal_(torch.empty(1, 400))).distribution == "gaussian"
    )  # one row: a direction


def kinds(model):
    return tuple(weight_statistics(layer.weight).distribution for layer in model if isinstance(layer, nn.Linear))


def test_default_linear_layers_say_what_uniform_weights_change():
    torch.manual_seed(0)
    x = torch.eye(100)[:4] * 3
    model = mlp((100, 300, 300, 10), nn.ReLU)
    assert kinds(model) == ("uniform",) * 3
    weights, biases = measure.read_ensemble(model, x).remarks
    assert weights.startswith(
        "layers 1, 2, 3: uniform weights (excess kurtosis k4 = -1.2): nu and every vertex are right"
    )
    assert "k4 sum x^4 / (sum x^2)^2 = -1.2 at most on these inputs" in weights  # one-hot: all of it
    assert biases.startswith("layers 1, 2: the biases are not Gaussian")


def test_the_remark_on_uniform_weights_is_true():
    """One-hot input, no bias: the first preactivation is one uniform weight, excess kurtosis -1.2."""
    z = torch.stack([nn.Linear(16, 64, bias=False)(torch.eye(16)[0]).detach() for _ in range(400)]).double()
    kurtosis = float(z.pow(4).mean() / z.square().mean() ** 2 - 3)
    assert abs(kurtosis + 1.2) < 4 * 1.147 / math.sqrt(z.numel())


def test_the_remark_on_biases_is_true():
    """Uniform biases give preactivations k4 (C_b / K)^2, however wide the layer."""
    torch.manual_seed(0)
    model = mlp((200, 20_000, 1))
    nn.init.normal_(model[0].weight, std=math.sqrt(0.5 / 200))
    nn.init.uniform_(model[0].bias, -math.sqrt(3), math.sqrt(3))
    x = torch.randn(1, 200)
    x *= math.sqrt(200) / x.norm()
    remark = measure.read_ensemble(model, x=x).remarks[-1]
    z = model[0](x).detach().double()
    measured = float(z.pow(4).mean() / z.square().mean() ** 2 - 3)
    expected = -1.2 / 1.5**2
    assert abs(measured - expected) < 4 * math.sqrt(24 / z.numel())
    said = float(re.search(r"up to (\S+) here", remark)[1])
    assert said == pytest.approx(expected, rel=0.05)  # C_b and K estimated, two digits


@pytest.mark.parametrize(("activation", "gain", "nu"), [(nn.Identity, 1.0, 0.0), (nn.ReLU, math.sqrt(2.0), 3.0)])
def test_the_remark_on_orthogonal_weights_is_true(activation, gain, nu):
    """V / K^2 = -2 + nu (l - 1) (PDLT's Gaussian weights: nu = 2 and 5), four square layers of width 48, one input."""
    from torch_eft.measure.ensembles.seeds import statistics_over_seeds

    width, depth = 48, 4

    def initialize(module):
        for layer in module:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=gain)
                nn.init.zeros_(layer.bias)

    model = mlp((width,) * (depth + 1), activation)
    initialize(model)
    read = measure.read_ensemble(model)
    assert kinds(model) == ("orthogonal",) * depth
    assert read.errors["C_W"] == (0.0,) * depth
    assert "V, F and B of order 1/n have their own recursions" in read.remarks[0]
    x = torch.full((1, width), 1.0)
    found = statistics_over_seeds(model, x, num_networks=1000, statistics=("K", "V"), initialize=initialize)
    K = float(found.mean["K"])
    ratio, error = float(found.mean["V"]) / K**2, float(found.error["V"]) / K**2
    expected = -2 + nu * (depth - 1)
    second_order = max(2, nu * (depth - 1)) ** 2 / width
    assert abs(ratio - expected) < 4 * error + second_order
    assert error < 0.6
