"""BatchNorm with the statistics of the training's first batches, at theta_t and at theta_0: by brute force."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from torch_eft import measure
from torch_eft.live import Observer
from torch_eft.live.instruments.interval import interval_compared
from torch_eft.results.tags import tag

SHARE = "eft-more/ntk_batch_norm_share/measured"


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Tanh(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels, momentum=None),
        )  # fmt: skip

    def forward(self, x):
        return torch.tanh(x + self.body(x))


class Gain(nn.Module):
    """Has a buffer that the loop changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x):
        return self.gain * x


def resnet():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        Block(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
        Gain(),
    )
    return nn.Sequential(*layers).double()


def batches(count, rows=8):
    generator = torch.Generator().manual_seed(1)
    x = 1 + 2 * torch.randn(count, rows, 2, 6, 6, generator=generator, dtype=torch.float64)
    return [(one, torch.randn(rows, 2, generator=generator, dtype=torch.float64)) for one in x]


def probe():
    return torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def kernel(model, x):
    """Row by row, in evaluation mode."""
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model.eval()(x).flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return J @ J.T


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "running" not in name}


def calibrated(model, parameters, inputs):
    """A copy in this state with torch's own recalculation of its running statistics."""
    own = copy.deepcopy(model)
    own.load_state_dict({**own.state_dict(), **parameters})
    update_bn(inputs, own)
    return own


def trained(model, shown, steps, observer=None, lr=0.05, seen=lambda batch: batch, after=lambda step: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    if observer is not None:
        observer.begin(model=model, optimizers=[optimizer])
    for step in range(1, steps + 1):
        x, y = shown[(step - 1) % len(shown)]
        if observer is not None:
            observer.observe_batch(seen((x, y)))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if observer is not None:
            observer.before_step()
        optimizer.step()
        model[-1].gain.mul_(1 + 2 * lr)
        if observer is not None:
            observer.measure(step)
        after(step)
    return model


def observer_of(**options):
    options = {"instruments": ["ntk", "batch_norm", "representation"], "budget": None, "every": 1} | options
    return Observer(None, probe(), on_error="raise", **options)


@pytest.mark.parametrize("every", [1, 6])
def test_drift_is_that_of_a_loop_that_recomputes_the_statistics(every):
    shown, model = batches(6), resnet()
    theta_0, path = state(model), {}
    observer = observer_of(every=every)
    trained(model, shown, 6, observer, after=lambda step: path.update({step: state(model)}))
    for step in range(every, 7, every):
        inputs = [x for x, _ in shown[: min(step, 4)]]
        there, start = (calibrated(model, theta, inputs) for theta in (path[step], theta_0))
        H, H_0 = kernel(there, probe()), kernel(start, probe())
        there.load_state_dict({**start.state_dict(), **path[step]})
        share = (H - kernel(there, probe())).norm() / (H - H_0).norm()
        seen = observer.history[step]
        assert seen["eft/ntk_drift/measured"] == pytest.approx(float((H - H_0).norm() / H_0.norm()), rel=1e-8)
        assert seen["eft/ntk_trace/measured"] == pytest.approx(float(H.diagonal().mean()), rel=1e-8)
        assert seen[SHARE] == pytest.approx(float(share), rel=1e-6)
    assert observer.history[0]["eft/ntk_trace/measured"] == pytest.approx(float(H_0.diagonal().mean()), rel=1e-8)
    assert observer.reference.calibration._theta_0 is None  # no longer kept
    observer.finish()


def test_nothing_drifts_where_no_parameter_moves():
    observer = observer_of(instruments=None, preset="standard")
    trained(resnet(), batches(5), 5, observer, lr=0.0)
    for step in range(1, 6):
        assert observer.history[step]["eft/ntk_drift/measured"] == 0
        assert observer.history[step]["eft/representation_change/measured"] == 0
        assert SHARE not in observer.history[step]


def test_training_is_left_alone():
    own = trained(resnet(), batches(6), 6).state_dict()
    state = torch.get_rng_state()
    watched = trained(resnet(), batches(6), 6, observer_of()).state_dict()
    assert all(torch.equal(value, watched[name]) for name, value in own.items())
    torch.manual_seed(0)  # resnet() did
    resnet()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (lambda batch: (batch[0] * 100 + 300, batch[1]), "not what training feeds the network"),
        (lambda batch: (batch[0][..., 0], batch[1]), "are not like the probe"),
        (lambda batch: (batch[0] * torch.nan, batch[1]), "cannot be run on a training batch"),
    ],
)
def test_batches_that_the_network_is_not_fed_are_not_taken(seen, words):
    observer, plain, pages = observer_of(), observer_of(), {}
    observer.recorder.pages, record = lambda new: pages.update(new) or record(new), observer.recorder.pages
    trained(resnet(), batches(3), 3, observer, seen=seen)
    assert words in pages["batch_norm"] and "inputs of the probe" in pages["batch_norm"]
    trained(resnet(), batches(3), 3, plain, seen=lambda batch: None)
    for step in range(4):
        assert observer.history[step]["eft/ntk_drift/measured"] == plain.history[step]["eft/ntk_drift/measured"]


@pytest.mark.parametrize("resumed", [False, True])
def test_batches_are_checked_by_the_first_one_alone(resumed):
    """Means of other batches, as small as these, differ by more than what tells a wrong batch."""
    shown = [(x + 3 * k, y) for k, (x, y) in enumerate(batches(6))]
    observer, model = observer_of(), resnet()
    trained(model, shown, 2, observer)
    if resumed:
        state, observer = observer.state_dict(), observer_of()
        observer.load_state_dict(state)
    observer.begin(2, model=model)
    for step in (3, 4, 5):
        observer.observe_batch(shown[step - 1])
        model(shown[step - 1][0])
        observer.before_step()
        observer.measure(step)
    assert observer.reference.calibration.refusal is None and len(observer.reference.calibration.kept) == 4


@pytest.mark.parametrize("at", [2, 5])
def test_a_resumed_training_goes_on_with_the_same_batches(at):
    shown, model = batches(6), resnet()
    whole = observer_of()
    trained(resnet(), shown, 6, whole)
    first = observer_of()
    trained(model, shown[:at], at, first)
    state = first.state_dict()
    second = observer_of()
    second.load_state_dict(copy.deepcopy(state))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    second.begin(at, model=model, optimizers=[optimizer])
    for step in range(at + 1, 7):
        second.observe_batch(shown[step - 1])
        second.measure(step)
    kept = second.reference.calibration.kept
    assert all(torch.equal(one, x) for one, (x, _) in zip(kept, shown[:4], strict=True))
    assert second.history[0] == whole.history[0]
    del state["calibration"]  # as an earlier version wrote it
    old = observer_of()
    old.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old.begin(at, model=model, optimizers=[optimizer])
        old.observe_batch(shown[0])
    assert old.reference.calibration.kept == []


@pytest.mark.parametrize(("every", "batches_left"), [(1, 2), (6, 0)])
def test_a_checkpoint_without_theta_0_carries_only_the_batches_that_it_was_measured_with(every, batches_left):
    shown, model = batches(4), resnet()
    first, second = (observer_of(every=every, keep_theta_0="none") for _ in range(2))
    trained(model, shown, 2, first, lr=0.0)
    state = copy.deepcopy(first.state_dict())
    assert state["theta_0"] is state["calibration"]["theta_0"] is None
    assert len(state["calibration"]["kept"]) == batches_left
    second.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    second.begin(2, model=model, optimizers=[optimizer])
    for step in (3, 4):
        second.observe_batch(shown[step - 1])
        second.measure(step, due_now=True)
        assert second.history[step]["eft/ntk_drift/measured"] == 0  # no parameter moves


def test_large_batches_are_kept_in_part():
    model = nn.Sequential(nn.Linear(2**15, 2), nn.BatchNorm1d(2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(40, 2**15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    observer = Observer(model, x[:2], optimizer, instruments=["representation"], budget=None, on_error="raise")
    observer.begin()
    observer.observe_batch((x, x[:, :2]))
    assert torch.equal(observer.reference.calibration.kept[0], x[:32])  # 8 MiB


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_of_several_forwards_before_a_step_the_others_may_be_of_other_samples(shift):
    """Gradient accumulation, of which the loop shows the first batch: few samples, each with an offset of its own."""
    generator = torch.Generator().manual_seed(10)
    shown = [(x + 4 * torch.randn(4, 1, 1, 1, generator=generator), y) for x, y in batches(4, rows=4)]
    observer, model = observer_of(), resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    observer.begin(model=model, optimizers=[optimizer])
    observer.observe_batch((shown[0][0] + shift, shown[0][1]))
    for x, y in shown:
        (model(x) - y).square().mean().backward()
    observer.before_step()
    optimizer.step()
    observer.measure(1)
    refusal = observer.reference.calibration.refusal
    assert "not what training feeds the network" in refusal if shift else refusal is None


def test_theta_0_is_logged_again_once():
    logged, observer = [], observer_of()
    record = observer.recorder.record
    observer.recorder.record = lambda step, *rest: logged.append(step) or record(step, *rest)
    trained(resnet(), batches(6), 6, observer)
    assert logged == [0, 1, 2, 3, 0, 4, 5, 6]
    logged.clear()
    short = observer_of()
    record = short.recorder.record
    short.recorder.record = lambda step, *rest: logged.append(step) or record(step, *rest)
    trained(resnet(), batches(2), 2, short)
    short.finish()
    assert logged == [0, 1, 2, 0]


def test_a_large_network_is_not_copied_for_a_few_steps(monkeypatch):
    monkeypatch.setattr("torch_eft.live.run.calibration.too_many", lambda network: "9 million parameters")
    observer = observer_of()
    trained(resnet(), batches(2), 2, observer)
    calibration = observer.reference.calibration
    assert calibration._theta_0 is None and not calibration.kept
    assert "inputs of the probe at the parameters of the moment: 9 million parameters" in calibration.sentence(3)


def test_derivatives_have_the_statistics_of_their_own_parameters():
    """Of the interval's start, by all batches that have come: dNTK by hand, at every step."""
    shown, model, path = batches(6), resnet(), {}
    path[0] = state(model)
    observer = observer_of(instruments=["ntk", "interval", "taylor"])

    def after(step):
        path[step] = state(model)
        model[-1].gain.fill_(1)  # as large at every measurement

    trained(model, shown, 5, observer, after=after)
    for step in range(1, 6):
        inputs = [x for x, _ in shown[: min(step, 4)]]
        names = [name for name, _ in model.named_parameters()]
        start, end = ({name: path[at][name] for name in names} for at in (step - 1, step))
        there = calibrated(model, path[step - 1] | {"6.gain": path[step]["6.gain"]}, inputs).eval()
        terms = measure.displacement_terms(there, probe(), start, end)
        seen, expected = observer.history[step], interval_compared(terms, 1)
        for name in ("dntk", "ddntk", "interval_output"):
            assert seen[tag(name)] == pytest.approx(expected[name].measured, rel=1e-6), (step, name)
        start = {name: path[0][name] for name in names}
        there = calibrated(model, path[0] | {"6.gain": path[step]["6.gain"]}, inputs).eval()
        series = measure.taylor_series(there, probe(), start, end)
        assert seen[tag("taylor_remainder")] == pytest.approx(series.sizes().left[-1], rel=1e-6)
