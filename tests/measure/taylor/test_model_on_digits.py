"""Shadows of order one and three beside real trainings on digits, and what their verdict says."""

import math
import statistics

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from tests.measure.taylor.shadowed import train
from tests.oracles.models import mlp
from torch_eft.measure.taylor.model import TaylorModel
from torch_eft.measure.taylor.perturbative import PerturbativeTaylorModel

DIGITS = load_digits()
X = torch.tensor(DIGITS.data, dtype=torch.float32)
X = (X - X.mean()) / X.std()
Y = torch.tensor(DIGITS.target)


def critical(width, activation, C_W, seed):
    """A critical MLP 64-n-n-10 in torch's parametrization, so that learning rates go as 1/n."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mlp((64, width, width, 10), activation)
        for layer in model[::2]:
            nn.init.normal_(layer.weight, std=math.sqrt(C_W / layer.in_features))
            nn.init.zeros_(layer.bias)
    return model


RATES = {"SGD": 0.15, "Adam": 0.02}
ACTIVATIONS = {"tanh": (nn.Tanh, 1.0), "GELU": (nn.GELU, 2.0)}


def errors_on_digits(width, activation, kind, seed, steps=60, images=32, faster=1.0):
    """Largest rms error of the logits of 64 other images over training, relative to their largest change."""
    model = critical(width, *ACTIVATIONS[activation], seed)
    rate, x, y, probe = faster * RATES[kind] / width, X[:images], Y[:images], X[1000:1064]
    if kind == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    shadows = {1: TaylorModel(model, taylor_order=1), 3: TaylorModel(model)}
    if kind == "SGD":
        shadows["perturbative"] = PerturbativeTaylorModel(model)
    own = {name: shadow.optimizer_like(optimizer) for name, shadow in shadows.items()}
    start, change, error = model(probe).detach(), 0.0, dict.fromkeys(shadows, 0.0)
    for step in range(1, steps + 1):
        train(model, optimizer, [(x, y)], F.cross_entropy)
        for name, shadow in shadows.items():
            shadow.step(x, lambda z: F.cross_entropy(z, y), own[name])
        if step % 10 == 0:
            with torch.no_grad():
                value = model(probe)
                change = max(change, float((value - start).square().mean().sqrt()))
                for name, shadow in shadows.items():
                    error[name] = max(error[name], float((shadow(probe) - value).square().mean().sqrt()))
    return {name: value / change for name, value in error.items()} | {"validity": shadows[3].check(probe)}


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_order_three_tracks_digits_better_than_order_one(activation, kind):
    found = errors_on_digits(128, activation, kind, 0, steps=30)
    assert found[3] < 0.5 * found[1]
    assert found["validity"].flag != "invalid"
    if kind == "SGD":
        assert found["perturbative"] < 0.5 * found[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_order_three_tracks_digits_better_at_every_width(activation, kind):
    """Errors fall with the width as 1/n (k = 1) and faster (k = 3); a verdict "valid" is never a false one."""
    medians = {}
    for width in (64, 128, 256):
        runs = [errors_on_digits(width, activation, kind, seed) for seed in range(3)]
        medians[width] = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "validity"}
        for run in runs:
            assert run["validity"].flag != "valid" or run[3] < 0.25 * run[1]
            assert run["validity"].flag != "caution" or run[3] < run[1]
        print(activation, kind, width, {name: round(value, 4) for name, value in medians[width].items()})
    for width, error in medians.items():
        assert error[3] < error[1]
        if "perturbative" in error and width >= 128:
            assert error["perturbative"] < 0.6 * error[1]
    slopes = {k: math.log(medians[256][k] / medians[64][k]) / math.log(4) for k in (1, 3)}
    assert slopes[3] < slopes[1] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_where_order_three_fails_its_verdict_says_so(activation, kind):
    """Trained up to ten times further: no false confidence, and there are failures to be found."""
    failures = 0
    for width in (32, 64, 256):
        for faster in (3.0, 10.0):
            run = errors_on_digits(width, activation, kind, 0, faster=faster)
            flag, better = run["validity"].flag, run[3] < run[1]
            print(activation, kind, width, faster, flag, round(run[1], 3), round(run[3], 3))
            assert better or flag == "invalid"
            assert flag != "valid" or run[3] < 0.5 * run[1]
            failures += not better
    assert failures > 0


def test_kinks_and_strong_weight_decay_are_said():
    model = critical(64, nn.ReLU, 2.0, 0)
    x, y = X[:32], Y[:32]
    shadow = TaylorModel(model)
    reason = shadow.check(x).reason
    assert reason.startswith("the network has kinks (relu)") and "nothing has moved yet" in reason
    assert shadow.check(x).flag == "invalid"
    linear = TaylorModel(model, taylor_order=1)
    train(linear, linear.optimizer_like(torch.optim.SGD(model.parameters(), lr=1e-3)), [(x, y)] * 3, F.cross_entropy)
    assert linear.check(x).flag == "caution" and "kinks (relu)" in linear.check(x).reason
    assert PerturbativeTaylorModel(model).check(x).flag == "invalid"

    model = critical(128, nn.Tanh, 1.0, 0)
    for order in (1, 3):
        shadow = TaylorModel(model, taylor_order=order)
        assert shadow.check(x).flag == "valid"
        real = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5.0)
        train(shadow, shadow.optimizer_like(real), [(x, y)] * 60, F.cross_entropy)
        verdict = shadow.check(x)
        assert verdict.flag == "invalid" and "of theta_0 is gone (weight decay?)" in verdict.reason
