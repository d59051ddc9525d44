"""NTK and its spread against networks drawn: the networks of architectures beyond MLPs, and networks at random."""

import pytest
import torch
from torch import nn

from tests.theory.architecture.drawn import compared, drawn_ntks
from tests.theory.architecture.networks import residual, resnet
from tests.theory.architecture.random_networks import Skip, z_scores
from torch_eft import theory

pytestmark = pytest.mark.slow


class Scaled(nn.Module):
    def __init__(self, layers, factor):
        super().__init__()
        self.layers, self.factor = layers, factor

    def forward(self, x):
        return self.factor * self.layers(x)


def dense(n, blocks, branch, last=()):
    """A residual MLP with Gaussian weights, C_W = 2, C_b = 0.05."""
    skips = [Skip(branch(n), nn.Identity()) for _ in range(blocks)]
    model = nn.Sequential(nn.Linear(4, n), *skips, *[layer(n) for layer in last], nn.GELU(), nn.Linear(n, 1)).double()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=(2.0 / layer.in_features) ** 0.5)
            nn.init.normal_(layer.bias, std=0.05**0.5)
    return model


def normed(norm):
    return lambda n: dense(n, 2, lambda n: nn.Sequential(norm(n), nn.Linear(n, n), nn.GELU(), nn.Linear(n, n)), (norm,))


NETWORKS = {
    "one layer a branch": lambda n: dense(n, 3, lambda n: Scaled(nn.Sequential(nn.GELU(), nn.Linear(n, n)), 0.5)),
    "two layers a branch": lambda n: dense(
        n, 2, lambda n: Scaled(nn.Sequential(nn.GELU(), nn.Linear(n, n), nn.GELU(), nn.Linear(n, n)), 0.5)
    ),
    "LayerNorm in front": normed(nn.LayerNorm),
    "RMSNorm in front": normed(lambda n: nn.RMSNorm(n, eps=1e-6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_residual_mlps(name):
    """Diagonal entries to 3 % (the next order, at n = 192), beside four standard errors of 500 seeds."""
    x = 1.5 * torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    architecture = theory.read_architecture(NETWORKS[name](192), x)
    assert compared(architecture, x, *drawn_ntks(lambda: NETWORKS[name](192), x, 500), kernel=0.015, spread=0.03)


def test_convolutions_with_norms_in_front():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    architecture = theory.read_architecture(residual(64), x)
    assert compared(architecture, x, *drawn_ntks(lambda: residual(64), x, 600))


@pytest.mark.parametrize(("activation", "pool"), [(nn.GELU, False), (nn.ReLU, True)])
def test_resnets_with_group_norm(activation, pool):
    """NTK to 2.5 % (the next order, at 64 and 128 channels), spread to 4 %, beside four standard errors."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    architecture = theory.read_architecture(resnet(64, activation, pool=pool), x)
    assert compared(architecture, x, *drawn_ntks(lambda: resnet(64, activation, pool=pool), x, 200), num_samples=2**14)


@pytest.mark.parametrize("seed", [1, 3, 6, 8])
def test_networks_at_random(seed):
    """Of width 256; |z| > 5 has the probability 1e-6 (50 seeds: Student's t, 7e-6)."""
    scores, _ = z_scores(seed, 50)
    assert max(scores.values()) < 5, scores
