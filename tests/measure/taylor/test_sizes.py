"""Sizes of Taylor terms: against a function whose terms are known, and their powers in the displacement."""

import pytest
import torch
from torch import nn

from torch_eft import measure

F64 = torch.float64


class Cubic(nn.Module):
    """f = w x + (w x)^2 + (w x)^3 + (w x)^4 about w = 0: every term is one power."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x):
        z = self.w * x
        return z + z * z + z * z * z + z * z * z * z


def sizes(w):
    model = Cubic()
    x, theta = torch.ones(1, 1, dtype=F64), {"w": torch.tensor([w], dtype=F64)}
    return measure.taylor_sizes(model, x, model, theta)


def test_powers_are_separated():
    w = 0.5
    found = sizes(w)
    total = w + w**2 + w**3 + w**4
    assert found.change == pytest.approx(total)
    assert found.terms == pytest.approx([w / total, w**2 / total, w**3 / total])
    assert found.left == pytest.approx([(w**2 + w**3 + w**4) / total, (w**3 + w**4) / total, w**4 / total])


def test_orders_needed():
    assert [sizes(w).orders_needed(0.05) for w in (0.01, 0.1, 0.3, 0.9)] == [1, 2, 3, 4]


def test_nothing_moved():
    assert sizes(0.0) is None


def test_rounding_is_an_honest_floor():
    """At tiny displacements of a float32 network, what three terms leave is rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    for scale in (1e-3, 1e-4):
        end = {name: value + scale * torch.randn_like(value) for name, value in theta.items()}
        found = measure.taylor_sizes(model, torch.randn(6, 8), theta, end)
        assert found.left[2] < found.rounding < 1
