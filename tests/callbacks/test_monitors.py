"""Monitors: their records, their schedules, and their reaction to failures."""

import contextlib
import csv
import io
import math
import pickle
import sys
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.callbacks.trainings import PROBE, Training, digest, normed_net, run, sgd, simple_mlp
from torch_eft import measure
from torch_eft.callbacks import (
    EFTMonitor,
    MeasurementWarning,
    NTKMonitor,
    RepresentationMonitor,
    TheoryComparison,
    logarithmic,
)
from torch_eft.measure import Probe


class _Keep(pl.Callback):
    """Keeps the weights at every step, before (step 0) and after, and the inputs."""

    def __init__(self):
        self.weights, self.batches = {}, []

    def on_train_batch_start(self, trainer, module, batch, *unused):
        self.batches.append(batch[0].clone())

    def on_train_start(self, trainer, module):
        self.keep(trainer, module)

    def on_train_batch_end(self, trainer, module, *unused):
        self.keep(trainer, module)

    def keep(self, trainer, module):
        self.weights[trainer.global_step] = {name: value.clone() for name, value in module.state_dict().items()}


def replay(weights, net=normed_net, batches=()):
    """A module with these weights; its BatchNorm has the first batches' statistics, with which monitors measure."""
    module = Training(net(), sgd)
    module.load_state_dict(weights)
    if net is normed_net:
        entering = [module.net[0](x).detach() for x in batches[:4]]
        module.net[1].running_mean = torch.stack([h.mean(0) for h in entering]).mean(0)
        module.net[1].running_var = torch.stack([h.var(0) for h in entering]).mean(0)
    return module


def test_values_are_those_of_the_weights_at_that_step():
    keep, ntk, hidden = (
        _Keep(),
        NTKMonitor(PROBE, budget=None, every=4),
        RepresentationMonitor(PROBE, budget=None, every=4, per_layer=True),
    )
    run([keep, ntk, hidden])
    assert list(ntk.history) == list(hidden.history) == [0, 4, 8, 9]
    H_0, K_0 = (f(replay(keep.weights[0], batches=keep.batches), PROBE) for f in (measure.ntk, measure.hidden_kernels))
    for step in (0, 4, 9):
        module = replay(keep.weights[step], batches=keep.batches)
        H, K = measure.ntk(module, PROBE), measure.hidden_kernels(module, PROBE)
        scalars = ntk.history[step]
        assert scalars["eft/ntk_drift/measured"] == pytest.approx(float((H - H_0).norm() / H_0.norm()), abs=1e-6)
        cosine = float((H * H_0).sum() / (H.norm() * H_0.norm()))
        assert scalars["eft/ntk_kernel_distance/measured"] == pytest.approx(1 - cosine, abs=1e-5)
        matrix = measure.as_matrix(H)
        assert scalars["eft/ntk_trace/measured"] == pytest.approx(float(matrix.trace()) / 12, rel=1e-5)
        assert scalars["eft/ntk_top_eigenvalue/measured"] == pytest.approx(
            float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-4
        )
        changes = [float((K[layer] - K_0[layer]).norm() / K_0[layer].norm()) for layer in K]
        assert hidden.history[step]["eft/representation_change/measured"] == pytest.approx(
            sum(changes) / len(changes), abs=1e-6
        )
        assert hidden.history[step]["eft-layers/representation_change/net.2"] == pytest.approx(changes[0], abs=1e-6)
    assert ntk.history[9]["eft/ntk_drift/measured"] > 0.01


def test_schedules():
    by_epoch, by_steps = (
        NTKMonitor(PROBE, budget=None, every="epoch"),
        NTKMonitor(PROBE, budget=None, every=2, name="steps"),
    )
    by_function = NTKMonitor(PROBE, budget=None, every=lambda step: step in (1, 5), name="function")
    run([by_epoch, by_steps, by_function])
    assert list(by_epoch.history) == [0, 3, 6, 9]
    assert list(by_steps.history) == [0, 2, 4, 6, 8, 9]
    assert list(by_function.history) == [0, 1, 5, 9]


def test_with_accumulation_each_optimizer_step_is_measured_once():
    monitor = NTKMonitor(PROBE, budget=None, every=1)
    run([monitor], accumulate_grad_batches=3, batch_size=4)
    assert list(monitor.history) == [0, 1, 2, 3, 4, 5, 6]


def test_learning_rates_of_parameter_groups_weigh_the_kernel():
    def groups(parameters):
        parameters = list(parameters)
        return torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.02}])

    keep, monitor = _Keep(), NTKMonitor(PROBE, budget=None)
    run([keep, monitor], net=simple_mlp, optimizer=groups, epochs=1)
    module = replay(keep.weights[0], simple_mlp)
    names = [name for name, _ in module.named_parameters()]
    H = measure.ntk(module, PROBE, lambdas={name: 1.0 if index < 2 else 0.2 for index, name in enumerate(names)})
    assert monitor.history[0]["eft/ntk_trace/measured"] == pytest.approx(float(measure.ntk_trace(H)), rel=1e-5)


def test_the_kernel_of_a_submodule_and_of_chosen_outputs():
    keep = _Keep()
    monitor = NTKMonitor(PROBE, budget=None, module="net", output_fn=lambda z: z[:, :1], outputs="trace")
    run([keep, monitor], epochs=1)
    H = measure.ntk(replay(keep.weights[0], batches=keep.batches).net, PROBE, output_fn=lambda z: z[:, :1])
    assert monitor.history[0]["eft/ntk_trace/measured"] == pytest.approx(float(measure.ntk_trace(H)), rel=1e-5)


def test_large_kernels_are_averaged_over_outputs():
    from torch_eft.live.instruments.ntk import NTKInstrument

    assert not NTKInstrument().plan(outputs=10, samples=100).ntk_trace
    assert NTKInstrument().plan(outputs=1000, samples=16).ntk_trace
    assert not NTKInstrument("full").plan(outputs=1000, samples=16).ntk_trace


def test_cost_is_counted_logged_and_printed(capsys):
    monitor = EFTMonitor(PROBE, every="epoch", budget=None)
    run([monitor])
    budget, said = monitor.observer.budget, capsys.readouterr().err
    assert monitor.seconds == budget.seconds > budget.start > 0
    assert f"4 measurements, {budget.percent:.1f} % of training time (besides {budget.start:.2f} s at the start" in said
    assert monitor.history[9]["eft/overhead_percent/measured"] > 0


def test_lines_are_their_own_beside_lightnings_bar():
    """Bar and lines share a terminal: here, one stream."""
    from tests.callbacks import trainings

    stream, monitor = io.StringIO(), EFTMonitor(PROBE, preset="light")
    with warnings.catch_warnings(), contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(max_epochs=2, callbacks=[monitor], logger=False, enable_checkpointing=False)
        loader = torch.utils.data.DataLoader(trainings.dataset(), batch_size=8)
        trainer.fit(trainings.Training(simple_mlp(), trainings.plain_sgd), loader)
    shown = stream.getvalue()
    assert "Epoch 1" in shown and shown.count("torch_eft  ") == 3
    for line in shown.split("\n"):
        if "torch_eft  " in line:
            assert line.rpartition("\r")[2].startswith("torch_eft  ")


class _FailingNet(nn.Module):
    """Fails, but only while it is measured (evaluation mode) and only when asked to."""

    fail = False

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        if _FailingNet.fail and not self.training:
            raise RuntimeError("no such luck")
        return self.layer(x)


class _FailFrom(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *unused):
        _FailingNet.fail = trainer.global_step >= self.step


@pytest.fixture(autouse=True)
def _healed():
    yield
    _FailingNet.fail = False


def test_a_failing_measurement_warns_once_and_training_goes_on():
    reference = digest(*run(net=_FailingNet))
    monitor = EFTMonitor(PROBE, budget=None, every=1)
    with pytest.warns(MeasurementWarning, match=r"EFTMonitor could not measure at step 5.*no such luck") as caught:
        trainer, module = run([_FailFrom(5), monitor], net=_FailingNet)
    _FailingNet.fail = False
    assert digest(trainer, module) == reference
    assert sum(isinstance(w.message, MeasurementWarning) for w in caught) == 1
    assert list(monitor.history) == [0, 1, 2, 3, 4]
    assert sorted({step for step, _ in monitor.skipped}) == [5, 6, 7, 8, 9]
    assert "5 measurements, 6 skipped" in monitor.overhead()


def test_on_error_raise_stops_for_debugging():
    with pytest.raises(ValueError, match="no such luck"):
        run([_FailFrom(5), EFTMonitor(PROBE, budget=None, every=1, on_error="raise")], net=_FailingNet)


def test_diverged_weights_are_skipped_in_words():
    monitor = NTKMonitor(PROBE, budget=None, every=1)
    with pytest.warns(MeasurementWarning, match="NaN or infinite"):
        run([monitor], net=simple_mlp, optimizer=lambda p: torch.optim.SGD(p, lr=1e30))
    assert 0 in monitor.history


@pytest.mark.parametrize("monitor_class", [NTKMonitor, RepresentationMonitor, TheoryComparison, EFTMonitor])
@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (torch.randn(4, 7), r"probe: \(4, 7\) float32 given, which the forward of Training .* rejects"),
        (torch.ones(4, 5, dtype=torch.long), r"probe: \(4, 5\) int64 given, which the forward"),
    ],
)
def test_a_probe_that_does_not_fit_stops_before_training(monitor_class, probe, message):
    with pytest.raises(ValueError, match=message):
        run([monitor_class(probe)])


def test_a_float64_probe_is_simply_converted():
    monitor = NTKMonitor(PROBE.double(), budget=None)
    run([monitor], epochs=1)
    assert not monitor.skipped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(probe=torch.ones(0, 5)), r"probe: 0 samples given"),
        (dict(every=0), r"every: 0 given; give 'auto', 'epoch', a positive number"),
        (dict(every="step"), r"every: 'step' given"),
        (dict(on_error="ignore"), r"on_error: 'ignore' given; give one of 'warn', 'raise'"),
    ],
)
def test_unusable_arguments_stop_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        EFTMonitor(**{"probe": PROBE} | arguments)


def test_unknown_names_and_outputs_stop_before_training():
    with pytest.raises(ValueError, match=r"module: 'body' is no submodule; the top level has net"):
        run([NTKMonitor(PROBE, budget=None, module="body")])
    with pytest.raises(ValueError, match=r"outputs: 'some' given"):
        NTKMonitor(PROBE, budget=None, outputs="some")
    with pytest.raises(ValueError, match=r"output_fn: the output for 4 samples is a tensor \(4,\)"):
        run([NTKMonitor(PROBE, budget=None, output_fn=lambda z: z[:, 0])])


def test_misnamed_layers_stop_before_training():
    with pytest.raises(ValueError, match=r"layers: 'nope' given; give one of 'net', 'net.0'"):
        run([RepresentationMonitor(PROBE, budget=None, layers=["nope"])])


def test_a_kernel_too_large_is_left_out_in_words_and_the_rest_is_measured():
    monitor = EFTMonitor(PROBE, budget=None, on_error="raise", memory=100)
    with pytest.warns(MeasurementWarning, match=r"will not measure the NTK: memory: .* 4 samples and 3 outputs"):
        run([monitor], net=simple_mlp)
    assert "eft/representation_change/measured" in monitor.history[9]
    assert "eft/ntk_drift/measured" not in monitor.history[9]


def test_a_model_built_late_is_checked_and_measured():
    class Late(Training):
        def __init__(self):
            pl.LightningModule.__init__(self)
            self.loss, self.make_optimizer, self.net = nn.functional.mse_loss, sgd, None

        def configure_model(self):
            if self.net is None:
                self.net = simple_mlp()

    from tests.callbacks import trainings

    monitor = NTKMonitor(PROBE, budget=None, every="epoch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[monitor], logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        trainer.fit(Late(), torch.utils.data.DataLoader(trainings.dataset(), batch_size=8))
    assert list(monitor.history) == [0, 3]


def test_state_loads_as_plain_types_and_resumes_from_theta_0(tmp_path):
    whole = EFTMonitor(PROBE, budget=None, every=1)
    run([whole], epochs=4)
    first = EFTMonitor(PROBE, budget=None, every=1)
    trainer, _ = run([first], epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)  # tensors and builtins only

    second = EFTMonitor(PROBE, budget=None, every=1)
    pl.seed_everything(0, verbose=False)
    module = Training(normed_net(), sgd)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = pl.Trainer(
            max_epochs=4, callbacks=[second], logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        from tests.callbacks import trainings

        loader = torch.utils.data.DataLoader(trainings.dataset(), batch_size=8, shuffle=True)
        resumed.fit(module, loader, ckpt_path=tmp_path / "half.ckpt")
    assert list(second.history) == list(range(13))
    for step in range(7):
        assert second.history[step] == first.history[step]
    # Other batches after the resume (shuffling), but the drift still counts from the first theta_0.
    assert second.history[12]["eft/ntk_drift/measured"] > second.history[1]["eft/ntk_drift/measured"]
    assert second.origin == "initialization"


def test_a_callback_used_again_starts_afresh():
    monitor = NTKMonitor(PROBE, budget=None, every="epoch")
    run([monitor], epochs=2)
    run([monitor], net=simple_mlp, epochs=1)
    assert list(monitor.history) == [0, 3]
    assert monitor.history[0]["eft/ntk_drift/measured"] == 0


def test_a_second_fit_of_the_same_trainer_goes_on():
    monitor = NTKMonitor(PROBE, budget=None, every="epoch")
    trainer, module = run([monitor], epochs=2)
    trainer.fit_loop.max_epochs = 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.callbacks import trainings

        trainer.fit(module, torch.utils.data.DataLoader(trainings.dataset(), batch_size=8))
    assert list(monitor.history) == [0, 3, 6, 9]
    assert all(math.isfinite(value) for value in monitor.history[9].values())


def test_layers_unfrozen_during_training_join_the_kernel():
    class Unfreeze(pl.Callback):
        def on_train_start(self, trainer, module):
            module.net[0].requires_grad_(False)

        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                module.net[0].requires_grad_(True)

    monitor = NTKMonitor(PROBE, budget=None, every="epoch")
    run([Unfreeze(), monitor], net=simple_mlp, epochs=2)
    assert not monitor.skipped
    assert list(monitor.history) == [0, 3, 6]


def test_fast_dev_run_and_zero_steps_are_survived(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(
        [EFTMonitor(PROBE, budget=None)], fast_dev_run=True, logger=True
    )  # Lightning puts a dummy in the logger's place
    assert not list(tmp_path.rglob("*.jsonl"))
    run([EFTMonitor(PROBE, budget=None)], max_steps=0)
    run([EFTMonitor(PROBE, budget=None)], epochs=0)


def test_monitors_travel_to_other_processes():
    monitor = pickle.loads(pickle.dumps(EFTMonitor(PROBE, preset="light", every=logarithmic(3), budget=None)))
    run([monitor])
    assert list(monitor.history) == [0, 1, 2, 5, 9]


def test_without_matplotlib_there_are_scalars_and_pages_but_no_figures(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    logger = TensorBoardLogger(tmp_path)
    monitor = EFTMonitor(PROBE, budget=None, on_error="raise")
    run([monitor], logger=logger)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert "eft/ntk_drift/measured" in tags["scalars"]
    assert "eft/diagnosis/text_summary" in tags["tensors"]
    assert tags["images"] == []


def test_other_loggers_get_the_scalars(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    run([NTKMonitor(PROBE, budget=None, every="epoch", on_error="raise")], logger=logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    drift, trace = "eft/ntk_drift/measured", "eft/ntk_trace/measured"
    measured = {int(row["step"]): float(row[drift]) for row in rows if row[drift]}
    assert [int(row["step"]) for row in rows if row[trace]] == [0, 3, 0, 6, 9]  # theta_0 anew, with all batches
    assert list(measured) == [0, 3, 6, 9]
    assert measured[0] == 0 < measured[9]


def test_a_logger_that_raises_costs_the_point_and_nothing_else():
    from lightning.pytorch.loggers import Logger

    class Broken(Logger):
        name, version = "broken", 0

        def log_metrics(self, metrics, step=None):
            if any(name.startswith("eft/") for name in metrics):
                raise OSError("disk full")

        def log_hyperparams(self, *unused):
            pass

    reference = digest(*run())
    with pytest.warns(MeasurementWarning, match="disk full"):
        assert digest(*run([NTKMonitor(PROBE, budget=None)], logger=Broken())) == reference


def test_a_probe_of_several_arguments_is_kept_as_given():
    assert Probe((torch.ones(2, 3), torch.ones(2, 4))).size == 2
    assert Probe({"a": torch.ones(5, 3)}).size == 5


def test_a_monitor_of_one_concern_refuses_what_would_have_no_effect():
    x = torch.zeros(4, 3)
    (theory,) = TheoryComparison(x, forecast_seconds=0.25).observer.instruments
    assert theory.seconds == 0.25
    for monitor, name, value in (
        (NTKMonitor, "preset", "full"),
        (NTKMonitor, "forecast_seconds", 1.0),
        (RepresentationMonitor, "ensemble", None),
        (TheoryComparison, "instruments", ["ntk"]),
    ):
        with pytest.raises(TypeError, match=f"{name} given, which a monitor of one concern does not have"):
            monitor(x, **{name: value})
