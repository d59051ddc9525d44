"""A monitor on random directions of the outputs: its numbers have error bars, and everything else goes on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.live.instruments.loop import Pages
from torch_eft import measure
from torch_eft.callbacks import EFTMonitor, NTKMonitor, TheoryComparison
from torch_eft.live import Observer
from torch_eft.live.instruments.trained_beside.replay import ReplayInstrument
from torch_eft.measure.kernels.random_outputs import estimates
from torch_eft.results.tags import ERROR, tag

QUANTITIES = ("ntk_drift", "ntk_kernel_distance", "ntk_trace")


def trained(outputs, classes=40, observed=True, steps=6, norm=nn.LayerNorm, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.GELU(), norm(24), nn.Linear(24, classes))
    x, y = torch.randn(32, 6), torch.randint(0, classes, (32,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pages, observer, kernels = Pages(), None, {}
    if observed:
        observer = Observer(
            model, x[:5], optimizer, outputs=outputs, budget=None, every=3, sinks=[pages], on_error="raise", **options
        )
        observer.begin(total_steps=steps)
    for step in range(1, steps + 1):
        samples = torch.arange(8) + 8 * (step % 4)
        if observed:
            observer.observe_batch((x[samples], y[samples]))
        loss = F.cross_entropy(model(x[samples]), y[samples])
        if observed:
            observer.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        if observed:
            observer.before_step()
        optimizer.step()
        if observed:
            observer.measure(step)
            kernels[step] = observer._run.measurements.latest and observer._run.measurements.latest.ntk
    if observed:
        observer.finish()
    return observer, pages.pages, model, kernels


def test_what_is_logged_carries_its_error_bar():
    observer, pages, model, kernels = trained("probes:16", extra=[ReplayInstrument(steps=2)], seeds=2)
    assert not observer.skipped
    last = observer.history[6]
    found = estimates(kernels[6], observer.reference.snapshot.ntk)
    assert kernels[6].shape == (5, 5, 16, 16)
    for quantity, number in zip(
        QUANTITIES, (found.relative_change, found.kernel_distance, found.ntk_trace), strict=True
    ):
        low, high = (last[tag(quantity, end)] for end in ERROR)
        assert low < last[tag(quantity)] < high and (low, high) == pytest.approx(number.interval(0.68))
    full, *_ = trained("full", extra=[ReplayInstrument(steps=2)], seeds=2)
    for quantity in QUANTITIES:  # truth within 95 %, which is about twice as far
        low, high = (last[tag(quantity, end)] for end in ERROR)
        middle = last[tag(quantity)]
        assert middle * (low / middle) ** 3 < full.history[6][tag(quantity)] < middle * (high / middle) ** 3
    assert "NTK on 16 random output directions, the same at all times" in pages["ntk"][0][1]
    assert tag("ntk_top_eigenvalue") not in last and tag("ntk_top_eigenvalue") in full.history[6]
    seeds = [tag("ntk_drift", series) for series in ("seeds_low", "seeds_high")]
    assert all(last[name] == pytest.approx(full.history[6][name], rel=0.5) for name in seeds)
    replayed = tag("replay_ntk")
    common = [step for step in full.history if replayed in full.history[step] and replayed in observer.history[step]]
    assert common
    for step in common:
        assert observer.history[step][replayed] == pytest.approx(full.history[step][replayed], rel=0.5)
    for series in ("taylor_1", "taylor_2"):  # in one chart with what is estimated
        assert last[tag("ntk_drift", series)] == pytest.approx(full.history[6][tag("ntk_drift", series)], rel=0.3)
    for quantity in ("representation_change", "dntk", "replay_output"):
        assert any(tag(quantity) in scalars for scalars in observer.history.values()), quantity
    alone = trained(None, observed=False)[2]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), alone.state_dict().values(), strict=True))


def test_the_share_of_batch_norm_is_of_the_same_directions():
    observer, *_ = trained("probes:16", norm=nn.BatchNorm1d, steps=3, instruments=["ntk", "batch_norm"])
    full, *_ = trained("full", norm=nn.BatchNorm1d, steps=3, instruments=["ntk", "batch_norm"])
    share = tag("ntk_batch_norm_share")
    assert observer.history[3][share] == pytest.approx(full.history[3][share], rel=0.3)


def test_what_has_no_forecast_says_on_what_it_is_measured():
    observer, *_ = trained("probes:16", steps=1, norm=nn.Identity, instruments=["ntk", "theory"])
    assert "the NTK is measured on 16 random output directions" in observer.validity.reason


def test_few_outputs_are_measured_in_full():
    observer, pages, _, kernels = trained("probes:16", classes=4, steps=1, preset="light")
    assert kernels[1].shape == (5, 5, 4, 4) and "ntk" not in pages
    assert tag("ntk_drift", ERROR[0]) not in observer.history[1]


def test_every_monitor_takes_it():
    x = torch.zeros(4, 3)
    for monitor in (NTKMonitor, EFTMonitor):
        assert monitor(x, outputs="probes:8").observer.instruments[0].outputs == "probes:8"
    with pytest.raises(ValueError, match="or 'probes:16', on random directions of the outputs"):
        NTKMonitor(x, outputs="some")
    with pytest.raises(TypeError, match="outputs given, which a monitor of one concern does not have"):
        TheoryComparison(x, outputs="probes:8")
    with pytest.raises(ValueError, match="an error bar takes 3"):
        Observer(nn.Linear(3, 2), x, outputs="probes:1")


def test_a_run_goes_on_with_its_own_outputs():
    observer, *_ = trained("probes:16", steps=1, preset="light")
    measurement_of = observer.instruments[0]
    other = measure.ntk(nn.Linear(3, 20), torch.zeros(5, 3))
    snapshot = measure.Snapshot(torch.zeros(5, 20), other, {})
    seen = type("Measurement", (), {"snapshot": snapshot, "reference": observer.reference.snapshot})
    with pytest.raises(ValueError, match="go on with the outputs= of the run"):
        measurement_of.observe(seen)
