"""Faults, one at a time: the training ends as without the callback, one warning says what was skipped, nothing is lost.

Each case measures at every step (0 to 9) and says at which steps the numbers must be there in spite of the fault.
"""

import os
import signal
import time
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from tests.callbacks.trainings import PROBE, plain_sgd, simple_mlp
from tests.reliability.runs import left_behind, train
from torch_eft.callbacks import EFTMonitor, MeasurementWarning
from torch_eft.live.config.schedule import Curve
from torch_eft.live.record.sinks import JSONLSink, TensorBoardSink
from torch_eft.live.run.measurements import Measurements
from torch_eft.measure.network import network as observing
from torch_eft.tensorboard.run_info import read_jsonl

ALL = list(range(10))


def light(**options):
    return EFTMonitor(PROBE, **{"preset": "light", "budget": None, "every": 1} | options)


def warned(caught):
    return [str(warning.message) for warning in caught if isinstance(warning.message, MeasurementWarning)]


def outcome(monitor, **options):
    """The hash of a training with a monitor, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        left = left_behind(*train([monitor], **options))
    return left, warned(caught)


def failing_from(monkeypatch, step, failure):
    """Measurements at ``step`` and later fail, whatever else they take snapshots of."""
    genuine = Measurements._taken

    def broken(measurements, *arguments):
        if measurements.progress.step >= step:
            failure()
        return genuine(measurements, *arguments)

    monkeypatch.setattr(Measurements, "_taken", broken)


def raising(error):
    def failure():
        raise error

    return failure


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such luck"),
        RuntimeError("CUDA error: device-side assert triggered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError("no memory"),
        AssertionError("never to happen"),
        RecursionError("maximum recursion depth exceeded"),
        NotImplementedError("no derivative of this"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_in_a_measurement(monkeypatch, error):
    reference = left_behind(*train())
    failing_from(monkeypatch, 4, raising(error))
    monitor = light()
    left, said = outcome(monitor)
    assert left == reference
    assert len(said) == 1 and f"could not measure at step 4 and goes on without ({type(error).__name__}" in said[0]
    assert list(monitor.history) == ALL[:4]
    assert [step for step, _ in monitor.skipped] == ALL[4:]


def test_an_exception_that_passes(monkeypatch):
    reference = left_behind(*train())
    genuine = Measurements._taken

    def sometimes(measurements, *arguments):
        if measurements.progress.step == 4:
            raise OSError("only once")
        return genuine(measurements, *arguments)

    monkeypatch.setattr(Measurements, "_taken", sometimes)
    monitor = light()
    left, said = outcome(monitor)
    assert left == reference and len(said) == 1
    assert list(monitor.history) == [step for step in ALL if step != 4]


def test_a_failing_start_leaves_the_later_measurements(monkeypatch):
    genuine, calls = observing.take_snapshot, [0]

    def first_fails(*arguments, **options):
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("not yet")
        return genuine(*arguments, **options)

    monkeypatch.setattr(observing, "take_snapshot", first_fails)
    monitor = light()
    left, said = outcome(monitor)
    assert left == left_behind(*train()) and len(said) == 1
    assert list(monitor.history) == ALL[1:]


def test_weights_that_are_not_finite():
    options = dict(net=simple_mlp, optimizer=lambda p: torch.optim.SGD(p, lr=1e30))
    reference = left_behind(*train(**options))
    monitor = light()
    left, said = outcome(monitor, **options)
    assert left == reference
    assert len(said) == 1 and "NaN or infinite" in said[0]
    assert 0 in monitor.history


def test_a_slow_measurement_is_left_out(monkeypatch):
    reference = left_behind(*train(epochs=6))
    failing_from(monkeypatch, 1, lambda: time.sleep(0.1))
    monitor = light(budget=0.05)
    left, said = outcome(monitor, epochs=6)
    assert left == reference and not said
    assert list(monitor.history) == [0, *Curve(0, 18).points(18)]  # what draws a curve is made at any budget
    assert "left out: 6 due measurements; budget=None brings them" in monitor.overhead()


class Raising(Logger):
    name, version = "raising", 0

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("eft") for name in metrics):
            raise ConnectionError("the server is gone")

    def log_hyperparams(self, *unused):
        pass


def test_a_raising_logger(tmp_path):
    reference = left_behind(*train())
    monitor = light()
    left, said = outcome(monitor, logger=[CSVLogger(tmp_path), Raising()])
    assert left == reference
    assert len(said) == 1 and "the server is gone" in said[0]
    assert list(monitor.history) == ALL
    assert list(read_jsonl(next(tmp_path.rglob("eft.jsonl"))).measurements) == ALL


class Full:
    """A file on a full disk."""

    def __init__(self, file, lines):
        self.file, self.lines = file, lines

    def write(self, text):
        self.lines -= 1
        if self.lines < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(text)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk(tmp_path, monkeypatch):
    genuine = JSONLSink._open
    monkeypatch.setattr(JSONLSink, "_open", lambda sink: Full(genuine(sink), 6))
    reference = left_behind(*train())
    monitor = light()
    left, said = outcome(monitor, logger=CSVLogger(tmp_path))
    assert left == reference
    assert len(said) == 1 and "cannot be written (No space left on device)" in said[0]
    assert list(monitor.history) == ALL
    kept = read_jsonl(next(tmp_path.rglob("eft.jsonl"))).measurements
    # Theta_0 is corrected when there are batches for BatchNorm's statistics.
    assert len(kept) > 1 and all(kept[step] == monitor.history[step] for step in kept if step > 0)


def test_tensorboard_on_a_full_disk(tmp_path, monkeypatch):
    reference = left_behind(*train())
    monkeypatch.setattr(TensorBoardSink, "flush", lambda sink: raising(OSError(28, "No space left on device"))())
    monitor = light()
    left, said = outcome(monitor, logger=TensorBoardLogger(tmp_path))
    assert left == reference and len(said) == 1
    assert list(monitor.history) == ALL


def test_an_unwritable_directory(tmp_path):
    class Elsewhere(Raising):
        log_dir = str(tmp_path / "blocked" / "logs")

        def log_metrics(self, metrics, step=None):
            pass

    (tmp_path / "blocked").write_text("a file, no directory")
    monitor = light()
    left, said = outcome(monitor, logger=Elsewhere())
    assert left == left_behind(*train())
    assert len(said) == 1 and "cannot be written" in said[0]
    assert list(monitor.history) == ALL


def saved(tmp_path, monitor):
    trainer, _ = train([monitor], epochs=2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    return path


def resumed_with(path, monitor, change):
    """Both trainings from one checkpoint whose callback state was changed, without the callback and with it."""
    stored = torch.load(path, weights_only=True)
    (key,) = stored["callbacks"]
    changed = change(stored["callbacks"][key])
    stored["callbacks"] = {} if changed is None else {key: changed}
    torch.save(stored, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = left_behind(*train(ckpt_path=path))
    return (reference, *outcome(monitor, ckpt_path=path))


def test_a_missing_state(tmp_path):
    monitor = light()
    reference, left, _ = resumed_with(saved(tmp_path, light()), monitor, lambda state: None)
    assert left == reference
    assert list(monitor.history) == [6, 7, 8, 9]
    assert monitor.origin == "resumed at step 6 without a recorded theta_0"


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"history": "gone"},
        lambda state: state | {"history": None},
        lambda state: state | {"parts": []},
        lambda state: state | {"reference": {"output": None}},
        lambda state: {name: value for name, value in state.items() if name != "lambdas"},
    ],
    ids=["nonsense", "no history", "parts", "reference", "a key is missing"],
)
def test_a_corrupt_state(tmp_path, change):
    monitor = light()
    reference, left, said = resumed_with(saved(tmp_path, light()), monitor, change)
    assert left == reference
    assert len(said) == 1 and "state" in said[0]
    assert list(monitor.history) == [6, 7, 8, 9]


def test_a_changed_probe(tmp_path):
    path = saved(tmp_path, light())
    monitor = EFTMonitor(torch.randn(7, 5), preset="light", budget=None, every=1)
    reference, left, said = resumed_with(path, monitor, lambda state: state)
    assert left == reference
    assert len(said) == 1 and "probe" in said[0]
    assert list(monitor.history) == [6, 7, 8, 9]


def test_a_renamed_parameter(tmp_path):
    def change(state):
        return state | {"parameters": [name.replace("net.0", "body.0") for name in state["parameters"]]}

    monitor = light()
    reference, left, _ = resumed_with(saved(tmp_path, light()), monitor, change)
    assert left == reference
    assert list(monitor.history) == [6, 7, 8, 9]
    assert monitor.origin == "resumed at step 6 without a recorded theta_0"


class Interrupt(pl.Callback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, module, *unused):
        if trainer.global_step == self.step:
            self.action()


def stopped(tmp_path, action, callbacks):
    interrupt = Interrupt(5, action)
    try:
        trainer, module = train([*callbacks, interrupt], logger=CSVLogger(tmp_path))
    except BaseException as error:
        return type(error).__name__
    return left_behind(trainer, module)


@pytest.mark.parametrize(
    "action",
    [raising(KeyboardInterrupt()), raising(RuntimeError("the training's own")), lambda: os.kill(os.getpid(), 15)],
    ids=["KeyboardInterrupt", "exception in the training", "SIGTERM"],
)
def test_a_training_that_is_stopped(tmp_path, action):
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *unused: raising(SystemExit(143))())
    try:
        reference = stopped(tmp_path / "without", action, [])
        monitor = light()
        assert stopped(tmp_path / "with", action, [monitor]) == reference
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert list(monitor.history) == ALL[:6]
    assert read_jsonl(next(tmp_path.rglob("eft.jsonl"))).measurements == monitor.history


def test_an_interrupt_during_a_measurement_is_not_swallowed(monkeypatch):
    failing_from(monkeypatch, 4, raising(KeyboardInterrupt()))
    monitor = light()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train([monitor])
    assert list(monitor.history) == ALL[:4]


def test_fit_twice():
    trainer, module = train()
    trainer.fit_loop.max_epochs = 4
    monitor = light()
    attached, same = train([monitor])
    attached.fit_loop.max_epochs = 4
    for each, net in ((trainer, module), (attached, same)):
        pl.seed_everything(1, verbose=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.fit(net, each.train_dataloader)
    assert left_behind(attached, same) == left_behind(trainer, module)
    assert list(monitor.history) == list(range(13))


def test_a_new_model():
    monitor = light()
    train([monitor])
    left, said = outcome(monitor, net=simple_mlp, optimizer=plain_sgd)
    assert left == left_behind(*train(net=simple_mlp, optimizer=plain_sgd)) and not said
    assert list(monitor.history) == ALL and monitor.history[0]["eft/ntk_drift/measured"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"max_steps": 0},
        {"max_epochs": 0},
        {"limit_train_batches": 0},
        {"max_time": {"seconds": 0}},
    ],
    ids=str,
)
def test_hardly_any_training(options):
    left, said = outcome(light(), **options)
    assert left == left_behind(*train(**options)) and not said


@pytest.mark.parametrize("jump", [-3600.0, 3600.0], ids=["back", "ahead"])
def test_a_clock_that_jumps(jump):
    reference = left_behind(*train())
    monitor, reads = light(budget=0.05), [0]

    def clock():
        reads[0] += 1
        return time.perf_counter() + (jump if reads[0] > 20 else 0.0)

    monitor.observer.budget.clock = clock
    left, said = outcome(monitor)
    assert left == reference and not said
    assert {0, 9} <= set(monitor.history)


@pytest.mark.slow
def test_a_worker_that_dies(tmp_path):
    class Dying(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    monitor = light()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        train([monitor, Dying()], workers=1, logger=CSVLogger(tmp_path))
    assert read_jsonl(next(tmp_path.rglob("eft.jsonl"))).measurements == monitor.history
    assert list(monitor.history) == ALL[:4]
