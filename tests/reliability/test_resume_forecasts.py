"""After a resume the theory stands beside the training as if nothing had stopped it; or it ends, in words.

The oracle is the training that nothing stopped: in the bare loops its own state, saved on the way, is what the resumed
one goes on from, so that both have one forecast and its values must be the same to float rounding. They are compared
to 1e-6 and not bit by bit, as forecasts are computed anew from what the checkpoint holds.
"""

import functools
import io

import pytest
import torch
from torch.nn import functional as F

from tests.callbacks.trainings import dataset
from tests.live.instruments.loop import data
from tests.reliability.interruptions import fit as lightning_fit
from tests.reliability.interruptions import light
from tests.reliability.resumed_loops import HALF, SECONDS, STEPS, Run, same
from torch_eft.callbacks import MeasurementWarning
from torch_eft.live.instruments.forecasts.instance import InstanceInstrument
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.live.instruments.interval import IntervalInstrument
from torch_eft.live.instruments.steps.dntk import DNTKInstrument
from torch_eft.measure.taylor.displacement import displacement_terms
from torch_eft.tensorboard import tag

THEORY = {"ensemble": ("output_projection", "ntk_mean_drift"), "instance": ("instance_output",)}


@functools.cache
def half(momentum=0.0):
    """A training that went on to its end, and its checkpoint from the middle."""
    run = Run(momentum=momentum).train(1, HALF)
    saved = run.saved()
    run.train(HALF + 1, STEPS)
    return run, saved


# ---- it goes on


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_its_values_are_those_of_the_training_that_was_not_stopped(momentum):
    whole, saved = half(momentum)
    resumed = Run(seed=1, momentum=momentum).resume(saved).train(HALF + 1, STEPS)
    for quantities in THEORY.values():
        for name in quantities:
            assert tag(name, "order_1") in whole.history[STEPS], whole.instruments()["ensemble"].facts()
    assert list(resumed.history) == list(range(STEPS + 1))
    same(resumed, whole, range(STEPS + 1))
    for name, instrument in resumed.instruments().items():
        assert instrument.facts() == whole.instruments()[name].facts()
    assert [event.text for event in resumed.observer.events] == [event.text for event in whole.observer.events]


@pytest.mark.slow
def test_cross_entropy_and_a_measurement_that_falls_on_the_resume():
    """The checkpoint lies between two measurements: its step is measured before the forecast is brought back."""
    options = dict(loss=F.cross_entropy, every=3)

    def made(seed=0):
        run = Run(seed=seed, **options)
        run.y = torch.tensor([0, 1, 1, 0])
        return run

    dense = Run(loss=F.cross_entropy)
    dense.y = made().y
    dense.train(1, STEPS)
    stopped = made().train(1, HALF)
    assert HALF not in stopped.history
    resumed = made(1).resume(stopped.saved()).train(HALF + 1, STEPS)
    name = tag("instance_output", "order_1")
    assert list(resumed.history) == [0, 3, HALF, 6, STEPS]
    for step in (3, HALF, 6, STEPS):
        assert resumed.history[step][tag("instance_output")] == pytest.approx(
            dense.history[step][tag("instance_output")], rel=1e-5
        )
        assert name in resumed.history[step]
    assert "squared error" in resumed.instruments()["ensemble"].validity.reason  # it had none, and says why still


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_it_goes_on_after_two_resumes_one_of_them_without_a_step(order):
    def run(seed=0):
        theory = TheoryInstrument(order=order, seconds=SECONDS)
        return Run(instruments=[theory, InstanceInstrument(seconds=SECONDS)], seed=seed)

    whole = run().train(1, HALF)
    saved = whole.saved()
    whole.train(HALF + 1, STEPS)
    again = run(1).resume(saved).saved()
    resumed = run(2).resume(again).train(HALF + 1, STEPS)
    assert tag("output_projection", f"order_{order}") in whole.history[STEPS]
    same(resumed, whole, range(STEPS + 1))


@pytest.mark.slow
def test_it_goes_on_beyond_its_horizon():
    """Of a training whose length is another after the resume."""
    run = Run(total=HALF).train(1, HALF)
    resumed = Run(seed=1).resume(run.saved()).train(HALF + 1, STEPS)
    for name in ("output_projection", "instance_output"):
        assert tag(name, "order_1") in resumed.history[STEPS]


def compared(tmp_path, batch_size):
    """A training that nothing stopped and one resumed after its second epoch, both with the theory, every step."""
    # Order 1 of 24 samples takes as long as it may, and is no part of the comparison.
    whole, first, resumed = (light(preset="standard", every=1, forecast_seconds=0.1) for _ in range(3))
    lightning_fit([whole], batch_size=batch_size)
    trainer, _ = lightning_fit([first], epochs=2, batch_size=batch_size)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    lightning_fit([resumed], ckpt_path=tmp_path / "half.ckpt", batch_size=batch_size)
    return whole, resumed


def test_a_forecast_goes_on_after_a_resume(tmp_path):
    whole, resumed = compared(tmp_path, batch_size=len(dataset()))
    for name in (tag("ntk_trace", "order_0"), tag("instance_output", "order_0")):
        assert name in whole.history[4]
        for step in (3, 4):
            assert resumed.history[step][name] == pytest.approx(whole.history[step][name], rel=1e-4)
    assert resumed.validity.flag == whole.validity.flag != "invalid"


# ---- it ends, in words


def rate(run):
    run.optimizer.param_groups[0]["lr"] = 0.01


def samples(run):
    run.x = run.x + 0.1


def labels(run):
    run.y = run.y + 0.1


def loss(run):
    run.loss = lambda z, y: (z - y).square().sum() / 2


def momentum(run):
    run.optimizer.param_groups[0]["momentum"] = 0.5


def adam(run):
    run.optimizer = torch.optim.Adam(run.net.parameters(), 1e-3)


FOLLOWED = ("instance", "learning rate")
ENDS = {
    "learning rate": (rate, "the learning rate is another after the resume: [0.01], it was [0.05]"),
    "samples": (samples, "the batch holds other samples after the resume"),
    "labels": (labels, "the batch holds other samples after the resume"),
    "loss": (loss, "the loss is another after the resume: half the sum (PDLT), it was mean over samples"),
    "momentum": (momentum, "momentum"),
    "optimizer": (adam, "Adam: forecasts are derived for gradient descent"),
}


@pytest.mark.parametrize("name", ENDS)
def test_another_training_after_the_resume_ends_it(name):
    change, words = ENDS[name]
    _, saved = half()
    resumed = Run(seed=1).resume(saved)
    change(resumed)
    resumed.train(HALF + 1, STEPS)
    for kind, instrument in resumed.instruments().items():
        if (kind, name) == FOLLOWED:
            continue
        assert instrument.validity.flag == "invalid"
        assert words in instrument.validity.reason
        assert any(event.text.startswith(instrument.what) and words in event.text for event in resumed.observer.events)
    for kind, quantities in THEORY.items():
        for quantity in quantities:
            order_0 = tag(quantity, "order_0")
            last = [step for step in resumed.history if order_0 in resumed.history[step]][-1]
            assert last == (STEPS if (kind, name) == FOLLOWED else HALF)
    assert list(resumed.history) == list(range(STEPS + 1))


@pytest.mark.slow
def test_a_momentum_that_was_not_restored_ends_it():
    _, saved = half(0.5)
    resumed = Run(seed=1, momentum=0.5).resume(saved, optimizer=False).train(HALF + 1, STEPS)
    for instrument in resumed.instruments().values():
        assert "lost its momentum with the resume" in instrument.validity.reason


@pytest.mark.slow
def test_why_it_ended_before_the_checkpoint_is_still_known_after_it():
    run = Run().train(1, 2)
    run.optimizer.param_groups[0]["lr"] = 0.01
    run.train(3, HALF)
    resumed = Run(seed=1).resume(run.saved()).train(HALF + 1, STEPS)
    found = {kind: instrument.validity for kind, instrument in resumed.instruments().items()}
    assert found.pop("instance").flag == "caution"  # it follows
    for validity in found.values():
        assert validity.reason == "the learning rate changed at step 2: the forecast is for a constant one"


def emptied(state):
    state["parts"] = {name: {} for name in state["parts"]}


def of_an_older_version(state):
    state["parts"] = {}


def without_the_ensemble(state):
    del state["parts"]["theory"]["ensemble"], state["parts"]["instance"]["comparison"]["modes"]


def of_wrong_types(state):
    state["parts"]["theory"]["comparison"] = state["parts"]["instance"]["comparison"] = 3


def of_another_shape(state):
    state["parts"]["theory"]["ensemble"]["widths"] = [1, 2]
    theta_0 = state["parts"]["instance"]["theta_0"]
    theta_0 |= {name: value[:1] for name, value in theta_0.items()}


def without_batches(state):
    for kept in state["parts"].values():
        del kept["batches"]


NO_STATE = "training starts at step 4, the theory at initialization"
UNREADABLE = {
    emptied: (NO_STATE, NO_STATE),
    of_an_older_version: (NO_STATE, NO_STATE),
    without_the_ensemble: (
        "what the checkpoint says of the ensemble does not fit (KeyError",
        "cannot be read (KeyError",
    ),
    of_wrong_types: ("cannot be read (TypeError", "cannot be read (TypeError"),
    of_another_shape: ("what the checkpoint says of the ensemble does not fit", "at theta_0"),
    without_batches: ("cannot be read (KeyError: 'batches')",) * 2,
}


@pytest.mark.parametrize("change", UNREADABLE, ids=lambda change: change.__name__)
def test_a_state_that_cannot_be_read_ends_it_and_nothing_else(change):
    whole, saved = half()
    resumed = Run(seed=1).resume(saved, change=change).train(HALF + 1, STEPS)
    for instrument, words in zip(resumed.instruments().values(), UNREADABLE[change], strict=True):
        assert instrument.validity.flag == "invalid"
        assert words in instrument.validity.reason
    assert list(resumed.history) == list(range(STEPS + 1))
    same(resumed, whole, range(HALF + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keep", ["file", *(pytest.param(keep, marks=pytest.mark.slow) for keep in ("a file that is gone", "none"))]
)
def test_theta_0_beside_the_checkpoint_or_not_at_all(keep, tmp_path):
    """This network's forecast is made again of theta_0, and ends without; that of the ensemble needs none."""

    def instruments():
        return [TheoryInstrument(order=0), InstanceInstrument(seconds=SECONDS)]

    options = dict(keep_theta_0="none" if keep == "none" else "file", logdir=tmp_path)
    whole = Run(instruments=instruments(), **options).train(1, HALF)
    saved = whole.saved()
    whole.train(HALF + 1, STEPS)
    state = torch.load(io.BytesIO(saved), weights_only=True)[2]
    assert state["theta_0"] is state["parts"]["instance"]["theta_0"] is None
    files = [path.name for path in tmp_path.glob("*.pt")]
    assert files == ([] if keep == "none" else ["eft-theta_0-instance.pt"])
    resumed = Run(instruments=instruments(), seed=1, **options)
    if keep == "a file that is gone":
        (tmp_path / files[0]).unlink()
        resumed.observer.recorder.on_error = "warn"
        with pytest.warns(MeasurementWarning, match="is not there"):
            resumed.resume(saved)
    else:
        resumed.resume(saved)
    again = torch.load(io.BytesIO(resumed.saved()), weights_only=True)[2]  # no step taken since
    assert again["parts"]["instance"]["theta_0_file"] == state["parts"]["instance"]["theta_0_file"]
    resumed.train(HALF + 1, STEPS)
    if keep == "file":
        same(resumed, whole, range(STEPS + 1))
    else:
        assert "theta_0, of which it would be made again" in resumed.instruments()["instance"].validity.reason
        assert tag("output_projection", "order_0") in resumed.history[STEPS]


def test_a_state_of_another_kind_is_a_new_start():
    _, saved = half()

    def change(state):
        state["parts"]["theory"] = 3

    with pytest.warns(MeasurementWarning, match="cannot be read"):
        resumed = Run(seed=1).resume(saved, change=change)
    resumed.train(HALF + 1, STEPS)
    for instrument in resumed.instruments().values():
        assert instrument.validity.reason == NO_STATE


def test_a_forecast_for_another_probe_is_dropped_with_its_theta_0():
    _, saved = half()
    with pytest.warns(MeasurementWarning, match="the probe is another"):
        resumed = Run(seed=1, probe=data(4, 2)[2] + 1).resume(saved)
    resumed.train(HALF + 1, STEPS)
    for instrument in resumed.instruments().values():
        assert instrument.validity.reason == NO_STATE
    assert list(resumed.history) == list(range(HALF, STEPS + 1))


# ---- instruments that look back to the last measurement


@pytest.mark.slow
def test_the_first_interval_after_a_resume_is_measured(tmp_path):
    whole, resumed = compared(tmp_path, batch_size=8)
    for step in (7, 8, 12):
        for name in (tag("interval_output"), tag("interval_output", "order_1"), tag("dntk")):
            assert resumed.history[step][name] == pytest.approx(whole.history[step][name], rel=1e-3)


@pytest.mark.parametrize("every", [1, 3])
def test_what_looks_back_after_a_resume_looks_back_to_where_it_went_on(every):
    """Changes over the interval, and dNTK along the displacement and along the gradient, with the checkpoint on a
    measurement and between two."""

    def instruments():
        return [IntervalInstrument(), DNTKInstrument()]

    dense = Run(instruments=instruments(), loss=F.smooth_l1_loss).train(1, STEPS)
    theta = {}
    stopped = Run(instruments=instruments(), every=every, loss=F.smooth_l1_loss).train(1, HALF)
    theta[HALF] = {name: p.detach().clone() for name, p in stopped.net.named_parameters()}
    resumed = Run(instruments=instruments(), every=every, loss=F.smooth_l1_loss, seed=1).resume(stopped.saved())
    next_one = HALF + 1 if every == 1 else 6
    resumed.train(HALF + 1, next_one)
    theta[next_one] = {name: p.detach().clone() for name, p in resumed.net.named_parameters()}
    resumed.train(next_one + 1, STEPS)
    observer = resumed.observer
    lambdas = observer.network.learning_rates()
    expected = displacement_terms(resumed.net, observer.network.probe, theta[HALF], theta[next_one], lambdas=lambdas)
    moved, size = expected.output_change.norm(), expected.output_terms[0].norm()
    rest = expected.output_change - expected.output_terms[0]
    found = resumed.history[next_one]
    assert found[tag("interval_output_error", "order_0")] == pytest.approx(float(rest.norm() / moved), rel=1e-4)
    assert found[tag("interval_output", "order_1")] == pytest.approx(
        float(expected.output_terms[1:].sum(0).norm() / size), rel=1e-4
    )
    # Along the gradient of the very step at which it went on: in no other visit of either process.
    for name in (tag("dntk_along_gradient"), tag("ddntk_along_gradient")):
        assert resumed.history[HALF][name] == pytest.approx(dense.history[HALF][name], rel=1e-4)
