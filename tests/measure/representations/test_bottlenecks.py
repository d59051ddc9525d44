"""The bottlenecks of a network: what is found, and its squared gradients against brute force."""

import pytest
import torch
from torch import nn

from tests.oracles.models import ConvNet, Recurrent, mlp
from torch_eft.measure.ensembles.reinitialized_networks import log_variance, reinitialized_networks
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.representations.bottlenecks import bottlenecks


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


class Branches(nn.Module):
    """Two branches side by side, then one layer."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.left(x)) * self.right(x))


def places(model, x):
    with isolated(model) as network:
        return bottlenecks(network, Probe(x))


class Downsampling(nn.Module):
    """A block of a ResNet with a convolution on its skip connection."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1), nn.BatchNorm2d(n_out)
        self.downsample, self.relu = nn.Conv2d(n_in, n_out, 1, 2), nn.ReLU(inplace=True)

    def forward(self, x):
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(inner + self.downsample(x))


def resnet():
    blocks = nn.Sequential(Downsampling(4, 6), Downsampling(6, 6))
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


class Shared(nn.Module):
    """One layer three times."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.head(x)


def residual():
    blocks = nn.Sequential(Residual(8), Residual(8))
    return nn.Sequential(nn.Linear(6, 8), blocks, nn.ReLU(inplace=True), nn.Linear(8, 3))


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 3)
    )


@pytest.mark.parametrize(
    ("model", "x", "names"),
    [
        (lambda: mlp((5, 12, 9, 3)), torch.randn(4, 5), ["0", "2", "4"]),
        (ConvNet, torch.randn(4, 1, 8, 8), ["conv", "head"]),
        (Recurrent, torch.randn(4, 5, 3), ["rnn", "head"]),
        (Branches, torch.randn(4, 4), ["head"]),
        (transformer, torch.randint(0, 11, (4, 5)), ["0", "1.layers.0", "1.layers.1", "1.layers.2", "3"]),
        (resnet, torch.randn(4, 1, 8, 8), ["0", "1.0", "1.1", "4"]),
        (Shared, torch.randn(4, 4), ["layer", "layer:2", "layer:3", "head"]),
        (residual, torch.randn(4, 6), ["0", "1.0", "1.1", "3"]),
    ],
)
def test_what_everything_passes(model, x, names):
    torch.manual_seed(0)
    assert [place.name for place in places(model(), x)] == names


def test_squared_gradients_by_brute_force():
    torch.manual_seed(0)
    model = mlp((5, 12, 9, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    found = places(model, x)
    with torch.no_grad():
        first = model[0](x)
    for place, start, values in (
        (found[0], 1, first),
        (found[1], 3, model[1:3](first)),
        (found[2], 5, model[1:](first)),
    ):
        J = torch.func.vmap(torch.func.jacrev(model[start:]))(values) if start < 5 else torch.eye(3).expand(4, 3, 3)
        J, values = J.detach(), values.detach()
        assert place.gradient == pytest.approx(float(J.square().sum()) / 12, rel=1e-10)
        assert place.variance == pytest.approx(float(values.square().mean()), rel=1e-10)
        assert place.features == values.shape[1]
    assert torch.allclose(found[1].entering, torch.tanh(first).square().mean(1))


def test_many_outputs_are_probed_at_random():
    """Random signs: a relative standard error of about sqrt(2 / (16 probes x 4 samples x ..)), well within a third."""
    torch.manual_seed(0)
    model = mlp((5, 60, 60, 40)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    J = torch.func.vmap(torch.func.jacrev(model[1:]))(model[0](x)).detach()
    assert places(model, x)[0].gradient == pytest.approx(float(J.square().sum()) / 160, rel=0.33)


def test_reinitialized_networks_leave_the_model_and_the_random_state_alone():
    torch.manual_seed(0)
    model = ConvNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = reinitialized_networks(
        model, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), num_networks=3
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    traces = [float(one.trace.mean()) for one in found.drawn]
    assert len(set(traces)) == 3
    again = reinitialized_networks(
        model, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), num_networks=3
    )
    assert traces == [float(one.trace.mean()) for one in again.drawn]


def test_what_cannot_be_redrawn_is_said():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x * self.scale)

    found = reinitialized_networks(Own(), torch.randn(2, 4), num_networks=3)
    assert found.drawn == []
    assert "'scale' of Own is drawn by no reset_parameters" in found.refusal
    with pytest.raises(ValueError, match="num_networks: -1 given"):
        reinitialized_networks(Own(), torch.randn(2, 4), num_networks=-1)


def test_the_variance_of_a_lognormal():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator, dtype=torch.float64).mul(0.5).exp()
    variance, error = log_variance(values.tolist())
    assert abs(variance - 0.25) < 3 * error
    assert error == pytest.approx(0.25 * (2 / 1999) ** 0.5, rel=0.1)
    assert all(value != value for value in log_variance([1.0, 0.0, 2.0]))
