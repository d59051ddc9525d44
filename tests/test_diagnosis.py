"""The diagnosis: its numbers, its verdicts, its text."""

import json
import math

import pytest
import torch
from torch import nn

import torch_eft as eft
from tests.models import ConvNet, mlp
from torch_eft.theory import MLPEnsemble


def test_critical_relu_by_hand():
    """PDLT 5.2: at C_W = 2 both susceptibilities are 1 at every layer, epsilon = 5 (L - 1) / n."""
    diagnosis = eft.diagnose(MLPEnsemble([10, 100, 100, 100, 1], "relu", C_W=2.0))
    assert diagnosis.depth == 4
    assert diagnosis.width == 100
    assert diagnosis.aspect_ratio == pytest.approx(0.04)
    assert diagnosis.epsilon == pytest.approx(15 / 100)
    assert diagnosis.growth == pytest.approx(1)
    assert diagnosis.verdict.startswith("critical within a factor of 2")
    for layer in diagnosis.layers[1:]:
        assert layer.chi_par == layer.chi_perp == pytest.approx(1)
        assert pytest.approx(2) == layer.K


def test_default_initialisation_is_found_subcritical_with_advice():
    torch.manual_seed(0)
    diagnosis = eft.diagnose(mlp((64, 128, 128, 128, 10)), torch.randn(8, 64))
    assert "subcritical" in diagnosis.verdict
    assert diagnosis.growth == pytest.approx(1 / 27, rel=0.1)  # nn.Linear: C_W = 1/3
    assert diagnosis.advice == ("initialise weights with variance 1 / n_in and biases with 0",)
    assert diagnosis.layers[1].C_W_error > 0


def test_following_the_advice_cures():
    torch.manual_seed(0)
    model = mlp((64, 128, 128, 128, 10), nn.ReLU)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
        nn.init.zeros_(layer.bias)
    diagnosis = eft.diagnose(model)
    assert diagnosis.verdict.startswith("critical")
    assert diagnosis.advice == ()


def test_too_deep_and_too_chaotic():
    diagnosis = eft.diagnose(MLPEnsemble([10, *[8] * 20, 1], "tanh", C_W=3.0))
    assert "supercritical (chaotic)" in diagnosis.verdict
    assert diagnosis.validity.flag == "invalid"
    assert any("half the depth" in sentence for sentence in diagnosis.advice)


def test_activations_without_critical_point():
    diagnosis = eft.diagnose(MLPEnsemble([10, 20, 1], "sigmoid"))
    assert diagnosis.critical is None
    assert "no critical initialisation" in diagnosis.verdict


def test_text_is_stable():
    """Golden text; every number in it is checked above or follows from K = 2, r = 3/50, epsilon = 10/50."""
    text = str(eft.diagnose(MLPEnsemble([4, 50, 50, 2], "relu", C_W=2.0)))
    assert text.splitlines() == [
        "### MLP 4-50-50-2, relu",
        "",
        "- depth L = 3, width n = 50, aspect ratio r = L/n = 0.06",
        "- epsilon = Var G/E[G]^2 = 0.2 (order 1/n): edge: finite-width corrections large, order 1/n is rough",
        "- critical within a factor of 2: prod C_W / C_W(critical) = 1 over layers 2..L, C_W(critical) = 2",
        "- order 0 is caution: infinite width (order 0): r = L/n = 0.06, epsilon = Var G/E[G]^2 = 0.2; edge: "
        "finite-width corrections large, order 1/n is rough. In training the NTK and the representations of a real "
        "network move by order r, more for larger targets; order 0 has neither: read it against the measured NTK drift",
        "- advice: too deep for its width: half the depth or twice the hidden widths about halve r and epsilon",
        "",
        "| layer | C_b | C_W | K | chi_par | chi_perp |",
        "|---|---|---|---|---|---|",
        "| 1 | 0 | 2 | 2 | - | - |",
        "| 2 | 0 | 2 | 2 | 1.0000 | 1.0000 |",
        "| 3 | 0 | 2 | 2 | 1.0000 | 1.0000 |",
        "| critical (scale-invariant) | 0 | 2 | any K | 1 | 1 |",
    ]


def test_dictionary_is_json():
    diagnosis = eft.diagnose(MLPEnsemble([4, 50, 50, 2], "tanh"))
    assert json.loads(json.dumps(diagnosis.to_dict()))["critical"]["C_W"] == 1.0


def test_other_networks_are_refused_with_the_reason():
    with pytest.raises(eft.measure.NotAnMLPError, match="Conv2d"):
        eft.diagnose(ConvNet(), torch.randn(2, 1, 8, 8))
