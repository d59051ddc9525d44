"""Parts for any run at all: Taylor terms, intervals, dNTK along the gradient, shadows; Adam and minibatches too."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.live.instruments.loop import data, fit, mlp
from torch_eft import measure
from torch_eft.live import Obstacle
from torch_eft.live.instruments.common import too_many
from torch_eft.live.instruments.expansion import ExpansionInstrument
from torch_eft.live.instruments.interval import IntervalInstrument
from torch_eft.live.instruments.steps.dntk import DNTKInstrument
from torch_eft.live.instruments.taylor import TaylorInstrument
from torch_eft.live.instruments.trained_beside.shadow import ShadowInstrument
from torch_eft.measure.taylor.displacement import displacement_terms, relative_dntk

MINIBATCHES = Obstacle("mini-batches", minibatches=True)
FOUR = (IntervalInstrument, TaylorInstrument, DNTKInstrument, ShadowInstrument)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def test_the_next_interval_in_a_run_with_adam_and_minibatches():
    """Ratios of realized to predicted near 1, and errors of order 1 below those of order 0, at every visit; five steps
    of Adam at this rate move H by some per cent, so the neglected third order is a few per cent of that at most."""
    x, y, x_probe = data(24)
    model = mlp(64)
    observer, pages = fit(
        model, [IntervalInstrument()], 30, adam(model), x, y, x_probe, batch=8, obstacle=MINIBATCHES, every=5
    )
    visits = [step for step in observer.history if step > 0]
    assert visits == [5, 10, 15, 20, 25, 30]
    for step in visits:
        scalars = observer.history[step]
        assert scalars["eft-theory/ntk_rate/order_0"] == 0
        assert scalars["eft-theory/ntk_rate/ratio"] == pytest.approx(1, abs=0.05)
        assert scalars["eft-theory/interval_ntk_error/order_1"] < 0.2
        assert (
            scalars["eft-theory/interval_output_error/order_1"]
            < 0.2 * scalars["eft-theory/interval_output_error/order_0"]
        )
    assert not observer.events
    assert "a copy of the trainable parameters" in pages["interval"][0][1]


def test_the_numbers_of_an_interval():
    """By hand, from measure.displacement_terms between the weights at two visits."""
    x, y, x_probe = data(24)
    model = mlp(16)
    thetas = {0: {name: p.detach().clone() for name, p in model.named_parameters()}}

    def keep(step):
        thetas[step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    observer, _ = fit(model, [IntervalInstrument()], 4, adam(model), x, y, x_probe, batch=8, every=4, on_step=keep)
    scalars = observer.history[4]
    found = displacement_terms(model, x_probe, thetas[0], thetas[4])
    H, change, P = found.ntk, found.ntk_change, found.ntk_terms.sum(0)
    correction, linear = found.output_terms[1:].sum(0), found.output_terms[0]
    d = {name: thetas[4][name] - thetas[0][name] for name in thetas[0]}
    sized = relative_dntk(model, x_probe, d, theta=thetas[0])  # along the displacement, whose length drops out
    along = float((change * P).sum() / P.norm() / H.norm()) / 4
    expected = {
        "eft-more/ntk_rate/measured": along,
        "eft/dntk/measured": sized.dntk,
        "eft-more/ddntk/measured": sized.ddntk,
        "eft-theory/dntk/order_0": 0,
        "eft-theory/ntk_rate/order_1": float(P.norm() / H.norm()) / 4,
        "eft-theory/interval_ntk_error/order_1": float((change - P).norm() / change.norm()),
        "eft-theory/interval_output/order_1": float(correction.norm() / linear.norm()),
        "eft-theory/interval_output_error/order_0": float(
            (found.output_change - linear).norm() / found.output_change.norm()
        ),
    }
    for name, value in expected.items():
        assert scalars[name] == pytest.approx(value, rel=1e-3), name


def test_taylor_terms_of_the_real_trajectory():
    x, y, x_probe = data(24)
    model = mlp(16)
    theta_0 = {name: p.detach().clone() for name, p in model.named_parameters()}
    observer, pages = fit(model, [TaylorInstrument()], 20, adam(model), x, y, x_probe, batch=8, every=10)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    series = measure.taylor_series(model, x_probe, theta_0, theta)
    change = series.value - series.terms[0]
    scalars = observer.history[20]
    for order in (1, 2, 3):
        expected = float(series.terms[order].norm() / change.norm())
        assert scalars[f"eft-layers/taylor_terms/order_{order}"] == pytest.approx(expected, rel=1e-3)
    assert scalars["eft/taylor_remainder/measured"] == pytest.approx(
        float(series.remainder.norm() / change.norm()), rel=1e-2
    )
    left = [(change - series.terms[1 : k + 1].sum(0)).norm() / change.norm() for k in (1, 2, 3)]
    needed = next((k for k, value in enumerate(left, start=1) if value <= 0.05), 4)
    assert scalars["eft-more/taylor_orders_needed/measured"] == needed
    assert not any("taylor" in name for name in observer.history[0])
    assert "of the change of the outputs since theta_0" in pages["taylor"][-1][1]


def test_dntk_along_the_gradient_is_logged_where_it_belongs():
    x, y, x_probe = data()
    model = mlp(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kept = {}

    def keep(step):  # the gradient of this step belongs to the theta before it
        kept[step - 1] = {name: p.grad.clone() for name, p in model.named_parameters()}
        kept[step] = None

    thetas = {0: {name: p.detach().clone() for name, p in model.named_parameters()}}

    def both(step):
        keep(step)
        thetas[step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    observer, _ = fit(model, [DNTKInstrument()], 6, optimizer, x, y, x_probe, every=2, on_step=both)
    assert [
        step for step, scalars in observer.history.items() if "eft-more/dntk_along_gradient/measured" in scalars
    ] == [0, 2, 4]
    for step in (0, 2, 4):
        expected = relative_dntk(model, x_probe, kept[step], theta=thetas[step], lambdas=1.0)
        scalars = observer.history[step]
        assert scalars["eft-more/dntk_along_gradient/measured"] == pytest.approx(expected.dntk, rel=1e-3)
        assert scalars["eft-more/ddntk_along_gradient/measured"] == pytest.approx(expected.ddntk, rel=1e-3)
        assert scalars["eft-theory/dntk_along_gradient/order_0"] == 0


def test_shadows_follow_minibatches_of_any_optimizer():
    """Order 3 is closer than order 1, and both are what training the Taylor models by hand gives."""
    x, y, x_probe = data(24)
    classes = y.argmax(1)
    model = mlp(128)
    shadow = measure.TaylorModel(model, taylor_order=1)
    optimizer = adam(model)
    twin = shadow.optimizer_like(optimizer)
    torch.manual_seed(5)
    observer, pages = fit(
        model,
        [ShadowInstrument()],
        12,
        optimizer,
        x,
        classes,
        x_probe,
        F.cross_entropy,
        batch=8,
        obstacle=MINIBATCHES,
    )
    torch.manual_seed(5)
    start = shadow(x_probe).detach()
    largest = 0.0
    for _ in range(12):
        samples = torch.randperm(24)[:8]
        shadow.step(x[samples], lambda z, samples=samples: F.cross_entropy(z, classes[samples]), twin)
        moved = shadow(x_probe).detach() - start
        largest = max(largest, float(moved.norm()))
    scalars = observer.history[12]
    assert scalars["eft-theory/shadow_output/order_0"] == pytest.approx(float(moved.norm()) / math.sqrt(6), rel=1e-3)
    errors = [scalars[f"eft-theory/shadow_output_error/order_{order}"] for order in (0, 1)]
    assert errors[1] < errors[0]
    measured = (model(x_probe).detach() - start - moved).norm() / largest
    assert errors[0] == pytest.approx(float(measured), rel=1e-2)
    assert "cross-entropy, mean over samples" in pages["shadow"][0][1]


def test_shadows_say_why_there_are_none():
    x, y, x_probe = data()
    for change, message in (
        (dict(obstacle=Obstacle("gradient clipping at 0.1")), "gradient clipping"),
        (dict(loss_function=F.l1_loss), "neither squared error"),
        (
            dict(model=nn.Sequential(mlp(16), nn.Dropout(0.5)).train()),
            "dropout|drops out|Dropout|gradient differs|usual",
        ),
    ):
        model = change.pop("model", None) or mlp(16)
        observer, pages = fit(model, [ShadowInstrument()], 3, adam(model), x, y, x_probe, **change)
        import re

        assert re.search(message, pages["shadow"][-1][1]), pages["shadow"]
        assert not any("shadow" in name for scalars in observer.history.values() for name in scalars)
    with pytest.raises(ValueError, match="orders: \\(2,\\) given"):
        ShadowInstrument(taylor_orders=(2,))


def test_a_network_too_large_is_told_so():
    x, y, x_probe = data()
    model = mlp(16)
    instruments = [each(largest=10) for each in FOUR]
    observer, pages = fit(model, instruments, 3, adam(model), x, y, x_probe)
    for name in ("interval", "taylor", "dntk", "shadow"):
        assert "million parameters; copies of them are kept for up to" in pages[name][0][1]
    logged = {name.split("/")[1] for scalars in observer.history.values() for name in scalars}
    assert not logged & {"ntk_rate", "taylor_remainder", "dntk_along_gradient", "shadow_output"}
    assert too_many(model) is None


class Convolutional(nn.Module):
    """With ReLU, group norm and a residual branch."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.first(x)))
        return self.head((h + torch.relu(self.second(h))).mean((2, 3)))


def test_a_network_with_kinks_is_measured_and_labeled():
    torch.manual_seed(0)
    x, x_probe, classes = torch.randn(16, 1, 5, 5), torch.randn(4, 1, 5, 5), torch.randint(0, 3, (16,))
    model = Convolutional()
    instruments = [IntervalInstrument(), TaylorInstrument(), DNTKInstrument()]
    observer, pages = fit(model, instruments, 8, adam(model), x, classes, x_probe, F.cross_entropy, batch=4, every=2)
    assert {"eft-more/ntk_rate/measured", "eft/taylor_remainder/measured"} <= set(observer.history[8])
    for name in ("interval", "dntk"):
        assert "almost everywhere" in pages[name][-1][1]
    assert "do not improve on order 1" in pages["taylor"][-1][1]
    assert "eft-theory/ntk_rate/truncation" not in observer.history[8]  # nothing estimates what kinks add
    assert {event.quantity for event in observer.events} <= {"taylor_remainder"}


def test_an_event_where_three_taylor_orders_are_not_enough():
    x, y, x_probe = data(24)
    model = mlp(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    observer, _ = fit(model, [TaylorInstrument()], 30, optimizer, x, y, x_probe, batch=8, every=5)
    (event,) = observer.events
    first = next(s for s in observer.history if observer.history[s].get("eft/taylor_remainder/measured", 0) > 0.05)
    assert (event.step, event.quantity) == (first, "taylor_remainder")
    assert "orders k >= 4 are not negligible from here on" in event.text
    assert observer.history[first]["eft-more/taylor_orders_needed/measured"] == 4


SETTINGS = {
    "full batch": dict(
        instruments=lambda: [each() for each in (*FOUR, ExpansionInstrument)],
        momentum=True,
    ),
    "minibatches, Adam": dict(instruments=lambda: [each() for each in (*FOUR, ExpansionInstrument)], batch=3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_training_is_left_bit_identical(name):
    setting = SETTINGS[name]
    x, y, x_probe = data()
    ends = []
    for instruments in (None, setting["instruments"]()):
        model = mlp(16)
        if setting.get("momentum"):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        else:
            optimizer = adam(model)
        torch.manual_seed(3)
        fit(model, instruments, 8, optimizer, x, y, x_probe, batch=setting.get("batch"), obstacle=MINIBATCHES, every=2)
        state = copy.deepcopy(optimizer.state_dict()["state"])
        ends.append([torch.get_rng_state(), *(p.detach().clone() for p in model.parameters()), *_tensors(state)])
    assert len(ends[0]) == len(ends[1])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def _tensors(state):
    return [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
