"""The diagnosis: its numbers, its verdicts, its text."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import torch_eft as eft
from tests.oracles.models import ConvNet, mlp
from torch_eft.diagnosis.findings import spread_finding
from torch_eft.diagnosis.text import plain
from torch_eft.theory import MLPEnsemble


def test_critical_relu_by_hand():
    """PDLT 5.2: at C_W = 2 both susceptibilities are 1 at every layer, epsilon = 5 (L - 1) / n."""
    diagnosis = eft.diagnose(MLPEnsemble([10, 100, 100, 100, 1], "relu", C_W=2.0))
    ratio = diagnosis.aspect_ratio
    assert (ratio.depth, ratio.width) == (4, 100)
    assert ratio.r == pytest.approx(0.04)
    assert ratio.epsilon == pytest.approx(15 / 100)
    assert ratio.gradient_gain == pytest.approx(1)
    assert diagnosis.criticality.startswith("critical within a factor of 2")
    assert diagnosis.verdict == "trains: near criticality, seeds differ little (40 %)"
    for layer in diagnosis.layers[1:]:
        assert layer.chi_par == layer.chi_perp == pytest.approx(1)
        assert pytest.approx(2) == layer.K


def test_default_initialization_is_subcritical_and_trains_where_it_is_shallow():
    torch.manual_seed(0)
    diagnosis = eft.diagnose(mlp((64, 128, 128, 128, 10), nn.ReLU), torch.randn(8, 64))
    assert "subcritical" in diagnosis.criticality
    assert diagnosis.aspect_ratio.gradient_gain == pytest.approx(1 / 6**3, rel=0.1)  # nn.Linear: C_W = 1/3
    assert diagnosis.verdict.startswith("trains: below criticality, seeds differ little")
    assert diagnosis.advice == ()
    assert diagnosis.layers[1].C_W_error == 0  # nn.Linear draws with a known variance


def test_default_initialization_of_a_deep_network_does_not_train_and_the_remedy_is_code():
    torch.manual_seed(0)
    model = mlp((16, *[64] * 9, 1), nn.ReLU)
    diagnosis = eft.diagnose(model, torch.randn(32, 16))
    assert diagnosis.verdict.startswith("gradients vanish: about ")
    (finding,) = diagnosis.warnings
    assert finding.remedy.startswith("initialize weights with variance 2 / n_in and biases with 0")
    exec(finding.line, {"model": model, "nn": nn})
    cured = eft.diagnose(model, torch.randn(32, 16))
    assert "gradients vanish" not in [finding.code for finding in cured.warnings]
    assert cured.phase == "critical"


def test_biases_alone_take_tanh_off_criticality():
    diagnosis = eft.diagnose(MLPEnsemble([10, *[100] * 6, 1], "tanh", C_b=0.1))
    assert "subcritical" in diagnosis.criticality


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
    assert [finding.code for finding in diagnosis.warnings] == ["nothing trains"]
    assert "stable below" not in diagnosis.details


def test_where_no_gradient_is_left_no_rates_are_given():
    diagnosis = eft.diagnose(MLPEnsemble([4, *[50] * 600, 2], "relu", C_b=0.1, C_W=0.1))
    assert diagnosis.layers[0].lr_W is None
    assert diagnosis.layers[-1].share == pytest.approx(1, abs=0.1)
    assert "| - | - |" in diagnosis.details


def test_remarks_on_the_weights_are_passed_on():
    torch.manual_seed(0)
    read = eft.measure.read_ensemble(mlp((64, 128, 10)))
    assert len(read.remarks) > 0  # nn.Linear draws uniform weights
    diagnosis = eft.diagnose(read)
    assert diagnosis.remarks == read.remarks
    assert all(f"- weights: {remark}" in diagnosis.details for remark in read.remarks)
    assert eft.diagnose(replace(read, remarks=())).remarks == ()


def test_following_the_advice_cures():
    torch.manual_seed(0)
    model = mlp((64, 128, 128, 128, 10), nn.ReLU)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
        nn.init.zeros_(layer.bias)
    diagnosis = eft.diagnose(model)
    assert diagnosis.phase == "critical"
    assert not {"gradients vanish", "gradients explode"} & {finding.code for finding in diagnosis.warnings}


def test_too_deep_and_too_chaotic():
    diagnosis = eft.diagnose(MLPEnsemble([10, *[8] * 9, 1], "tanh", C_W=3.0))
    assert "supercritical (chaotic)" in diagnosis.criticality
    assert diagnosis.validity.flag == "invalid"
    assert {finding.code for finding in diagnosis.warnings} == {"gradients explode", "spread"}
    assert any("hidden widths times" in sentence for sentence in diagnosis.advice)


def test_inputs_that_hardly_differ_are_not_laid_to_the_network():
    x = 1 + 1e-4 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    diagnosis = eft.diagnose(MLPEnsemble([8, 100, 1], "relu", C_W=2.0), x)
    (finding,) = [each for each in diagnosis.warnings if each.code != "edge"]
    assert (finding.code, finding.line) == ("inputs", "x = x - x.mean(0)")
    assert diagnosis.verdict.startswith("inputs hardly differ")
    assert eft.diagnose(MLPEnsemble([8, 100, 1], "relu", C_W=2.0), torch.ones(3, 8)).warnings == ()


def test_advice_on_widths_names_the_narrow_layer_and_holds():
    """The widths that it writes, diagnosed in turn, need no such advice."""
    for ensemble in (
        MLPEnsemble([10, 64, 12, 64, 3], "relu", C_W=2.0),
        MLPEnsemble([10, *[40] * 5, 3], "relu", C_W=2.0),
        MLPEnsemble([10, *[20] * 3, 3], "gelu", C_b=0.17292, C_W=1.98306),
    ):
        (finding,) = eft.diagnose(ensemble).warnings
        found: dict = {}
        exec(finding.line, found)
        wider = replace(ensemble, widths=tuple(found["widths"]))
        assert eft.diagnose(wider).warnings == ()
        if 12 in ensemble.widths:
            assert finding.remedy.startswith("layer 2 (12 neurons) makes most of it")
            assert [a == b for a, b in zip(wider.widths, ensemble.widths, strict=True)].count(False) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_learning_rates_in_the_unit_of_the_optimizer(reduction):
    """At the bound, one step more or less decides; heavy ball: 1 + m times as much."""
    torch.manual_seed(0)
    model, x = mlp((6, 400, 2)).double(), torch.randn(5, 6, dtype=torch.float64)
    plain = eft.diagnose(model, x, reduction=reduction).largest_learning_rate
    H = eft.measure.as_matrix(eft.measure.ntk(model, x))
    hessian = 2 * float(torch.linalg.eigvalsh(H)[-1]) / (10 if reduction == "mean" else 1)
    assert plain == pytest.approx(2 / hessian, rel=0.15)  # one network of width 400
    optimizer = torch.optim.SGD(model.parameters(), lr=40.0, momentum=0.9)
    found = eft.diagnose(model, x, optimizer=optimizer, reduction=reduction)
    assert found.largest_learning_rate == pytest.approx(1.9 * plain)
    first = found.warnings[0]
    assert first.code == "learning rate"
    assert first.message.startswith(f"lr = 40 is {40 / found.largest_learning_rate:.3g} times the largest stable one")
    assert "momentum=0.9" in first.line
    adam = eft.diagnose(model, x, optimizer=torch.optim.Adam(model.parameters(), lr=40.0))
    assert adam.warnings == ()
    assert adam.stability.startswith("Adam has no such bound")
    with pytest.raises(ValueError, match="reduction: 'total' given"):
        eft.diagnose(model, x, reduction="total")


def test_texts_are_short_and_fit_a_terminal():
    for ensemble in (
        MLPEnsemble([4, 50, 50, 2], "relu", C_W=2.0),
        MLPEnsemble([10, *[5] * 5, 1], "tanh", C_b=0.05, C_W=3.0),
        MLPEnsemble([8, *[8] * 24, 4], "relu", C_W=2.0),
        MLPEnsemble([8, *[64] * 9, 4], "relu", C_b=0.005, C_W=1 / 3),
        MLPEnsemble([4, 2], "linear"),
    ):
        diagnosis = eft.diagnose(ensemble)
        lines = str(diagnosis).splitlines()
        assert len(lines) < 32
        assert all(len(line) <= 80 for line in lines if not line.startswith("            "))  # code is not wrapped
        assert "|" not in str(diagnosis).replace("|x|^2", "")
        assert len(diagnosis.verdict) <= 70
        assert repr(diagnosis).startswith("Diagnosis(MLP ") and repr(diagnosis).endswith(f": {diagnosis.verdict})")
        assert len(repr(diagnosis)) < 120
        assert diagnosis.verdict in diagnosis.details
        assert all(len(line) <= 100 for line in plain(diagnosis.details).splitlines())
        assert "|--" not in plain(diagnosis.details)


def test_plot_draws_both_planes():
    figure = eft.diagnose(MLPEnsemble([8, 30, 30, 3], "relu", C_W=2.0)).plot()
    assert len(figure.axes) == 3  # two planes and a color bar
    with pytest.raises(ValueError, match="without a hidden layer"):
        eft.diagnose(MLPEnsemble([8, 3], "linear")).plot()


def test_activations_without_expectations_of_two_inputs():
    diagnosis = eft.diagnose(MLPEnsemble([10, 40, 40, 1], "hardswish", C_W=2.0))
    assert diagnosis.plateau is None
    assert diagnosis.verdict.startswith("trains")
    assert "tells inputs apart" not in diagnosis.details


def test_activations_without_critical_point():
    diagnosis = eft.diagnose(MLPEnsemble([10, 20, 1], "sigmoid"))
    assert diagnosis.aspect_ratio.critical is None
    assert "no critical initialization" in diagnosis.criticality
    assert diagnosis.verdict == "trains: no critical point, seeds differ little (16 %)"


def test_dictionary_is_json():
    for name in ("tanh", "sigmoid", "gelu"):
        report = eft.diagnose(MLPEnsemble([4, 50, 50, 2], name)).to_dict()
        assert json.loads(json.dumps(report, allow_nan=False))["aspect_ratio"]["r"] == pytest.approx(0.06)


def test_other_networks_need_inputs_to_be_measured_on():
    with pytest.raises(eft.measure.NotAnMLPError, match=r"Conv2d.*give inputs x"):
        eft.diagnose(ConvNet())


def test_inputs_that_do_not_fit_are_refused():
    ensemble = MLPEnsemble([4, 8, 2], "tanh")
    with pytest.raises(ValueError, match=r"x: \(3, 5\) given"):
        eft.diagnose(ensemble, torch.randn(3, 5))
    with pytest.raises(ValueError, match="x: dict given"):
        eft.diagnose(ensemble, {"x": torch.randn(3, 4)})


def test_inputs_too_large_for_the_quadrature_are_named():
    with pytest.raises(eft.theory.QuadratureError, match=r"\|x\|\^2 / n_0 is up to 1e\+06.*scale the inputs"):
        eft.diagnose(MLPEnsemble([4, 20, 2], "tanh"), torch.full((1, 4), 1e3))


def test_a_signal_beyond_float64_is_named():
    with pytest.raises(ValueError, match=r"the kernel K at layer .* beyond what float64 can square"):
        eft.diagnose(MLPEnsemble([4, *[50] * 600, 2], "relu", C_W=6.0))


@pytest.mark.parametrize("name", [pytest.param("tanh", marks=pytest.mark.slow), "relu"])
def test_the_doubled_networks_are_recomputed(name):
    """Twice the width halves epsilon and the NTK's relative variance at order 1/n; all else comes from the ensemble."""
    widths = [10, 40, 60, 40, 3]
    ensemble = MLPEnsemble(widths, name, C_b=0.02, C_W=1.3, lambda_W=widths[:-1])
    own, deep, wide = eft.diagnose(ensemble).variants
    assert wide.epsilon == pytest.approx(own.epsilon / 2)
    assert wide.r == pytest.approx(own.r / 2)
    twice = [10, 40, 40, 60, 60, 40, 40, 3]
    again = eft.diagnose(MLPEnsemble(twice, name, C_b=0.02, C_W=1.3, lambda_W=twice[:-1])).variants[0]
    for field in ("r", "epsilon", "ntk_spread", "kernel_growth", "gradient_growth", "drift", "largest_learning_rate"):
        assert getattr(deep, field) == pytest.approx(getattr(again, field), rel=1e-9)


def test_growth_over_the_depth_is_that_of_the_layers():
    diagnosis = eft.diagnose(MLPEnsemble([5, 30, 30, 30, 2], "gelu", C_b=0.1, C_W=1.7))
    assert diagnosis.kernel_growth == pytest.approx(diagnosis.layers[-1].K / diagnosis.layers[0].K)
    assert diagnosis.gradient_growth == pytest.approx(math.prod(layer.chi_perp for layer in diagnosis.layers[1:]))
    assert diagnosis.recommended == (pytest.approx(0.172922391), pytest.approx(1.983058257))


CASES = {
    "fine": (MLPEnsemble([8, 200, 200, 4], "relu", C_W=2.0), set()),
    "gradients vanish": (MLPEnsemble([8, *[300] * 12, 4], "relu", C_b=0.01, C_W=0.33), {"gradients vanish"}),
    "below criticality": (MLPEnsemble([8, 300, 300, 300, 4], "relu", C_W=1.2), set()),
    "gradients explode": (MLPEnsemble([8, 300, 300, 300, 4], "relu", C_W=3.0), {"gradients explode"}),
    "no criticality": (MLPEnsemble([8, *[300] * 8, 4], "sigmoid"), {"gradients vanish"}),
    "edge": (MLPEnsemble([8, *[50] * 4, 4], "relu", C_W=2.0), {"edge"}),
    "spread beyond order 1/n": (MLPEnsemble([8, *[50] * 8, 4], "relu", C_W=2.0), {"spread"}),
    "r of order one alone": (MLPEnsemble([8, *[8] * 9, 4], "tanh"), {"edge"}),
    "too deep": (MLPEnsemble([8, *[16] * 24, 4], "relu", C_W=2.0), {"too deep"}),
    "dead network": (MLPEnsemble([8, 4, 4, 4], "relu", C_W=2.0), {"spread", "dead network"}),
    "frozen layer": (MLPEnsemble([8, 300, 4], "relu", C_W=2.0, lambda_W=[1e-4, 1.0], lambda_b=0.0), {"frozen layer"}),
    "nothing trains": (MLPEnsemble([8, 300, 4], "relu", C_W=2.0, lambda_W=0.0, lambda_b=0.0), {"nothing trains"}),
    "signal": (MLPEnsemble([8, *[900] * 10, 4], "relu", C_W=0.7), {"signal"}),
}


@pytest.mark.parametrize(
    ("size", "r", "code"),
    [(0.19, 5.0, None), (0.3, 5.0, "edge"), (6.0, 2.0, "spread"), (6.0, 5.0, "too deep"), (120.0, 1.0, "too deep")],
)
def test_words_of_the_spread(size, r, code):
    """r alone is no fault; with a spread of order one it is: tanh networks of 16 layers of 8 train, of 40 do not."""
    found = spread_finding(size, "NTK by so much", "wider", r=r)
    assert (found and found.code) == code


@pytest.mark.parametrize("case", CASES)
def test_every_warning_has_its_case(case):
    ensemble, codes = CASES[case]
    diagnosis = eft.diagnose(ensemble)
    assert {finding.code for finding in diagnosis.warnings} == codes
    assert diagnosis.status == (1 if codes else 0)
    for finding in diagnosis.warnings:
        assert f"- WARNING: {finding.message}" in diagnosis.details
        assert not finding.remedy or finding.remedy in diagnosis.advice


def test_large_epsilon_is_called_a_lower_bound_or_unreliable():
    assert "read the exact value, 0.4641" in eft.diagnose(CASES["edge"][0]).details
    deep = eft.diagnose(MLPEnsemble([8, *[12] * 7, 4], "tanh")).details
    assert "at order 1/n is a lower bound" in deep
    off = eft.diagnose(MLPEnsemble([8, *[10] * 6, 4], "gelu", C_W=1.2))
    assert off.aspect_ratio.epsilon > 0.2
    assert "at order 1/n is unreliable" in off.details
