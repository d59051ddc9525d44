"""Residual MLPs: the tower of persistent correlations against closed forms, other sums and drawn networks."""

import math

import numpy
import pytest
import torch
from scipy import integrate, special

from tests.oracles.residual_tower import residual_flow
from tests.oracles.scalar_moments import ALPHA, ORACLES, gauss, within
from torch_eft.theory import Activation, QuadratureError, criticality, get_activation, leaky_relu
from torch_eft.theory.signal_propagation.residual import hermite_modes, vertex_growth


def two_slope_covariance(a, correlation):
    """Cov(s^2, s'^2) of leaky ReLU at unit variances: the arc-cosine kernel of degree 2 (Cho & Saul 2009, eq. 6)."""

    def degree_two(c):
        angle = math.acos(max(-1.0, min(1.0, c)))
        return (3 * math.sin(angle) * c + (math.pi - angle) * (1 + 2 * c * c)) / (2 * math.pi)

    same, opposite = degree_two(correlation), degree_two(-correlation)
    return (1 + a**4) * same + 2 * a**2 * opposite - ((1 + a**2) / 2) ** 2


def green_kubo(covariance, gamma):
    """The sum over layers of Cov(s^2(z_0), s^2(z_k)), which decays as gamma^k."""
    last = math.ceil(math.log(1e-15) / math.log(gamma))
    return covariance(1.0) + 2 * sum(covariance(gamma**k) for k in range(1, last))


@pytest.mark.parametrize("gamma", [0.3, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("a", [0.0, 0.2])
def test_nu_of_two_slopes_is_the_sum_of_arc_cosine_kernels(a, gamma):
    point = criticality(leaky_relu(a), residual=gamma)
    assert pytest.approx((1 - gamma**2) * 2 / (1 + a**2), rel=1e-14) == point.C_W
    expected = point.C_W**2 * green_kubo(lambda c: two_slope_covariance(a, c), gamma)
    # acos at c ~ gamma^k ~ 0 is exact to 1e-16, the terms sum to about nu; the modes left out are below 1e-8.
    assert point.nu == pytest.approx(expected, rel=2e-8)


@pytest.mark.parametrize(("gamma", "nu"), [(0.5, "6.50"), (0.7, "5.509"), (0.9, "2.536")])
def test_nu_of_relu_to_the_printed_digits(gamma, nu):
    assert within(criticality("relu", residual=gamma).nu, nu)


@pytest.mark.parametrize("name", ["gelu", "silu", "hardswish"])
def test_nu_at_a_half_stable_point_is_a_sum_over_layers(name):
    """Two-dimensional Gauss-Legendre, cut at the kinks, instead of Hermite modes."""
    gamma = 0.8
    point, plain = criticality(name, residual=gamma), criticality(name)
    assert point.K_star == plain.K_star
    assert (pytest.approx(0.36 * plain.C_b), pytest.approx(0.36 * plain.C_W)) == (point.C_b, point.C_W)
    assert point.a_1 == pytest.approx(0.36 * plain.a_1, rel=1e-12)
    s, _, kinks = ORACLES[name]
    root = math.sqrt(plain.K_star)
    nodes, weights = numpy.polynomial.legendre.leggauss(60)
    edges = sorted({-9.0, -6.0, -3.0, 0.0, 3.0, 6.0, 9.0, *(k / root for k in kinks)})
    u = numpy.concatenate([(b + a) / 2 + (b - a) / 2 * nodes for a, b in zip(edges, edges[1:], strict=False)])
    w = numpy.concatenate([(b - a) / 2 * weights for a, b in zip(edges, edges[1:], strict=False)])
    squares = s(root * u) ** 2

    def covariance(c):
        if c == 1.0:
            return gauss(lambda z: s(z) ** 4, root**2, kinks) - gauss(lambda z: s(z) ** 2, root**2, kinks) ** 2
        quadratic = (u[:, None] ** 2 + u[None] ** 2 - 2 * c * u[:, None] * u[None]) / (2 * (1 - c * c))
        density = numpy.exp(-quadratic) / (2 * math.pi * math.sqrt(1 - c * c))
        mean = (w * squares * numpy.exp(-u * u / 2)).sum() / math.sqrt(2 * math.pi)
        return (w * squares) @ density @ (w * squares) - mean**2

    expected = point.C_W**2 * green_kubo(covariance, gamma) / root**4
    assert point.nu == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95])
def test_closed_forms(gamma):
    """Linear and |z|, equal squares: 2(1 - gamma^4). K* = 0: a third of it; SELU: a third of two slopes."""
    for name in ("linear", "abs"):
        assert criticality(name, residual=gamma).nu == pytest.approx(2 * (1 - gamma**4), rel=1e-8)
    for name in ("tanh", "sin", "softsign"):
        point = criticality(name, residual=gamma)
        assert point.nu == pytest.approx(2 / 3 * (1 - gamma**4), rel=1e-8)
        assert pytest.approx(1 - gamma**2, rel=1e-12) == point.C_W
        assert point.a_1 == pytest.approx((1 - gamma**2) * criticality(name).a_1, rel=1e-12)
    tangent = Activation("tangent", lambda z: torch.where(z > 0, z, ALPHA * z), (ALPHA, 1.0))
    assert criticality("selu", residual=gamma).nu == pytest.approx(
        criticality(tangent, residual=gamma).nu / 3, rel=1e-12
    )


@pytest.mark.parametrize("name", ["relu", "gelu", "hardswish"])
def test_hermite_modes_are_their_integrals(name):
    K, count = 2.3, 12
    modes = hermite_modes(get_activation(name), K, count)
    s, kinks = (lambda z: max(z, 0.0), (0.0,)) if name == "relu" else (ORACLES[name][0], ORACLES[name][2])
    for a in range(count + 1):
        norm = math.sqrt(math.factorial(a))
        expected = gauss(lambda z: s(z) ** 2 * special.eval_hermitenorm(a, z / math.sqrt(K)) / norm, K, kinks)
        assert float(modes[a]) == pytest.approx(expected, abs=1e-10)


def test_hermite_modes_of_relu_are_complete():
    """Parseval: sum s_a^2 = <relu^4> = 3/2. Squares fall as a^(-7/2), so the rest after M modes as M^(-5/2)."""
    squares = hermite_modes(get_activation("relu"), 1.0, 4000).square()
    rest = [1.5 - float(squares[: count + 1].sum()) for count in (250, 1000, 4000)]
    assert 0 < rest[2] < 1e-8
    assert rest[1] / rest[0] == pytest.approx(4**-2.5, rel=0.02)
    # Quadrature, told of the kink, gives the same modes.
    kinked = Activation("kinked", torch.relu, kinks=(0.0,))
    torch.testing.assert_close(
        hermite_modes(kinked, 1.3, 300), hermite_modes(get_activation("relu"), 1.3, 300), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("name", "gamma"), [("relu", 0.7), ("relu", 0.9), ("linear", 0.7), ("gelu", 0.6)])
def test_flow_grows_as_nu_once_the_memory_has_built_up(name, gamma):
    """Transients decay as gamma^l: after 12 / ln(1/gamma) layers they are 1e-5 of the growth."""
    point = criticality(name, residual=gamma)
    K = point.K_star or 0.8
    flow = residual_flow(name, gamma, point.C_b, point.C_W, K, 3 + math.ceil(12 / math.log(1 / gamma)))
    assert pytest.approx([K] * len(flow.K), rel=1e-9) == flow.K
    assert (flow.V[-1] - flow.V[-2]) / K**2 == pytest.approx(point.nu, rel=1e-4)
    assert flow.V_error[-1] < 1e-9 * flow.V[-1]


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu"])
def test_without_skip_connection_the_flow_is_that_of_the_plain_mlp(name):
    """V' = C_W^2 { <s^4> - <s^2>^2 + (d<s^2>/dK)^2 V } (PDLT 4.3) with moments by scipy, off criticality."""
    s, kinks = (lambda z: max(z, 0.0), (0.0,)) if name == "relu" else (ORACLES[name][0], ORACLES[name][2])
    C_b, C_W, K, V = 0.1, 1.6, 0.9, 0.0
    flow = residual_flow(name, 0.0, C_b, C_W, K, 4)
    for layer in range(4):
        assert (flow.K[layer], flow.V[layer]) == (pytest.approx(K, rel=1e-10), pytest.approx(V, rel=1e-9))
        second, fourth = (gauss(lambda z: s(z) ** p, K, kinks) for p in (2, 4))
        slope = gauss(lambda z: s(z) ** 2 * (z * z / K - 1) / (2 * K), K, kinks)
        K, V = C_b + C_W * second, C_W**2 * (fourth - second**2 + slope**2 * V)


@pytest.mark.parametrize(
    ("a", "gamma", "C_b", "C_W"), [(0.0, 0.9, 0.5, 0.38), (0.2, 0.95, 0.3, 2.0), (0.0, 0.4, 2.0, 1.0)]
)
def test_flow_off_criticality_is_that_of_empirical_means(a, gamma, C_b, C_W):
    """A second derivation, without modes: the central limit theorem for neurons driven by a common, fluctuating G.

    sqrt(n) (mean of z^2 - K) = zeta + kappa, zeta and eta the fluctuations of z^2 and s^2 over independent neurons of
    the infinitely wide network, kappa' = (gamma^2 + C_W d<s^2>/dK) kappa + C_W eta what G has done; the variance of
    the left side is V + 2 K^2.
    """
    depth, A = 7, (1 + a**2) / 2
    K = [0.2]
    for _ in range(depth - 1):
        K.append(gamma**2 * K[-1] + C_b + C_W * A * K[-1])
    K = numpy.array(K)
    layer = numpy.arange(depth)
    early, late = numpy.minimum.outer(layer, layer), numpy.maximum.outer(layer, layer)
    correlation = gamma ** (late - early) * numpy.sqrt(K[early] / K[late])
    eta = K[:, None] * K * numpy.vectorize(lambda c: two_slope_covariance(a, c))(correlation)
    zeta = 2 * A * K[:, None] * K * correlation**2  # the odd part of s^2 does not correlate with z^2
    flow = residual_flow(leaky_relu(a), gamma, C_b, C_W, K[0], depth)
    weights = numpy.zeros(depth)  # of every eta in kappa
    for now in range(depth):
        V = weights @ eta @ weights + 2 * weights @ zeta[now]
        assert flow.V[now] == pytest.approx(V, rel=1e-10)
        weights *= gamma**2 + C_W * A
        weights[now] = C_W


@pytest.mark.slow
def test_decaying_kernel_of_tanh_with_skip_connection():
    """x' = nu_0 + x (1 - 2/(l + l_0)), l_0 = 1/(|a_1| K_0): as for the plain MLP, with (1 - gamma^2) a_1."""
    gamma, K, layers = 0.7, 2e-3, 400
    point = criticality("tanh", residual=gamma)
    flow = residual_flow("tanh", gamma, 0.0, point.C_W, K, layers + 1)
    start = 1 / (abs(point.a_1) * K)
    expected = point.nu * (layers + start) * (1 - (start / (layers + start)) ** 3)
    assert flow.V[-1] / flow.K[-1] ** 2 == pytest.approx(expected, rel=5 * K)


def sampled_vertex(s, gamma, C_b, C_W, K, depth, width, count, draw_weights, chunk=500):
    """n Cov(z_i^2, z_j^2), i != j, over ``count`` networks, and its standard error.

    Either weights are drawn, or, for one input the same in law, z' = gamma z + sqrt(G) xi with G as the network has it.
    """
    generator = torch.Generator().manual_seed(width + 10_000 * draw_weights)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    pairs, means = [], []
    for _ in range(count // chunk):
        z = math.sqrt(K) * normal(chunk, width)
        for _ in range(depth - 1):
            signal = s(z)
            if draw_weights:
                weight = normal(chunk, width, width) * math.sqrt(C_W / width)
                delta = (weight @ signal[..., None])[..., 0] + math.sqrt(C_b) * normal(chunk, width)
            else:
                delta = (C_b + C_W * signal.square().mean(1, keepdim=True)).sqrt() * normal(chunk, width)
            z = gamma * z + delta
        total, fourth = z.double().square().sum(1), z.double().pow(4).sum(1)
        pairs.append((total**2 - fourth) / (width * (width - 1)))
        means.append(total / width)
    pair, mean = torch.cat(pairs), torch.cat(means)
    # The influence of one network on mean(pair) - mean(mean)^2.
    influence = pair - 2 * mean.mean() * mean
    return width * float(pair.mean() - mean.mean() ** 2), width * float(influence.std()) / math.sqrt(count)


def extrapolated(width, **settings):
    """Two widths, O(1/n) removed, with the standard error."""
    (coarse, coarse_error), (fine, fine_error) = (sampled_vertex(width=n, **settings) for n in (width, 2 * width))
    return 2 * fine - coarse, math.hypot(2 * fine_error, coarse_error)


@pytest.mark.slow
def test_relu_vertex_of_sampled_networks_and_not_the_quartic_closure():
    gamma, depth = 0.7, 8
    C_W = 2 * (1 - gamma**2)
    theory = residual_flow("relu", gamma, 0.0, C_W, 1.0, depth).V[-1]
    assert within(theory, "28.9")
    # Closing the flow on V alone: the persistent neurons are taken for uncorrelated but for G.
    naive = (depth - 1) * ((1 - gamma**2) ** 2 * 5 + 4 * gamma**2 * (1 - gamma**2))
    assert within(naive, "16.1")
    value, error = extrapolated(
        256, s=torch.relu, gamma=gamma, C_b=0.0, C_W=C_W, K=1.0, depth=depth, count=40_000, draw_weights=False
    )
    # The next order is (V/n)^2/3 ~ (29/256)^2/3 = 0.4 %, times -1/2 after extrapolation.
    assert abs(value - theory) < 4 * error + 0.002 * theory
    assert error < 0.03 * theory
    assert value - naive > 10 * error


def test_drawn_weights_have_the_law_of_the_sampled_ones():
    """W s given s is Gaussian with variance G: the same estimate at the same width, here with weights really drawn."""
    settings = dict(s=torch.relu, gamma=0.7, C_b=0.0, C_W=1.02, K=1.0, depth=8, width=48, chunk=250)
    drawn, drawn_error = sampled_vertex(count=4_000, draw_weights=True, **settings)
    law, law_error = sampled_vertex(count=100_000, draw_weights=False, **settings)
    assert abs(drawn - law) < 4 * math.hypot(drawn_error, law_error)
    assert drawn_error < 0.15 * law
    assert drawn - 16.1 > 4 * drawn_error  # 1/n corrections raise V, here as in the plain MLP (1 + 5/n)^L


@pytest.mark.parametrize(("name", "s"), [("tanh", torch.tanh), ("gelu", torch.nn.functional.gelu)])
def test_vertex_of_sampled_networks_off_criticality(name, s):
    gamma, C_b, C_W, K, depth = 0.8, 0.05, 0.9, 1.5, 6
    theory = residual_flow(name, gamma, C_b, C_W, K, depth)
    assert max(theory.K) / min(theory.K) > 1.1
    value, error = extrapolated(
        96, s=s, gamma=gamma, C_b=C_b, C_W=C_W, K=K, depth=depth, count=80_000, draw_weights=False
    )
    # (V/nK^2)^2 is left at next order.
    rest = (theory.V[-1] / theory.K[-1] ** 2 / 96) ** 2
    assert abs(value - theory.V[-1]) < 4 * error + rest * theory.V[-1]
    assert error < 0.05 * theory.V[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(residual=1.0), "residual: 1 given.*0 <= gamma < 1"),
        (dict(residual=-0.2), "residual: -0.2 given"),
        (dict(C_b=-1.0), "C_b: -1 given"),
        (dict(C_W=math.nan), "C_W: nan given"),
        (dict(K=0.0), "give a first kernel > 0"),
        (dict(depth=0), "at least one layer"),
        (dict(activation="rleu"), "'rleu' given"),
    ],
)
def test_errors_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        residual_flow(**{"activation": "relu", "residual": 0.5, "C_b": 0.0, "C_W": 1.0, "K": 1.0, "depth": 3, **change})


def test_undeclared_kink_is_refused_by_name():
    with pytest.raises(QuadratureError, match="smooth"):
        residual_flow(lambda z: torch.relu(z - 0.3), 0.5, 0.0, 1.0, 1.0, 2)


def test_vertex_growth_is_bounded_by_its_tail():
    """gamma -> 1: nu ~ 14.8 (1 - gamma^2) for ReLU; the sum over layers becomes an integral over log-correlation."""
    total, _ = integrate.quad(lambda t: two_slope_covariance(0.0, math.exp(-t)), 0, 40, epsabs=1e-12, limit=200)
    gamma = 0.999
    growth = vertex_growth("relu", 2 * (1 - gamma**2), 1.0, gamma)
    # 2 sum_k -> 2/ln(1/gamma) int dt, with C_W^2 = 4 (1 - gamma^2)^2; the trapezoid is off by order (1 - gamma).
    assert growth / (1 - gamma**2) == pytest.approx(8 * total * 2, rel=3e-3)
    assert growth / (1 - gamma**2) == pytest.approx(14.8, abs=0.1)
