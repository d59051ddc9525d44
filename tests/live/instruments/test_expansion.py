"""The expansion about theta_0: its line, its end, what it says instead, and that it predicts where it is drawn."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.live.instruments.loop import Pages, data, fit, mlp
from torch_eft import measure
from torch_eft.live import MeasurementWarning, Observer, Obstacle
from torch_eft.live.instruments.expansion import LIMIT, ExpansionInstrument
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.live.instruments.representation import RepresentationInstrument
from torch_eft.measure.network.network import Network

MINIBATCHES = Obstacle("mini-batches", minibatches=True)
GAUGE, RADIUS = "eft-more/expansion_gauge/measured", "eft-more/expansion_radius/measured"
DRIFT = [f"eft-theory/ntk_drift/taylor_{order}" for order in (1, 2)]
ERROR = [f"eft-theory/ntk_expansion_error/taylor_{order}" for order in (1, 2)]


def all_three():
    return [NTKInstrument(), RepresentationInstrument(), ExpansionInstrument()]


@pytest.fixture
def expansions(monkeypatch):
    """How often a change was expanded."""
    genuine, made = Network.expansion, []

    def counted(self, *arguments):
        made.append(arguments)
        return genuine(self, *arguments)

    monkeypatch.setattr(Network, "expansion", counted)
    return made


def trained(steps=12, lr=3e-3, width=32, instruments=all_three, **options):
    x, y, x_probe = data(24)
    model = mlp(width)
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    options = {"batch": 8, "obstacle": MINIBATCHES, **options}
    return model, x_probe, *fit(model, instruments(), steps, optimizer, x, y, x_probe, **options)


def test_the_line_ends_once_and_nothing_is_computed_after(expansions):
    _, _, observer, pages = trained(every=1)
    history = observer.history
    gauges = {step: scalars[GAUGE] for step, scalars in history.items() if GAUGE in scalars}
    *drawn, end = gauges
    assert drawn and 2 < end < 12 and gauges[end] > LIMIT >= max(gauges[step] for step in drawn)
    assert [step for step in history if DRIFT[0] in history[step]] == [0, *drawn]
    assert len(expansions) == end
    (event,) = observer.events
    assert (event.step, event.quantity) == (end, "ntk_drift")
    assert f"ends here, step {end}, outputs moved" in event.text
    assert history[0][DRIFT[0]] == history[0][DRIFT[1]] == 0
    assert all(history[step]["eft-theory/ntk_drift/order_0"] == 0 for step in history)
    for step in drawn:
        assert history[step][ERROR[1]] < max(0.01, 2 * gauges[step] ** 2)
        assert history[step][DRIFT[1]] == pytest.approx(history[step]["eft/ntk_drift/measured"], rel=2 * LIMIT**2)
    text = pages["expansion"][-1][1]
    assert f"ended at step {end}" in text and "radius m* = " in text and "response r_0 = " in text


def test_the_numbers_of_a_visit():
    """By hand, with the derivatives that ``measure.ntk_derivatives`` takes by jets."""
    theta_0 = {name: p.detach().clone() for name, p in mlp(32).named_parameters()}
    model, x_probe, observer, _ = trained(steps=2, every=2)
    d = {name: p.detach() - theta_0[name] for name, p in model.named_parameters()}
    with measure.Network(model, x_probe) as network:
        H, dH, ddI, ddII = (getattr(network.at(theta_0).derivatives(d), name) for name in ("H", "dH", "ddI", "ddII"))
        change, hidden = network.ntk() - H, network.hidden_kernels()
        hidden_0 = network.at(theta_0).hidden_kernels()
    first = dH + dH.permute(1, 0, 3, 2)
    both = first + (ddI + ddI.permute(1, 0, 3, 2)) / 2 + ddII
    scalars = observer.history[2]
    for order, P in ((1, first), (2, both)):
        assert scalars[f"eft-theory/ntk_drift/taylor_{order}"] == pytest.approx(float(P.norm() / H.norm()), rel=1e-3)
        error = float((P - change).norm() / change.norm())
        assert scalars[f"eft-theory/ntk_expansion_error/taylor_{order}"] == pytest.approx(error, rel=0.02, abs=1e-3)
    assert scalars[GAUGE] == pytest.approx(float((both - first).norm() / first.norm()), rel=0.02)
    moved = sum(float((hidden[name] - hidden_0[name]).norm() / hidden_0[name].norm()) for name in hidden) / len(hidden)
    assert scalars["eft-theory/representation_change/taylor_2"] == pytest.approx(moved, rel=0.01)
    assert scalars["eft-theory/representation_expansion_error/taylor_2"] < 0.01


def test_radius_and_response_are_those_of_the_first_step_unless_it_is_not_measured():
    runs = [trained(steps=6, every=every)[2:] for every in ("auto", 6)]
    seen = [observer.history[0] for observer, _ in runs]
    assert list(runs[1][0].history) == [0, 6]
    for name in (RADIUS, "eft-more/expansion_response/measured"):
        assert 1 / 4 < seen[1][name] / seen[0][name] < 4  # Adam's later steps take another direction
    for (_, pages), words in zip(runs, ("the optimizer's own first step", "own first 6 steps"), strict=True):
        assert words.removeprefix("the optimizer's ") in pages["expansion"][-1][1]
    model, x_probe, observer, _ = trained(steps=1)  # and the response is the dNTK along that step
    before = {name: p.detach().clone() for name, p in mlp(32).named_parameters()}
    step = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    sizes = measure.relative_dntk(model, x_probe, step, theta=before)
    assert observer.history[0]["eft-more/expansion_response/measured"] == pytest.approx(sizes.dntk, rel=1e-3)


def test_a_first_step_that_moves_nothing_is_not_taken_for_a_direction():
    x, y, x_probe = data(24)
    model = mlp(32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

    def on_step(step):
        optimizer.param_groups[0]["lr"] = 1e-3

    observer, pages = fit(model, all_three(), 3, optimizer, x, y, x_probe, every=3, on_step=on_step)
    assert observer.history[0][RADIUS] > 0 and ERROR[1] in observer.history[3]
    assert "along the optimizer's own first 3 steps" in pages["expansion"][-1][1]


class Notes(Pages):
    """Keeps the run info as well."""

    def run_info(self, info):
        self.info = info


def resumed(model, optimizer, x, y, x_probe, steps, observer, start=0):
    observer.begin(start, total_steps=12)
    for step in range(start + 1, steps + 1):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        observer.before_step()
        optimizer.step()
        observer.measure(step)


@pytest.mark.parametrize("at", [3, 11])
def test_a_checkpoint_goes_on_with_the_line_or_its_end(at, expansions):
    x, y, x_probe = data(24)
    model = mlp(32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def observer():
        options = {"every": 1, "budget": None, "on_error": "raise", "sinks": [Notes()]}
        return Observer(model, x_probe, optimizer, instruments=all_three(), **options)

    first = observer()
    resumed(model, optimizer, x, y, x_probe, at, first)
    done, state = len(expansions), first.state_dict()
    ends = [event.step for event in first.events]
    assert bool(ends) == (at == 11)
    second = observer()
    second.load_state_dict(state)
    resumed(model, optimizer, x, y, x_probe, 12, second, at)
    (end,) = [event.step for event in second.events]
    assert len(expansions) == end and (not ends or done == end)
    assert [step for step in second.history if DRIFT[1] in second.history[step]] == list(range(end))
    assert second.history[0][RADIUS] == first.history[0][RADIUS]
    notes = second.sinks[0].info["unpredicted"]
    assert notes["ntk_drift"] == notes["representation_change"] and f"ended at step {end}" in notes["ntk_drift"]


def test_kinks_have_a_sentence_instead_of_a_line(expansions):
    model, notes = mlp(16, activation=nn.ReLU), Notes()
    observer = Observer(
        model, data()[2], every=1, budget=None, instruments=all_three(), sinks=[notes], on_error="raise"
    )
    observer.begin()
    observer.measure(1)
    observer.finish()
    assert not expansions and not any("taylor" in name for scalars in observer.history.values() for name in scalars)
    why = "at kinks (relu in '1' and 1 more) derivatives miss most of the change"
    assert why in notes.info["unpredicted"]["ntk_drift"]
    assert notes.pages["expansion"] == [(0, notes.info["unpredicted"]["ntk_drift"])]


@pytest.mark.parametrize("why", ["million parameters", "NTK is not measured", "other parameters are trained"])
def test_other_reasons_why_there_is_no_line(why, expansions):
    model, pages = mlp(16), Pages()
    options = {"budget": None, "sinks": [pages], "memory": 100 if "NTK" in why else 2**30}
    instruments = [*all_three()[:2], ExpansionInstrument(largest=10 if "million" in why else 10**6)]
    observer = Observer(model, data()[2], every=1, instruments=instruments, **options)
    if "NTK" in why:
        with pytest.warns(MeasurementWarning, match="will not measure the NTK"):
            observer.check()
    observer.begin()
    model[0].weight.data.mul_(1.1)
    model[0].bias.requires_grad_("other" not in why)
    observer.measure(1)
    observer.finish()
    assert why in pages.pages["expansion"][-1][1] and not expansions


# ---- real trainings


def digits():
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(images, dtype=torch.float32) / 16).view(-1, 1, 8, 8)[order]
    return x, torch.tensor(labels)[order]


def minibatches(x, y, size=64):
    generator = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield x[order[start : start + size]], y[order[start : start + size]]


def cnn():
    layers: list[nn.Module] = []
    for n_in, n_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(n_in, n_out, 3, stride, padding=1), nn.GroupNorm(4, n_out), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Block(nn.Module):
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.GELU()),
            *(nn.Conv2d(n_out, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)),
        )
        self.skip = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if stride > 1 else nn.Identity()
        self.end = nn.GELU()

    def forward(self, x):
        return self.end(self.body(x) + self.skip(x))


def resnet():
    first = (nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU())
    blocks = (Block(8, 8, 1), Block(8, 16, 2))
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class Transformer(nn.Module):
    """For associative recall: four pairs of a key and a value, then a key whose value is asked for."""

    def __init__(self, width=32):
        super().__init__()
        self.embedding, self.place = nn.Embedding(16, width), nn.Parameter(0.02 * torch.randn(9, width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16)

    def forward(self, x):
        z = self.embedding(x) + self.place
        for layer in self.layers:
            z = layer(z)
        return self.head(self.norm(z)[:, -1])


def recall(count):
    generator = torch.Generator().manual_seed(1)
    keys = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(count)])
    values, asked = torch.randint(8, 16, (2, count, 4), generator=generator)
    asked = asked[:, :1] % 4
    x = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, asked)], 1)
    return x, values.gather(1, asked)[:, 0]


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=0.9)


TRAININGS = {
    "CNN, AdamW 1e-4": (cnn, lambda: digits(), lambda p: torch.optim.AdamW(p, 1e-4), 40),
    "CNN, AdamW 1e-3": (cnn, lambda: digits(), lambda p: torch.optim.AdamW(p, 1e-3), 5),
    "ResNet, SGD 0.05": (resnet, lambda: digits(), lambda p: sgd(p, 0.05), 5),
    "ResNet, SGD 0.005": (resnet, lambda: digits(), lambda p: sgd(p, 0.005), 25),
    "transformer, AdamW 1e-3": (Transformer, lambda: recall(2000), lambda p: torch.optim.AdamW(p, 1e-3), 15),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TRAININGS)
def test_the_change_of_H_is_predicted_wherever_the_line_is_drawn(name, seed):
    """The error of the matrices, of both orders together: below 0.3 up to a gauge of 0.3, below 0.6 to the end."""
    make, load, optimizer_of, steps = TRAININGS[name]
    torch.manual_seed(seed)
    model = make()
    x, y = load()
    optimizer, batches, x_probe = optimizer_of(model.parameters()), minibatches(x[8:], y[8:]), x[:8]
    observer = Observer(model, x_probe, optimizer, every=1, budget=None, instruments=all_three(), on_error="raise")
    observer.begin(total_steps=steps)
    for step in range(1, steps + 1):
        inputs, targets = next(batches)
        observer.observe_batch((inputs, targets))  # whose statistics BatchNorm takes
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        observer.measure(step)
    history = observer.history
    visits = [step for step in history if GAUGE in history[step]]
    for step in visits[:-1]:
        assert history[step][ERROR[1]] < (0.3 if history[step][GAUGE] < 0.3 else 0.6)
        assert history[step]["eft-theory/representation_expansion_error/taylor_2"] < 0.3
    (event,) = observer.events
    moved = float(event.text.split("outputs moved ")[1].split(":")[0])
    assert event.step == visits[-1]
    assert abs(math.log2(history[0][RADIUS] / moved)) < 1
