"""A training stopped and resumed: no point is lost and none is there twice, wherever the checkpoint fell.

Each case trains to a checkpoint, goes on a little, stops (by an exception, or by SIGKILL), resumes from the checkpoint
into the same log directory, and compares with the steps of a training that nothing stopped.
"""

import warnings
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from tests.callbacks.trainings import PROBE, Training, dataset, digest, plain_sgd, simple_mlp
from tests.reliability.interruptions import (
    DRIFT,
    StopAt,
    Stopped,
    fit,
    in_csv,
    in_tensorboard,
    interrupted,
    kill,
    light,
    loggers,
    stop,
)
from torch_eft.callbacks import MeasurementWarning
from torch_eft.live import Observer
from torch_eft.tensorboard import tag
from torch_eft.tensorboard.run_info import read_jsonl

CASES = {
    # schedule, when checkpoints are written, when it stops, the checkpoint from which it goes on
    "end of an epoch": ("epoch", {"every_n_epochs": 1}, 8, 6),
    "end of an epoch, measured every step": (1, {"every_n_epochs": 1}, 8, 6),
    "mid-epoch": ("epoch", {"every_n_train_steps": 5}, 7, 5),
    "mid-epoch, measured every step": (1, {"every_n_train_steps": 4}, 6, 4),
    "just before the measurement that was due": ("epoch", {"every_n_train_steps": 3}, 7, 6),
}


KILLED = ("mid-epoch", "end of an epoch, measured every step")
"""Cases that the fast suite ends by SIGKILL too: a process of its own each."""


@pytest.mark.parametrize(
    ("case", "action"),
    [
        pytest.param(
            case, action, id=f"{case}-{name}", marks=[pytest.mark.slow] * (name == "SIGKILL" and case not in KILLED)
        )
        for case in CASES
        for name, action in (("exception", stop), ("SIGKILL", kill))
    ],
)
def test_no_point_is_lost_and_none_is_doubled(tmp_path, case, action):
    every, checkpoint, stop_at, goes_on_from = CASES[case]
    whole = light(every=every)
    fit([whole])
    path = interrupted(tmp_path, every, checkpoint, stop_at, action)[goes_on_from]
    resumed = light(every=every)
    trainer, module = fit([resumed], loggers(tmp_path), ckpt_path=path)
    assert digest(trainer, module) == digest(*fit([], ckpt_path=path))
    # A checkpoint between two due measurements adds one: the weights from which the training goes on.
    steps = sorted({*whole.history, goes_on_from} if every == "epoch" else whole.history)
    assert sorted(resumed.history) == steps
    assert resumed.origin == "initialization"
    for step in whole.history:
        if step <= goes_on_from:
            assert resumed.history[step][DRIFT] == pytest.approx(whole.history[step][DRIFT], rel=1e-6)
    for times, values in (in_tensorboard(tmp_path), in_csv(tmp_path)):
        assert sorted(times) == steps
        assert times == Counter(steps)
        for step, value in values.items():
            assert value == pytest.approx(resumed.history[step][DRIFT], rel=1e-6)
    records = read_jsonl(tmp_path / "tb" / "version_0" / "eft.jsonl")
    assert records.measurements == resumed.history
    assert records.corrupt == 0


def test_points_of_the_stopped_training_that_the_resumed_one_does_not_make_are_gone(tmp_path):
    """Measured every step, killed, resumed with measurements at the end only: the old points past the checkpoint are
    not part of this training."""
    path = interrupted(tmp_path, 1, {"every_n_train_steps": 4}, 6, stop)[4]
    resumed = light(every=100)
    fit([resumed], loggers(tmp_path), ckpt_path=path)
    assert sorted(resumed.history) == [0, 1, 2, 3, 4, 12]
    assert read_jsonl(tmp_path / "tb" / "version_0" / "eft.jsonl").measurements == resumed.history
    assert sorted(in_tensorboard(tmp_path)[0]) == sorted(in_csv(tmp_path)[0]) == [0, 1, 2, 3, 4, 12]


class Logging(Training):
    """Logs its own loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=False)
        return loss


@pytest.mark.slow
def test_the_trainings_own_points_are_neither_lost_nor_doubled(tmp_path):
    path = interrupted(tmp_path, 1, {"every_n_train_steps": 4}, 6, stop, kind=Logging)[4]
    fit([light(every=1)], loggers(tmp_path), ckpt_path=path, kind=Logging)
    events = EventAccumulator(str(tmp_path / "tb" / "version_0"), size_guidance={"scalars": 0}).Reload()
    times = Counter(point.step for point in events.Scalars("loss"))
    assert sorted(times) == list(range(12))
    # Lightning counts the loss of the step from 4 to 5 as step 4: the stopped training's is a double without us, too.
    assert {step for step, count in times.items() if count > 1} <= {4}


@pytest.mark.slow
def test_a_purge_step_of_the_users_does_no_harm(tmp_path):
    path = interrupted(tmp_path, 1, {"every_n_train_steps": 4}, 6, stop)[4]
    resumed = light(every=1)
    fit([resumed], loggers(tmp_path, purge_step=5), ckpt_path=path)
    assert in_tensorboard(tmp_path)[0] == Counter(range(13))


def test_a_second_fit_doubles_nothing(tmp_path):
    monitor, places = light(every=1), loggers(tmp_path)
    trainer, module = fit([monitor], places, epochs=2)
    trainer.fit_loop.max_epochs = 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(dataset(), batch_size=8))
    assert sorted(monitor.history) == list(range(10))
    assert in_tensorboard(tmp_path)[0] == in_csv(tmp_path)[0] == Counter(range(10))
    assert read_jsonl(tmp_path / "tb" / "version_0" / "eft.jsonl").measurements == monitor.history


@pytest.mark.slow
def test_a_new_log_directory_holds_the_whole_story(tmp_path):
    path = interrupted(tmp_path / "first", 1, {"every_n_train_steps": 4}, 6, stop)[4]
    resumed = light(every=1)
    fit([resumed], loggers(tmp_path / "second"), ckpt_path=path)
    assert read_jsonl(tmp_path / "second" / "tb" / "version_0" / "eft.jsonl").measurements == resumed.history
    times, _ = in_csv(tmp_path / "second")
    assert times == Counter(range(13))


def test_the_catch_up_measurement_is_made_within_any_budget(tmp_path):
    """At the start there is no training time yet of which it could be a share: like theta_0, it falls once."""
    path = interrupted(tmp_path, "epoch", {"every_n_train_steps": 3}, 7, stop)[6]
    resumed = light(budget=1e-3)
    fit([resumed], ckpt_path=path)
    assert 6 in resumed.history
    assert 6 not in torch.load(path, weights_only=True)["callbacks"][resumed.state_key]["history"]


def test_values_after_a_resume_are_those_of_the_training_that_was_not_stopped(tmp_path):
    whole, resumed = light(every=1), light(every=1)
    trainer, module = fit([whole])
    path = interrupted(tmp_path, 1, {"every_n_epochs": 1}, 8, kill)[6]
    assert digest(*fit([resumed], ckpt_path=path)) == digest(trainer, module)
    assert sorted(resumed.history) == sorted(whole.history)
    for step, scalars in whole.history.items():
        for name, value in scalars.items():
            if name != tag("overhead_percent"):
                assert resumed.history[step][name] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, name)


@pytest.mark.slow
def test_resumed_twice(tmp_path):
    path = interrupted(tmp_path, 1, {"every_n_train_steps": 4}, 6, stop)[4]
    saver = ModelCheckpoint(tmp_path / "again", filename="{step}", save_top_k=-1, every_n_train_steps=4)
    with pytest.raises(Stopped):
        fit([light(every=1), saver, StopAt(10, stop)], loggers(tmp_path), ckpt_path=path)
    last = light(every=1)
    fit([last], loggers(tmp_path), ckpt_path=tmp_path / "again" / "step=8.ckpt")
    assert sorted(last.history) == list(range(13))
    assert in_tensorboard(tmp_path)[0] == in_csv(tmp_path)[0] == Counter(range(13))
    assert read_jsonl(tmp_path / "tb" / "version_0" / "eft.jsonl").measurements == last.history


# ---- theta_0


@pytest.mark.parametrize("preset", ["light", "full"])
def test_theta_0_travels_in_the_checkpoint(tmp_path, preset):
    """Its measurements always; its values where a part needs them."""
    monitor = light(preset=preset, every=3)
    trainer, _ = fit([monitor], epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    pl.seed_everything(0, verbose=False)
    start = Training(simple_mlp(), plain_sgd)
    if preset == "light":
        assert state["theta_0"] is None
    else:
        assert all(torch.equal(state["theta_0"][name], p) for name, p in start.named_parameters())
    resumed = light(preset=preset, every=3)
    fit([resumed], ckpt_path=tmp_path / "half.ckpt")
    whole = light(preset=preset, every=3)
    fit([whole])
    assert resumed.origin == whole.origin == "initialization"
    for name in (DRIFT, tag("representation_change"), *[tag("taylor_remainder")] * (preset == "full")):
        assert resumed.history[12][name] == pytest.approx(whole.history[12][name], rel=1e-4), name


def test_without_theta_0_in_the_checkpoint_the_origin_says_so(tmp_path):
    trainer, _ = fit([], epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    monitor = light(every="epoch")
    fit([monitor], ckpt_path=tmp_path / "half.ckpt")
    assert monitor.origin == "resumed at step 6 without a recorded theta_0"
    assert sorted(monitor.history) == [6, 9, 12]
    assert monitor.history[6][DRIFT] == 0


# ---- one callback, several models


def other_mlp():
    from tests.oracles.models import mlp

    return mlp((5, 8, 3))


@pytest.mark.slow
@pytest.mark.parametrize("net", [simple_mlp, other_mlp], ids=["the same architecture", "another architecture"])
def test_a_callback_used_for_another_model_starts_afresh(tmp_path, net):
    monitor = light(every="epoch")
    fit([monitor], epochs=2)
    fit([monitor], net=net, epochs=1)
    assert sorted(monitor.history) == [0, 3]
    assert monitor.origin == "initialization"
    assert monitor.history[0][DRIFT] == 0


def test_a_used_callback_takes_on_the_checkpoint_not_its_own_past(tmp_path):
    path = interrupted(tmp_path, 1, {"every_n_train_steps": 4}, 6, stop)[4]
    monitor = light(every=1)
    fit([monitor], net=other_mlp, epochs=5)
    fit([monitor], ckpt_path=path)
    fresh = light(every=1)
    fit([fresh], ckpt_path=path)
    assert sorted(monitor.history) == list(range(13))
    for step in monitor.history:
        assert monitor.history[step][DRIFT] == fresh.history[step][DRIFT]


def test_a_checkpoint_of_another_model_is_not_compared_with(tmp_path):
    """The state says which parameters theta_0 had; one of other parameters is told apart, in words."""
    path = interrupted(tmp_path, 1, {"every_n_train_steps": 4}, 6, stop)[4]
    stored = torch.load(path, weights_only=True)
    state = stored["callbacks"][light().state_key]
    observer = Observer(other_mlp(), PROBE, preset="light", every=1, budget=None)
    observer.load_state_dict(state)
    with pytest.warns(MeasurementWarning, match=r"the parameters are others than those of the recorded theta_0"):
        observer.begin(4)
    assert observer.origin == "resumed at step 4 without a recorded theta_0"
    assert sorted(observer.history) == [4]


# ---- a bare loop


def bare(net, optimizer, observer, steps):
    x, y = dataset().tensors
    for step in steps:
        loss = torch.nn.functional.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        observer.before_step()
        optimizer.step()
        observer.measure(step)


def test_a_bare_loop_resumed_into_its_own_directory(tmp_path):
    """The observer's own writer tells TensorBoard itself where the training goes on."""
    net = simple_mlp()
    optimizer = plain_sgd(net.parameters())
    options = dict(preset="light", every=1, budget=None, logdir=tmp_path, on_error="raise")
    first = Observer(net, PROBE, optimizer, **options)
    first.begin()
    bare(net, optimizer, first, range(1, 4))
    torch.save([net.state_dict(), optimizer.state_dict(), first.state_dict()], tmp_path / "half.pt")
    bare(net, optimizer, first, range(4, 7))
    first.flush()  # and here it dies
    weights, steps, state = torch.load(tmp_path / "half.pt", weights_only=True)
    net.load_state_dict(weights)
    optimizer.load_state_dict(steps)
    second = Observer(net, PROBE, optimizer, **options)
    second.load_state_dict(state)
    second.begin(3)
    bare(net, optimizer, second, range(4, 9))
    second.finish()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in events.Scalars(DRIFT)] == list(range(9))
    assert "eft/run" in events.Tags()["tensors"]
    assert read_jsonl(tmp_path / "eft.jsonl").measurements == second.history


def test_events_are_not_told_again_after_a_resume():
    """What had left its band before the checkpoint does not leave it anew."""
    from torch_eft.live import Instrument, Reading

    class Outside(Instrument):
        name = "outside"

        def observe(self, visit):
            values = {tag("ntk_drift", series): 1.0 * (series == "truncation") for series in ("order_0", "truncation")}
            return Reading(scalars={tag("ntk_drift"): 10.0 * (visit.step > 0)} | values)

    first = Observer(simple_mlp(), PROBE, every=1, budget=None, instruments=[Outside()], on_error="raise")
    for step in range(3):
        first.measure(step)
    assert [event.step for event in first.events] == [1]
    second = Observer(simple_mlp(), PROBE, every=1, budget=None, instruments=[Outside()], on_error="raise")
    second.load_state_dict(first.state_dict())
    second.begin(2)
    second.measure(3)
    assert [event.step for event in second.events] == [1]
