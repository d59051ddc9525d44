"""Parts for full-batch training: the ensemble's forecast and the network's own; where there is none, why."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.live.instruments.loop import data, fit, mlp
from torch_eft.forecast.comparison.compared import Compared
from torch_eft.live import Obstacle
from torch_eft.live.instruments.common import compared_scalars
from torch_eft.live.instruments.forecasts.full_batch import ValidityWatch
from torch_eft.live.instruments.forecasts.instance import InstanceInstrument
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.live.instruments.representation import RepresentationInstrument
from torch_eft.live.instruments.trained_beside.shadow import ShadowInstrument
from torch_eft.results.tags import BAND_90, tag

PARTS = {"ensemble": lambda: TheoryInstrument(order=0), "instance": lambda: InstanceInstrument(seconds=60.0)}
PAGE = {"ensemble": "validity", "instance": "instance"}
TAG = {"ensemble": "eft-theory/ntk_trace/order_0", "instance": "eft-theory/instance_output/order_0"}


def sgd(model, lr=0.05, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def test_both_forecasts_beside_one_training():
    """Momentum, squared error: order 1 of both; the network's own is closer at order 1 than at order 0 at all steps."""
    x, y, x_probe = data(4, 3, 1)
    model = mlp(96, 1)
    instruments = [TheoryInstrument(seconds=4.0), InstanceInstrument(seconds=4.0), RepresentationInstrument()]
    observer, pages = fit(model, instruments, 30, sgd(model, 0.005, momentum=0.5), x, y, x_probe, every=5)
    assert "eft-theory/output_projection/order_1" in observer.history[0]  # reported late
    for step in (5, 15, 30):
        scalars = observer.history[step]
        for quantity in ("instance_output_error", "instance_ntk_error"):
            errors = [scalars[f"eft-theory/{quantity}/order_{order}"] for order in (0, 1)]
            assert errors[1] < errors[0], (step, quantity)
        for quantity in ("output_projection", "output_chi_squared", "ntk_trace"):
            names = [
                f"eft-theory/{quantity}/{series}" for series in ("order_0", "order_1", "minus_sigma", "plus_sigma")
            ]
            assert set(names) <= set(scalars)
        assert scalars["eft-theory/ntk_drift/order_0"] == 0
        low, median, high = (scalars[tag("ntk_drift", name)] for name in (BAND_90[0], "order_1", BAND_90[1]))
        assert low < median < high  # the ensemble's, which has a band, is drawn, and not the network's own
        assert scalars["eft-theory/ntk_mean_drift/order_1"] > 0
    ratio = observer.history[30]["eft-theory/instance_output/ratio"]
    error, order_0, order_1 = (
        observer.history[30][f"eft-theory/{name}"]
        for name in ("instance_output_error/order_1", "instance_output/order_0", "instance_output/order_1")
    )
    # The largest motion is at most a half above the present one (it relaxes towards the targets).
    assert abs(ratio - 1) <= error * 1.5 * order_0 / order_1
    assert "learning rate 0.005, momentum 0.5" in pages["validity"][-1][1]
    assert "the NTK at order 1/n" in pages["validity"][-1][1]
    assert "dNTK and ddNTK along" in pages["instance"][-1][1]
    assert instruments[0].facts().claim.level == "ensemble, order 1"
    assert instruments[1].facts().claim.level == "instance, order 1"
    assert instruments[1].facts().claim.validity.flag in ("valid", "caution")


@pytest.mark.slow
def test_hidden_kernels_beside_their_expectation():
    x, y, x_probe = data(3, 2, 1)
    model = mlp(96, 1)
    observer, pages = fit(
        model,
        [TheoryInstrument(seconds=60.0), RepresentationInstrument()],
        10,
        sgd(model, 0.005),
        x,
        y,
        x_probe,
        every=10,
    )
    assert {"eft-more/representation_mean_drift/measured", "eft-theory/representation_mean_drift/order_1"} <= set(
        observer.history[10]
    )
    assert "| 1 |" in pages["representation"][-1][1]
    assert "| 3 |" in pages["representation"][-1][1]


def test_any_architecture_and_loss_gets_its_own_forecast():
    """Cross-entropy, Nesterov, GELU with layer norm; classes; a loss that is given."""
    torch.manual_seed(0)
    x, y, x_probe = data()
    classes = y.argmax(1)
    base = nn.Sequential(nn.Linear(3, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 2))
    for loss, given, targets in ((F.cross_entropy, None, classes), (F.smooth_l1_loss, F.smooth_l1_loss, y)):
        model = copy.deepcopy(base)
        optimizer = sgd(model, 0.05, momentum=0.5, nesterov=True)
        instrument = InstanceInstrument(seconds=60.0, loss_function=given)
        observer, _ = fit(model, [instrument], 20, optimizer, x, targets, x_probe, loss, every=10)
        errors = [observer.history[20][f"eft-theory/instance_output_error/order_{order}"] for order in (0, 1)]
        assert errors[1] < errors[0]


class Two(nn.Module):
    """A forward with two inputs."""

    def __init__(self):
        super().__init__()
        self.body = mlp(48)

    def forward(self, a, b=None):
        return self.body(a if b is None else a + b)


def test_batches_with_several_inputs():
    """The same network with its input as a sum of two: the same forecast; and other samples are seen."""
    x, y, x_probe = data()
    plain, instrument = mlp(48), InstanceInstrument(seconds=60.0)
    observer, _ = fit(plain, [instrument], 4, sgd(plain), x, y, x_probe)
    expected = observer.history[4]["eft-theory/instance_output/order_1"]
    for changed in (False, True):
        model, instrument = Two(), InstanceInstrument(seconds=60.0)

        def shown(batch, inner=instrument.observe_batch, instrument=instrument, changed=changed):
            other = changed and instrument._comparison is not None
            inner(({"a": batch[0] + other, "b": torch.zeros_like(batch[0])}, batch[1]))

        instrument.observe_batch = shown
        observer, pages = fit(model, [instrument], 4, sgd(model), x, y, {"a": x_probe, "b": torch.zeros_like(x_probe)})
        if changed:
            assert "other samples than the first" in pages["instance"][-1][1]
        else:
            found = observer.history[4]["eft-theory/instance_output/order_1"]
            assert found == pytest.approx(expected, rel=1e-6), pages


def test_the_forecast_goes_on_when_the_number_of_steps_was_not_known():
    x, y, x_probe = data()
    model = mlp(32)
    instrument = InstanceInstrument(seconds=60.0)
    observer, pages = fit(model, [instrument], 12, sgd(model), x, y, x_probe, total_steps=4, every=4)
    assert "eft-theory/instance_output/order_1" in observer.history[12]
    assert [text[: text.index(":")] for _, text in pages["instance"][1:]][-1].endswith("up to step 16")


FOLLOWED = ("instance", "weight decay")
OUTSIDE = {
    "weight decay": (dict(optimizer=lambda m: sgd(m, weight_decay=0.1)), r"weight_decay=0.1"),
    "Adam": (dict(optimizer=lambda m: torch.optim.AdamW(m.parameters())), r"AdamW: forecasts are derived for gradient"),
    "what the loop says": (
        dict(obstacle=Obstacle("mini-batches (3 per epoch)", minibatches=True)),
        r"mini-batches \(3 per epoch\)",
    ),
    "another loss": (dict(loss_function=F.l1_loss), r"squared error"),
    "too large a learning rate": (dict(optimizer=lambda m: sgd(m, 30.0)), r"beyond the linear stability bound"),
    "no tensors": (dict(y=None), r"not a pair"),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in PARTS for name in OUTSIDE if (kind, name) != FOLLOWED]
)
def test_outside_it_says_so_and_the_training_goes_on(kind, name):
    change, message = OUTSIDE[name]
    x, y, x_probe = data()
    model = mlp(16)
    optimizer = change.get("optimizer", sgd)(model)
    options = {key: value for key, value in change.items() if key in ("obstacle", "loss_function")}
    instrument = PARTS[kind]()
    if "y" in change:
        instrument.observe_batch = lambda batch, inner=instrument.observe_batch: inner({"x": x})
    observer, pages = fit(model, [instrument], 3, optimizer, x, y, x_probe, **options)
    assert re.search(message, pages[PAGE[kind]][-1][1]), pages
    assert instrument.validity.flag == "invalid"
    assert instrument.facts().claim.level == "measurements only"
    assert list(observer.history) == [0, 1, 2, 3]
    assert not any(name.startswith("eft-theory") for scalars in observer.history.values() for name in scalars)


@pytest.mark.parametrize("kind", PARTS)
def test_it_ends_where_the_training_leaves_it(kind):
    """A changed learning rate, and a batch with other samples: an event, a page, and no theory from there on."""
    x, y, x_probe = data()
    for change, message in (("rate", "learning rate changed at step 3"), ("batch", "other samples than the first")):
        if (kind, change) == ("instance", "rate"):  # that is followed
            continue
        model = mlp(16)
        optimizer = sgd(model)
        instrument = PARTS[kind]()

        def on_step(step, change=change, optimizer=optimizer):
            if change == "rate" and step == 3:
                optimizer.param_groups[0]["lr"] = 0.01

        if change == "batch":
            instrument.observe_batch = lambda batch, inner=instrument.observe_batch: inner(
                batch if instrument._seen is None or instrument._comparison is None else (batch[0][:3], batch[1][:3])
            )
        observer, pages = fit(model, [instrument], 5, optimizer, x, y, x_probe, on_step=on_step)
        assert any(message in event.text for event in observer.events), observer.events
        assert message in pages[PAGE[kind]][-1][1]
        with_theory = [step for step, scalars in observer.history.items() if TAG[kind] in scalars]
        first = 0 if kind == "ensemble" else 1
        assert with_theory == list(range(first, 4 if change == "rate" else 3))


@pytest.mark.parametrize("kind", [*PARTS, "shadow"])
def test_a_loop_that_shows_nothing_is_told_so(kind):
    x, y, x_probe = data()
    model = mlp(16)
    instrument = ShadowInstrument() if kind == "shadow" else PARTS[kind]()
    observer, pages = fit(model, [instrument], 3, sgd(model), x, y, x_probe, shown=False)
    assert "does not show its batches and losses" in pages[PAGE.get(kind, kind)][-1][1]
    assert list(observer.history) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", PARTS)
def test_the_order_of_the_samples_does_not_matter(kind):
    x, y, x_probe = data()
    model = mlp(16)
    observer, _ = fit(model, [PARTS[kind]()], 4, sgd(model), x, y, x_probe, batch=5)
    assert TAG[kind] in observer.history[4]


@pytest.mark.parametrize("kind", PARTS)
def test_the_training_is_left_bit_identical(kind):
    x, y, x_probe = data()
    ends = []
    for instruments in (None, [PARTS[kind]()]):
        model = mlp(16)
        optimizer = sgd(model, momentum=0.5)
        torch.manual_seed(3)
        fit(model, instruments, 6, optimizer, x, y, x_probe, batch=5)
        velocity = [entry["momentum_buffer"] for entry in optimizer.state_dict()["state"].values()]
        ends.append([torch.get_rng_state(), *(p.detach().clone() for p in model.parameters()), *velocity])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_forecast_too_dear_says_so():
    x, y, x_probe = data()
    model = mlp(16)
    _, pages = fit(model, [InstanceInstrument(largest=10)], 2, sgd(model), x, y, x_probe)
    assert (
        "16 outputs on training and probe points; one network's forecast is made for up to 10"
        in pages["instance"][-1][1]
    )
    observer, pages = fit(model, [InstanceInstrument(seconds=1e-9)], 2, sgd(model), x, y, x_probe)
    assert "order 0 only" in pages["instance"][-1][1]
    assert "eft-theory/instance_output/order_1" not in observer.history[2]


def test_events_when_the_gauge_crosses_its_bounds():
    watch = ValidityWatch("Forecast")
    reported = [watch.events(step, gauge) for step, gauge in enumerate([None, 0.1, 0.19, 0.21, 0.3, 1.2, 2.0])]
    assert [len(events) for events in reported] == [0, 0, 0, 1, 0, 1, 0]
    assert "0.21 times those of order 0, above 0.2" in reported[3][0].text
    assert "not valid from here on" in reported[5][0].text
    assert len(ValidityWatch("Forecast").events(0, 5.0)) == 1


def test_comparisons_as_scalars():
    found = compared_scalars(
        {
            "ntk_trace": Compared(3.0, 2.0, 2.5, 0.5, 0.1),
            "instance_output_error": Compared(None, 0.2, math.nan),
        }
    )
    assert found == {
        "eft/ntk_trace/measured": 3.0,
        "eft-theory/ntk_trace/order_0": 2.0,
        "eft-theory/ntk_trace/order_1": 2.5,
        "eft-theory/ntk_trace/minus_sigma": 2.0,
        "eft-theory/ntk_trace/plus_sigma": 3.0,
        "eft-theory/ntk_trace/truncation": 0.1,
        "eft-theory/instance_output_error/order_0": 0.2,
    }


@pytest.mark.parametrize("wrong", [dict(order=2), dict(seconds=-1.0)])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match="order"):
        TheoryInstrument(**wrong)


def test_wrong_arguments_of_the_instance():
    with pytest.raises(ValueError, match="seconds: 0"):
        InstanceInstrument(seconds=0)
