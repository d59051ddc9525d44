"""Criticality and fluctuation against values from the literature, exact products and sampled networks."""

import math

import pytest
import torch

from torch_eft.theory import (
    MLPEnsemble,
    QuadratureError,
    block,
    criticality,
    get_activation,
    initial_statistics,
    output_fluctuation,
    regime,
)
from torch_eft.theory.criticality import slope_of_variance, slope_squared
from torch_eft.theory.expectations import expectation


@pytest.mark.parametrize(
    ("name", "universality_class", "C_b", "C_W", "K_star", "nu", "digits"),
    [
        # PDLT 5.2-5.4 and (GELU, SiLU) 5.3.4; digits as far as printed or known in closed form.
        ("linear", "scale-invariant", 0, 1, None, 2, 1e-14),
        ("relu", "scale-invariant", 0, 2, None, 5, 1e-14),
        ("leaky_relu", "scale-invariant", 0, 2 / 1.0001, None, 3 * (1 + 1e-8) * 2 / 1.0001**2 - 1, 1e-12),
        ("tanh", "K*=0", 0, 1, 0, 2 / 3, 1e-12),
        ("sin", "K*=0", 0, 1, 0, 2 / 3, 1e-12),
        ("erf", "K*=0", 0, math.pi / 4, 0, 2 / 3, 1e-12),
        ("gelu", "half-stable", 0.17292239, 1.98305826, 3.561552813, 4.904226, 1e-6),
        ("gelu_tanh", "half-stable", 0.172895198, 1.982888240, 3.556772845, 4.904124, 1e-6),
        ("silu", "half-stable", 0.55514317, 1.98800468, 14.32017362, 4.923187, 1e-6),
    ],
)
def test_critical_points(name, universality_class, C_b, C_W, K_star, nu, digits):
    point = criticality(name)
    assert point.universality_class == universality_class
    assert point.C_b == pytest.approx(C_b, rel=digits, abs=1e-14)
    assert pytest.approx(C_W, rel=digits) == point.C_W
    assert point.K_star == (None if K_star is None else pytest.approx(K_star, rel=digits))
    assert point.nu == pytest.approx(nu, rel=max(digits, 1e-6) if digits > 1e-10 else digits)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_half_stable_points_are_fixed_and_critical(name):
    """The definition itself: K* is a fixed point, and both susceptibilities are 1 there."""
    point, sigma = criticality(name), get_activation(name)
    K = torch.tensor(point.K_star, dtype=torch.float64)
    assert point.C_b + point.C_W * float(expectation(lambda z: sigma(z) ** 2, K)) == pytest.approx(
        point.K_star, rel=1e-11
    )
    assert point.C_W * float(slope_of_variance(sigma, K)) == pytest.approx(1, abs=1e-9)
    assert point.C_W * float(slope_squared(sigma, K)) == pytest.approx(1, abs=1e-11)


@pytest.mark.parametrize("name", ["sigmoid", "softplus"])
def test_activations_without_criticality(name):
    assert criticality(name) is None


def test_slope_of_variance_is_the_derivative():
    for name in ("tanh", "gelu"):
        sigma, h = get_activation(name), 1e-4
        K = torch.tensor([0.5, 2.0], dtype=torch.float64)
        difference = (expectation(lambda z: sigma(z) ** 2, K + h) - expectation(lambda z: sigma(z) ** 2, K - h)) / (
            2 * h
        )
        torch.testing.assert_close(slope_of_variance(sigma, K), difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("widths", [[3, 40, 40, 40, 1], [3, 20, 80, 50, 2]])
def test_relu_fluctuation_is_the_first_order_of_the_exact_product(widths):
    """Exactly E[G^2]/E[G]^2 = prod_l (1 + 5 / n_l), so to order 1/n epsilon = 5 sum_l 1 / n_l."""
    epsilon = output_fluctuation(MLPEnsemble(widths, "relu", C_W=2.0))
    assert epsilon == pytest.approx(5 * sum(1 / n for n in widths[1:-1]), rel=1e-13)


@pytest.mark.parametrize("name", ["tanh", "gelu", "relu"])
def test_fluctuation_is_the_four_point_vertex_of_one_label(name):
    """The one-label recursion against V(aaaa) / (n K^2) of the general one."""
    ensemble = MLPEnsemble([3, 20, 30, 10, 1], name, C_b=0.1, C_W=1.4)
    x = torch.tensor([[1.0, -0.5, 0.7], [0.2, 0.1, 2.0]], dtype=torch.float64)
    V, _ = block(ensemble, x, "V", "aaaa", {"a": torch.arange(2)})
    K = initial_statistics(ensemble, x)[-1].K.diagonal()
    assert output_fluctuation(ensemble, x) == pytest.approx(float((V / K.square()).mean()) / 10, rel=1e-9)


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_fluctuation_agrees_with_sampled_networks(name):
    """Var(G)/E[G]^2, G = C_W |s|^2 / n the output variance given the last hidden layer; two widths, extrapolated."""
    x = torch.tensor([[1.0, -0.5, 0.7]], dtype=torch.float64)
    scaled, errors = [], []
    for width, count in ((40, 40_000), (80, 40_000)):
        generator = torch.Generator().manual_seed(width)
        sigma = get_activation(name)
        signal = x.expand(count, 1, 3)
        for n_in in (3, width):
            weight = torch.randn(count, n_in, width, dtype=torch.float64, generator=generator) * math.sqrt(1.5 / n_in)
            signal = sigma(signal @ weight)
        G = signal.square().mean((1, 2))
        ratio = G.var() / G.mean() ** 2
        batches = G.reshape(40, -1)
        errors.append(float((batches.var(1) / batches.mean(1) ** 2).std() / math.sqrt(40)) * width)
        scaled.append(float(ratio) * width)
    theory = output_fluctuation(MLPEnsemble([3, 40, 40, 1], name, C_W=1.5), x) * 40
    extrapolated = 2 * scaled[1] - scaled[0]
    error = math.hypot(2 * errors[1], errors[0])
    assert abs(extrapolated - theory) < 4 * error
    assert error < 0.05 * theory


def test_regimes_are_ordered():
    assert "practically infinitely wide" in regime(0.001, 0.001)
    assert "effectively deep" in regime(0.02, 0.1)
    assert "edge" in regime(0.1, 0.5)
    assert "too deep" in regime(0.3, 1.5)
    assert "too deep" in regime(3.0, 0.01)  # the ordered phase: biases keep epsilon small


def test_kinked_user_function_is_refused_by_name():
    with pytest.raises(QuadratureError, match="smooth"):
        criticality(lambda z: torch.where(z > 0, z, torch.expm1(z)) + z.abs())
