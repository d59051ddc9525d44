"""Susceptibilities and fixed points against scipy's integrals, finite differences and closed forms."""

import math
from dataclasses import astuple

import pytest
import torch

from tests.oracles.scalar_moments import ORACLES, oracle_moments
from torch_eft.theory import Activation, criticality, get_activation
from torch_eft.theory.gaussian.quadrature import expectation
from torch_eft.theory.signal_propagation.susceptibility import (
    curvature_of_variance,
    fixed_points,
    imbalance,
    slope_of_variance,
    susceptibilities,
)


def test_sign_of_the_imbalance_of_cos_and_cubic_is_the_closed_one():
    """<cos cos''> = -(1 + e^{-2K})/2; <z^3 6z> = 18 K^2; <relu^2 relu^2''> = K."""
    K = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)
    squared = Activation("squared_relu", lambda z: torch.relu(z) ** 2, kinks=(0.0,))
    torch.testing.assert_close(imbalance(get_activation("cos"), K), -(1 + (-2 * K).exp()) / 2, rtol=1e-11, atol=0)
    torch.testing.assert_close(imbalance(Activation("c", lambda z: z**3), K), 18 * K**2, rtol=1e-11, atol=0)
    torch.testing.assert_close(imbalance(squared, K), K, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", sorted(ORACLES))
@pytest.mark.parametrize("K", [0.2, 5.0, 60.0])
def test_susceptibilities_are_the_integrals_by_parts(name, K):
    """Delta functions at kinks included: <s s' z>/K knows nothing of s''. Rounding of the oracle: 1e-11."""
    _, perpendicular, parallel = oracle_moments(name, K)
    assert astuple(susceptibilities(name, 1.3, K)) == pytest.approx((1.3 * parallel, 1.3 * perpendicular), rel=1e-10)
    assert astuple(susceptibilities(name, 1.3, K, residual=0.6)) == pytest.approx(
        (0.36 + 1.3 * parallel, 0.36 + 1.3 * perpendicular), rel=1e-10
    )


@pytest.mark.parametrize("name", ["tanh", "gelu", "hardswish", "selu"])
def test_slopes_of_the_variance_are_its_derivatives(name):
    sigma, h = get_activation(name), 1e-3
    K = torch.tensor([0.5, 2.0, 9.0], dtype=torch.float64)
    mean = [expectation(lambda z: sigma(z) ** 2, K + i * h, sigma.kinks) for i in (-2, -1, 0, 1, 2)]
    first = (8 * (mean[3] - mean[1]) - (mean[4] - mean[0])) / (12 * h)
    second = (16 * (mean[3] + mean[1]) - (mean[4] + mean[0]) - 30 * mean[2]) / (12 * h**2)
    # Truncation h^4, rounding 1e-13 / h and 1e-13 / h^2.
    torch.testing.assert_close(slope_of_variance(sigma, K), first, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(curvature_of_variance(sigma, K), second, rtol=1e-6, atol=1e-6)


def test_fixed_points_in_closed_form():
    # ReLU: K = C_b / (1 - C_W/2). cos: K = C_W (1 + e^{-2K})/2, chi_par = -C_W e^{-2K}.
    (point,) = fixed_points("relu", C_b=0.1, C_W=1.5)
    assert (point.K, point.chi_par, point.stable) == (pytest.approx(0.4), pytest.approx(0.75), True)
    assert fixed_points("relu", C_b=0.1, C_W=2.0) == []
    (point,) = fixed_points("cos", C_b=0.0, C_W=8.0)
    assert pytest.approx(4 * (1 + math.exp(-2 * point.K)), rel=1e-12) == point.K
    assert point.chi_par == pytest.approx(-8 * math.exp(-2 * point.K), rel=1e-9)
    # z - z^3/5 at C_W = 1: <s^2> = K - 6K^2/5 + 3K^3/5, so K = 0 and 2, there with slope 17/5.
    point = criticality(lambda z: z - 0.2 * z**3)
    (other,) = point.other_fixed_points
    assert (other.K, other.chi_par, other.stable) == (pytest.approx(2), pytest.approx(3.4), False)
    # A critical point is touched, not crossed: both are found.
    gelu = criticality("gelu")
    assert [(fixed.K, fixed.stable) for fixed in fixed_points("gelu", gelu.C_b, gelu.C_W)] == [
        (pytest.approx(3.035, abs=5e-4), True),
        (pytest.approx(gelu.K_star, rel=1e-6), False),
    ]


def test_a_fixed_point_on_the_grid_is_not_missed():
    """F(K) = (1 + K) / 2 is exact in floating point, and K = 1 is one of the places where it is sampled."""
    (point,) = fixed_points("linear", 0.5, 0.5)
    assert (point.K, point.chi_par, point.stable) == (1.0, 0.5, True)
