"""Criticality and fluctuation against the literature, scipy's integrals, exact products and sampled networks."""

import json
import math
from dataclasses import asdict, astuple

import pytest
import torch
from scipy import optimize

from tests.oracles.residual_tower import residual_flow
from tests.oracles.scalar_moments import ALPHA, ORACLES, SCALE, gauss, oracle_moments, within
from torch_eft.theory import (
    Activation,
    MLPEnsemble,
    QuadratureError,
    criticality,
    get_activation,
    initial_statistics,
    leaky_relu,
    output_fluctuation,
    regime,
    vertex_block,
)
from torch_eft.theory.signal_propagation.susceptibility import fixed_points, susceptibilities


@pytest.mark.parametrize(
    ("activation", "C_W", "nu"),
    [
        ("linear", 1, 2),
        ("abs", 1, 2),
        ("relu", 2, 5),
        (torch.relu, 2, 5),  # a callable is recognized by its values
        (lambda z: 2 * z, 1 / 4, 2),
        ("leaky_relu", 2 / 1.0001, 3 * (1 + 1e-8) * 2 / 1.0001**2 - 1),
        (leaky_relu(0.2), 2 / 1.04, 3 * (1 + 0.2**4) * 2 / 1.04**2 - 1),
    ],
)
def test_scale_invariant_class(activation, C_W, nu):
    """PDLT 5.2: C_W = 1/A_2, nu = 3 A_4 / A_2^2 - 1."""
    point = criticality(activation)
    assert (point.universality_class, point.C_b, point.K_star, point.stability) == (
        "scale-invariant",
        0,
        None,
        "any K",
    )
    assert point.a_1 == 0
    assert pytest.approx(C_W, rel=1e-14) == point.C_W
    assert point.nu == pytest.approx(nu, rel=1e-12)


def test_leaky_relu_has_the_printed_nu():
    assert within(criticality("leaky_relu").nu, "4.9988")
    assert within(criticality(leaky_relu(0.2)).nu, "4.5562")


@pytest.mark.parametrize(
    ("name", "C_W", "a_1", "power", "p_perp", "nu"),
    [
        ("tanh", 1, -2, 1, 1, 2 / 3),
        ("arctan", 1, -2, 1, 1, 2 / 3),
        ("erf", math.pi / 4, -2, 1, 1, 2 / 3),
        ("sin", 1, -1, 1, 1, 2 / 3),
        ("elu", 1, -math.sqrt(2 / math.pi), 0.5, 2, 2 / 3),
        ("softsign", 1, -4 * math.sqrt(2 / math.pi), 0.5, 2, 2 / 3),
        (
            "selu",
            2 / (SCALE**2 * (1 + ALPHA**2)),
            -2 * ALPHA**2 / (1 + ALPHA**2) * math.sqrt(2 / math.pi),
            0.5,
            2,
            (6 * (1 + ALPHA**4) / (1 + ALPHA**2) ** 2 - 1) / 3,
        ),
    ],
)
def test_vanishing_kernel_class(name, C_W, a_1, power, p_perp, nu):
    """Closed forms by Taylor expansion on either side, and the laws themselves by integration at a small kernel."""
    point = criticality(name)
    assert (point.universality_class, point.C_b, point.K_star, point.stability) == ("K*=0", 0, 0, "attractive")
    assert pytest.approx(C_W, rel=1e-13) == point.C_W
    assert point.a_1 == pytest.approx(a_1, rel=1e-12)
    assert (point.power, point.p_perp) == (power, pytest.approx(p_perp, rel=1e-12))
    assert point.nu == pytest.approx(nu, rel=1e-12)
    assert point.other_fixed_points == ()
    K = 1e-6  # the next order is smaller by K^power times a number below 10; rounding, 1e-13 / K^power
    variance, slopes, _ = oracle_moments(name, K)
    error = dict(rel=10 * K**power + 1e-13 / K**power)
    assert (C_W * variance / K - 1) / K**power == pytest.approx(point.a_1, **error)
    assert (C_W * slopes - 1) / K**power == pytest.approx(point.p_perp * power * point.a_1, **error)


def test_selu_critical_and_standard():
    point = criticality("selu")
    assert within(point.C_W, ".476771")
    assert within(point.nu, ".89102")
    origin, standard = fixed_points("selu", C_b=0, C_W=1)
    assert origin.K == 0
    assert not origin.stable
    assert origin.chi_par == pytest.approx(SCALE**2 * (1 + ALPHA**2) / 2, rel=1e-13)
    # Klambauer et al. chose scale and alpha for this one.
    assert pytest.approx(1, abs=1e-12) == standard.K
    assert standard.stable
    assert within(standard.chi_par, ".782648")
    assert within(standard.chi_perp, "1.071575")
    _, perpendicular, parallel = oracle_moments("selu", 1.0)
    assert astuple(susceptibilities("selu", 1.0, 1.0)) == pytest.approx((parallel, perpendicular), rel=1e-11)


HALF_STABLE = [
    # C_b, C_W, K*, nu, a, relaxation depth
    ("gelu", ".172922391", "1.983058257", "3.561552813", "4.904226", "-1.436e-4", "1955"),
    ("gelu_tanh", ".172895198", "1.982888240", "3.556772845", "4.904124", None, None),
    ("silu", ".555143171", "1.988004678", "14.32017362", "4.923187", "2.850e-6", "24504"),
    ("mish", ".094521787", "2.013524070", "1.670169132", "4.770687", "7.894e-3", "76"),
    ("hardswish", ".507145849", "1.97328958", "4.803855949", "4.798019", "1.390e-3", None),
]


@pytest.mark.parametrize(("name", "C_b", "C_W", "K_star", "nu", "a_1", "depth"), HALF_STABLE)
def test_half_stable_class_to_the_printed_digits(name, C_b, C_W, K_star, nu, a_1, depth):
    point = criticality(name)
    assert point.universality_class == "half-stable"
    assert within(point.C_b, C_b)
    assert within(point.C_W, C_W)
    assert within(point.K_star, K_star)
    assert within(point.nu, nu)
    assert a_1 is None or within(point.a_1, a_1)
    assert depth is None or within(point.relaxation_depth, depth)
    assert point.relaxation_depth == pytest.approx(1 / abs(point.a_1) / point.K_star)
    assert point.stability == f"attracts from {'above' if point.a_1 < 0 else 'below'} only"


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "hardswish"])
def test_half_stable_points_by_integration_and_root_search(name):
    """K* from <s s' z>/K = <s'^2> by scipy; the coefficient a from the map itself."""

    def imbalance_oracle(K):
        _, perpendicular, parallel = oracle_moments(name, K)
        return parallel - perpendicular

    point = criticality(name)
    K = optimize.brentq(imbalance_oracle, 0.8 * point.K_star, 1.25 * point.K_star, xtol=1e-13, rtol=1e-13)
    variance, perpendicular, _ = oracle_moments(name, K)
    s, _, kinks = ORACLES[name]
    fourth = gauss(lambda z: s(z) ** 4, K, kinks)
    C_W = 1 / perpendicular
    # <s s''> crosses zero at a slope of 0.01 / K or more: 1e-13 of integration error is 1e-11 in K*.
    assert point.K_star == pytest.approx(K, rel=1e-10)
    assert pytest.approx(C_W, rel=1e-10) == point.C_W
    assert point.C_b == pytest.approx(K - C_W * variance, abs=1e-10)
    assert point.nu == pytest.approx(C_W**2 * (fourth - variance**2) / K**2, rel=1e-9)

    def difference(step):
        return C_W * (sum(oracle_moments(name, K + side * step)[0] for side in (-1, 1)) - 2 * variance) / (2 * step**2)

    # Richardson: what is left is (step/K)^4 ~ 1e-5 of derivatives that exceed the second, small for SiLU, by 1e2.
    extrapolated = (4 * difference(0.025 * K) - difference(0.05 * K)) / 3
    assert extrapolated == pytest.approx(point.a_1, rel=1e-2)


def test_gelu_and_silu_have_a_second_stable_fixed_point_and_an_unstable_origin():
    (other,) = criticality("gelu").other_fixed_points
    assert other.stable
    assert within(other.K, "3.035")
    assert within(other.chi_par, ".99991")
    assert within(other.chi_perp, ".99398")
    (other,) = criticality("silu").other_fixed_points
    assert other.stable
    assert within(other.K, "14.593")
    for name, a_1 in (("gelu", 6 / math.pi), ("silu", 0.75)):  # s''(0) = sqrt(2/pi), 1/2; s'''(0) = 0
        origin = criticality(name).unstable_alternative
        assert (origin.C_b, origin.C_W, origin.K_star) == (0, pytest.approx(4, rel=1e-14), 0)
        assert origin.a_1 == pytest.approx(a_1, rel=1e-12)
    assert within(6 / math.pi, "1.910")


@pytest.mark.parametrize(
    ("activation", "sign", "origin"),
    [
        ("sigmoid", "<", "s(0) = 0.5 != 0"),
        ("cos", "<", "s(0) = 1 != 0"),
        ("softplus", ">", "s(0) = 0.6931 != 0"),
        (lambda z: z**2, ">", "s'(0) = 0"),
        (lambda z: z**3, ">", "s'(0) = 0"),
        (Activation("squared_relu", lambda z: torch.relu(z) ** 2, kinks=(0.0,)), ">", "s'(0) = 0"),
        (lambda z: z + 1, "=", "s(0) = 1 != 0"),
        (lambda z: z + 0.1 * z**3, ">", "repels (a_1 = 0.6)"),
    ],
)
def test_activations_without_criticality_say_why(activation, sign, origin):
    point = criticality(activation)
    assert not point.exists
    assert (point.universality_class, point.stability) == ("no criticality", "none")
    assert (point.C_b, point.C_W, point.K_star, point.nu) == (None,) * 4
    assert f"<s s''> {sign} 0" in point.reason
    assert "0.001 <= K <= 100" in point.reason
    assert origin in point.reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fixed_points("relu", 0.0, 2.0), "every K is a fixed point of relu"),
        (lambda: fixed_points("tanh", -0.1, 2.0), "C_b: -0.1 given; it must be finite and >= 0"),
        (lambda: fixed_points("tanh", 0.1, math.inf), "C_W: inf given"),
        (lambda: fixed_points("tanh", 0.1, 1.0, K_range=(2.0, 1.0)), "K_range"),
        (lambda: susceptibilities("tanh", 1.0, -1.0), "K: -1 given"),
        (lambda: criticality("tanh", residual=1.0), "residual: 1 given.*0 <= gamma < 1"),
        (lambda: criticality("tanh", residual=-0.1), "residual: -0.1 given"),
        (lambda: criticality(Activation("step", lambda z: (z > 0) * 1.0 + 0 * z, kinks=(0.0,))), "step jumps at 0"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "softplus"])
def test_critical_points_are_json(name):
    assert json.loads(json.dumps(asdict(criticality(name))))["reason"]


@pytest.mark.parametrize(
    "name", ["tanh", "sin", *(pytest.param(name, marks=pytest.mark.slow) for name in ("elu", "selu"))]
)
def test_vertex_grows_with_depth_as_nu_once_the_kernel_decays(name):
    """x = V/K^2 under K' = K - c K^{1+d}: x' = nu_0 + x (1 - 2/(l + l_0)), l_0 = 1/(c d K_0^d); nu = nu_0 / 3.

    So x = nu (l + l_0) [1 - (l_0/(l + l_0))^3], up to corrections of relative order K_0^d.
    """
    point, layers = criticality(name), 400
    small = 2e-3
    K = small ** (1 / point.power)
    flow = residual_flow(name, 0.0, 0.0, point.C_W, K, layers + 1)
    start = 1 / (abs(point.a_1) * point.power * small)
    expected = point.nu * (layers + start) * (1 - (start / (layers + start)) ** 3)
    assert flow.V[-1] / flow.K[-1] ** 2 == pytest.approx(expected, rel=5 * small)


@pytest.mark.parametrize("name", ["relu", "linear", "abs", "gelu", "hardswish"])
def test_vertex_grows_exactly_linearly_at_other_fixed_points(name):
    point = criticality(name)
    flow = residual_flow(name, 0.0, point.C_b, point.C_W, point.K_star or 0.7, 6)
    assert pytest.approx([point.nu * flow.K[0] ** 2 * layer for layer in range(6)], rel=1e-7) == flow.V


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
    V = vertex_block(ensemble, x, name="V", labels="aaaa", label_sets={"a": torch.arange(2)}).value
    K = initial_statistics(ensemble, x, statistics=("K", "Theta"))[-1].K.diagonal()
    assert output_fluctuation(ensemble, x) == pytest.approx(float((V / K.square()).mean()) / 10, rel=1e-9)


@pytest.mark.slow
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
