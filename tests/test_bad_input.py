"""Mistakes that people make are answered at once: what was given, what is allowed, the nearest name."""

import pytest
import torch
from torch import nn

import torch_eft as eft
from torch_eft import live, measure, theory
from torch_eft.tensorboard import trajectory_figure

MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
ENSEMBLE = theory.MLPEnsemble([3, 8, 2], "tanh")
X, Y = torch.eye(3).double(), torch.ones(3, 2).double()
THETA = dict(MODEL.named_parameters())
DATA = (X, Y, X[:1])
SGD = {"learning_rate": 0.01, "steps": 2}

MISTAKES = {
    "an old name": (lambda: measure.contracted, AttributeError, "contracted"),
    "arguments of ntk swapped": (lambda: measure.ntk(X, MODEL), TypeError, r"model: Tensor given; .*\(model, x"),
    "a word for lambdas": (lambda: measure.ntk(MODEL, X, lambdas="layer"), ValueError, "lambdas: 'layer' given"),
    "positional lambdas": (lambda: measure.ntk(MODEL, X, 1.0), TypeError, "positional argument"),
    "a misspelled parameter": (
        lambda: measure.ntk(MODEL, X, lambdas={**dict.fromkeys(THETA, 1.0), "0.weigth": 1.0}),
        ValueError,
        r"'0.weigth' is not a trainable parameter \(did you mean '0.weight'\?\)",
    ),
    "theta that lacks a parameter's name": (
        lambda: measure.taylor_terms(MODEL, X, THETA, {"0.bais": THETA["0.bias"]}),
        ValueError,
        r"'0.bais' is not a trainable parameter of the model \(did you mean '0.bias'\?\)",
    ),
    "memory in words": (lambda: measure.ntk(MODEL, X, memory="1GB"), ValueError, "memory: '1GB' given; .* bytes"),
    "a module for an ensemble": (
        lambda: theory.predict_training(MODEL, *DATA, **SGD),
        TypeError,
        r"ensemble: Sequential given; .*measure.read_ensemble",
    ),
    "inputs before the ensemble": (lambda: theory.initial_statistics(X, ENSEMBLE), TypeError, "ensemble: Tensor given"),
    "lr": (lambda: eft.predict_from_network(MODEL, *DATA, lr=0.1, steps=2), TypeError, "mean 'learning_rate'"),
    "a misspelled keyword": (
        lambda: eft.predict_from_network(MODEL, *DATA, **SGD, momentun=0.9),
        TypeError,
        "momentun: no such argument .did you mean 'momentum'",
    ),
    "weight decay": (lambda: eft.predict_from_network(MODEL, *DATA, **SGD, weight_decay=1), TypeError, "TaylorModel"),
    "a rate in words": (
        lambda: eft.Training(learning_rate="0.1", steps=2),
        ValueError,
        "'0.1' given, where a number",
    ),
    "a loss class": (lambda: eft.Training(loss=nn.MSELoss, **SGD), ValueError, r"give an instance, MSELoss\(\)"),
    "another loss": (lambda: eft.Training(loss="msee", **SGD), ValueError, "did you mean 'mse'"),
    "negative steps": (lambda: eft.Training(learning_rate=0.1, steps=-1), ValueError, "steps: -1 given"),
    "classes for the squared error": (
        lambda: eft.predict_from_network(MODEL, X, torch.tensor([0, 1, 1]), X, **SGD),
        ValueError,
        r"y_train: shape \(3,\) int64 given; .*for class indices use loss='cross_entropy'",
    ),
    "a class that is not there": (
        lambda: eft.predict_from_network(MODEL, X, torch.tensor([0, 1, 5]), X, **SGD, loss="cross_entropy"),
        ValueError,
        r"from 0 to 5 given; .*classes 0 .. 1",
    ),
    "NaN among the targets": (
        lambda: eft.predict_from_network(MODEL, X, Y * float("nan"), X, **SGD),
        ValueError,
        "y_train: contains NaN",
    ),
    "an activation class": (lambda: theory.MLPEnsemble([3, 8, 2], nn.Tanh), TypeError, r"give an instance, Tanh\(\)"),
    "a misspelled activation": (lambda: theory.MLPEnsemble([3, 8, 2], "tahn"), ValueError, "did you mean 'tanh'"),
    "a label without a set": (
        lambda: theory.vertex_block(ENSEMBLE, X, name="V", labels="xxgd", label_sets={"x": torch.arange(2)}),
        ValueError,
        "'g' has no label set",
    ),
    "a label set beyond the inputs": (
        lambda: theory.vertex_block(ENSEMBLE, X, name="V", labels="xxxx", label_sets={"x": torch.tensor([7])}),
        ValueError,
        "label_sets: 'x' holds indices outside 0 .. 2",
    ),
    "a misspelled preset": (lambda: live.Observer(MODEL, X, preset="ful"), ValueError, "did you mean 'full'"),
    "one name for a list": (lambda: live.Observer(MODEL, X, extra="taylor"), ValueError, r"such as \['taylor'\]"),
    "percent": (lambda: live.Observer(MODEL, X, budget="5%"), ValueError, "budget: '5%' given; give the share"),
    "a trajectory without a label": (lambda: trajectory_figure(X), ValueError, "give {label: trajectory}"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered(mistake):
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()
