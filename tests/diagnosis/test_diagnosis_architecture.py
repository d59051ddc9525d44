"""The diagnosis of convolutions, skips and norms: what is derived, against closed forms and against seeds."""

import json
import math

import pytest
import torch
from torch import nn

import torch_eft as eft
from tests.oracles.models import ConvNet
from torch_eft import theory
from torch_eft.diagnosis import ArchitectureDiagnosis, MeasuredDiagnosis
from torch_eft.theory.estimates.layer_profile import layer_profile


class Branch(nn.Module):
    """h + W2 s(W1 LN h)."""

    def __init__(self, n, activation, gain):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(n), nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False)
        self.activation = activation
        nn.init.normal_(self.inner.weight, std=n**-0.5)
        nn.init.normal_(self.outer.weight, std=(gain / n) ** 0.5)

    def forward(self, x):
        return x + self.outer(self.activation(self.inner(self.norm(x))))


def pre_norm(activation, blocks=3, gain=0.05, n=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, n), *[Branch(n, activation, gain) for _ in range(blocks)], nn.Linear(n, 2))


@pytest.mark.parametrize(("activation", "name"), [(nn.ReLU(), "relu"), (nn.GELU(), "gelu")])
def test_the_exponent_of_a_pre_norm_stream_is_that_of_its_branch(activation, name):
    """chi_b / kappa = C_W1 <s'^2> / <s^2> at C_W1; finite blocks take it to the square of their step, 1 % here."""
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    architecture = theory.read_architecture(pre_norm(activation), x)
    (stream,) = layer_profile(architecture, x).streams
    s, C_W = theory.get_activation(name), [node for node in architecture.nodes if hasattr(node, "C_W")][1].C_W
    z = torch.randn(2**20, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * C_W**0.5
    exponent = C_W * float(s(z, 1).square().mean() / s(z).square().mean())
    assert stream.blocks == 3 and stream.normed
    assert stream.kernel_growth > 1.05
    assert stream.exponent == pytest.approx(exponent, rel=0.03)


def chain(gain, depth=4, n=16, pool=False):
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, n, 3, padding=1, padding_mode="circular")]
    for index in range(depth):
        layers += [nn.ReLU(), nn.Conv1d(n, n, 3, padding=1, padding_mode="circular")]
        layers += [nn.AvgPool1d(2)] if pool and index == 1 else []
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(n * (3 if pool else 6), 2))
    for layer in model:
        if hasattr(layer, "weight"):
            nn.init.normal_(layer.weight, std=(gain / layer.weight[0].numel()) ** 0.5)
            nn.init.zeros_(layer.bias)
    return model


@pytest.mark.parametrize("pool", [False, True])
def test_layers_of_a_critical_chain_keep_their_gradient(pool):
    """ReLU at C_W = 2 keeps K and J from layer to layer, to the error of C_W read off 768 weights."""
    x = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1))
    hidden = layer_profile(theory.read_architecture(chain(2.0, pool=pool), x), x).layers[:-1]
    for before, after in zip(hidden, hidden[1:], strict=False):
        assert before.gradient / after.gradient == pytest.approx(1, abs=4 * math.sqrt(2 / 768) + 1e-9)


def test_what_explodes_or_vanishes_is_found_and_advised_in_the_networks_own_terms():
    x = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(1))
    loud = eft.diagnose(chain(8.0), x)
    assert isinstance(loud, ArchitectureDiagnosis)
    assert "gradients explode" in {finding.code for finding in loud.warnings}
    assert "smaller initial weights" in loud.advice[0] and "residual connections" in loud.advice[0]
    spread = next(finding for finding in loud.warnings if finding.code in ("edge", "spread", "too deep"))
    assert "times the neurons (channels), or fewer layers" in spread.remedy and "with 16" in spread.remedy
    quiet = eft.diagnose(chain(0.3, depth=8), x)
    assert quiet.gradient_growth < 0.1
    assert "gradients vanish" in quiet.verdict or "its last layers most" in quiet.verdict


def test_a_residual_network_is_derived_in_words():
    model = pre_norm(nn.GELU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = eft.diagnose(model.train(), torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))
    assert found.kind == "architecture" and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(each.share for each in found.populations) == pytest.approx(1)
    assert sum(each.share for each in found.layers) <= 1 + 1e-9  # gains and shifts make the rest
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["inputs"] == 6 and report["measured"] is None
    text = str(found)
    for words in ("verdict", "kernel K, last layer over first", "NTK, seed to seed", "depth over width, r", "derived"):
        assert words in text, words
    assert "power law, critical for any initial weights" in found.details
    assert max(map(len, text.splitlines())) <= 80


def test_what_is_not_derived_is_measured_and_says_why():
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pooled = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    cases = (pooled, "max pooling is not covered"), (ConvNet(), "BatchNorm"), (chain(2.0, depth=1), None)
    for model, reason in cases:
        x = images if reason else images[:, 0, :1, :6]
        found = eft.diagnose(model, x, num_networks=0 if reason is None else None)
        assert isinstance(found, MeasuredDiagnosis)
        assert reason is None or reason in found.reason


@pytest.mark.slow
def test_derived_and_measured_agree():
    """16 networks tell a spread to 18 %: within four standard errors."""
    model = nn.Sequential(
        nn.Conv1d(1, 32, 3), nn.Tanh(), nn.Conv1d(32, 32, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)
    )
    found = eft.diagnose(model, torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1)), beside=True)
    measured = found.measured
    assert abs(math.sqrt(measured.epsilon_ntk) / found.ntk_spread - 1) < 4 * 0.18
    assert "| NTK, seed to seed |" in found.details
