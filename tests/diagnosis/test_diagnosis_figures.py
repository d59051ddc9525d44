"""The numbers behind the pictures of a diagnosis, and that the pictures hold what they should."""

import pytest
import torch
from matplotlib import colormaps

import torch_eft as eft
from tests.oracles.models import ConvNet
from torch_eft.diagnosis.figures import _REGIMES, planes_figure
from torch_eft.diagnosis.planes import depth_width_plane, phase_plane
from torch_eft.theory import MLPEnsemble, aspect_ratio, susceptibilities
from torch_eft.theory.estimates.learning_rates import layer_gains


@pytest.mark.parametrize("name", ["relu", "tanh", pytest.param("gelu", marks=pytest.mark.slow)])
def test_the_phase_plane_is_the_theory_on_a_grid(name):
    ensemble = MLPEnsemble([8, *[30] * 5, 2], name, C_b=0.1, C_W=1.2)
    plane = phase_plane(ensemble, aspect_ratio(ensemble))
    for row, column in ((0, 0), (10, 30), (25, 5)):
        there = MLPEnsemble(ensemble.widths, name, C_b=float(plane.C_b[column]), C_W=float(plane.C_W[row]))
        J = float(layer_gains(there).J[0])
        assert float(plane.log_growth[row, column]) == pytest.approx(torch.tensor(J).log10().item(), abs=1e-6)
    assert plane.network == pytest.approx((0.1, 1.2))


def test_the_line_is_where_chi_perp_is_one_at_a_fixed_point():
    ensemble = MLPEnsemble([8, 30, 30, 2], "tanh")
    line = phase_plane(ensemble, aspect_ratio(ensemble)).line
    assert line[0].tolist() == pytest.approx([0, 1], abs=1e-4)
    for C_b, C_W in line[40:120:20].tolist():
        K = 1.0
        for _ in range(20_000):
            z = (K**0.5) * torch.linspace(-8, 8, 401, dtype=torch.float64)
            weight = torch.softmax(-z.square() / (2 * K), 0)
            before, K = K, C_b + C_W * float(weight @ torch.tanh(z).square())
            if abs(K - before) < 1e-12 * K:
                break
        assert susceptibilities("tanh", C_W, K).chi_perp == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("name", "C_W"), [("relu", 2.0), ("tanh", 1.0)])
def test_the_depth_width_plane_is_the_theory(name, C_W):
    ensemble = MLPEnsemble([8, *[50] * 5, 2], name, C_W=C_W)
    plane = depth_width_plane(ensemble, aspect_ratio(ensemble))
    for depth, width in ((3, 20), (8, 100), (30, 1000)):
        ratio = aspect_ratio(MLPEnsemble([8, *[width] * (depth - 1), 2], name, C_W=C_W))
        size = plane.size[plane.depths.index(depth)] / width
        assert size == pytest.approx(ratio.epsilon, rel=1e-6)


def luminance(color):
    red, green, blue = (int(color[index : index + 2], 16) / 255 for index in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_neighboring_regimes_differ_in_lightness_or_hue():
    """To a reader without red-green vision: in lightness, or on the blue-yellow axis."""
    colors = [color for _, _, color in _REGIMES]
    for first, second in zip(colors[:-1], colors[1:], strict=True):
        blue_yellow = [int(c[5:7], 16) / 255 - luminance(c) for c in (first, second)]
        assert abs(luminance(first) - luminance(second)) + abs(blue_yellow[0] - blue_yellow[1]) > 0.2
    assert "RdBu_r" in colormaps


def test_the_pictures_name_what_they_show():
    ensemble = MLPEnsemble([8, *[30] * 5, 2], "tanh", C_b=0.1, C_W=1.2)
    ratio = aspect_ratio(ensemble)
    drawing = planes_figure(phase_plane(ensemble, ratio), depth_width_plane(ensemble, ratio))
    left, right = drawing.axes[:2]
    assert drawing.get_suptitle() == "MLP 8-(30) x 5-2, tanh"
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    assert legend == ["χ⊥ = 1", "critical point", "this network"]
    assert {text.get_text().split(":")[0] for text in left.texts} == {"chaos", "order"}
    assert any("seeds" in text.get_text() for text in right.texts)
    assert right.lines[-1].get_xydata().tolist() == [[30.0, 6.0]]
    assert min(label.get_fontsize() for label in [*left.texts, *right.texts]) >= 12


def test_a_picture_of_measurements_says_so():
    found = eft.diagnose(ConvNet(), torch.randn(3, 1, 8, 8), num_networks=0)
    drawing = found.plot()
    assert "measured, not derived" in drawing.get_suptitle()
    assert [label.get_text() for label in drawing.axes[0].get_xticklabels()] == ["conv", "head"]
    assert "there is no spread" in found.details
