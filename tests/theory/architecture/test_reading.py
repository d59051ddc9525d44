"""What is read off a module, that nothing of the module changes, and that results are kept."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.theory.architecture.networks import residual
from torch_eft import theory
from torch_eft.theory.architecture.nodes import Affine, Data, Elementwise, Norm, Weight


def test_a_residual_network_of_convolutions_is_read_with_torchs_initialization():
    architecture = theory.read_architecture(residual(16), torch.zeros(1, 3, 6))
    weights = [node for node in architecture.nodes if isinstance(node, Weight)]
    assert [node.name for node in weights] == ["0", "1.layers.0", "1.layers.1", "2", "7"]
    assert {node.C_W for node in weights} == {1 / 3}
    assert [node.C_b for node in weights] == pytest.approx([1 / 27, 1 / 144, 1 / 144, 1 / 144, 1 / 48])
    assert {node.bias_law for node in weights} == {node.weight_law for node in weights} == {"uniform"}
    assert [node.lambda_W for node in weights] == [9, 48, 48, 48, 16]
    assert list(architecture.hidden.values()) == [16, 16, 16]


@pytest.mark.parametrize(
    ("initialize", "C_W"),
    [
        (lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"), [2.0, 2.0, 2.0, 2.0]),
        (lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"), [3 / 8, 1.0, 2.0, 8.0]),
        (lambda w: nn.init.xavier_uniform_(w), [6 / 19, 2 / 3, 1.0, 8 / 5]),
        (lambda w: nn.init.normal_(w, std=0.1), None),
    ],
    ids=["fan-in", "fan-out", "Glorot", "one deviation"],
)
def test_a_rule_of_all_layers_is_recognized_from_few_weights(initialize, C_W):
    """The stem has 144 weights, whose own mean square is good to 12 %."""
    torch.manual_seed(1)
    channels = (3, 16, 32, 32, 8)
    layers = [nn.Conv1d(n, after, 3, bias=False) for n, after in zip(channels, channels[1:], strict=False)]
    for layer in layers:
        initialize(layer.weight)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 1))
    found = [
        node.C_W for node in theory.read_architecture(model, torch.zeros(1, 3, 12)).nodes if isinstance(node, Weight)
    ]
    if C_W is None:
        shares = [C / (3 * n * 0.01) for C, n in zip(found[:-1], channels, strict=False)]
        assert shares == pytest.approx([shares[0]] * 4, rel=1e-12)
        assert shares[0] == pytest.approx(1.0, rel=0.06)
    else:
        assert found[:-1] == pytest.approx(C_W, rel=1e-12)


def test_gains_learning_rates_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 2))
    model[0].bias.requires_grad_(False)
    rates = {"0.weight": 2.0, "1.weight": 3.0, "1.bias": 4.0, "3.weight": 5.0, "3.bias": 6.0}
    nodes = theory.read_architecture(model, torch.zeros(1, 3), lambdas=rates).nodes
    assert [type(node) for node in nodes] == [Data, Weight, Norm, Affine, Elementwise, Weight]
    assert (nodes[1].lambda_W, nodes[1].lambda_b) == (6.0, 0.0)
    assert (nodes[3].lambda_gain, nodes[3].lambda_bias, nodes[3].per_position) == (3.0, 4.0, False)
    assert (nodes[5].lambda_W, nodes[5].lambda_b) == (320.0, 6.0)
    with pytest.raises(ValueError, match=r"lambdas: no value for '1\.weight'"):
        theory.read_architecture(model, torch.zeros(1, 3), lambdas={"0.weight": 1.0})


def test_batch_norm_in_evaluation_mode_is_a_factor():
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layers = [nn.Linear(3, 64), nn.BatchNorm1d(64, affine=False, eps=0.0), nn.Tanh(), nn.Linear(64, 1)]
    model = nn.Sequential(*layers).eval()
    model[1].running_var.fill_(0.25)
    found = theory.read_architecture(model, x)
    assert [node.factor for node in found.nodes if isinstance(node, Affine)] == [2.0]
    K = theory.architecture_statistics(found, x, num_samples=8).K["output"]
    laws = {"weight_law": "uniform", "bias_law": "uniform"}
    twice = theory.MLPEnsemble([3, 64, 1], "tanh", C_W=[4 / 3, 1 / 3], C_b=[4 / 9, 1 / 192], **laws)
    truth = theory.initial_statistics(twice, x, statistics=["K"])[-1].K
    assert (K / truth - 1).abs().max() < 4e-3  # the square of what the law of biases changes, 2.7 % in all


def test_reading_leaves_no_trace():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(24, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(theory.NotReadableError):
        theory.read_architecture(model.train(), torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_batch_that_was_traced_is_no_part_of_the_inputs():
    """Sizes written down by the forward, in-place operations on inputs, gains of flattened positions."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.last = nn.Conv1d(2, 32, 2), nn.BatchNorm1d(96), nn.Linear(96, 1)

        def forward(self, x):
            x = torch.cat([x, x.new_zeros(x.shape[0], 4)], 1).sub_(0.5)
            h = self.layer(x.view(x.shape[0], 2, 4)).flatten(1)
            return self.last(torch.tanh(self.norm(h)))

    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    before, model = x.clone(), Padded().eval()
    architecture = theory.read_architecture(model, x)
    found = theory.architecture_statistics(architecture, x, num_samples=8)
    assert torch.equal(x, before)
    (data,) = [node for node in architecture.nodes if isinstance(node, Data)]
    prepared = torch.cat([x, torch.zeros(3, 4)], 1).sub(0.5).view(3, 2, 4).mT
    assert torch.equal(data.prepare(x), prepared)
    (gains,) = [node for node in architecture.nodes if isinstance(node, Affine)]
    assert gains.per_position
    assert found.Theta.shape == (3, 3)


def test_weights_that_a_test_rejects_by_chance_are_torchs_where_another_layer_shows_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))
    with torch.no_grad():
        model[0].weight.abs_().mul_(torch.where(torch.rand(128, 4) < 0.4, -1.0, 1.0))  # a mean at five of its errors
    assert not theory.read_architecture(model, torch.zeros(1, 4)).remarks


def test_trained_weights_are_told():
    model = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    with torch.no_grad():
        model[2].weight.add_(0.1)
    found = theory.architecture_statistics(theory.read_architecture(model, torch.ones(1, 4)), torch.ones(1, 4))
    assert found.validity.flag == "caution"
    assert "weights of '2' follow no known law" in " ".join(found.validity.reasons)


def test_inputs_may_be_prepared_in_the_forward():
    """Patches, cut by a reshape of the inputs, are a convolution whose stride is its kernel."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 32), nn.Linear(32, 1)

        def forward(self, x):
            tokens = ((x - 0.5) * 2).view(x.shape[0], 3, 4)
            return self.last(torch.tanh(self.layer(tokens)).mean(1))

    class Convolution(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.layer, self.last = nn.Conv1d(1, 32, 4, 4), other.last
            self.layer.weight.data, self.layer.bias.data = other.layer.weight.data[:, None], other.layer.bias.data

        def forward(self, x):
            return self.last(torch.tanh(self.layer(((x - 0.5) * 2)[:, None])).mean(2))

    x = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    patches = Patches()
    found = [theory.read_architecture(model, x) for model in (patches, Convolution(patches))]
    first, second = (theory.architecture_statistics(each, x, num_samples=64) for each in found)
    assert (first.Theta / second.Theta - 1).abs().max() < 1e-12


def test_statistics_are_kept_and_shown(tmp_path):
    x = torch.eye(3)[:2]
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1))
    found = theory.architecture_statistics(theory.read_architecture(model, x), x, num_samples=64)
    found.save(tmp_path / "statistics.npz")
    again = theory.ArchitectureStatistics.load(tmp_path / "statistics.npz")
    assert torch.equal(again.Theta, found.Theta)
    assert dict(again.shares) == dict(found.shares)
    assert "ntk_relative_sd: (2, 2) float64" in repr(found)
    with pytest.raises(ValueError, match="2 inputs need about"):
        theory.architecture_statistics(theory.read_architecture(model, x), x, memory=100)


@pytest.mark.parametrize("activation", ["Tanh", "GELU"])
def test_an_mlp_of_torchs_initialization_has_the_spread_of_its_ensemble(activation):
    """Two derivations, neurons drawn and vertices, with uniform weights and biases; to 4 % and four standard errors."""
    act = getattr(nn, activation)
    torch.manual_seed(0)
    x = torch.randn(1, 16)
    model = nn.Sequential(
        nn.Linear(16, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10)
    )
    found = theory.architecture_statistics(theory.read_architecture(model, x), x, num_samples=2**14)
    laws = {"weight_law": "uniform", "bias_law": "uniform", "C_W": 1 / 3, "lambda_W": [16.0, 64.0, 64.0, 64.0]}
    ensemble = theory.MLPEnsemble([16, 64, 64, 64, 10], activation, C_b=[1 / 48] + [1 / 192] * 3, **laws)
    truth = theory.seed_spread(ensemble, x.double())
    kernels = theory.initial_statistics(ensemble, x.double(), statistics=["K", "Theta"])[-1]
    assert (found.K["output"] / kernels.K - 1).abs().max() < 2e-5  # 0.5 % if they were taken for Gaussian
    assert (found.Theta / kernels.Theta - 1).abs().max() < 2e-5
    assert "counted in K and Theta at first order" in " ".join(found.validity.reasons)
    error = {name: 4 * float(value.max()) for name, value in found.error.items()}
    assert float(found.ntk_relative_sd) == pytest.approx(truth.ntk, rel=0.02, abs=error["ntk_relative_sd"])
    assert found.ntk_trace_relative_sd == pytest.approx(truth.ntk_trace, rel=0.02, abs=error["ntk_trace_relative_sd"])
    assert found.epsilon == pytest.approx(truth.output_variance**2, rel=0.04, abs=error["epsilon"])
    assert not theory.read_architecture(model, x).remarks


def test_variances_that_no_rule_has_are_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.bias, std=0.3)
    (remark,) = theory.read_architecture(model, torch.zeros(1, 4)).remarks
    assert "mean square of this network's biases, good to 14 %" in remark


class ChannelsFirst(nn.Module):
    def __init__(self, n=32):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, n, 2, 2), nn.GroupNorm(1, n)
        self.up, self.down, self.last = nn.Conv2d(n, 2 * n, 1), nn.Conv2d(2 * n, n, 1), nn.Linear(n, 2)

    def forward(self, x):
        h = self.stem(x)
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.last(F.gelu(h).mean((2, 3)))


class ChannelsLast(nn.Module):
    """The same with its channels last, as ConvNeXt and transformers write it; the read-out in front of the mean."""

    def __init__(self, other):
        super().__init__()
        n = other.last.in_features
        self.stem, self.norm = other.stem, nn.LayerNorm((4, n), elementwise_affine=False)
        self.up, self.down, self.last = nn.Linear(n, 2 * n), nn.Linear(2 * n, n), other.last
        for own, its in ((self.up, other.up), (self.down, other.down)):
            own.weight.data, own.bias.data = its.weight.data.flatten(1), its.bias.data

    def forward(self, x):
        h = self.stem(x).flatten(2).transpose(1, 2)
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.last(F.gelu(h)).mean(1)


def test_two_ways_to_write_a_network_are_one_architecture():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    first = ChannelsFirst().double()
    first.norm = nn.GroupNorm(1, 32, affine=False)
    second = ChannelsLast(first).double()
    assert (first(x) - second(x)).abs().max() < 1e-12
    read = [theory.read_architecture(model, x) for model in (first, second)]
    found = [theory.architecture_statistics(each, x, num_samples=512) for each in read]
    assert (found[0].K["output"] / found[1].K["output"] - 1).abs().max() < 1e-12
    assert (found[0].Theta / found[1].Theta - 1).abs().max() < 1e-12
    assert (found[0].ntk_relative_sd / found[1].ntk_relative_sd - 1).abs().max() < 1e-6
