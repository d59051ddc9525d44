"""Mistakes that people make are answered at once: what was given, what is allowed, the nearest name."""

import lightning.pytorch as pl
import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_eft as eft
from torch_eft import live, measure, theory
from torch_eft.callbacks import EFTMonitor
from torch_eft.cli.main import main
from torch_eft.tensorboard import tag, trajectory_figure, verdict

MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
ENSEMBLE = theory.MLPEnsemble([3, 8, 2], "tanh")
X, Y = torch.eye(3).double(), torch.ones(3, 2).double()
THETA = dict(MODEL.named_parameters())
DATA = (X, Y, X[:1])
IMAGES = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
TOKENS = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
FRESH = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
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
    # ---- the probe
    "a batch for a probe": (
        lambda: measure.ntk(MODEL, (X, Y)),
        ValueError,
        r"looks like a batch \(inputs, targets\): give its inputs alone, batch\[0\]",
    ),
    "a batch with labels": (
        lambda: measure.ntk(MODEL, {"x": X, "labels": Y}),
        ValueError,
        r"a batch with its targets: give its inputs alone, batch\['x'\]",
    ),
    "a batch whose labels the forward does not know": (
        lambda: measure.ntk(MODEL, {"input": X, "labels": Y}),
        ValueError,
        "a batch with its targets: leave out 'labels'",
    ),
    "one sample": (
        lambda: measure.ntk(MODEL, X[0]),
        ValueError,
        r"one sample without its batch axis; give x\[None\], or better a few samples, x\[:16\]",
    ),
    "one image": (
        lambda: measure.ntk(IMAGES, torch.ones(1, 4, 4)),
        ValueError,
        r"looks like one sample without its batch axis: give x\[None\]",
    ),
    "images without a channel": (
        lambda: measure.ntk(IMAGES, torch.ones(3, 4, 4)),
        ValueError,
        r"takes a channel axis: give x\[:, None\]",
    ),
    "images for rows": (lambda: measure.ntk(FRESH, torch.ones(4, 1, 3, 1)), ValueError, r"give x\.flatten\(1\)"),
    "bytes for numbers": (lambda: measure.ntk(FRESH, torch.ones(4, 3).byte()), ValueError, r"kind: x\.float\(\)"),
    "numbers for indices": (lambda: measure.ntk(TOKENS, torch.ones(4, 2)), ValueError, r"indices: x\.long\(\)"),
    "a network for a probe": (
        lambda: EFTMonitor(MODEL),
        TypeError,
        r"that is a network; give inputs of it, .*x\[:16\]",
    ),
    "a loader for a probe": (lambda: EFTMonitor(DataLoader([X])), TypeError, "DataLoader given; give 'first_batch:16'"),
    "a data set for a probe": (
        lambda: live.Observer(MODEL, TensorDataset(X)),
        TypeError,
        "TensorDataset given; give 'first_batch:16'",
    ),
    "texts for a probe": (lambda: measure.ntk(MODEL, ["a", "b"]), ValueError, "of texts by their tokenizer"),
    "an array of objects": (
        lambda: measure.ntk(MODEL, numpy.array([{}, {}])),
        TypeError,
        "an array of object given; give numbers",
    ),
    "a first batch without a number": (
        lambda: EFTMonitor("first batch"),
        ValueError,
        "'first batch' given; say of how many samples, 'first_batch:16'",
    ),
    "thousands of samples": (
        lambda: live.Observer(FRESH, torch.ones(3000, 3)).check(),
        ValueError,
        r"probe: 3000 samples given; forecasts on so many take about 144 s, .*: give fewer, such as x\[:64\]",
    ),
    "the name of an output": (
        lambda: measure.ntk(MODEL, X, output_fn="logits"),
        TypeError,
        r"output_fn: 'logits' given; give a function .* lambda out: out\['logits'\]",
    ),
    # ---- monitors and observers
    "two monitors of one name": (
        lambda: pl.Trainer(callbacks=[EFTMonitor(X), EFTMonitor(X)], logger=False, accelerator="cpu"),
        ValueError,
        r"two EFTMonitor named '' given; give each a name of its own, EFTMonitor\(probe, name='first'\) and",
    ),
    "a misspelled preset of a monitor": (
        lambda: EFTMonitor(X, preset="standart"),
        ValueError,
        "did you mean 'standard'",
    ),
    "a misspelled activation of a monitor": (
        lambda: EFTMonitor(X, activation="Tahn"),
        ValueError,
        "did you mean 'tanh'",
    ),
    "percent as a number": (
        lambda: EFTMonitor(X, budget=5),
        ValueError,
        "budget: 5 given, 500 % of the training's time; 5 % is 0.05, and None is no limit",
    ),
    "epochs": (lambda: EFTMonitor(X, every="epochs"), ValueError, r"'epochs' given \(did you mean 'epoch'\?\)"),
    "seconds in words": (
        lambda: EFTMonitor(X, forecast_seconds="10"),
        ValueError,
        "forecast_seconds: '10' given; give a positive number of seconds",
    ),
    "the class of a network": (
        lambda: live.Observer(nn.Linear, X),
        TypeError,
        r"the class Linear given; give a network, Linear\(\.\.\.\)",
    ),
    "the observer's arguments swapped": (
        lambda: live.Observer(X, MODEL),
        TypeError,
        r"model: Tensor given; .*Observer\(model, x\)",
    ),
    "the class of an optimizer": (
        lambda: live.Observer(MODEL, X, torch.optim.SGD),
        TypeError,
        r"the class SGD given; give the training's own, SGD\(model\.parameters\(\), \.\.\.\)",
    ),
    "parameters for an optimizer": (
        lambda: live.Observer(MODEL, X, list(MODEL.parameters())),
        TypeError,
        r"optimizer: Parameter given; give a torch\.optim\.Optimizer",
    ),
    # ---- the rest
    "widths for a network": (
        lambda: eft.diagnose([3, 8, 2]),
        TypeError,
        r"model_or_ensemble: list given; .*a torch\.nn\.Module or a theory\.MLPEnsemble",
    ),
    "the diagnosis's arguments swapped": (lambda: eft.diagnose(X, MODEL), TypeError, r"diagnose\(model, x\)"),
    "the ensemble's arguments swapped": (
        lambda: theory.MLPEnsemble("tanh", [3, 8, 2]),
        ValueError,
        r"widths: 'tanh' given; give a list n_0, \.\.\., n_L and then the activation",
    ),
    "one width": (lambda: theory.MLPEnsemble(8, "tanh"), ValueError, "widths: 8 given; give a list"),
    "classes for the ensemble's targets": (
        lambda: theory.predict_training(ENSEMBLE, X, torch.tensor([0, 1, 1]), X, **SGD),
        ValueError,
        r"for classes use one-hot targets, F\.one_hot\(y\)\.double\(\), or loss='cross_entropy'",
    ),
    "tensors for trajectories": (
        lambda: eft.average_trajectories([X, X], "runs"),
        TypeError,
        "trajectories: Tensor given; give Trajectory objects",
    ),
    "a state_dict for parameters": (
        lambda: measure.taylor_terms(nn.BatchNorm1d(3), X, nn.BatchNorm1d(3).state_dict(), nn.BatchNorm1d(3)),
        ValueError,
        r"'running_mean' is not a trainable parameter of the model; give those of named_parameters\(\)",
    ),
    "a misspelled quantity": (lambda: verdict({}, "ntk drift"), ValueError, "did you mean 'ntk_drift'"),
    "a misspelled quantity of a history": (
        lambda: live.RunHistory({0: {tag("ntk_drift"): 0.0}}).plot("ntk-drift"),
        ValueError,
        "did you mean 'ntk_drift'",
    ),
    "a quantity that was not measured": (
        lambda: live.RunHistory({0: {tag("ntk_drift"): 0.0}}).plot("ntk_trace"),
        ValueError,
        "'ntk_trace' was not measured; it has ntk_drift",
    ),
    "an ensemble by a word": (
        lambda: EFTMonitor(X, ensemble="tanh"),
        TypeError,
        "ensemble: str given; .*read_ensemble",
    ),
    "preset and instruments": (
        lambda: EFTMonitor(X, preset="light", instruments=["ntk"]),
        ValueError,
        r"'light' given beside instruments, .* give one of the two, or .* as extra=\[\.\.\]",
    ),
    "no instruments": (lambda: EFTMonitor(X, instruments=[]), ValueError, r"none given; name some, such as \['ntk'\]"),
    "a number for a directory": (lambda: live.Observer(MODEL, X, logdir=5), TypeError, "logdir: 5 given; give a dir"),
    "a network for the law of the drift": (
        lambda: theory.predict_drift(MODEL, *DATA, **SGD),
        TypeError,
        "ensemble: Sequential given; .*read_ensemble",
    ),
    "a network for the aspect ratio": (lambda: theory.aspect_ratio(MODEL), TypeError, "ensemble: Sequential given"),
    "lr of a training": (lambda: eft.Training(lr=0.1, steps=2), TypeError, "lr: no such argument .*'learning_rate'"),
    "epochs of a training": (lambda: eft.Training(learning_rate=0.1, epochs=2), TypeError, "did you mean 'steps'"),
    "a training without keywords": (
        lambda: eft.Training(0.1, 2),
        TypeError,
        r"go by keyword, Training\(learning_rate=0\.1, steps=100\)",
    ),
    "an optimizer for a rate": (
        lambda: eft.Training(learning_rate=torch.optim.SGD(MODEL.parameters(), lr=0.1), steps=2),
        ValueError,
        "learning_rate: SGD given, where a number belongs",
    ),
    "a network for a function that draws them": (
        lambda: eft.predict_from_networks(MODEL, *DATA, **SGD),
        TypeError,
        r"make_model: Sequential given; .* draws a new network, lambda: Net\(\)",
    ),
    "too few draws": (
        lambda: theory.predict_training(
            ENSEMBLE, X, torch.tensor([0, 1, 1]), X, **SGD, loss="cross_entropy", order=0, num_draws=16
        ),
        ValueError,
        "num_draws: 16 given; 3 points of 2 outputs ask for 112 at least",
    ),
    "an ensemble for its statistics": (
        lambda: measure.statistics_over_seeds(FRESH, X[:1].float(), num_networks=3, statistics=("K",)).compare(
            ENSEMBLE
        ),
        TypeError,
        r"theory: MLPEnsemble given; .* theory\.initial_statistics\(ensemble, x\)",
    ),
    "a run that is not there": (lambda: eft.load_run("runs/no"), FileNotFoundError, "give a run's log directory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered(mistake):
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()


def test_an_activation_has_its_name_in_any_case_and_arrays_are_inputs():
    EFTMonitor(X, activation="ReLU")
    torch.testing.assert_close(measure.ntk(MODEL, X.numpy()), measure.ntk(MODEL, X))
    assert EFTMonitor(X.numpy()).observer.probe.size == 3
    assert eft.diagnose(FRESH, X.float().numpy()).inputs == 3


def test_a_large_probe_is_told_what_it_takes():
    with pytest.warns(live.MeasurementWarning, match="600 samples given; .* about 6 s of one core; fewer, such as"):
        live.Observer(FRESH, torch.ones(600, 3)).check()


def test_two_monitors_with_names_are_kept_apart():
    first, second = EFTMonitor(X, name="first"), EFTMonitor(X, name="second")
    pl.Trainer(callbacks=[first, second], logger=False, accelerator="cpu")
    assert first.state_key != second.state_key
    assert {str(first.state_key): 1}[EFTMonitor(X, name="first").state_key] == 1


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["diagnos"], "invalid choice: 'diagnos'"),
        (["diagnose", "--model", "mlp.py"], "--model mlp.py: give package.module:factory"),
        (["diagnose", "--widths", "64"], "widths: (64,) given; give at least two positive integers"),
        (["diagnose", "--widths", "3", "8", "1", "--activation", "tahn"], "did you mean 'tanh'"),
        (["report", "no/such/run"], "no such file or directory; give a run's log directory or its eft.jsonl"),
    ],
)
def test_a_mistake_on_the_command_line_is_answered(words, answer, capsys):
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    assert status == 2 and answer in capsys.readouterr().err
