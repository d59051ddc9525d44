"""One network's forecast under weight decay and learning rates that change: exact where the network is linear."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.live.instruments.loop import data, fit, mlp
from torch_eft.live import Observer
from torch_eft.live.instruments.forecasts.instance import InstanceInstrument
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.results.tags import tag

ERROR, DRIFT = tag("instance_output_error", "order_0"), tag("instance_ntk_error", "order_0")


def followed(model, optimizer, rates=None, steps=9, on_step=None, **options):
    """A full-batch training with the learning rates of each step, in every group by its own factor."""
    x, y, x_probe = data(6)
    factors = [group["lr"] for group in optimizer.param_groups]

    def step_on(step):
        if rates is not None:
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = factor * rates[step % len(rates)]
        if on_step is not None:
            on_step(step)

    instruments = [NTKInstrument(), InstanceInstrument()]
    return fit(model, instruments, steps, optimizer, x, y, x_probe, on_step=step_on, **options)


@pytest.mark.parametrize(
    "options", [dict(momentum=0.8), dict(momentum=0.8, nesterov=True), dict(momentum=0.6, dampening=0.3)]
)
@pytest.mark.parametrize("rates", [None, [1.0, 1.0, 0.5, 0.8, 0.1]], ids=["constant", "schedule"])
def test_linear_networks_are_followed_exactly(options, rates):
    """Two groups: a bias with a rate and a decay of its own."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    groups = [
        {"params": [model.weight], "weight_decay": 0.2},
        {"params": [model.bias], "lr": 0.02, "weight_decay": 0.0},
    ]
    observer, pages = followed(model, torch.optim.SGD(groups, lr=0.05, **options), rates)
    assert all(observer.history[step][ERROR] < 1e-5 for step in range(1, 10))
    assert "weight decay 0, 0.2" in pages["instance"][-1][1]


def test_a_schedule_ends_order_1_and_not_the_forecast():
    model = mlp(64)
    observer, pages = followed(model, torch.optim.SGD(model.parameters(), lr=0.05), [1.0, 1.0, 1.0, 0.5])
    order_1 = tag("instance_output", "order_1")
    assert order_1 in observer.history[2] and order_1 not in observer.history[9]
    assert observer.history[9][ERROR] < 0.2
    assert "The learning rate changes at step 3: order 1, for a constant one, ends there" in pages["instance"][-1][1]
    decayed, same = mlp(64), mlp(64)
    strong, _ = followed(decayed, torch.optim.SGD(decayed.parameters(), lr=0.05, weight_decay=0.05))
    without, _ = followed(same, torch.optim.SGD(same.parameters(), lr=0.05))
    assert strong.history[9][ERROR] < 0.3 and without.history[9][ERROR] < 0.3


def test_a_step_left_out_takes_its_learning_rate_with_it():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    inner, count = optimizer.step, [0]

    def step(*given):
        count[0] += 1
        return inner(*given) if count[0] != 4 else None

    optimizer.step = step
    observer, _ = followed(model, optimizer, [1.0, 0.7, 0.2])
    assert observer.history[9][ERROR] < 1e-5


def test_it_goes_on_after_a_checkpoint():
    torch.manual_seed(0)
    x, y, x_probe = data(6)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=0.1)
    observer, state = None, None
    for step in range(1, 10):
        if step in (1, 6):
            observer = Observer(
                model, x_probe, optimizer, every=1, budget=None, instruments=[NTKInstrument(), InstanceInstrument()]
            )
            if state is not None:
                observer.load_state_dict(state)
            observer.begin(step - 1, total_steps=9)
        observer.observe_batch((x, y))
        loss = F.mse_loss(model(x), y)
        observer.observe_loss(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        observer.before_step()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.05 / step
        observer.measure(step)
        state = observer.state_dict()
    assert state["parts"]["instance"]["comparison"]["rates"][:4] == [[0.05], [0.05], [0.025], [0.05 / 3]]
    assert observer.history[9][ERROR] < 1e-5 and not observer.skipped


@pytest.mark.parametrize("shown", ["divided", "whole"])
@pytest.mark.parametrize("same", [True, False])
def test_all_of_the_data_in_several_parts_is_full_batch_training(shown, same):
    """Two batches of three, in any order, whose gradients are added up; other samples at step 4 end it."""
    torch.manual_seed(0)
    x, y, x_probe = data(6)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1)
    instruments = [NTKInstrument(), InstanceInstrument()]
    observer = Observer(model, x_probe, optimizer, every=1, budget=None, instruments=instruments, on_error="raise")
    observer.begin(total_steps=6)
    for step in range(1, 7):
        optimizer.zero_grad()
        order = torch.randperm(6) if same or step != 4 else torch.tensor([0, 1, 2, 3, 4, 4])
        for part in order.split(3):
            observer.observe_batch((x[part], y[part]))
            loss = F.mse_loss(model(x[part]), y[part])
            observer.observe_loss(loss.detach() / (2 if shown == "divided" else 1))
            (loss / 2).backward()
        observer.before_step()
        optimizer.step()
        observer.measure(step)
    observer.finish()
    if same:
        assert all(observer.history[step][ERROR] < 1e-5 for step in range(1, 7))
    else:
        assert ERROR in observer.history[3] and ERROR not in observer.history[6]
        assert any("other samples than the first" in event.text for event in observer.events)
