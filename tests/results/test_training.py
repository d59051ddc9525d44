"""The one description of a training: what it accepts, what it derives, and what it says."""

import math
from dataclasses import replace

import pytest
import torch

from torch_eft import Training
from torch_eft.results.training import as_training


def test_describe_names_what_differs_from_plain_descent():
    assert str(Training(learning_rate=0.1, steps=1)) == (
        "full-batch gradient descent, learning rate 0.1, 1 step, mean squared error"
    )
    told = Training(
        learning_rate=None, schedule=[0.2, 0.1], steps=2, momentum=0.9, dampening=0.5, batches=[[0]], reduction="sum"
    )
    assert told.describe() == (
        "fixed-minibatch gradient descent with momentum 0.9 and dampening 0.5, learning rates 0.1 to 0.2, 2 steps, "
        "summed squared error"
    )
    flow = Training(learning_rate=0.1, steps=2.5, dynamics="gradient_flow")
    assert flow.describe() == "full-batch gradient flow, learning rate 0.1, 2.5 steps, mean squared error"
    assert "loss l1_loss" in Training(learning_rate=0.1, steps=2, loss=torch.nn.functional.l1_loss).describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mae"}, "loss: 'mae' given .*; give one of 'mse', 'cross_entropy', or a function"),
        ({"reduction": "means"}, "did you mean 'mean'"),
        ({"dynamics": "gradient flow"}, "did you mean 'gradient_flow'"),
        ({"learning_rate": "mean"}, "learning_rate: 'mean' given, where a number belongs"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 given; it must be positive"),
        ({"learning_rate": None}, "learning_rate: none given"),
        ({"steps": "20"}, "steps: '20' given, where a number belongs"),
        ({"steps": -1}, "steps: -1 given"),
        ({"steps": 1.5}, "steps: 1.5 given"),
        ({"steps": math.inf, "momentum": 0.9}, "steps: inf given"),
        ({"momentum": 1.0}, "momentum: 1.0 given; it must lie in"),
        ({"dampening": -0.1}, "dampening: -0.1 given"),
        ({"nesterov": True}, "nesterov: needs momentum"),
        ({"schedule": [0.1, 0.2]}, "given beside schedule"),
        ({"schedule": [0.1, 0.2], "learning_rate": None}, "schedule: 2 learning rates given for 3 steps"),
        ({"schedule": [0.1, -0.2, 0.1], "learning_rate": None}, "schedule: -0.2 given"),
        ({"batches": []}, "batches: none given"),
        ({"batches": [[0], []]}, r"batches: \[\] given"),
        ({"batches": [[-1]]}, r"batches: \[-1\] given"),
        ({"dynamics": "gradient_flow", "momentum": 0.5}, "'gradient_flow' is in closed form"),
        ({"dynamics": "gradient_flow", "loss": "cross_entropy"}, "'gradient_flow' is in closed form"),
    ],
)
def test_values_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Training(**{"learning_rate": 0.1, "steps": 3, **options})


def test_rates_and_batches_of_each_step():
    training = Training(schedule=lambda step: 1 / (1 + step), steps=3, batches=[[0, 1], torch.tensor([2])])
    assert training.learning_rates == (1.0, 0.5, 1 / 3)
    assert [training.batch(step).tolist() for step in range(3)] == [[0, 1], [2], [0, 1]]
    assert not training.is_full_batch and not training.is_plain
    assert [batch.tolist() for batch in training.different_batches()] == [[0, 1], [2]]
    assert [batch.tolist() for batch in replace(training, steps=1).different_batches()] == [[0, 1]]
    training.check_batches(3)
    with pytest.raises(ValueError, match=r"batches: \[2\] given; each is a list of sample indices, 0 .. 1"):
        training.check_batches(2)
    plain = Training(learning_rate=0.1, steps=10**12)
    assert plain.is_plain and plain.batch(5) is None
    assert Training(schedule=[0.1, 0.1], steps=2).is_plain and not Training(schedule=[0.1, 0.2], steps=2).is_plain
    assert plain.summed(4) == Training(learning_rate=0.05, steps=10**12, reduction="sum")
    assert Training(schedule=[1.0, 0.5], steps=2).summed(4).learning_rates == (0.5, 0.25)
    assert plain.different_batches() == [None] and plain.rate(7) == 0.1
    assert replace(plain, steps=2) == Training(learning_rate=0.1, steps=2)


def test_times_lie_within_the_training():
    training = Training(learning_rate=0.1, steps=2)
    assert training.times().tolist() == [0, 1, 2] and training.times([2, 0]).tolist() == [2, 0]
    for wrong in ([], [3], [-1], [0.5]):
        with pytest.raises(ValueError, match="at_steps"):
            training.times(wrong)
    endless = Training(learning_rate=0.1, steps=math.inf)
    assert endless.times([3, math.inf]).tolist() == [3, math.inf]
    with pytest.raises(ValueError, match="name the times that are wanted"):
        endless.times()
    assert Training(learning_rate=0.1, steps=1, dynamics="gradient_flow").times([0.5]).tolist() == [0.5]


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.6}, {"momentum": 0.6, "nesterov": True}, {"momentum": 0.6, "dampening": 0.3}],
)
def test_the_stability_bound_is_where_a_quadratic_begins_to_diverge(options):
    bound = Training(learning_rate=1.0, steps=1, **options).largest_stable
    for factor, diverges in ((0.99, False), (1.01, True)):
        theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=factor * bound, **options)
        for _ in range(3000):
            optimizer.zero_grad()
            (theta.square() / 2).sum().backward()
            optimizer.step()
        assert (abs(theta.item()) > 1) == diverges
        training = Training(learning_rate=factor * bound, steps=1, **options)
        if diverges:
            with pytest.raises(
                ValueError, match=r"beyond the linear stability bound .* at the start\); give a smaller"
            ):
                training.check_stable(1.0, "at the start")
        else:
            training.check_stable(1.0, "at the start")


def test_a_forecast_takes_a_training_or_its_parts():
    training = Training(learning_rate=0.1, steps=3)
    assert as_training(None, learning_rate=0.1, steps=3, loss="mse") == training
    assert as_training(training, learning_rate=None, steps=None, batches=None) is training
    with pytest.raises(ValueError, match="steps, momentum: given beside training"):
        as_training(training, learning_rate=None, steps=3, momentum=0.5)
    with pytest.raises(ValueError, match="steps: none given; give learning_rate= and steps="):
        as_training(None, learning_rate=0.1, steps=None)
    with pytest.raises(ValueError, match=r"training: 0.1 given; give a torch_eft\.Training"):
        as_training(0.1, learning_rate=None, steps=3)


def test_numbers_of_other_libraries_are_numbers():
    """NumPy's and torch's scalars are kept as Python's own, so that they print and compare."""
    import numpy

    made = Training(learning_rate=numpy.float32(0.5), steps=numpy.int64(3), nesterov=numpy.bool_(True), momentum=0.5)
    assert made == Training(learning_rate=0.5, steps=3, nesterov=True, momentum=0.5)
    assert "3 steps" in repr(made)
    assert Training(schedule=torch.tensor([0.5, 0.25]), steps=2) == Training(schedule=[0.5, 0.25], steps=2)
    assert repr(Training(learning_rate=0.1, steps=torch.tensor(2))).count("2 steps") == 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"learning_rate": 0.1, "steps": True}, "steps: True given, where a number belongs"),
        ({"learning_rate": True, "steps": 1}, "learning_rate: True given, where a number belongs"),
        ({"schedule": "cosine", "steps": 1}, "schedule: 'cosine' given; give a sequence"),
        ({"schedule": [0.1, None], "steps": 2}, "schedule: None given, where a number belongs"),
        ({"learning_rate": 0.1, "steps": 1, "batches": 3}, "batches: 3 given; give one list"),
        (
            {"learning_rate": 0.1, "steps": 1, "batches": [[True, False]]},
            "batches: .* each is a list of sample indices",
        ),
    ],
)
def test_other_things_are_not(keywords, message):
    with pytest.raises(ValueError, match=message):
        Training(**keywords)


def test_a_keyword_beside_a_training_is_refused_whatever_its_value():
    with pytest.raises(ValueError, match="reduction: given beside training"):
        as_training(Training(learning_rate=0.1, steps=1, reduction="sum"), reduction="mean")


def test_verdicts_can_be_keys():
    """Numbers explain a verdict; they do not make it another."""
    from torch_eft import Validity

    assert len({Validity("valid", "so", {"size": 1.0}), Validity("valid", "so", {"size": float("nan")})}) == 1
