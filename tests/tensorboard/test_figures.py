"""Figures and tags from plain results, without a Trainer."""

import math

import torch

from torch_eft.comparison import Compared
from torch_eft.tensorboard import compared_quantities, compared_scalars, comparison_figure, kernel_figure, layers_figure


def test_scalars_of_a_comparison():
    scalars = compared_scalars({"a": Compared(1.0, 2.0, 0.5), "b": Compared(math.nan, 0.0, None)})
    assert scalars == {
        "eft/a/measured": 1.0,
        "eft/a/theory": 2.0,
        "eft/a/theory_minus_sigma": 1.5,
        "eft/a/theory_plus_sigma": 2.5,
        "eft/b/theory": 0.0,
    }


def test_comparison_draws_what_there_is():
    compared = {"ntk_trace": Compared(1.0, 2.0, 0.5), "ntk_drift": Compared(0.1, 0.0, None)}
    history = {step: compared_scalars(compared) for step in (0, 10, 200)}
    assert compared_quantities(history) == ["ntk_trace", "ntk_drift"]
    drawing = comparison_figure(history, ["ntk_trace", "ntk_drift"], "title")
    first, second = drawing.axes
    assert [line.get_label() for line in first.lines] == ["theory (infinite width)", "measured"]
    assert list(first.lines[1].get_xdata()) == [0, 10, 200]
    assert len(first.collections) == 1  # the band
    assert len(second.collections) == 0


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
