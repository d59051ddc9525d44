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
    ratio = diagnosis.aspect_ratio
    assert (ratio.depth, ratio.width) == (4, 100)
    assert ratio.r == pytest.approx(0.04)
    assert ratio.epsilon == pytest.approx(15 / 100)
    assert ratio.gradient_gain == pytest.approx(1)
    assert diagnosis.verdict.startswith("critical within a factor of 2")
    for layer in diagnosis.layers[1:]:
        assert layer.chi_par == layer.chi_perp == pytest.approx(1)
        assert pytest.approx(2) == layer.K


def test_default_initialisation_is_found_subcritical_with_advice():
    torch.manual_seed(0)
    diagnosis = eft.diagnose(mlp((64, 128, 128, 128, 10), nn.ReLU), torch.randn(8, 64))
    assert "subcritical" in diagnosis.verdict
    assert diagnosis.aspect_ratio.gradient_gain == pytest.approx(1 / 6**3, rel=0.1)  # nn.Linear: C_W = 1/3
    assert diagnosis.advice == ("initialise weights with variance 2 / n_in and biases with 0",)
    assert diagnosis.layers[1].C_W_error > 0


def test_biases_alone_take_tanh_off_criticality():
    diagnosis = eft.diagnose(MLPEnsemble([10, *[100] * 10, 1], "tanh", C_b=0.1))
    assert "subcritical" in diagnosis.verdict
    assert diagnosis.advice == ("initialise weights with variance 1 / n_in and biases with 0",)


def test_learning_rates_are_those_of_torch():
    """Plain SGD of the module: its shares of the NTK, and rates that make them equal, by measurement."""
    torch.manual_seed(0)
    model = mlp((6, 1000, 1000, 2), nn.ReLU).double()
    x = torch.randn(1, 6, dtype=torch.float64)
    diagnosis = eft.diagnose(model, x)
    names = [f"{index}.{kind}" for index in (0, 2, 4) for kind in ("weight", "bias")]
    total = float(eft.measure.ntk_trace(eft.measure.ntk(model, x)))
    # Fluctuations of one wide network: relative order n^(-1/2), a few times 3 %.
    assert 2 / total == pytest.approx(diagnosis.largest_learning_rate, rel=0.15)
    for index, layer in enumerate(diagnosis.layers):
        own = dict.fromkeys(names, 0.0) | dict.fromkeys(names[2 * index : 2 * index + 2], 1.0)
        part = float(eft.measure.ntk_trace(eft.measure.ntk(model, x, lambdas=own)))
        assert layer.share == pytest.approx(part / total, rel=0.15)
        own |= {names[2 * index]: layer.lr_W, names[2 * index + 1]: layer.lr_b}
        part = float(eft.measure.ntk_trace(eft.measure.ntk(model, x, lambdas=own)))
        assert part / total == pytest.approx(1 / 3, rel=0.15)


def test_a_network_that_does_not_train_has_no_learning_rates():
    diagnosis = eft.diagnose(MLPEnsemble([4, 50, 2], "tanh", lambda_b=0.0, lambda_W=0.0))
    assert diagnosis.largest_learning_rate is None
    assert diagnosis.layers[0].share is None
    assert "eta" not in str(diagnosis)


def test_where_no_gradient_is_left_no_rates_are_given():
    diagnosis = eft.diagnose(MLPEnsemble([4, *[50] * 600, 2], "relu", C_b=0.1, C_W=0.1))
    assert diagnosis.layers[0].lr_W is None
    assert diagnosis.layers[-1].share == pytest.approx(1, abs=0.1)
    assert "| - | - |" in str(diagnosis)


def test_remarks_on_the_weights_are_passed_on():
    torch.manual_seed(0)
    read = eft.measure.read_ensemble(mlp((64, 128, 10)))
    assert len(read.remarks) > 0  # nn.Linear draws uniform weights
    diagnosis = eft.diagnose(read)
    assert diagnosis.remarks == read.remarks
    assert all(f"- weights: {remark}" in str(diagnosis) for remark in read.remarks)
    assert eft.diagnose(read.ensemble).remarks == ()


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
    assert diagnosis.aspect_ratio.critical is None
    assert "no critical initialisation" in diagnosis.verdict


def test_text_is_stable():
    """Golden text. By hand: K = 2, r = 3/50, epsilon = 10/50, exactly 1.1^2 - 1 = .21, so 1 - .2/.21 = 4.8 % low.

    r* = 4 / (26 * 5), shifted 4 / (20 * 5). Layer 1 has lambda_b = lambda_W = 1 and g = 1, layers 2 and 3 have
    g = K / 2 = 1, J = 1 throughout: Theta = 6, equal shares; lr = lambda_W / n_in. MSELoss: eta < n_L / Theta.
    """
    text = str(eft.diagnose(MLPEnsemble([4, 50, 50, 2], "relu", C_W=2.0)))
    assert text.splitlines() == [
        "### MLP 4-50-50-2, relu",
        "",
        "- critical within a factor of 2: squared gradients at layer 1 are 1 times the critical ones "
        "(C_b = 0, C_W = 2)",
        "- depth L = 3, width n = 50, aspect ratio r = L/n = 0.06: edge: finite-width corrections large, order 1/n is "
        "rough",
        "- epsilon = Var G/E[G]^2 = 0.2 at order 1/n (G: output variance), 4.8 % below the exact product over layers "
        "(piecewise linear, no biases)",
        "- from seed to seed G varies by 45 %; its mean to 10 % takes 21 network(s)",
        "- epsilon with twice the hidden layers: 0.4; with twice the hidden widths: 0.1",
        "- r* = 0.0308, or 0.04 with epsilon to order r^2: a heuristic scale, not a measured optimum",
        "- full-batch gradient descent on MSELoss is stable below eta = 0.333 (inputs with |x|^2 = n_0, any number; "
        "linearised model: finite networks can survive more)",
        "- layers share the NTK equally within 10 %",
        "- infinite width (order 0) as a description: caution",
        "- advice: too deep for its width: half the depth or twice the hidden widths about halve r and epsilon",
        "",
        "| layer | C_b | C_W | K | chi_par | chi_perp | NTK share | lr bias | lr weight |",
        "|---|---|---|---|---|---|---|---|---|",
        "| 1 | 0 | 2 | 2 | - | - | 33.3 % | 1 | 0.25 |",
        "| 2 | 0 | 2 | 2 | 1.0000 | 1.0000 | 33.3 % | 1 | 0.02 |",
        "| 3 | 0 | 2 | 2 | 1.0000 | 1.0000 | 33.3 % | 1 | 0.02 |",
        "| critical (scale-invariant) | 0 | 2 | any K | 1 | 1 | 33.3 % | - | - |",
    ]


def test_dictionary_is_json():
    for name in ("tanh", "sigmoid", "gelu"):
        report = eft.diagnose(MLPEnsemble([4, 50, 50, 2], name)).to_dict()
        assert json.loads(json.dumps(report, allow_nan=False))["aspect_ratio"]["r"] == pytest.approx(0.06)


def test_other_networks_are_refused_with_the_reason():
    with pytest.raises(eft.measure.NotAnMLPError, match="Conv2d"):
        eft.diagnose(ConvNet(), torch.randn(2, 1, 8, 8))
