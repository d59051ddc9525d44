"""Two-label moments against closed forms written independently, and against adaptive integration."""

import math

import numpy
import pytest
import torch
from scipy import integrate, special

from torch_eft.theory import Activation, QuadratureError, get_activation
from torch_eft.theory.gaussian.quadrature import expectation
from torch_eft.theory.gaussian.two_point_moments import two_point_moments


def moment_matrix(activation, K, order):
    return two_point_moments(activation, K).explicit((order,), (order,))


def kernel(correlation: float, variance_a: float, variance_b: float) -> torch.Tensor:
    covariance = correlation * math.sqrt(variance_a * variance_b)
    return torch.tensor([[variance_a, covariance], [covariance, variance_b]], dtype=torch.float64)


def polar_relu(K: torch.Tensor, order: int) -> float:
    """<relu relu> and <relu' relu'> by the angle form of Cho & Saul (2009), eq. 3-6, here with atan2."""
    a, b, c = float(K[0, 0]), float(K[1, 1]), float(K[0, 1])
    angle = math.atan2(math.sqrt(a * b - c * c), c)
    if order == 1:
        return (math.pi - angle) / (2 * math.pi)
    return math.sqrt(a * b) * (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / (2 * math.pi)


CASES = [(0.3, 1.0, 1.0), (-0.7, 0.4, 2.5), (0.95, 1.5, 0.2), (0.0, 0.6, 0.6)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", [0, 1])
def test_relu_is_the_arc_cosine_kernel(case, order):
    K = kernel(*case)
    assert float(moment_matrix(get_activation("relu"), K, order)[0, 1]) == pytest.approx(
        polar_relu(K, order), abs=1e-12
    )


@pytest.mark.parametrize("case", CASES)
def test_leaky_relu_is_a_mixture_of_relu_at_both_signs(case):
    # leaky(z) = relu(z) - s relu(-z); the cross terms are the kernel of (z_a, -z_b).
    slope, K = 0.2, kernel(*case)
    flipped = K * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    leaky = Activation("leaky", lambda z: torch.where(z > 0, z, slope * z), slopes=(slope, 1.0))
    expected = (1 + slope**2) * polar_relu(K, 0) - 2 * slope * polar_relu(flipped, 0)
    assert float(moment_matrix(leaky, K, 0)[0, 1]) == pytest.approx(expected, abs=1e-12)


def test_linear_moments_are_the_kernel_and_one():
    K = kernel(0.4, 2.0, 3.0)
    torch.testing.assert_close(moment_matrix(get_activation("linear"), K, 0), K, rtol=0, atol=1e-15)
    torch.testing.assert_close(moment_matrix(get_activation("linear"), K, 1), torch.ones_like(K), rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_erf_is_the_arc_sine_kernel_of_williams(case):
    K = kernel(*case).numpy()
    expected = 2 / math.pi * math.asin(2 * K[0, 1] / math.sqrt((1 + 2 * K[0, 0]) * (1 + 2 * K[1, 1])))
    assert float(moment_matrix(get_activation("erf"), torch.from_numpy(K), 0)[0, 1]) == pytest.approx(
        expected, abs=1e-12
    )
    # <erf' erf'> = (4/pi) / sqrt(det(1 + 2K)): a Gaussian integral.
    expected = 4 / math.pi / math.sqrt(numpy.linalg.det(numpy.eye(2) + 2 * K))
    assert float(moment_matrix(get_activation("erf"), torch.from_numpy(K), 1)[0, 1]) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("case", CASES)
def test_sin_moments_are_those_of_characteristic_functions(case):
    a, b, c = case[1], case[2], case[0] * math.sqrt(case[1] * case[2])
    sum_, difference = math.exp(-(a + b) / 2 - c), math.exp(-(a + b) / 2 + c)
    K = kernel(*case)
    assert float(moment_matrix(get_activation("sin"), K, 0)[0, 1]) == pytest.approx((difference - sum_) / 2, abs=1e-13)
    assert float(moment_matrix(get_activation("sin"), K, 1)[0, 1]) == pytest.approx((difference + sum_) / 2, abs=1e-13)


def integrate_pair(function, K):
    """<f(z_a) f(z_b)> by SciPy's adaptive Gauss-Kronrod rule, nested, in Cholesky coordinates."""
    sd = math.sqrt(K[0, 0])
    slope, rest = K[0, 1] / sd, math.sqrt(K[1, 1] - K[0, 1] ** 2 / K[0, 0])
    weight = lambda u: math.exp(-u * u / 2) / math.sqrt(2 * math.pi)  # noqa: E731

    def inner(u):
        return integrate.quad(lambda v: function(slope * u + rest * v) * weight(v), -9.5, 9.5, epsabs=1e-13, limit=200)[
            0
        ]

    return integrate.quad(lambda u: function(sd * u) * inner(u) * weight(u), -9.5, 9.5, epsabs=1e-12, limit=200)[0]


def gelu_slope(z):
    return special.ndtr(z) + z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def silu_slope(z):
    s = special.expit(z)
    return s + z * s * (1 - s)


REFERENCES = {
    ("tanh", 0): math.tanh,
    ("tanh", 1): lambda z: 1 / math.cosh(z) ** 2,
    ("gelu", 0): lambda z: z * special.ndtr(z),
    ("gelu", 1): gelu_slope,
    ("silu", 0): lambda z: z * special.expit(z),
    ("silu", 1): silu_slope,
    ("softplus", 0): lambda z: numpy.logaddexp(0, z),
    ("softplus", 1): special.expit,
}


@pytest.mark.parametrize(("name", "order"), REFERENCES)
@pytest.mark.parametrize("case", [(0.5, 1.0, 1.0), (-0.6, 0.3, 2.0)])
def test_quadrature_agrees_with_adaptive_integration(name, order, case):
    K = kernel(*case)
    expected = integrate_pair(REFERENCES[name, order], K.numpy())
    assert float(moment_matrix(get_activation(name), K, order)[0, 1]) == pytest.approx(expected, abs=1e-9)


def test_user_given_functions_go_through_quadrature():
    K = kernel(0.5, 1.0, 2.0)
    mine = get_activation(lambda z: z + 0.1 * z**3)
    # Isserlis: <z_a z_b> + 0.1 (<z_a^3 z_b> + <z_a z_b^3>) + 0.01 <z_a^3 z_b^3>
    a, b, c = 1.0, 2.0, float(K[0, 1])
    expected = c + 0.1 * (3 * a * c + 3 * b * c) + 0.01 * (9 * a * b * c + 6 * c**3)
    assert float(moment_matrix(mine, K, 0)[0, 1]) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_mehler_series_reproduces_the_closed_form_at_every_variance(scale):
    # The same function once by name (closed form) and once as a stranger (Mehler's series).
    points = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    K = scale * points @ points.T / 20
    stranger = Activation("stranger", torch.erf)
    for order in (0, 1):
        difference = moment_matrix(stranger, K, order) - moment_matrix(get_activation("erf"), K, order)
        assert float(difference.abs().max()) < 1e-11


def test_repeated_parallel_and_zero_inputs():
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    K = x @ x.T / 2
    for name in ("relu", "tanh", "gelu"):
        M = moment_matrix(get_activation(name), K, 0)
        assert bool(torch.isfinite(M).all())
        torch.testing.assert_close(M[0], M[1], rtol=0, atol=1e-14)
    relu = moment_matrix(get_activation("relu"), K, 1)
    # Parallel: half of all units are active at both; opposite: none is.
    assert float(relu[0, 2]) == pytest.approx(0.5, abs=1e-15)
    assert float(relu[0, 3]) == pytest.approx(0.0, abs=1e-15)


def test_single_label_expectation():
    variances = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(expectation(lambda z: z**4, variances), 3 * variances**2, rtol=1e-12, atol=1e-15)


def test_a_kink_without_closed_form_is_refused():
    with pytest.raises(QuadratureError, match=r"must be smooth"):
        moment_matrix(Activation("kinked", torch.abs), kernel(0.5, 1.0, 1.0), 0)


def test_explosive_growth_is_refused():
    with pytest.raises(QuadratureError, match=r"not finite|grow"):
        moment_matrix(Activation("explosive", lambda z: torch.exp(z**2)), kernel(0.5, 1.0, 1.0), 0)
