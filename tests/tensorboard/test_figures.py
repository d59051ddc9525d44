"""Figures and tags from plain results, without a Trainer."""

import warnings

import pytest
import torch

from torch_eft.results.tags import layer_theory, quantity_of
from torch_eft.tensorboard import (
    QUANTITIES,
    compared_quantities,
    comparison_figure,
    kernel_figure,
    layer_tag,
    layer_theory_tag,
    layers_figure,
    tag,
)


def banded(quantity, measured, order_0, sigma):
    return {
        tag(quantity): measured,
        tag(quantity, "order_0"): order_0,
        tag(quantity, "minus_sigma"): order_0 - sigma,
        tag(quantity, "plus_sigma"): order_0 + sigma,
    }


def test_tags_are_built_and_read():
    assert tag("ntk_trace") == "eft/ntk_trace/measured"
    assert tag("ntk_trace", "order_1") == "eft-theory/ntk_trace/order_1"
    assert layer_tag("representation_change", "net.2/a") == "eft-layers/representation_change/net.2/a"
    for name in (tag("ntk_trace"), tag("ntk_trace", "z_score"), layer_tag("ntk_trace", "a/b")):
        assert quantity_of(name) == "ntk_trace"
    assert quantity_of("eft/nothing/measured") is None
    assert quantity_of("loss") is None
    with pytest.raises(ValueError, match="'weight' is not registered"):
        tag("weight")
    with pytest.raises(ValueError, match="series: 'theory' given"):
        tag("ntk_trace", "theory")


def test_every_quantity_is_described():
    for name, quantity in QUANTITIES.items():
        assert all(quantity.to_dict().values()), name


def test_comparison_draws_what_there_is():
    history = {
        step: banded("ntk_trace", 1.0, 2.0, 0.5)
        | {tag("ntk_trace", "order_1"): 2.1, tag("ntk_drift"): 0.1, tag("ntk_drift", "order_0"): 0.0}
        for step in (0, 10, 200)
    }
    assert compared_quantities(history) == ["ntk_trace", "ntk_drift"]
    drawing = comparison_figure(history, ["ntk_trace", "ntk_drift"], "title")
    first, second = drawing.axes
    labels = [line.get_label() for line in first.lines]
    assert labels == ["order 0 (infinite width)", "order 1 (finite width)", "measured"]
    assert list(first.lines[2].get_xdata()) == [0, 10, 200]
    assert len(first.collections) == 1  # the band
    assert len(second.collections) == 0
    (legend,) = drawing.legends  # one for all
    assert [entry.get_text() for entry in legend.get_texts()] == ["theory ± σ", *labels]


def quantiles(quantity):
    edges = {"band_90_low": 1.0, "band_68_low": 1.2, "band_68_high": 1.8, "band_90_high": 2.0}
    lines = {"order_0": 0.0, "order_1": 1.5, "given_start": 1.6, "taylor_2": 1.7}
    return {tag(quantity, series): value for series, value in (edges | lines).items()}


def test_bands_of_networks_and_what_the_start_says_are_drawn():
    history = {step: quantiles("ntk_drift") | {tag("ntk_drift"): 1.0 + 0.2 * step} for step in (0, 1, 10)}
    (axes,) = comparison_figure(history, ["ntk_drift"]).axes
    assert [line.get_label() for line in axes.lines] == [
        "order 0 (infinite width)", "median of networks, order 1/n", "median given this network's start", "measured"
    ]  # fmt: skip
    assert [band.get_label() for band in axes.collections] == ["90 % of networks", "68 % of networks"]
    edges = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (1.0, 2.0)
    assert [words.get_text() for words in axes.texts] == ["left the 90 % band at step 10 (above)"]


def test_an_expansion_that_ends_has_a_mark_at_its_end():
    line = {step: {tag("ntk_drift"): 0.1 * step, tag("ntk_drift", "taylor_2"): 0.2 * step} for step in range(4)}
    (axes,) = comparison_figure(line, ["ntk_drift"]).axes
    assert len(axes.lines) == 2
    start = {0: {tag("ntk_drift"): 0.0, tag("ntk_drift", "taylor_2"): 0.0}, 1: {tag("ntk_drift"): 0.1}}
    assert len(comparison_figure(start, ["ntk_drift"]).axes[0].lines) == 1  # it ended at once
    (axes,) = comparison_figure(line | {4: {tag("ntk_drift"): 0.5}}, ["ntk_drift"]).axes
    (mark,) = [drawn for drawn in axes.lines if drawn.get_marker() == "X"]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([3], [pytest.approx(0.6)])
    assert axes.texts[0].get_text() == "the expansion about theta_0 ends at step 3"


def test_layers_are_drawn_over_their_predictions():
    values = {"order_1": 0.2, "band_90_low": 0.1, "band_90_high": 0.3}
    history = {
        step: {layer_theory_tag("representation_change", "net.1/a", name): v * step for name, v in values.items()}
        for step in (0, 5)
    }
    theory = layer_theory(history, "representation_change")
    assert theory["net.1/a"]["order_1"] == {0: 0.0, 5: 1.0}
    (axes,) = layers_figure({"net.1/a": {0: 0.0, 5: 0.9}, "net.2": {0: 0.0, 5: 0.8}}, "t", theory).axes
    assert len(axes.lines) == 3 and len(axes.collections) == 1


def test_kernels_on_one_scale_compare():
    H = torch.diag(torch.tensor([1.0, -3.0]))
    image = kernel_figure(H, "H", limit=5.0).axes[0].images[0]
    assert image.get_clim() == (-5.0, 5.0)
    assert kernel_figure(H, "H").axes[0].images[0].get_clim() == (-3.0, 3.0)
    assert kernel_figure(torch.zeros(2, 2), "0").axes[0].images[0].get_clim() == (-1.0, 1.0)


def test_many_layers_get_no_legend():
    few = layers_figure({"a": {0: 0.0, 1: 0.1}}, "t")
    many = layers_figure({str(i): {0: 0.0, 1: 0.1} for i in range(20)}, "t")
    assert few.axes[0].get_legend() is not None
    assert many.axes[0].get_legend() is None
    assert len(many.axes[0].lines) == 20


def test_figures_without_lines_have_no_legend_and_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layers_figure({}, "t").axes[0].get_legend() is None
        assert comparison_figure({}, ["ntk_drift"]).axes[0].get_legend() is None


def test_forecasts_and_runs_are_drawn_on_each_other():
    from torch_eft import Validity, trajectory_from_records
    from torch_eft.tensorboard import trajectory_figure
    from torch_eft.theory import MLPEnsemble, predict_training

    x = torch.eye(3).double()
    forecast = predict_training(
        MLPEnsemble([3, 64, 1], "tanh"), x[:2], x[:2, :1], x[2:], learning_rate=0.1, steps=5, order=0
    )
    ntks = [torch.full((1, 1, 1, 1), 1.0 + 0.1 * step) for step in range(6)]
    outputs = [torch.zeros(1, 1)] * 6
    run = trajectory_from_records(range(6), outputs, "a run", Validity("valid", "measured"), ntks=ntks)
    drawing = trajectory_figure({"order 0": forecast, "measured": run})
    first, second = drawing.axes
    assert [line.get_label() for line in first.lines] == ["order 0", "measured"]
    assert len(first.collections) == 1  # the band of the ensemble; one run has none
    assert second.lines[1].get_ydata()[-1] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="point: 4, output: 0 given; 'order 0' has 1 points, 1 outputs"):
        trajectory_figure({"order 0": forecast}, point=4)
    with pytest.raises(TypeError, match="trajectory_figure"):
        comparison_figure(forecast, ["ntk_drift"])


def test_errors_of_replays_have_a_log_axis_and_a_line_at_nothing_predicted():
    history = {
        step: {tag("replay_output_error", f"order_{order}"): 10.0**-order * (1 + step) for order in (1, 2, 3)}
        for step in range(3)
    }
    (axes,) = comparison_figure(history, ["replay_output_error"]).axes
    assert axes.get_yscale() == "log" and [text.get_text() for text in axes.texts] == ["nothing predicted"]
    assert [list(line.get_ydata()) for line in axes.lines][3] == [1, 1]
    assert "order 3: with ddNTK" in [line.get_label() for line in axes.lines]
    sizes = {step: {tag("replay_output"): 0.1, tag("replay_output", "truncation_low"): 0.09} for step in range(3)}
    for step in range(3):
        sizes[step] |= {tag("replay_output", "truncation_high"): 0.11, tag("replay_output", "order_3"): 0.1}
    (axes,) = comparison_figure(sizes, ["replay_output"]).axes
    assert axes.get_yscale() == "linear" and len(axes.collections) == 1
