"""The validity that a forecast of order 1/n claims, against small trained ensembles: no false confidence."""

import math

import pytest
import torch

from tests.theory.training.validity_grid import STEPS, Forecasts, data, ensemble_of
from torch_eft import Training
from torch_eft.theory.hidden_layers.predict import predict_representation
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.corrections.validity import neuron_movement
from torch_eft.theory.training.infinite_width import FrozenTraining

PAIRS = {4: 1000, 8: 1000, 16: 1000, 32: 800, 64: 500}


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_movement_of_the_only_hidden_layer_is_that_of_the_representation(name):
    x, y = data(None, 2.0)
    ensemble, rate = ensemble_of(name, 2, 32), 0.2
    training = Training(learning_rate=rate, steps=40, reduction="sum")
    finite = FiniteWidthTraining(FrozenTraining(ensemble, x[1:], y, x[:1], training))
    found = neuron_movement(ensemble, finite.vertices.layers, finite.path, torch.tensor([0, 5, 40]))
    spec = dict(reduction="sum", at_steps=[0, 5, 40], observable="preactivations", ntk=False)
    layer = predict_representation(ensemble, x[1:], y, x, learning_rate=rate, steps=40, **spec).layers[0]
    expected = layer.movement.diagonal(dim1=1, dim2=2).sum(1) / layer.kernel_infinite_width.trace()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "depth", "close"), [("tanh", 2, None), ("gelu", 2, 0.1), ("gelu", 3, None)])
def test_no_false_confidence(name, depth, close):
    """Called valid, less than half of the largest 1/n term is neglected; called uncertain, less than all of it.

    Beside three standard errors. A mean that is not finite, of networks that diverged, is an error without bound.
    """
    forecasts = Forecasts(name, depth, close)
    counts, false = {"valid": 0, "caution": 0, "invalid": 0}, []
    for scale in (0.3, 1.0, 3.0):
        y = data(close, scale)[1]
        for n, pairs in PAIRS.items():
            compared = forecasts.compared(y, n, pairs, seed=n)
            for step in STEPS:
                flag = forecasts.validity(y, n, step)[0].flag
                counts[flag] += 1
                for key in ("mean", "covariance", "ntk"):
                    this = compared[key, step]
                    largest = max(compared[key, s].first for s in STEPS if s <= step)
                    allowed = {"valid": 0.5, "caution": 1.0, "invalid": math.inf}[flag] * largest
                    if not this.neglected < allowed + 3 * this.error and flag != "invalid":
                        share = this.neglected / largest, this.error / largest
                        false.append(f"{key}, y {scale}, n = {n}, t = {step}, {flag}: {share[0]:.2f} +- {share[1]:.2f}")
    print(f"{name}, depth {depth}, close {close}: {counts}")
    assert not false, "; ".join(false)
    assert min(counts.values()) >= 3  # of everything, some
