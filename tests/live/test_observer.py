"""The observer in a bare PyTorch loop."""

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from tests.callbacks.trainings import PROBE, dataset, normed_net, plain_sgd, run, sgd, simple_mlp
from torch_eft.callbacks import EFTMonitor
from torch_eft.live import Instrument, MeasurementWarning, Observer, Reading, Sink
from torch_eft.live import budget as budget_module
from torch_eft.live.config.schedule import Curve
from torch_eft.live.instruments.forecasts import theory
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.live.instruments.representation import RepresentationInstrument
from torch_eft.measure.network.snapshot import Plan
from torch_eft.results.tags import quantity_of
from torch_eft.tensorboard import QUANTITIES, register_quantity, tag
from torch_eft.tensorboard.run_info import read_jsonl


def train(make_net=simple_mlp, make_optimizer=plain_sgd, steps=6, batch=24, observe=None):
    torch.manual_seed(0)
    net = make_net()
    optimizer = make_optimizer(net.parameters())
    x, y = dataset().tensors
    observer = None if observe is None else observe(net, optimizer)
    if observer is not None:
        observer.begin(total_steps=steps)
    for step in range(1, steps + 1):
        rows = torch.randperm(24)[:batch]
        loss = F.mse_loss(net(x[rows]), y[rows])
        if observer is not None:
            observer.observe_batch((x[rows], y[rows]))
            observer.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        if observer is not None:
            observer.before_step()
        optimizer.step()
        if observer is not None:
            observer.measure(step)
    if observer is not None:
        observer.finish()
    return net, optimizer, observer


def bits(net, optimizer):
    return [
        *(value.clone() for value in net.state_dict().values()),
        *(value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)),
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize(("net", "optimizer"), [(simple_mlp, plain_sgd), (normed_net, sgd)])
def test_a_bare_loop_ends_in_the_same_bits(net, optimizer):
    alone = bits(*train(net, optimizer, batch=8)[:2])
    *observed, observer = train(
        net,
        optimizer,
        batch=8,
        observe=lambda *of: Observer(of[0], PROBE, of[1], every=1, budget=None, forecast_seconds=0.1, on_error="raise"),
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, bits(*observed), strict=True))
    assert list(observer.history) == list(range(7))


def test_it_says_what_the_callback_says():
    """The same full-batch training by hand and by Lightning: the same numbers to rounding."""

    def instruments():  # order 1 is left out where a loaded machine could not afford it: not what is compared
        return [NTKInstrument(), RepresentationInstrument(), TheoryInstrument(order=0)]

    def observe(net, optimizer):
        return Observer(net, PROBE, optimizer, every=2, budget=None, on_error="raise", instruments=instruments())

    *_, observer = train(observe=observe)
    monitor = EFTMonitor(PROBE, instruments=instruments(), every=2, budget=None, on_error="raise")
    run([monitor], net=simple_mlp, optimizer=plain_sgd, batch_size=24, epochs=6)
    assert str(observer.validity) == str(monitor.validity)
    assert list(observer.history) == list(monitor.history) == [0, 2, 4, 6]
    for step, scalars in monitor.history.items():
        assert scalars.keys() == observer.history[step].keys()
        for name, value in scalars.items():
            if quantity_of(name) != "overhead_percent":
                assert observer.history[step][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (step, name)


def test_measure_alone_is_enough():
    net = simple_mlp()
    observer = Observer(net, PROBE, preset="light", every=10, budget=None)
    found = [observer.measure(step) for step in range(0, 21)]
    assert [bool(scalars) for scalars in found if scalars is not found[0]].count(True) == 2
    observer.finish()
    assert list(observer.history) == [0, 10, 20]
    assert observer.origin == "initialization"
    late = Observer(net, PROBE, preset="light")
    late.measure(5)
    assert late.origin == "resumed at step 5 without a recorded theta_0"


def test_the_last_planned_step_is_measured_whatever_the_schedule():
    *_, observer = train(observe=lambda *of: Observer(of[0], PROBE, of[1], preset="light", every=4, budget=None))
    assert list(observer.history) == [0, 4, 6]


def test_files_hold_the_history(tmp_path):
    instruments = [NTKInstrument(), TheoryInstrument(order=0)]
    *_, observer = train(
        observe=lambda *of: Observer(
            of[0], PROBE, of[1], every=3, budget=None, logdir=tmp_path, instruments=instruments
        )
    )
    records = read_jsonl(tmp_path / "eft.jsonl")
    assert records.measurements == observer.history
    assert records.info["parameters"] == sum(p.numel() for p in simple_mlp().parameters())
    assert records.info["probe"] == [4, 3]
    assert records.info["optimizer"] == "SGD, lr 0.05"
    assert records.info["validity"]["flag"] == observer.validity.flag
    assert set(records.info["quantities"]) == {quantity_of(name) for name in observer.history[6]}
    assert {"diagnosis", "validity", "overhead"} <= set(records.pages)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    assert set(observer.history[6]) == {name for name in tags["scalars"] + tags["tensors"] if quantity_of(name)}
    assert "eft/ntk_spectrum/log10_eigenvalues" in tags["histograms"]


def run_on_disk(folder, stop=None, spoil=None):
    """The last run info of a training of five steps: flushed after step ``stop``, infinite from step ``spoil`` on."""
    net = simple_mlp()
    observer = Observer(net, PROBE, preset="light", every=1, budget=None, logdir=folder)
    observer.begin(total_steps=5)
    with pytest.warns(MeasurementWarning) if spoil else contextlib.nullcontext():
        for step in range(1, (stop or 5) + 1):
            with torch.no_grad():
                net[0].weight.add_(torch.inf if step == spoil else 0.01)
            observer.measure(step)
    if stop is None:
        observer.finish()
    else:
        observer.flush()
    return read_jsonl(folder / "eft.jsonl").info["progress"]


def test_a_run_says_how_it_ended(tmp_path):
    assert run_on_disk(tmp_path / "a") == {"state": "ended", "step": 5, "planned": 5, "diverged": None}
    assert run_on_disk(tmp_path / "b", stop=3) == {"state": "interrupted", "step": 3, "planned": 5, "diverged": None}
    assert run_on_disk(tmp_path / "c", spoil=4) == {"state": "ended", "step": 5, "planned": 5, "diverged": 4}


def test_state_goes_on_where_it_stopped():
    torch.manual_seed(0)
    net = simple_mlp()
    first = Observer(net, PROBE, preset="light", every=1, budget=None)
    first.measure(0)
    with torch.no_grad():
        net[0].weight.add_(0.1)
    first.measure(1)
    second = Observer(net, PROBE, preset="light", every=1, budget=None)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        net[0].weight.sub_(0.1)
    second.begin(1)
    second.measure(2)
    assert list(second.history) == [0, 1, 2]
    assert second.history[1] == first.history[1]
    assert second.history[2][tag("ntk_drift")] == pytest.approx(0, abs=1e-6)


class _Costly(Instrument):
    """Each visit takes a second on the clock of the test."""

    name = "costly"

    def __init__(self, clock, seconds=1.0):
        self.clock, self.seconds, self.visits = clock, seconds, []

    def plan(self, outputs, samples):
        return Plan()

    def observe(self, measurement):
        self.clock.now += self.seconds
        self.visits.append((measurement.step, measurement.last))
        return Reading()


class _Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_the_schedule_is_thinned_to_the_budget_and_says_so(monkeypatch):
    clock, said = _Clock(), []
    monkeypatch.setattr(budget_module, "time", clock)
    instrument = _Costly(clock)
    observer = Observer(simple_mlp(), PROBE, every=1, budget=0.5, instruments=[instrument], say=said.append)
    observer.begin(total_steps=100)
    for step in range(1, 101):
        clock.now += 1.0
        observer.measure(step)
    observer.finish()
    steps = [step for step, _ in instrument.visits]
    assert instrument.visits[0] == (0, False)
    assert instrument.visits[-1] == (100, True)
    assert set(Curve(0, 100).points(100)) <= set(steps)
    # Of 100 s at 50 % the points of the curve take 11 s after the start, which is apart; the rest is spread.
    assert observer.budget.limited == pytest.approx(50, abs=1.01) and len(steps) in (51, 52)
    assert sum(step <= 50 for step in steps) in range(24, 33)
    assert len(observer.history) == 101  # the snapshot itself takes no time on this clock
    assert observer.budget.start >= 2.0
    assert f"left out: costly at {101 - len(steps)} others; budget=None brings them" in said[-1]


def test_a_measurement_too_dear_is_left_out_whole(monkeypatch):
    from torch_eft.measure.network import network as module

    clock, said = _Clock(), []
    monkeypatch.setattr(budget_module, "time", clock)
    take = module.take_snapshot

    def slow(*arguments, **options):
        clock.now += 1.0
        return take(*arguments, **options)

    monkeypatch.setattr(module, "take_snapshot", slow)
    observer = Observer(simple_mlp(), PROBE, preset="light", every=1, say=said.append)
    observer.begin()
    for step in range(1, 101):
        clock.now += 1.0
        observer.measure(step)
    observer.finish()
    # The points of a curve take more than the budget has: there is nothing beyond them.
    assert list(observer.history) == [0, *Curve(0, None).points(99), 100]
    assert "87 due measurements; budget=None brings them" in said[-1]


class _Broken(Sink):
    def scalars(self, step, values, epoch=None):
        raise OSError("disk full")


class _Keep(Sink):
    def __init__(self):
        self.steps = []

    def scalars(self, step, values, epoch=None):
        self.steps.append(step)


def test_a_sink_that_fails_does_not_keep_others_from_their_numbers():
    keep = _Keep()
    observer = Observer(simple_mlp(), PROBE, preset="light", every=1, budget=None, sinks=[_Broken(), keep])
    with pytest.warns(MeasurementWarning, match="disk full"):
        for step in range(3):
            observer.measure(step)
    assert keep.steps == [0, 1, 2]
    assert len(observer.skipped) == 3


class _FailsSometimes(Instrument):
    name = "moody"

    def observe(self, measurement):
        if measurement.step == 1:
            raise RuntimeError("not today")
        return Reading(scalars={tag("dntk"): 1.0})


def test_a_part_that_fails_is_skipped_and_the_others_go_on():
    observer = Observer(simple_mlp(), PROBE, every=1, budget=None, instruments=[_FailsSometimes(), NTKInstrument()])
    with pytest.warns(MeasurementWarning, match="not today"):
        for step in range(3):
            observer.measure(step)
    assert [tag("dntk") in observer.history[step] for step in range(3)] == [True, False, True]
    assert all(tag("ntk_drift") in observer.history[step] for step in range(3))
    assert observer.skipped == [(1, "RuntimeError: not today")]


def test_a_training_on_minibatches_pays_for_no_forecast(monkeypatch):
    def no_forecast(*arguments, **options):
        raise AssertionError("a forecast was begun")

    monkeypatch.setattr(theory, "EnsembleComparison", no_forecast)

    def observe(net, optimizer):
        instruments = [TheoryInstrument(order=0)]
        return Observer(net, PROBE, optimizer, every=1, budget=None, instruments=instruments, on_error="raise")

    *_, observer = train(batch=8, observe=observe)
    assert observer.validity.flag == "invalid" and "other samples" in observer.validity.reason
    assert not observer.events


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(preset="everything"), r"preset: 'everything' given; give one of 'light', 'standard', 'full'"),
        (dict(extra=["horoscope"]), r"extra: 'horoscope' given; give one of 'ntk', 'representation'"),
        (dict(budget=0), r"budget: 0 given"),
        (dict(on_error="ignore"), r"on_error: 'ignore' given"),
    ],
)
def test_unusable_arguments_stop_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        Observer(simple_mlp(), PROBE, **arguments)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="model: None given"):
        Observer(None, PROBE).begin()
    with pytest.raises(ValueError, match="probe: None given"):
        Observer(simple_mlp(), "first_batch:3").begin()


@pytest.mark.parametrize("training", ["full batch", "mini-batches"])
def test_every_logged_key_is_documented_and_the_first_group_is_small(training):
    net, optimizer, batch = (simple_mlp, plain_sgd, 24) if training == "full batch" else (normed_net, sgd, 8)
    options = {"preset": "full", "every": 3, "budget": None, "forecast_seconds": 4.0, "on_error": "raise"}
    make = lambda *of: Observer(of[0], PROBE, of[1], **options)  # noqa: E731
    *_, observer = train(net, optimizer, batch=batch, observe=make)
    logged = {name for scalars in observer.history.values() for name in scalars}
    assert all(quantity_of(name) in QUANTITIES for name in logged)
    assert 1 <= len({name for name in logged if name.startswith("eft/")}) <= 12


def test_at_most_twelve_quantities_are_among_the_first():
    assert sum(quantity.among_the_first for quantity in QUANTITIES.values()) <= 12


def test_the_core_needs_no_lightning():
    program = (
        "import sys, torch, torch_eft.live as live\n"
        "net = torch.nn.Linear(3, 2)\n"
        "observer = live.Observer(net, torch.randn(4, 3), preset='light', budget=None)\n"
        "observer.measure(0), observer.measure(1), observer.finish()\n"
        "print(sorted({'lightning', 'pytorch_lightning', 'matplotlib'} & set(sys.modules)), len(observer.history))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[] 2"


class _WeightNorm(Instrument):
    name = "weight_norm"

    def observe(self, measurement):
        norm = sum(float(p.detach().square().sum()) for p in measurement.model.parameters()) ** 0.5
        return Reading({tag("weight_norm"): norm})


def test_an_own_instrument_has_its_scalar_drawn_with_a_title(tmp_path):
    register_quantity("weight_norm", title="Norm of the weights", formula="||theta||")
    try:
        net = simple_mlp()
        observer = Observer(net, PROBE, preset="light", extra=[_WeightNorm()], budget=None, logdir=tmp_path)
        observer.begin()
        observer.finish()
        records = read_jsonl(tmp_path / "eft.jsonl")
        assert records.info["quantities"]["weight_norm"]["title"] == "Norm of the weights"
        assert records.measurements[0]["eft-more/weight_norm/measured"] > 0
        assert [instrument.name for instrument in observer.instruments] == ["ntk", "representation", "weight_norm"]
        with pytest.raises(ValueError, match="two are named 'weight_norm'"):
            Observer(net, PROBE, instruments=["ntk", _WeightNorm()], extra=[_WeightNorm()])
    finally:
        del QUANTITIES["weight_norm"]


def test_a_loop_too_fast_for_the_budget_has_a_curve_all_the_same():
    observer = Observer(simple_mlp(), PROBE)
    observer.begin()
    assert all(observer.measure(step) for step in range(1, 5))
    assert not observer.measure(5)
