"""What is measured when: instruments that add late numbers, beginnings that fail, and what the budget books."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.callbacks.trainings import PROBE, simple_mlp
from tests.live.instruments.loop import data, mlp
from torch_eft.live import Instrument, MeasurementWarning, Observer, Obstacle, Reading
from torch_eft.live import budget as budget_module
from torch_eft.live.budget import SNAPSHOT
from torch_eft.live.config.schedule import Curve
from torch_eft.live.run import measured_network
from torch_eft.live.run.measurements import joined
from torch_eft.tensorboard import tag

DRIFT, LATE = tag("ntk_drift"), tag("dntk")


def observed(*extra, model=None, **options):
    options = dict(preset="light", every=1, budget=None) | options
    return Observer(simple_mlp() if model is None else model, PROBE, extra=extra, **options)


def test_a_median_is_not_drawn_beside_another_forecasts_band():
    band = {tag("ntk_drift", "order_1"): 1.9, tag("ntk_drift", "band_90_low"): 1.7}
    other = {tag("ntk_drift", "order_1"): 5.9, tag("ntk_drift", "truncation"): 3.0, tag("ntk_drift", "taylor_2"): 2.0}
    both = band | {tag("ntk_drift", "taylor_2"): 2.0}  # an expansion is a line of its own
    assert joined(band, other) == joined(other, band) == both
    assert joined(other, {DRIFT: 1.0}) == other | {DRIFT: 1.0}


class _EveryStep(Instrument):
    name = "every_step"

    def after_step(self, step, network):
        return Reading(late={step: {LATE: 1.0}})


def test_late_numbers_of_a_step_do_not_stand_in_for_its_measurement():
    observer = observed(_EveryStep(), every=2)
    observer.begin()
    for step in range(1, 6):
        observer.measure(step)
    observer.finish()
    assert [step for step, scalars in observer.history.items() if DRIFT in scalars] == [0, 2, 4, 5]
    assert [step for step, scalars in observer.history.items() if LATE in scalars] == [1, 2, 3, 4, 5]
    assert observer.overhead().startswith("torch_eft: 4 measurements")


@pytest.mark.parametrize(("stop", "measured"), [(2, [0, 2, 4, 5]), (3, [0, 2, 3, 4, 5])])
def test_a_resume_at_a_step_with_late_numbers_only_measures_it(stop, measured):
    first = observed(_EveryStep(), every=2)
    first.begin()
    for step in range(1, stop + 1):
        first.measure(step)
    second = observed(_EveryStep(), every=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.begin(stop)
    for step in range(stop + 1, 6):
        second.measure(step)
    second.finish()
    assert [step for step, scalars in second.history.items() if DRIFT in scalars] == measured


class _Calls(Instrument):
    name = "calls"

    def __init__(self):
        self.calls = []

    def begin(self, start):
        self.calls.append(("begin", start.step, start.fresh))
        return Reading()

    def observe(self, measurement):
        self.calls.append(("observe", measurement.step))
        return Reading()

    def after_step(self, step, network):
        self.calls.append(("after_step", step))
        return Reading()


@pytest.mark.parametrize("where", ["gathering", "isolation", "snapshot"])
def test_no_instrument_observes_before_it_has_begun(monkeypatch, where):
    """The failure is that of one moment, when training begins."""
    failures = iter([RuntimeError("out of luck")])

    def failing(genuine):
        def action(*arguments, **options):
            for error in failures:
                raise error
            return genuine(*arguments, **options)

        return action

    calls, options = _Calls(), {}
    if where == "gathering":
        options = dict(unsharded_model=simple_mlp())
    observer = observed(calls, **options)
    observer.check()
    if where == "gathering":
        copied = lambda source, target: target.load_state_dict(source.state_dict())  # noqa: E731
        monkeypatch.setattr(measured_network, "full_copy", failing(copied))
    elif where == "isolation":
        monkeypatch.setattr(measured_network, "Network", failing(measured_network.Network))
    else:
        network = measured_network.Network
        monkeypatch.setattr(network, "snapshot", failing(network.snapshot))
    with pytest.warns(MeasurementWarning, match="out of luck"):
        observer.begin()
    observer.measure(1)
    observer.measure(2)
    assert [call for call in calls.calls if call[0] != "after_step"] == [
        ("begin", 0, True) if where == "snapshot" else ("begin", 1, False),
        ("observe", 1),
        ("observe", 2),
    ]
    assert calls.calls[0][0] == "begin"
    assert list(observer.history) == [1, 2]
    assert observer.skipped == [(0, "RuntimeError: out of luck")]


class _Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_the_first_snapshot_is_booked_with_its_gathering_and_without_what_instruments_begin_with(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(budget_module, "time", clock)

    def slow(source, target):
        clock.now += 3.0
        target.load_state_dict(source.state_dict())

    class Begins(Instrument):
        name = "begins"

        def begin(self, start):
            clock.now += 100.0
            return Reading()

    monkeypatch.setattr(measured_network, "full_copy", slow)
    observer = observed(Begins(), budget=0.05, unsharded_model=simple_mlp())
    observer.begin()
    account = observer.budget.accounts[SNAPSHOT]
    assert (account.latest, account.made, account.spent) == (3.0, 1, 0.0)


class _Answers(Instrument):
    name = "answers"

    def __init__(self, answer):
        self.answer = answer

    def observe(self, measurement):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "TypeError: instrument 'answers': observe returned NoneType, not a Reading"),
        ({LATE: 1.0}, "TypeError: instrument 'answers': observe returned dict, not a Reading"),
        (Reading({LATE: "large"}), "TypeError: must be real number, not str"),
    ],
)
def test_an_answer_that_is_no_reading_costs_the_others_nothing(answer, words):
    observer = observed(_Answers(answer))
    with pytest.warns(MeasurementWarning):
        observer.begin()
    observer.measure(1)
    assert observer.skipped == [(0, words), (1, words)]
    assert all(DRIFT in observer.history[step] for step in (0, 1))


def test_another_model_is_checked_anew_when_training_begins():
    observer = observed()
    observer.check(simple_mlp())
    wider = nn.Sequential(nn.Linear(PROBE.shape[1], 7), nn.Tanh(), nn.Linear(7, 3))
    observer.begin(model=wider)
    assert observer.network.model is wider
    assert observer.network.shape == (len(PROBE), 3)
    with pytest.warns(MeasurementWarning, match="measures nothing of this training.*probe"):
        observer.begin(model=nn.Linear(4, 1))  # the probe does not fit
    assert observer.history == observer.measure(1) == {}


def test_a_second_training_without_a_directory_does_not_write_to_that_of_the_first(tmp_path):
    observer = observed(keep_theta_0="file")
    observer.begin(theta_file=tmp_path / "first.pt")
    assert observer.theta_file == tmp_path / "first.pt"
    observer.begin()
    assert observer.theta_file is None
    logged = observed(keep_theta_0="file", logdir=tmp_path)
    logged.begin(theta_file=tmp_path / "first.pt")
    logged.begin()
    assert logged.theta_file == tmp_path / "eft-theta_0.pt"


@pytest.mark.parametrize("version", [None, 1, 1000])
def test_of_another_version_s_checkpoint_history_and_theta_0_are_kept(version):
    class Counts(_Calls):
        def state(self):
            return {"calls": len(self.calls)}

        def load_state(self, state):
            raise AssertionError("a state of another layout")

    first = observed(Counts())
    first.begin()
    with torch.no_grad():
        first.network.model[0].weight.add_(0.1)
    first.measure(1)
    state = copy.deepcopy(first.state_dict())
    del state["measured"]
    state["version"] = version
    if version is None:
        del state["version"]
    second = observed(Counts(), model=first.network.model)
    with pytest.warns(
        MeasurementWarning, match="written by another version of torch_eft; history and theta_0 are kept"
    ):
        second.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeasurementWarning)
        second.begin(1)
        second.measure(2)
    assert list(second.history) == [0, 1, 2]
    assert second.history[1] == first.history[1]
    assert second.history[2][DRIFT] == pytest.approx(first.history[1][DRIFT], rel=1e-4)  # from the same theta_0


def test_where_the_budget_is_short_curves_have_their_points_without_second_orders():
    x, y, x_probe = data(24)
    model = mlp(16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    said = []
    observer = Observer(model, x_probe, optimizer, budget=1e-9, say=said.append, on_error="raise")
    observer.begin(total_steps=40, obstacle=Obstacle("mini-batches", minibatches=True))
    for step in range(1, 41):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        observer.measure(step)
    observer.finish()
    with_points = {
        quantity: [step for step, scalars in observer.history.items() if tag(quantity) in scalars]
        for quantity in ("ntk_drift", "representation_change", "dntk", "taylor_remainder", "ddntk", "ntk_rate")
    }
    points = Curve(0, 40).points(40)
    assert with_points["ntk_drift"] == with_points["representation_change"] == [0, *points]
    assert with_points["dntk"] == with_points["taylor_remainder"] == points and len(points) == 12
    assert with_points["ddntk"] == with_points["ntk_rate"] == [1]
    assert tag("expansion_radius") in observer.history[0]  # the first step belongs to the start
    assert "ddNTK at 11" in said[-1] and "budget=None brings them" in said[-1]
