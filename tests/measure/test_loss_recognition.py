"""Recognizing losses: those that are, and everything that is not."""

import pytest
import torch
from torch.nn import functional as F

from tests.oracles.models import mlp
from torch_eft.measure.training_loss import UnrecognizedLossError, recognize_loss

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2])


def step(loss_function, y=Y, given=None, count=6):
    torch.manual_seed(0)
    model = mlp()
    x, y = X[:count], y[:count]
    loss = loss_function(model(x), y)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return recognize_loss(model, x, y, loss.detach(), gradients, loss_function=given)


CASES = {
    "mean squared error": (F.mse_loss, Y, "mse", 2 / 18),
    "half the sum": (lambda z, y: 0.5 * (z - y).square().sum(), Y, "mse", 1.0),
    "over samples": (lambda z, y: (z - y).square().sum(1).mean(), Y, "mse", 2 / 6),
    "classes": (F.cross_entropy, CLASSES, "cross_entropy", 1 / 6),
    "probabilities": (F.cross_entropy, Y.softmax(1), "cross_entropy", 1 / 6),
    "sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), CLASSES, "cross_entropy", 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_found_is_the_loss_on_other_outputs_and_batches_too(name):
    loss_function, y, kind, factor = CASES[name]
    found = step(loss_function, y)
    assert (found.kind, found.factor) == (kind, pytest.approx(factor))
    z = torch.randn(4, 3)
    torch.testing.assert_close(found.function(z, y[:4]), loss_function(z, y[:4]))
    base = 0.5 * (z - y[:4]).square().sum() if kind == "mse" else F.cross_entropy(z, y[:4], reduction="sum")
    whole = found.function(torch.cat([z, z[:2]]), torch.cat([y[:4], y[:2]]))
    if y is Y:
        assert float(whole) == pytest.approx(factor * float(base + 0.5 * (z[:2] - y[:2]).square().sum()), rel=1e-5)


def test_a_given_loss_is_checked():
    assert step(F.l1_loss, given=F.l1_loss).kind == "given"
    with pytest.raises(UnrecognizedLossError, match="the loss that was given on the batch"):
        step(F.l1_loss, given=F.mse_loss)


@pytest.mark.parametrize(
    ("loss_function", "y"),
    [
        (F.l1_loss, Y),
        (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), CLASSES),
        (lambda z, y: F.cross_entropy(z, y) + (z.sum() - z.sum().detach()), CLASSES),
    ],
)
def test_others_are_told_apart(loss_function, y):
    with pytest.raises(UnrecognizedLossError, match=r"neither squared error .* nor cross-entropy; give loss_function="):
        step(loss_function, y)
