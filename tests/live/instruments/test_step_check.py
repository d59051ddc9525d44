"""Forecasts end, or are not made, where the training does something else to gradients or weights."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.trainings import Training
from tests.live.instruments.loop import data, fit, mlp
from torch_eft.callbacks import EFTMonitor
from torch_eft.live.instruments.forecasts.instance import InstanceInstrument
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.live.instruments.trained_beside.shadow import ShadowInstrument
from torch_eft.live.observer import Observer
from torch_eft.results.tags import tag

STEP, GRADIENT = "do not move by -learning_rate times the gradient", "the gradient is not that of"


def clipped(model, optimizer, now):
    def clip(*unused):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)

    optimizer.register_step_pre_hook(clip)


def decayed(model, optimizer, now):
    def decay(*unused):
        for p in model.parameters():
            p.data.mul_(0.999)

    optimizer.register_step_post_hook(decay)


def projected(model, optimizer, now):
    def project(step):
        if step == 7:
            with torch.no_grad():
                model[0].weight.clamp_(-1, 1)

    return project


def slower(model, optimizer, now):
    def halve(*unused):
        optimizer.param_groups[0]["lr"] *= 0.5

    def double(*unused):
        optimizer.param_groups[0]["lr"] *= 2

    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(double)


def frozen_at_times(model, optimizer, now):
    def freeze(*unused):
        if now["step"] % 3 == 2:
            model[2].weight.grad.zero_()

    optimizer.register_step_pre_hook(freeze)


def scaled_from_step_5(model, optimizer, now):
    model[2].weight.register_hook(lambda grad: grad * 0.5 if now["step"] >= 5 else grad)


@pytest.mark.parametrize(
    ("change", "reason", "momentum"),
    [
        (clipped, STEP, 0.9),
        (decayed, STEP, 0.0),
        (projected, STEP, 0.9),
        (slower, STEP, 0.0),
        (frozen_at_times, STEP, 0.9),
        (scaled_from_step_5, GRADIENT, 0.9),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_training_ends_the_forecast_in_words(change, reason, momentum):
    x, y, x_probe = data(3, 2, 1)
    model = mlp(12, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    now = {"step": 0}
    also = change(model, optimizer, now)

    def on_step(step):
        now["step"] = step
        if also is not None:
            also(step)

    observer, _ = fit(model, [InstanceInstrument(seconds=60.0)], 12, optimizer, x, y, x_probe, every=2, on_step=on_step)
    assert observer.validity.flag == "invalid" and reason in observer.validity.reason
    seen = [event.step <= 12 for event in observer.events if reason in event.text]
    assert seen == ([] if change in (clipped, decayed, slower) else [True])  # the first step: no forecast was begun
    assert "eft-theory/ntk_drift/order_1" not in observer.history[12]


def test_the_forecast_of_the_ensemble_ends_likewise():
    x, y, x_probe = data(3, 2, 1)
    model = mlp(12, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    decayed(model, optimizer, {})
    observer, _ = fit(model, [TheoryInstrument(order=0)], 3, optimizer, x, y, x_probe)
    assert observer.validity.flag == "invalid" and STEP in observer.validity.reason


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"momentum": 0.8, "dampening": 0.3}, torch.float64),
        ({"momentum": 0.9, "nesterov": True}, torch.float32),
    ],
    ids=str,
)
def test_gradient_descent_is_recognized_until_it_has_converged(options, dtype):
    """At the end the gradient is all rounding."""
    x, y, x_probe = (value.to(dtype) for value in data(3, 2, 1))
    model = mlp(12, 1).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
    observer, _ = fit(model, [InstanceInstrument(seconds=60.0)], 100, optimizer, x, y, x_probe, every=20)
    loss = float((model(x) - y).detach().square().mean())
    assert loss < (1e-4 if options else 1e-1)
    assert "eft-theory/instance_output_error/order_1" in observer.history[100], observer.validity


@pytest.mark.parametrize("change", [clipped, decayed, None], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_shadows_that_take_another_first_step_end(kind, change):
    x, y, x_probe = data(3, 2, 1)
    model = mlp(12, 1)
    optimizer = kind(model.parameters(), lr=0.002)
    if change is not None:
        change(model, optimizer, {})
    observer, pages = fit(model, [ShadowInstrument()], 3, optimizer, x, y, x_probe, every=3)
    assert (tag("shadow_output") in observer.history[3]) == (change is None)
    assert ("first step is" in pages["shadow"][-1][1]) == (change is not None)


class Clips(Training):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)


class ChangesBeforeTheStep(Training):
    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.mul_(0.1)


class ChangesAfterTheBackward(Training):
    def on_after_backward(self):
        if self.global_step >= 3:
            for p in self.parameters():
                p.grad.add_(0.01)


class DecaysInTheStep(Training):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(0.999)


class Projects(Training):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.5, 0.5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Clips, STEP),
        (ChangesBeforeTheStep, STEP),
        (ChangesAfterTheBackward, GRADIENT),
        (DecaysInTheStep, STEP),
        (Projects, STEP),
        (Training, None),
    ],
)
def test_what_a_lightning_module_changes_is_seen(kind, reason):
    x, y, x_probe = data(3, 2, 1)
    module = kind(mlp(12, 1), lambda parameters: torch.optim.SGD(parameters, lr=0.05))
    monitor = EFTMonitor(
        x_probe, instruments=[InstanceInstrument(seconds=60.0)], every=2, budget=None, on_error="raise"
    )
    trainer = pl.Trainer(
        max_epochs=8,
        callbacks=[monitor],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True))
    if reason is None:
        assert "eft-theory/instance_output_error/order_1" in monitor.history[8], monitor.validity
    else:
        assert monitor.validity.flag == "invalid" and reason in monitor.validity.reason


def skipping(instruments, model, optimizer, steps, how, counted=True, resume_at=None):
    """A training that takes no step where ``how`` says so; returns the observer and {counted step: steps taken}."""
    x, y, x_probe = data(3, 2, 1)
    options = {"instruments": instruments, "budget": None, "every": 1, "on_error": "raise"}
    observer = Observer(model, x_probe, optimizer, **options)
    observer.begin()
    scaler = torch.amp.GradScaler("cpu", enabled=how == "scaler")
    loops, taken = 0, {0: 0}
    while (step := max(taken)) < steps:
        if step == resume_at:
            other = Observer(model, x_probe, optimizer, **options)
            other.load_state_dict(observer.state_dict())
            other.begin(step)
            observer, resume_at = other, None
        observer.observe_batch((x, y))
        loss = torch.nn.functional.mse_loss(model(x), y)
        observer.observe_loss(loss)
        optimizer.zero_grad()
        skips = loops in (0, 3, 4)
        if not (how == "no gradients" and skips):
            scaler.scale(loss).backward()
        if how == "scaler":
            if skips:  # as an overflow does
                model[0].weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
        before = model[0].weight.clone()
        observer.before_step()
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(before, model[0].weight)
        loops += 1
        if moved or counted:
            taken[step + 1] = taken[step] + moved
            observer.measure(step + 1)
    observer.finish()
    return observer, taken


@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
@pytest.mark.parametrize("how", ["no gradients", "scaler"])
@pytest.mark.parametrize(
    ("counted", "resume_at"),
    [(True, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, 4), (False, None)))],
)
def test_steps_that_are_skipped_are_none_of_the_forecasts(how, counted, resume_at, momentum):
    def run(how, **options):
        model = mlp(48, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=momentum)
        return skipping([InstanceInstrument(seconds=60.0)], model, optimizer, 8, how, **options)

    plain, _ = run("")
    assert tag("instance_output", "order_1") in plain.history[8]
    observer, taken = run(how, counted=counted, resume_at=resume_at)
    assert taken[8] == (5 if counted else 8)
    for step, number in taken.items():
        expected = {name: value for name, value in plain.history[number].items() if "overhead" not in name}
        seen = {name: observer.history[step][name] for name in expected}
        assert seen == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("how", ["no gradients", "scaler"])
def test_shadows_take_no_step_that_the_network_does_not_take(how):
    """Where they cannot know before, they end in words."""
    model, shadow = mlp(12, 1), ShadowInstrument()
    _, taken = skipping([shadow], model, torch.optim.SGD(model.parameters(), lr=0.02), 8, how)
    if how == "scaler":
        assert shadow.validity.flag == "invalid" and "skipped a step" in shadow.validity.reason
    else:
        assert shadow.validity is None and shadow._taken == taken[8] == 5


def fused(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, fused=True)


@pytest.mark.parametrize("how", ["", "no gradients"])
def test_steps_of_a_fused_optimizer_are_taken_though_no_version_counts_them(how):
    model, other = mlp(48, 1), mlp(48, 1)
    observer, taken = skipping([InstanceInstrument(seconds=60.0)], model, fused(model), 4, how)
    plain, _ = skipping([InstanceInstrument(seconds=60.0)], other, torch.optim.SGD(other.parameters(), lr=0.02), 4, "")
    for step, number in taken.items():
        expected = {name: value for name, value in plain.history[number].items() if "overhead" not in name}
        assert {name: observer.history[step][name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_step_that_a_fused_optimizer_skips_for_a_scaler_ends_the_forecast():
    model = mlp(48, 1)
    observer, _ = skipping([InstanceInstrument(seconds=60.0)], model, fused(model), 6, "scaler")
    assert STEP in observer.validity.reason


def test_shadows_go_on_beside_a_fused_optimizer():
    x, y, x_probe = data(3, 2, 1)
    model = mlp(12, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, fused=True)
    observer, pages = fit(model, [ShadowInstrument()], 3, optimizer, x, y, x_probe)
    assert tag("shadow_output") in observer.history[3], pages["shadow"]
