"""Which networks are drawn without a function that draws: those that the given network could be one of."""

import re

import pytest
import torch
from torch import nn

import torch_eft as eft
from tests.oracles.models import ConvNet, Recurrent
from torch_eft.measure import statistics_over_seeds
from torch_eft.measure.ensembles.draws import Draw
from torch_eft.measure.forward.isolation import isolated


def body():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))


def he(module):
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


class Free(nn.Module):
    """Initialized by its constructor, with a function that nothing finds."""

    def __init__(self):
        super().__init__()
        self.body = body()
        self.start()

    def start(self):
        self.body.apply(he)

    def forward(self, x):
        return self.body(x)


class AppliedHook(Free):
    """As transformers and minGPT do it."""

    def start(self):
        self.apply(self._init_weights)

    def _init_weights(self, module):
        he(module)


class WholeHook(Free):
    """As timm does it."""

    def start(self):
        self.init_weights()

    def init_weights(self, zero_last=True):
        for module in self.modules():
            he(module)
        if zero_last:
            nn.init.zeros_(self.body[3].weight)


class WrongHook(Free):
    """A hook that wants what nobody knows here."""

    def init_weights(self, path):
        raise AssertionError(path)


def drawn(model, seed=0):
    with isolated(model) as network:
        return Draw(network, None, seed)(1)


@pytest.mark.parametrize("make", [AppliedHook, WholeHook, lambda: nn.Sequential(AppliedHook())])
def test_the_usual_hooks_draw_networks_of_the_networks_own_scale(make):
    torch.manual_seed(1)
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for name, value in drawn(model).items():
        own = model.get_parameter(name).detach()
        assert torch.equal(own, before[name])
        if not own.any():
            assert not value.any()
            continue
        assert not torch.equal(value[0], own)
        # The standard deviation of n normal values is good to 1 / sqrt(2 n), that of two of them differs by sqrt(2).
        assert abs(float(value[0].std() / own.std()) - 1) < 5 / own.numel() ** 0.5


@pytest.mark.parametrize("make", [Free, WrongHook])
def test_a_constructors_own_scale_is_never_replaced(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 3, 4, 4)
    std = f"{float(model.body[0].weight.detach().std()):.3g}"
    with pytest.raises(ValueError, match=rf"initialize: the parameter 'body.0.weight' of Conv2d.*{re.escape(std)}"):
        statistics_over_seeds(model, x, num_networks=4)
    found, alone = eft.diagnose(model, x, num_networks=16), eft.diagnose(model, x, num_networks=0)
    assert found.gradient_growth == alone.gradient_growth
    assert found.num_networks == 0
    assert any("pass a function initialize(module)" in remark for remark in found.remarks)
    asked = eft.diagnose(model, x, initialize=lambda module: module.apply(he), num_networks=4)
    assert asked.num_networks == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.mul_(1.3),
        lambda model: model[0].weight.div_(1.3),
        lambda model: model[0].bias.zero_(),
        lambda model: model[1].weight.mul_(1.001),  # ones
        lambda model: model[4].weight.add_(0.02),
        lambda model: model[5].weight.zero_(),
    ],
)
def test_one_parameter_of_another_scale_is_enough(change):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64), nn.Linear(64, 1)
    )
    drawn(model)
    with torch.no_grad():
        change(model)
    with pytest.raises(ValueError, match="was not drawn by reset_parameters"):
        drawn(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(1, 1),
        lambda: nn.Linear(3, 2, dtype=torch.float64),
        lambda: nn.Linear(8, 4).bfloat16(),
        lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.PReLU(), nn.GRU(3, 2)),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        ConvNet,
        Recurrent,
    ],
)
def test_networks_as_torch_draws_them_are_not_refused(make):
    for seed in range(20):
        torch.manual_seed(seed)
        assert drawn(make(), seed + 1)
