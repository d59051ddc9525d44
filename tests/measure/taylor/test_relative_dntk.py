"""Sizes of dNTK and ddNTK along a gradient, against their whole tensors."""

import math

import pytest
import torch
from torch import nn

from torch_eft import measure
from torch_eft.measure.taylor.displacement import relative_dntk

F64 = torch.float64


def setting(width=5, activation=nn.Tanh):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 2))
    model = model.double()
    lambdas = {name: 0.4 + 0.2 * index for index, (name, _) in enumerate(model.named_parameters())}
    return model, lambdas, torch.randn(3, 3, dtype=F64)


def test_against_whole_tensors():
    """With the gradient of e . z on the probe itself: H e, dH e, ddI e e and ddII e e say everything."""
    model, lambdas, x = setting()
    e = torch.randn(3, 2, dtype=F64)
    loss = (e * model(x)).sum()
    names = [name for name, _ in model.named_parameters()]
    gradient = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    found = relative_dntk(model, x, gradient, lambdas=lambdas)
    H, dH = measure.ntk(model, x, lambdas=lambdas), measure.dntk(model, x, lambdas=lambdas)
    ddI, ddII = measure.ddntk(model, x, lambdas=lambdas)
    moved = torch.einsum("abij,bj->ai", H, e).norm() / math.sqrt(6)
    first = torch.einsum("abcijk,ck->abij", dH, e)
    second = torch.einsum("abcdijkl,ck,dl->abij", ddI, e, e)
    square = torch.einsum("abcdijkl,ck,dl->abij", ddII, e, e)
    first, second = first + first.permute(1, 0, 3, 2), (second + second.permute(1, 0, 3, 2)) / 2 + square
    assert found.dntk == pytest.approx(float(first.norm() / H.norm() / moved), rel=1e-8)
    assert found.ddntk == pytest.approx(float(second.norm() / H.norm() / moved**2), rel=1e-8)
    # Neither the gradient's length nor where theta is taken from matters.
    theta = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        nn.init.zeros_(p)
    scaled = {name: 1e4 * value for name, value in gradient.items()}
    again = relative_dntk(model, x, scaled, theta=theta, lambdas=lambdas, derivatives=1)
    assert (again.dntk, again.ddntk) == (pytest.approx(found.dntk, rel=1e-10), None)


def test_nothing_moves():
    model, lambdas, x = setting()
    gradient = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert relative_dntk(model, x, gradient, lambdas=lambdas) is None


def test_kinks_are_said():
    model, lambdas, x = setting(activation=nn.ReLU)
    gradient = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert "almost everywhere" in relative_dntk(model, x, gradient, lambdas=lambdas).validity.reason


@pytest.mark.slow
def test_both_fall_with_the_width():
    """Along the gradient of squared error, ddNTK / NTK falls as 1/n; dNTK / NTK too, with random signs. Means over 24
    networks at n = 16 and 128, a factor 8: log-ratios with their standard errors."""
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(4, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
    logs = {}
    for width in (16, 128):
        rows = []
        for seed in range(24):
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
            )
            model = model.double()
            lambdas = {}
            for name, p in model.named_parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=p.shape[1] ** -0.5)
                    lambdas[name] = 1 / p.shape[1]
                else:
                    nn.init.zeros_(p)
                    lambdas[name] = 1.0
            loss = (model(x) - y).square().sum() / 2
            names = [name for name, _ in model.named_parameters()]
            gradient = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
            found = relative_dntk(model, x, gradient, lambdas=lambdas)
            rows.append([math.log(found.dntk), math.log(found.ddntk)])
        logs[width] = torch.tensor(rows)
    change = logs[128].mean(0) - logs[16].mean(0)
    error = ((logs[128].var(0) + logs[16].var(0)) / 24).sqrt()
    slope, slope_error = change / math.log(8), error / math.log(8)
    # Corrections of relative order 1/16 at the narrow end: 1/16 / log 8 = 0.03 of a slope for each unit of them.
    assert ((slope + 1).abs() < 3 * slope_error + 0.1).all(), (slope, slope_error)
