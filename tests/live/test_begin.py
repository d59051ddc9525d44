"""Beginnings: whatever keeps a network from being measured is said, and the training goes on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.callbacks.trainings import PROBE, dataset, plain_sgd, run, simple_mlp
from torch_eft.callbacks import EFTMonitor
from torch_eft.live import JSONLSink, MeasurementWarning, Observer, Sink
from torch_eft.results.tags import tag

DRIFT = tag("ntk_drift")


def trained(model, observer, steps=6, every=1):
    """Train the network inside ``model``; the observer looks every few steps."""
    inner = getattr(model, "module", model)
    optimizer = plain_sgd(inner.parameters())
    observer.begin(optimizers=[optimizer])
    x, y = dataset().tensors
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.mse_loss(inner(x), y).backward()
        observer.before_step()
        optimizer.step()
        if step % every == 0:
            observer.measure(step)
    observer.finish()
    return observer


class Refusing(nn.Sequential):
    """Its forward runs in training only."""

    def forward(self, x):
        if not self.training:
            raise OSError("no evaluation")
        return super().forward(x)


class Pages(Sink):
    def __init__(self):
        self.texts = {}

    def text(self, name, markdown, step):
        self.texts[name] = markdown


def test_a_training_goes_on_where_nothing_can_be_measured():
    pages, net = Pages(), Refusing(*simple_mlp())
    before = net[0].weight.detach().clone()
    with pytest.warns(MeasurementWarning, match="measures nothing of this training, which goes on") as told:
        observer = trained(net, Observer(net, PROBE, preset="light", every=1, sinks=[pages]))
    assert len(told) == 1 and len(observer.skipped) == 1 and observer.history == {}
    assert "no evaluation" in pages.texts["skipped"]
    assert not torch.equal(net[0].weight, before)
    with pytest.raises(Exception, match="no evaluation"):
        Observer(net, PROBE, on_error="raise").begin()


def test_it_begins_anew_after_a_refusal():
    net = simple_mlp()
    observer = Observer(net, PROBE, preset="light", every=1, budget=None)
    with pytest.warns(MeasurementWarning, match="measures nothing"):
        observer.begin(model=nn.Linear(7, 1))
    assert list(trained(net, observer).history) == list(range(7))


class Unusable(Exception):
    pass


def test_a_raw_error_of_the_check_is_told_when_lightning_starts(monkeypatch):
    monitor = EFTMonitor(PROBE, preset="light")

    def failing(*unused):
        raise Unusable("raw")

    monkeypatch.setattr(monitor.observer, "check", failing)
    with pytest.warns(MeasurementWarning, match="measures nothing of this training, which goes on .Unusable: raw"):
        trainer, _ = run([monitor])
    assert trainer.global_step == 9 and monitor.history == {}
    strict = EFTMonitor(PROBE, on_error="raise")
    monkeypatch.setattr(strict.observer, "check", failing)
    with pytest.raises(Unusable):
        run([strict])


def test_a_loop_that_looks_every_seventh_step_is_measured_when_ten_have_passed():
    net = simple_mlp()
    observer = trained(net, Observer(net, PROBE, preset="light", every=10, budget=None), steps=50, every=7)
    assert list(observer.history) == [0, 14, 21, 35, 42, 49]  # 10, 20, 30, 40 passed; the last weights


def test_an_average_is_not_measured_with_the_rates_of_the_network():
    net = simple_mlp()
    average = torch.optim.swa_utils.AveragedModel(net)
    optimizer = plain_sgd(net.parameters())
    pages = Pages()
    observer = Observer(average, PROBE, optimizer, preset="full", every=1, budget=None, sinks=[pages])
    reason = "none of the parameters of this AveragedModel"
    with pytest.warns(MeasurementWarning, match=f"leaves out the NTK and whatever else takes learning rates.*{reason}"):
        observer.begin()
    with torch.no_grad():
        average.module[0].weight.mul_(1.5)
    observer.measure(1)
    assert tag("representation_change") in observer.history[1] and tag("interval_output") in observer.history[1]
    assert not [name for name in observer.history[1] if "ntk" in name]
    assert reason in observer.validity.reason and reason in pages.texts["dntk"]
    assert "Measured is the average of weights" in pages.texts["weights"]
    with torch.no_grad():
        average.module[0].weight.div_(1.5)
    alone = Observer(average, PROBE, preset="light", every=1, budget=None)
    alone.begin()
    with torch.no_grad():
        net[0].weight.add_(0.1)
    average.update_parameters(net)
    assert alone.measure(1)[DRIFT] > 0


def test_a_wrapper_for_several_devices_is_the_network_inside():
    torch.manual_seed(0)
    net, (_, same) = simple_mlp(), (torch.manual_seed(0), simple_mlp())
    wrapped = nn.DataParallel(net)
    histories = [
        trained(model, Observer(model, PROBE, preset="light", every=1, budget=None, on_error="raise")).history
        for model in (wrapped, same)
    ]
    assert [scalars[DRIFT] for scalars in histories[0].values()] == [s[DRIFT] for s in histories[1].values()]


def test_a_probe_overwritten_later_is_measured_as_it_was():
    net, probe = simple_mlp(), PROBE.clone()
    observer = Observer(net, probe, preset="light", every=1, budget=None)
    probe.mul_(3)
    observer.begin()
    probe.mul_(3)
    assert observer.measure(1)[DRIFT] == 0
    with torch.no_grad():
        assert torch.allclose(observer.reference.snapshot.output, net(PROBE))


@pytest.mark.parametrize("address", ["s3://bucket/runs", "gs://bucket", "memory://runs/1"])
def test_an_address_makes_no_local_folder(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in (lambda: Observer(simple_mlp(), PROBE, logdir=address), lambda: JSONLSink(address + "/eft.jsonl")):
        with pytest.raises(ValueError, match=r"is an address, .* give a local directory"):
            make()
    assert not list(tmp_path.iterdir())


def test_two_observers_of_one_directory_are_told(tmp_path):
    said = []
    first, second, third = (
        Observer(simple_mlp(), PROBE, preset="light", budget=None, logdir=tmp_path / str(place), say=said.append)
        for place in (0, 0, 1)
    )
    for observer in (first, third):
        observer.begin()
    assert not [sentence for sentence in said if "another observer" in sentence]
    second.begin()
    assert sum("another observer, which has not finished, writes to" in sentence for sentence in said) == 1
    second.finish()
    third.begin()
    first.begin()
    assert sum("another observer" in sentence for sentence in said) == 1


@pytest.mark.parametrize("announced", [True, False])
def test_a_lazy_network_is_measured_as_soon_as_it_has_shapes(announced):
    """Before the first step, if the loop says when that comes: at initialization."""

    def lazy():
        torch.manual_seed(3)
        return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(2))

    def run(model, observer=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = dataset().tensors
        y = y[:, :2]
        if observer is not None:
            observer.begin(optimizers=[optimizer])
        start = None
        for step in range(1, 5):
            loss = F.mse_loss(model(x), y)
            start = [p.detach().clone() for p in model.parameters()] if start is None else start
            optimizer.zero_grad()
            loss.backward()
            if observer is not None and announced:
                observer.before_step()
            optimizer.step()
            if observer is not None:
                observer.measure(step)
        return start, list(model.parameters())

    said, model = [], lazy()
    observer = Observer(model, PROBE, preset="standard", every=1, budget=None, on_error="raise")
    observer.recorder.announce = said.append
    start, end = run(model, observer)
    observer.finish()
    assert len(said) == 1 and "lazy modules" in said[0]
    assert list(observer.history) == ([0, 1, 2, 3, 4] if announced else [1, 2, 3, 4])
    assert observer.origin == (
        "initialization" if announced else "step 1, the first at which its lazy modules had seen a batch"
    )
    assert observer.history[4][DRIFT] > 0 and observer.history[0 if announced else 1][DRIFT] == 0
    _, plain = run(lazy())
    assert all(torch.equal(a, b) for a, b in zip(end, plain, strict=True))
    if announced:
        assert all(torch.equal(value, p) for value, p in zip(observer.reference.theta_0.values(), start, strict=True))
    assert Observer(lazy(), PROBE, budget=None).measure(1) == {}
