"""The comparison beside a running training: right numbers where it applies, words where it does not."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.callbacks.trainings import PROBE, adamw, dataset, normed_net, plain_sgd, run, simple_mlp
from torch_eft import measure
from torch_eft.callbacks import EFTMonitor
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument
from torch_eft.live.instruments.ntk import NTKInstrument
from torch_eft.live.instruments.representation import RepresentationInstrument
from torch_eft.theory import MLPEnsemble, initial_statistics, predict_training

FULL = {"net": simple_mlp, "optimizer": plain_sgd, "batch_size": 24, "epochs": 6}


def beside(every="epoch", ensemble=None, on_error="warn"):
    """Order 0 of the ensemble's theory beside what is measured: what is tested here is the road, not the numbers."""
    instruments = [NTKInstrument(), RepresentationInstrument(), TheoryInstrument(ensemble, order=0)]
    return EFTMonitor(PROBE, instruments=instruments, every=every, budget=None, on_error=on_error)


def test_theory_is_that_of_the_ensemble_read_off_the_network():
    """The logged numbers against predict_training, called by hand."""
    monitor = beside(every=2, on_error="raise")
    run([monitor], **FULL)
    assert monitor.validity.flag in ("valid", "caution")
    pl.seed_everything(0, verbose=False)
    ensemble = measure.read_ensemble(simple_mlp(), x=PROBE)
    x, y = dataset().tensors
    prediction = predict_training(ensemble, x, y, PROBE, learning_rate=0.05, steps=6, order=0)
    first = prediction.output_mean[1] - prediction.output_mean[0]
    # The direction of the first step, up to rounding in the difference of two means.
    direction = first / first.norm()
    assert list(monitor.history) == [0, 2, 4, 6]
    for step, scalars in monitor.history.items():
        mean, covariance = prediction.output_mean[step], prediction.output_covariance[step, ..., 0, 0]
        sigma = math.sqrt(float(torch.einsum("ai,ab,bi->", direction, covariance, direction)))
        assert scalars["eft-theory/output_projection/order_0"] == pytest.approx(
            float((direction * mean).sum()), abs=1e-6
        )
        upper = scalars["eft-theory/output_projection/plus_sigma"]
        assert upper - scalars["eft-theory/output_projection/order_0"] == pytest.approx(sigma, rel=1e-5)
        trace = float(prediction.ntk_mean[0].diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).mean())
        assert scalars["eft-theory/ntk_trace/order_0"] == pytest.approx(trace, rel=1e-6)
        assert scalars["eft-theory/ntk_drift/order_0"] == 0
        assert scalars["eft-theory/representation_change/order_0"] == 0


def test_a_wide_network_follows_its_forecast():
    """Width 1024 at unit scale: outputs within the band, by the chi squared of 12 correlated deviates."""

    def wide():
        net = simple_mlp_of(1024)
        for layer in net[::2]:
            nn.init.normal_(layer.weight, std=math.sqrt(1.5 / layer.in_features))
            nn.init.zeros_(layer.bias)
        return net

    def slow_sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.01)

    monitor = beside(every=10, on_error="raise")
    run([monitor], net=wide, optimizer=slow_sgd, batch_size=24, epochs=60)
    assert monitor.validity.flag == "valid"
    last = monitor.history[60]
    moved = abs(
        last["eft-theory/output_projection/order_0"] - monitor.history[0]["eft-theory/output_projection/order_0"]
    )
    for quantity in ("output_projection", "output_chi_squared"):
        theory = last[f"eft-theory/{quantity}/order_0"]
        sigma = last[f"eft-theory/{quantity}/plus_sigma"] - theory
        assert abs(last[f"eft/{quantity}/measured"] - theory) < 4 * sigma
        if quantity == "output_projection":
            assert moved > 0.5 * sigma  # the training moved what is compared
    assert last["eft/ntk_drift/measured"] < 0.1


def simple_mlp_of(width):
    from tests.oracles.models import mlp

    return mlp((5, width, width, 3))


def clipped(**options):
    return FULL | options


OUTSIDE = {
    "mini-batches": (FULL | {"batch_size": 8}, r"mini-batches \(3 per epoch\)"),
    "Adam": (FULL | {"optimizer": adamw}, r"AdamW: forecasts are derived for gradient descent"),
    "clipping": (FULL | {"gradient_clip_val": 0.1}, r"gradient clipping at 0.1"),
    "accumulation": (FULL | {"accumulate_grad_batches": 2}, r"gradient accumulation over 2 batches"),
    "no MLP": (FULL | {"net": normed_net}, r"not an MLP: .*BatchNorm1d"),
    "another loss": (FULL | {"loss": F.l1_loss}, r"no usual multiple of the squared error"),
    "too large a learning rate": (
        FULL | {"optimizer": lambda p: torch.optim.SGD(p, lr=30.0)},
        r"learning_rate: 30 given, beyond the linear stability bound",
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_the_theory_it_says_so_and_measures_on(name):
    options, message = OUTSIDE[name]
    monitor = beside(on_error="raise")
    run([monitor], **options)
    assert monitor.validity.flag == "invalid"
    import re

    assert re.search(message, monitor.validity.reason), monitor.validity.reason
    assert len(monitor.history) > 2
    for scalars in monitor.history.values():
        assert "eft/ntk_top_eigenvalue/measured" in scalars
        assert not any(tag.startswith("eft-theory") for tag in scalars)


@pytest.mark.parametrize(("batches", "reason"), [(1, None), (float("inf"), None), (3, "mini-batches (3 per epoch)")])
def test_batches_that_nobody_counted_show_themselves_what_they_are(batches, reason):
    from types import SimpleNamespace

    from torch_eft.callbacks.monitor import obstacle

    one = {"world_size": 1, "accumulate_grad_batches": 1, "gradient_clip_val": None}
    found = obstacle(SimpleNamespace(num_training_batches=batches, **one), SimpleNamespace(automatic_optimization=True))
    assert (found and found.reason.partition(":")[0]) == reason


def test_a_failing_theory_does_not_cost_theta_0(monkeypatch):
    from torch_eft.live import MeasurementWarning
    from torch_eft.live.instruments.forecasts import theory

    def broken(*unused):
        raise RuntimeError("no diagnosis today")

    monkeypatch.setattr(theory, "diagnose", broken)
    monitor = beside()
    with pytest.warns(MeasurementWarning, match="no diagnosis today"):
        run([monitor], **FULL)
    assert list(monitor.history) == list(range(7))
    assert monitor.history[0]["eft/ntk_drift/measured"] == 0
    assert "no diagnosis today" in monitor.validity.reason


def test_a_learning_rate_schedule_ends_the_comparison_when_it_acts():
    class Scheduled(pl.Callback):
        def on_train_batch_end(self, trainer, *unused):
            if trainer.global_step == 3:
                trainer.optimizers[0].param_groups[0]["lr"] = 0.01

    monitor = beside(every=1, on_error="raise")
    run([monitor, Scheduled()], **FULL)
    assert "learning rate changed at step 3" in monitor.validity.reason
    with_theory = [step for step, scalars in monitor.history.items() if "eft-theory/ntk_trace/order_0" in scalars]
    assert with_theory == [0, 1, 2, 3]
    assert list(monitor.history) == list(range(7))


def test_a_batch_with_other_samples_ends_the_comparison():
    """limit_train_batches=1 with shuffling looks like one batch an epoch, but each holds other samples."""
    monitor = beside(every=1, on_error="raise")
    run([monitor], **FULL | {"batch_size": 8, "limit_train_batches": 1})
    assert "other samples than the first" in monitor.validity.reason
    assert not any("eft-theory/ntk_trace/order_0" in scalars for scalars in monitor.history.values())  # never begun


def test_shuffling_the_full_batch_is_still_full_batch():
    monitor = beside(every=1, on_error="raise")
    run([monitor], **FULL)  # shuffle=True
    assert "eft-theory/ntk_trace/order_0" in monitor.history[6]


def test_a_known_ensemble_can_be_given():
    monitor = beside(ensemble=MLPEnsemble([5, 16, 16, 3], "tanh", C_b=0.03, C_W=1 / 3), on_error="raise")
    run([monitor], **FULL)
    assert monitor.validity.flag == "valid"
    # Its lambda is the optimizer's, one torch learning rate for all, not the default of MLPEnsemble.
    with_lambda = MLPEnsemble([5, 16, 16, 3], "tanh", C_b=0.03, C_W=1 / 3, lambda_W=[5.0, 16.0, 16.0])
    Theta = initial_statistics(with_lambda, PROBE, statistics=("K", "Theta"))[-1].Theta
    assert monitor.history[6]["eft-theory/ntk_trace/order_0"] == pytest.approx(float(Theta.diagonal().mean()))


def test_a_given_ensemble_of_other_widths_stops_before_training():
    with pytest.raises(ValueError, match=r"ensemble: widths \(5, 16, 3\) given, the network has \(5, 16, 16, 3\)"):
        run([beside(ensemble=MLPEnsemble([5, 16, 3], "tanh"))], **FULL)


def test_a_deep_narrow_network_is_flagged_before_training():
    def deep():
        from tests.oracles.models import mlp

        return mlp((5, *[4] * 12, 3), nn.ReLU)

    monitor = beside(on_error="raise")
    run([monitor], **FULL | {"net": deep})
    assert monitor.validity.flag == "invalid"
    assert "too deep for 1/n" in monitor.validity.reason
