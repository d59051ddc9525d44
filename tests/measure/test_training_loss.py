"""Recognizing squared error by value and gradient, and seeing everything that is not it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.oracles.models import mlp
from torch_eft import measure
from torch_eft.measure.training_loss import batch_fingerprint, same_batch

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])


def step(loss_function, model=None, y=Y):
    torch.manual_seed(0)
    model = model or mlp()
    loss = loss_function(model(X), y)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return measure.recognize_squared_error(model, X, y, loss.detach(), gradients)


@pytest.mark.parametrize(
    ("loss_function", "c"),
    [
        (F.mse_loss, 1 / 18),
        (lambda z, y: F.mse_loss(z, y, reduction="sum"), 1.0),
        (lambda z, y: 0.5 * (z - y).square().sum(), 0.5),
        (lambda z, y: (z - y).square().sum(1).mean(), 1 / 6),
        (lambda z, y: 0.5 * (z - y).square().sum(1).mean(), 1 / 12),
        (lambda z, y: 0.5 * F.mse_loss(z, y), 1 / 36),
    ],
)
def test_the_usual_normalizations_are_told_apart(loss_function, c):
    loss = step(loss_function)
    assert loss.c == pytest.approx(c)
    assert loss.rate_factor == pytest.approx(2 * c)
    torch.testing.assert_close(loss.targets, Y)


def test_class_numbers_are_taken_as_one_hot():
    loss = step(lambda z, y: F.mse_loss(z, F.one_hot(y, 3).float()), y=CLASSES)
    torch.testing.assert_close(loss.targets, F.one_hot(CLASSES, 3).float())


@pytest.mark.parametrize(
    ("loss_function", "model", "y", "message"),
    [
        (F.cross_entropy, None, CLASSES, r"is no usual multiple of the squared error"),
        (F.l1_loss, None, Y, r"is no usual multiple of the squared error"),
        (lambda z, y: F.mse_loss(z, y) + 0.1 * z.square().mean(), None, Y, r"is no usual multiple"),
        # The value is right, the gradient is not: only the second check can see this.
        (lambda z, y: F.mse_loss(z, y) + (z.sum() - z.sum().detach()), None, Y, r"gradient differs"),
        (lambda z, y: F.mse_loss(z.detach(), y) + 0 * z.sum(), None, Y, r"gradient differs"),
        (F.cross_entropy, None, torch.tensor([0, 1, 2, 3, 1, 2]).clamp(max=2)[:, None], r"targets \(6, 1\) cannot"),
    ],
)
def test_other_losses_are_seen(loss_function, model, y, message):
    wanted = (lambda z, t: F.cross_entropy(z, t.flatten())) if y.shape == (6, 1) else loss_function
    with pytest.raises(measure.UnrecognizedLossError, match=message):
        step(wanted, model, y)


def test_dropout_in_training_is_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 3))
    with pytest.raises(measure.UnrecognizedLossError):
        step(F.mse_loss, model)


def test_fingerprints_ignore_order_and_nothing_else():
    reference = batch_fingerprint(X, Y)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert same_batch(batch_fingerprint(X[order], Y[order]), reference)
    assert not same_batch(batch_fingerprint(X[order], Y), reference)
    assert not same_batch(batch_fingerprint(X[:5], Y[:5]), reference)
    assert not same_batch(batch_fingerprint(X + 1e-3, Y), reference)
