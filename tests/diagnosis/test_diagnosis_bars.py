"""The diagnosis before training against what is measured of real networks: depth sweeps, and the phase plane."""

import itertools
import math

import pytest
import torch
from torch import nn

import torch_eft as eft
from torch_eft.measure import statistics_over_seeds
from torch_eft.theory import MLPEnsemble

CRITICAL = {"tanh": (nn.Tanh, 1.0), "relu": (nn.ReLU, 2.0)}
WIDTH = 40


def network(widths, activation, C_b, C_W):
    """A real module, drawn from N(0, C_b) and N(0, C_W / n_in)."""
    layers = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), activation()]
    return drawn(nn.Sequential(*layers[:-1]), C_b, C_W)


def drawn(model, C_b, C_W):
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(C_W / layer.in_features))
            nn.init.normal_(layer.bias, std=math.sqrt(C_b))
    return model


def measured_spread(name, depth, seeds):
    """Relative standard deviation of H_ii of real modules with its standard error, (A + 2B) / (n Theta^2)."""
    activation, C_W = CRITICAL[name]
    model = network([8, *[WIDTH] * (depth - 1), 2], activation, 0.0, C_W).double()
    x = torch.ones(1, 8, dtype=torch.float64)
    found = statistics_over_seeds(
        model,
        x,
        num_networks=seeds,
        statistics=("Theta", "A", "B"),
        initialize=lambda m: drawn(m, 0.0, C_W),
        width=WIDTH,
    )

    def spread(values):
        A, B, Theta = (values[key].flatten() for key in ("A", "B", "Theta"))
        return ((A + 2 * B) / WIDTH).clamp_min(0).sqrt() / Theta

    replicas = spread(found.replicas)
    return float(spread(found.mean)), float(((len(replicas) - 1) * replicas.var(unbiased=False)).sqrt())


def predicted(name, depth):
    widths = [8, *[WIDTH] * (depth - 1), 2]
    return eft.diagnose(MLPEnsemble(widths, name, C_W=CRITICAL[name][1], lambda_W=widths[:-1]))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seeds"), [("tanh", 2000), ("relu", 2000)])
def test_a_depth_sweep_at_fixed_width(name, seeds):
    """r = 0.05 .. 0.2: within 20 %, the measurement itself being good to 7 %."""
    for depth in (2, 4, 8):
        diagnosis = predicted(name, depth)
        assert diagnosis.aspect_ratio.r <= 0.2
        value, error = measured_spread(name, depth, seeds)
        print(f"{name} L = {depth}: predicted {diagnosis.spread.ntk:.4f}, measured {value:.4f} +- {error:.4f}")
        assert error < 0.07 * value
        assert diagnosis.spread.ntk == pytest.approx(value, rel=0.2)


@pytest.mark.parametrize(("name", "width"), [("relu", 40), pytest.param("tanh", 6, marks=pytest.mark.slow)])
def test_the_words_are_those_of_the_spread(name, width):
    """Down to networks that are fine: none whose seeds differ by order one is missed, none below 0.2 is flagged."""
    seen = set()
    for depth in (2, 4, 9, 12):
        n = width if depth > 2 else 200
        diagnosis = eft.diagnose(MLPEnsemble([8, *[n] * (depth - 1), 2], name, C_W=CRITICAL[name][1]))
        codes = {finding.code for finding in diagnosis.warnings}
        own = diagnosis.variants[0]
        largest = max(own.output_spread, own.ntk_spread) ** 2
        assert ("spread" in codes) == (100 > largest >= 1)
        assert ("edge" in codes) == (0.2 <= largest < 1)
        seen.add(largest >= 1)
    assert seen == {False, True}


def squared_gradient(model, x):
    """E|dz_i / dz^(1)|^2 of one module: the mean over outputs and inputs."""
    first = model[0](x).detach().requires_grad_()
    outputs = model[1:](first)
    rows = [torch.autograd.grad(outputs[:, i].sum(), first, retain_graph=True)[0] for i in range(outputs.shape[1])]
    return float(torch.stack(rows).square().sum(2).mean())


@pytest.mark.parametrize(
    ("name", "C_bs", "C_Ws"),
    [
        pytest.param("tanh", (0.0, 0.1), (0.5, 1.0, 1.6, 4.0), marks=pytest.mark.slow),
        ("relu", (0.0, 0.1, 1.0), (0.8, 1.5, 2.0, 2.9)),
    ],
)
def test_the_phase_is_that_of_the_measured_jacobians(name, C_bs, C_Ws):
    """Modules of width 200, 10 layers, diagnosed from their weights; measured against modules at criticality.

    One module's squared gradient, averaged over 20 outputs, is off by about sqrt(epsilon) = 0.2 to 0.4: where the
    measured ratio is within 1.6 of a border, 0.5 or 2, either side is right.
    """
    torch.manual_seed(0)
    activation, critical = CRITICAL[name]
    widths, x = [30, *[200] * 9, 20], torch.randn(6, 30)
    reference = [squared_gradient(network(widths, activation, 0.0, critical), x) for _ in range(8)]
    reference = sum(reference) / len(reference)
    phases = set()
    for C_b, C_W in itertools.product(C_bs, C_Ws):
        model = network(widths, activation, C_b, C_W)
        ratio = squared_gradient(model, x) / reference
        diagnosis = eft.diagnose(model, x)
        allowed = {phase for r in (ratio / 1.6, ratio, 1.6 * ratio) for phase in [phase_of(r)]}
        assert diagnosis.phase in allowed, f"C_b = {C_b}, C_W = {C_W}: measured {ratio:.3g}"
        phases.add(phase_of(ratio))
    assert phases == {"ordered", "critical", "chaotic"}


def phase_of(ratio):
    return "ordered" if ratio < 0.5 else "chaotic" if ratio > 2 else "critical"


def test_the_measured_diagnosis_of_an_mlp_agrees_with_the_derived_one():
    """What is measured of any module, on one that theory covers: chi, shares, step size and the NTK's spread."""
    from torch_eft.diagnosis.measured.diagnose import measured_diagnosis

    torch.manual_seed(0)
    widths = [8, 100, 100, 100, 4]
    model = network(widths, nn.ReLU, 0.0, 2.0)
    x = torch.randn(4, 8)
    derived = eft.diagnose(MLPEnsemble(widths, "relu", C_W=2.0, lambda_W=widths[:-1]), x)
    found = measured_diagnosis(model, x, "for the test", num_networks=60, initialize=lambda m: drawn(m, 0.0, 2.0))
    for block in found.blocks[:-1]:
        assert abs(block.chi - 1) < 4 * block.chi_error + 0.02
    assert found.gradient_growth == pytest.approx(1, abs=0.2)
    assert list(found.shares.values()) == pytest.approx([layer.share for layer in derived.layers], abs=0.1)
    assert found.largest_learning_rate == pytest.approx(derived.largest_learning_rate, rel=0.4)
    # Var log of a lognormal; inputs are correlated, so that the mean over four of them varies a little less.
    assert 0.4 < math.sqrt(found.epsilon_ntk) / derived.spread.ntk_trace < 1.3
    assert found.epsilon_features == pytest.approx(derived.aspect_ratio.epsilon_all_orders, rel=0.6)
