"""Infinite width beside a running full-batch training of a convolutional network; where there is none, why."""

import re

import pytest
import torch
from torch import nn

from tests.live.instruments.loop import fit
from torch_eft import Training, theory
from torch_eft.forecast.comparison.architecture import ArchitectureComparison
from torch_eft.forecast.comparison.work import Allowance
from torch_eft.live.instruments.forecasts.theory import TheoryInstrument


def network(n=48, pool=nn.AvgPool1d, seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv1d(1, n, 3, padding=1), nn.ReLU(), pool(2), nn.Conv1d(n, n, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(n, 1))


def data():
    generator = torch.Generator().manual_seed(3)
    x, x_probe = torch.randn(4, 1, 6, generator=generator), torch.randn(3, 1, 6, generator=generator)
    return x, 0.3 * torch.tensor([[1.0], [-1], [1], [-1]]), x_probe


def beside(model, seconds=10.0, steps=12, lr=0.02):
    instrument = TheoryInstrument(seconds=seconds)
    observer, pages = fit(model, [instrument], steps, torch.optim.SGD(model.parameters(), lr=lr), *data(), every=4)
    return instrument, observer, pages


def test_a_convolutional_network_trains_inside_the_band_of_infinite_width():
    instrument, observer, pages = beside(network())
    assert instrument.validity.flag == "valid"
    assert (
        "infinite width" in pages["validity"][-1][1]
        and "Predicted for Architecture(3 weights" in pages["validity"][-1][1]
    )
    for step in (0, 4, 12):
        scalars = observer.history[step]
        for quantity in ("output_projection", "output_chi_squared"):
            order_0, plus = (scalars[f"eft-theory/{quantity}/{name}"] for name in ("order_0", "plus_sigma"))
            assert abs(scalars[f"eft/{quantity}/measured"] - order_0) < 4 * (plus - order_0), (step, quantity)
        trace = scalars["eft-theory/ntk_trace/order_0"]
        assert abs(scalars["eft/ntk_trace/measured"] / trace - 1) < 0.6  # four times 0.15, the spread at 48 channels
        assert scalars["eft-theory/ntk_drift/order_0"] == 0
    first, last = (observer.history[step]["eft-theory/output_projection/order_0"] for step in (0, 12))
    assert first == 0 < last


def test_a_checkpoint_keeps_the_forecast():
    instrument, _, _ = beside(network(), steps=4)
    state = instrument.state()
    assert "ensemble" not in state
    x, y, x_probe = data()
    training = Training(learning_rate=0.01, steps=4)
    earlier = state["comparison"]
    again = ArchitectureComparison(None, x, y, x_probe, training, allowance=Allowance(0.0), earlier=earlier)
    architecture = theory.read_architecture(network(), x)
    anew = ArchitectureComparison(architecture, x, y, x_probe, training, allowance=Allowance(10.0))
    H = torch.eye(3)
    for step in (0, 3):
        pairs = zip(*(each.compare(step, torch.ones(3, 1), H, H).values() for each in (again, anew)), strict=True)
        for restored, made in pairs:
            assert restored.order_0 == pytest.approx(made.order_0, rel=1e-9, abs=1e-12)
            assert restored.sigma == (None if made.sigma is None else pytest.approx(made.sigma))
    assert again.validity.reason == anew.validity.reason


@pytest.mark.parametrize(
    ("model", "seconds", "reason"),
    [
        (lambda: network(pool=nn.MaxPool1d), 10.0, "nor is it a graph of layers that is read: .*max pooling"),
        (network, 0.0, "K and Theta at infinite width of 7 points take .*forecast_seconds=1 brings it"),
        (
            lambda: nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Tanh(), nn.Flatten(), nn.Linear(32, 1)),
            0.0,
            "no closed",
        ),
    ],
)
def test_what_has_no_forecast_says_why(model, seconds, reason):
    instrument, observer, _ = beside(model(), seconds, steps=4)
    assert instrument.validity.flag == "invalid"
    assert re.search(reason, instrument.validity.reason), instrument.validity.reason
    assert not any(tag.startswith("eft-theory") for tag in observer.history[4])
