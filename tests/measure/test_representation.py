"""Hidden kernels against features computed by hand, and CKA's defining properties."""

import pytest
import torch
from torch import nn

from tests.models import ConvNet, mlp
from torch_eft import measure


def test_kernels_of_the_activations_of_an_mlp():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(4, 5)
    kernels = measure.hidden_kernels(model, x)
    assert list(kernels) == ["1", "3"]
    with torch.no_grad():
        for name, depth in (("1", 2), ("3", 4)):
            features = model[:depth](x)
            torch.testing.assert_close(kernels[name], features @ features.T / features.shape[1])


def test_without_activation_modules_weighted_layers_but_the_last():
    torch.manual_seed(0)
    model, x = ConvNet().eval(), torch.randn(3, 1, 8, 8)
    kernels = measure.hidden_kernels(model, x)
    assert list(kernels) == ["conv"]
    features = model.conv(x).detach().flatten(1)
    torch.testing.assert_close(kernels["conv"], features @ features.T / features.shape[1])
    assert list(measure.hidden_kernels(model, x, layers=["norm", "head"])) == ["norm", "head"]


class Reusing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(3, 6), nn.Linear(6, 2), nn.Tanh()

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x))))


def test_a_module_called_twice_is_recorded_twice():
    torch.manual_seed(0)
    model, x = Reusing(), torch.randn(4, 3)
    kernels = measure.hidden_kernels(model, x)
    assert list(kernels) == ["act", "act:2"]
    features = torch.tanh(model.first(x)).detach()
    torch.testing.assert_close(kernels["act"], features @ features.T / 6)


def test_unknown_layers_are_named():
    with pytest.raises(ValueError, match=r"layers: 'nope' is no submodule; there are 0, 1, 2"):
        measure.hidden_kernels(mlp(), torch.ones(2, 5), layers=["nope"])


def test_cka_of_features_is_invariant_under_rotation_scale_and_shift():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator))[0]
    moved = 3 * features @ rotation + 7
    K, L = features @ features.T, moved @ moved.T
    assert float(measure.linear_cka(L, K)) == pytest.approx(1, abs=1e-12)
    other = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    # By its definition: ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centred features (Kornblith et al., eq. 2).
    X, Y = features - features.mean(0), other - other.mean(0)
    expected = (Y.T @ X).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm())
    assert float(measure.linear_cka(other @ other.T, K)) == pytest.approx(float(expected), abs=1e-12)
