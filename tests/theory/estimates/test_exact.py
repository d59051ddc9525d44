"""Exact finite-width results against drawn networks, automatic differentiation, closed forms and the order-1/n theory.

Drawn networks are differentiated by autograd, nothing of the theory is used on them; comparisons are in standard
errors, with fixed seeds and networks whose moments are not heavy tailed.
"""

import math

import pytest
import torch
from torch.func import functional_call, jacrev, vmap

from tests.oracles.exact_moments import exact_G_moment_ratio, exact_output_moment_ratio
from tests.oracles.two_layer_linear import two_layer_linear_differentials, two_layer_linear_map
from torch_eft.theory import Activation, MLPEnsemble, initial_statistics, leaky_relu, output_fluctuation
from torch_eft.theory.estimates.exact import dead_probability, exact_statistics

C_W, LAMBDA_B, LAMBDA_W = (1.3, 1.5, 1.2, 1.4), (0.5, 1.0, 0.2, 0.3), (1.0, 0.7, 1.2, 0.8)
X = torch.tensor([[1.0, -0.5, 0.7], [0.2, 1.1, -0.4]], dtype=torch.float64)


def ensemble_of(name, hidden, C_b=(0.0,) * 4):
    depth = len(hidden) + 1
    return MLPEnsemble(
        [3, *hidden, 2], name, C_b=C_b[:depth], C_W=C_W[:depth], lambda_b=LAMBDA_B[:depth], lambda_W=LAMBDA_W[:depth]
    )


def drawn(ensemble, x, count, seed=0):
    """Outputs (S, N, n_L) and NTKs (S, N, N, n_L, n_L) of drawn networks, by automatic differentiation."""
    generator = torch.Generator().manual_seed(seed)
    rates, parameters = {}, {}
    shapes = list(zip(ensemble.widths[:-1], ensemble.widths[1:], strict=True))
    for layer, (n_in, n_out) in enumerate(shapes):
        weight = torch.randn(count, n_out, n_in, dtype=x.dtype, generator=generator)
        bias = torch.randn(count, n_out, dtype=x.dtype, generator=generator)
        parameters[f"{layer}.weight"] = weight * math.sqrt(ensemble.C_W[layer] / n_in)
        parameters[f"{layer}.bias"] = bias * math.sqrt(ensemble.C_b[layer])
        rates[f"{layer}.weight"] = ensemble.lambda_W[layer] / n_in
        rates[f"{layer}.bias"] = ensemble.lambda_b[layer]
    model = torch.nn.ModuleList(torch.nn.Linear(n_in, n_out, dtype=x.dtype) for n_in, n_out in shapes)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, signal):
            for layer, linear in enumerate(self.layers):
                signal = linear(signal if layer == 0 else ensemble.activation.function(signal))
            return signal

    network = Network()

    def output(values):
        return functional_call(network, {f"layers.{key}": value for key, value in values.items()}, (x,))

    z, H = [], []
    for start in range(0, count, 10_000):
        chunk = {key: value[start : start + 10_000] for key, value in parameters.items()}
        z.append(vmap(output)(chunk))
        jacobians = vmap(jacrev(output))(chunk)
        H.append(
            sum(torch.einsum("saim,sbjm->sabij", J.flatten(3), J.flatten(3)) * rates[k] for k, J in jacobians.items())
        )
    return torch.cat(z), torch.cat(H)


def second_moments(z, H, last):
    """{name: (S, N, N, N, N)}, whose mean over networks is the vertex over n_{l-1}; both outputs are used alike."""
    K, Theta, e = last.K, last.Theta, torch.einsum
    zz = e("sai,sbj->sabij", z, z)
    products = {"V": (zz, zz, K, K), "D": (zz, H, K, Theta), "A": (H, H, Theta, Theta)}
    found = {
        key: (e("sab,scd->sabcd", X[..., 0, 0], Y[..., 1, 1]) + e("sab,scd->sabcd", X[..., 1, 1], Y[..., 0, 0])) / 2
        - e("ab,cd->abcd", x, y)
        for key, (X, Y, x, y) in products.items()
    }
    for key, left in (("F", zz), ("B", H)):
        both = (
            e("sab,scd->sabcd", left[..., 0, 1], H[..., 0, 1]) + e("sab,scd->sabcd", left[..., 1, 0], H[..., 1, 0])
        ) / 2
        found[key] = both.transpose(2, 3)  # in printed order 1324
    return found


def z_scores(values, expected):
    """(mean - expected) / standard error, and the standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    return (values.mean(0) - expected) / error, error


@pytest.mark.parametrize(
    ("name", "hidden", "C_b", "x"),
    [
        ("relu", (6,), (0.0,) * 4, X[:1]),
        pytest.param("relu", (7, 5), (0.0,) * 4, X[:1], marks=pytest.mark.slow),
        pytest.param("relu", (6, 8, 7), (0.2, 0.1, 0.3, 0.1), X[:1], marks=pytest.mark.slow),
        pytest.param("leaky_relu(0.3)", (5, 7), (0.0,) * 4, X[:1], marks=pytest.mark.slow),
        pytest.param("abs", (4, 6), (0.0, 0.1, 0.0, 0.0), X[:1], marks=pytest.mark.slow),
        pytest.param("linear", (3, 5, 4), (0.0,) * 4, X, marks=pytest.mark.slow),
        ("linear", (4, 3), (0.2, 0.1, 0.3, 0.1), X),
    ],
)
def test_second_moments_of_drawn_networks(name, hidden, C_b, x):
    """K, Theta, V, A, B, D, F: every entry within 4 standard errors; V and A to order 1/n are not."""
    activation = leaky_relu(0.3) if name.startswith("leaky") else name
    ensemble, n = ensemble_of(activation, hidden, C_b), hidden[-1]
    z, H = drawn(ensemble, x, 300_000, seed=20 + len(hidden))
    last = exact_statistics(ensemble, x)[-1]
    means = {
        "K": (torch.einsum("sai,sbi->sab", z, z) / 2, last.K),
        "Theta": (H.diagonal(dim1=3, dim2=4).mean(-1), last.Theta),
    }
    means |= {key: (value, getattr(last, key) / n) for key, value in second_moments(z, H, last).items()}
    for key, (values, expected) in means.items():
        scores, _ = z_scores(values, expected)
        assert float(scores.abs().max()) < 4, (key, scores)
    if len(hidden) == 1:
        return  # one hidden layer: V, A, D, F, B are their own limits
    leading = initial_statistics(ensemble, x, statistics=("V", "A"), check_validity=False)[-1]
    for key in ("V", "A"):
        scores, _ = z_scores(means[key][0], getattr(leading, key) / n)
        assert float(scores.abs().max()) > 4, key


def test_ntk_of_one_network_is_what_the_recursion_averages():
    """E[H_11^2], E[H_11 H_22], E[H_12^2] in full: the first holds A and B together."""
    ensemble = ensemble_of("relu", (6, 8))
    _, H = drawn(ensemble, X[:1], 100_000, seed=5)
    H, last, n = H[:, 0, 0], exact_statistics(ensemble, X[:1])[-1], 8
    Theta, A, B = (float(value) for value in (last.Theta, last.A, last.B))
    for values, expected in (
        (H[:, 0, 0].square(), Theta**2 + (A + 2 * B) / n),
        (H[:, 0, 0] * H[:, 1, 1], Theta**2 + A / n),
        (H[:, 0, 1].square(), B / n),
    ):
        score, error = z_scores(values, expected)
        assert abs(float(score)) < 4
        assert float(error) < 0.02 * expected


@pytest.mark.parametrize("name", ["linear", "relu", "leaky_relu(0.3)"])
def test_extrapolated_to_infinite_width_they_are_the_order_one_over_n_theory(name):
    """Exact vertices are polynomials in 1/n of degree (hidden layers - 1): widths 1, 2, 4 times w give their limit."""
    x, hidden = (X if name == "linear" else X[:1]), (4, 7, 5)
    activation = leaky_relu(0.3) if name.startswith("leaky") else name
    C_b = (0.2, 0.1, 0.3, 0.1)
    exact = [exact_statistics(ensemble_of(activation, [k * n for n in hidden], C_b), x)[-1] for k in (1, 2, 4)]
    theory = initial_statistics(
        ensemble_of(activation, hidden, C_b), x, statistics=("V", "A", "B", "D", "F"), num_samples=2**17
    )[-1]
    for key in ("V", "A", "B", "D", "F"):
        one, two, four = (getattr(statistics, key) for statistics in exact)
        limit = one / 3 - 2 * two + 8 * four / 3  # Lagrange's polynomial through 1, 1/2, 1/4, at 0
        scale = float(limit.abs().max())
        sampled = theory.error.get(key, 0.0)
        assert sampled < 0.01 * scale
        rounding = 1e-9 if name == "linear" else 1e-4  # quadrature to 1e-10; sampled sums are in float32
        assert float((limit - getattr(theory, key)).abs().max()) < 4 * sampled + rounding * scale
        # The truncation falls as 1/n: halved by doubled widths, up to the next order.
        assert float((two - limit).norm() / (four - limit).norm()) == pytest.approx(2, abs=0.5)
        assert float((one - limit).norm()) > 0.05 * float(limit.norm())
    for key in ("K", "Theta"):
        for statistics in exact:
            torch.testing.assert_close(getattr(statistics, key), getattr(theory, key), rtol=1e-13, atol=1e-13)


def test_deep_linear_four_point_function_is_multilinear_in_the_inputs():
    """z is linear in x without biases: so is V, exactly, in each label."""
    x = torch.cat([X, X[:1] - 2 * X[1:]])
    V = exact_statistics(ensemble_of("linear", (3, 5, 4)), x)[-1].V
    torch.testing.assert_close(V[2], V[0] - 2 * V[1], rtol=0, atol=1e-13 * float(V.max()))
    torch.testing.assert_close(V, V.permute(2, 3, 0, 1), rtol=0, atol=1e-13 * float(V.max()))
    torch.testing.assert_close(V, V.transpose(0, 1), rtol=0, atol=1e-13 * float(V.max()))


@pytest.mark.parametrize(
    ("name", "nu"), [("linear", 2), ("abs", 2), ("relu", 5), ("leaky_relu", 3 * (1 + 1e-8) * 2 / 1.0001**2 - 1)]
)
def test_second_moment_of_G_is_the_product_over_layers(name, nu):
    hidden = (3, 20, 8)
    ensemble = MLPEnsemble([3, *hidden, 1], name, C_W=C_W)
    product = math.prod(1 + nu / n for n in hidden)
    assert exact_G_moment_ratio(ensemble) == pytest.approx(product, rel=1e-13)
    assert exact_output_moment_ratio(ensemble) == pytest.approx(3 * product, rel=1e-13)
    last = exact_statistics(ensemble, X[:1])[-1]  # the same number out of the four-point recursion
    assert 1 + float(last.V / last.K**2) / hidden[-1] == pytest.approx(product, rel=1e-13)


@pytest.mark.parametrize(("layers", "n", "value"), [(2, 20, 1.5625), (5, 50, 1.6105), (10, 50, 2.594), (10, 20, 9.31)])
def test_critical_relu_numbers(layers, n, value):
    ensemble = MLPEnsemble([3, *[n] * layers, 1], "relu", C_W=2.0)
    assert exact_G_moment_ratio(ensemble) == pytest.approx(value, rel=4e-4)


@pytest.mark.parametrize("power", [1, 2, 3, 5, 40])
def test_moments_of_G_by_other_ways(power):
    """Linear: moments of chi^2. ReLU: a binomial number of active neurons, chi^2 given it. Both for unequal widths."""

    def chi_squared(n):
        return math.prod(n + 2 * k for k in range(power))

    hidden = (3, 11)
    linear = math.prod(chi_squared(n) / n**power for n in hidden)
    relu = math.prod(
        sum(math.comb(n, m) / 2**n * chi_squared(m) for m in range(1, n + 1)) / (n / 2) ** power for n in hidden
    )
    for name, expected in (("linear", linear), ("relu", relu)):
        ensemble = MLPEnsemble([3, *hidden, 1], name, C_W=C_W[:3])
        assert exact_G_moment_ratio(ensemble, power) == pytest.approx(expected, rel=1e-12)
        double_factorial = math.factorial(2 * power) / (2**power * math.factorial(power))
        assert exact_output_moment_ratio(ensemble, power) == pytest.approx(double_factorial * expected, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("C_b", [0.0, (0.4, 0.2, 0.6)])
def test_third_moment_of_G_in_drawn_networks(C_b):
    """With biases, too: G = C_b + C_W |s|^2 / n of the output, in networks that are only run forward."""
    ensemble = MLPEnsemble([3, 8, 7, 1], "relu", C_b=C_b, C_W=C_W[:3])
    generator, signal = torch.Generator().manual_seed(3), X[:1].expand(400_000, 1, 3)
    for layer, (n_in, n_out) in enumerate(((3, 8), (8, 7))):
        weight = torch.randn(len(signal), n_in, n_out, dtype=X.dtype, generator=generator)
        bias = torch.randn(len(signal), 1, n_out, dtype=X.dtype, generator=generator)
        weight, bias = weight * math.sqrt(C_W[layer] / n_in), bias * math.sqrt(ensemble.C_b[layer])
        signal = torch.relu(signal @ weight + bias)
    G = ensemble.C_b[2] + C_W[2] * signal.square().mean((1, 2))
    K = float(initial_statistics(ensemble, X[:1], statistics=("K", "Theta"))[-1].K)
    for power in (2, 3):
        score, error = z_scores((G / K) ** power, exact_G_moment_ratio(ensemble, power, X[:1]))
        assert abs(float(score)) < 4
        assert float(error) < 0.02 * float(((G / K) ** power).mean())
    if C_b == 0.0:
        dead = float((G == 0).double().mean())
        expected = dead_probability(ensemble)
        assert abs(dead - expected) < 4 * math.sqrt(expected / len(G))


@pytest.mark.parametrize("C_b", [0.0, (0.4, 0.2, 0.6, 0.1)])
@pytest.mark.parametrize("name", ["linear", "relu"])
def test_fluctuation_of_wide_networks_is_epsilon_of_order_one_over_n(name, C_b):
    """E[G^2] / E[G]^2 - 1 = V / (n K^2) up to a relative 1/n: nu sum_l 1/n_l without biases."""
    hidden = [k * 10**6 for k in (4, 7, 5)]
    ensemble = MLPEnsemble([3, *hidden, 1], name, C_b=C_b, C_W=C_W)
    epsilon = exact_G_moment_ratio(ensemble, 2, X[:1]) - 1
    assert epsilon == pytest.approx(output_fluctuation(ensemble, X[:1]), rel=1e-5)
    if C_b == 0.0:
        assert epsilon == pytest.approx({"linear": 2, "relu": 5}[name] * sum(1 / n for n in hidden), rel=1e-5)


def test_dead_probability():
    assert dead_probability(MLPEnsemble([3, 1, 2, 1], "relu")) == pytest.approx(1 - 1 / 2 * 3 / 4, rel=1e-14)
    assert dead_probability(MLPEnsemble([3, 100, 100, 1], "relu")) == pytest.approx(2 * 2.0**-100, rel=1e-14)
    assert dead_probability(MLPEnsemble([3, 1000, 1], "relu")) == pytest.approx(2.0**-1000, rel=1e-14)
    for name in ("linear", "leaky_relu", "abs"):
        assert dead_probability(MLPEnsemble([3, 1, 1], name)) == 0.0


def ntk_spread(name, depth, n):
    """E[H_11^2] / E[H]^2 at criticality in NTK parametrization: lambda_W = C_W, lambda_b = 0."""
    C = 2.0 if name == "relu" else 1.0
    ensemble = MLPEnsemble([3, *[n] * (depth - 1), 1], name, C_W=C, lambda_b=0.0, lambda_W=C)
    last = exact_statistics(ensemble, X[:1])[-1]
    return 1 + float((last.A + 2 * last.B) / last.Theta**2) / n


@pytest.mark.parametrize(
    ("depth", "n", "value", "error"),
    [
        (3, 8, 2.014, 0.007),
        (3, 32, 1.215, 0.002),
        (5, 10, 3.49, 0.06),
        (5, 50, 1.308, 0.003),
        (9, 20, 3.92, 0.07),
        (9, 90, 1.369, 0.003),
        (20, 40, 6.4, 0.2),
    ],
)
def test_ntk_spread_of_critical_relu_networks(depth, n, value, error):
    """Against an earlier Monte Carlo in the regime of Hanin & Nica 2020; order 1/n is many errors off."""
    assert abs(ntk_spread("relu", depth, n) - value) < 2.5 * error


@pytest.mark.parametrize(("name", "nu"), [("linear", 2), ("relu", 5)])
def test_ntk_spread_at_fixed_aspect_ratio(name, nu):
    """L, n -> infinity, r = L/n: (e^{nu r} / 3) [1 + 4 (q - 1 + e^{-q}) / q^2], q = (nu + 1) r; not its first order."""
    r = 0.25
    values = [ntk_spread(name, int(r * n), n) for n in (64, 128, 256)]
    limit = values[0] / 3 - 2 * values[1] + 8 * values[2] / 3
    q = (nu + 1) * r
    assert limit == pytest.approx(math.exp(nu * r) / 3 * (1 + 4 * (q - 1 + math.exp(-q)) / q**2), rel=5e-4)
    assert abs(1 + (7 * nu - 2) / 9 * r - limit) > 0.05 * limit


def test_two_layer_linear_network_in_closed_form():
    """Moments of f_i = u.v_i / sqrt(n), H_ij = (d_ij |u|^2 + v_i.v_j) / n by hand; the dNTK and ddNTK on average.

    E f^4 = 3 + 3V/n = 3 (1 + 2/n); Var H_11 = (A + 2B)/n = 4/n, E[H_12^2] = B/n = 1/n, Cov(H_11, H_22) = 2/n;
    E[f^2 H_11] = 2 + (D + 2F)/n = 2 + 4/n, E[f_1 f_2 H_12] = F/n = 1/n.
    """
    n = 5
    ensemble = MLPEnsemble([1, n, 1], "linear", lambda_b=0.0)
    x = torch.ones(1, 1, dtype=torch.float64)
    last = exact_statistics(ensemble, x)[-1]
    expected = {"K": 1.0, "Theta": 2.0, "V": 2.0, "D": 2.0, "F": 1.0, "A": 2.0, "B": 1.0, "G1": 0.0, "Theta1": 0.0}
    for key, value in expected.items():
        assert float(getattr(last, key)) == pytest.approx(value, abs=1e-14), key
    # E[dH f] = 2 E[f^2] / n = (P + 2Q) / n and E[ddII] = E[lam] / n = (S + T + U) / n: exact at order 1/n.
    theory = initial_statistics(ensemble, x, statistics=("P", "Q", "R", "S", "T", "U"))[-1]
    assert float(theory.P + 2 * theory.Q) == pytest.approx(2, rel=1e-10)
    assert float(theory.R) == pytest.approx(0, abs=1e-10)
    assert float(theory.S + theory.T + theory.U) == pytest.approx(2, rel=1e-10)


def test_two_layer_differentials_by_automatic_differentiation():
    n = 6
    u, v = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def output(theta):
        return theta[:n] @ theta[n:] / math.sqrt(n)

    theta = torch.cat([u, v])
    gradient = torch.func.grad(output)(theta)
    hessian = torch.func.hessian(output)(theta)
    cubic = torch.func.jacrev(torch.func.hessian(output))(theta)
    expected = (
        gradient @ gradient,
        gradient @ hessian @ gradient,
        torch.einsum("mnr,m,n,r->", cubic, gradient, gradient, gradient),
        gradient @ hessian @ hessian @ gradient,
    )
    found = two_layer_linear_differentials(output(theta), (u @ u + v @ v) / n, n)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("eta_lam", "target", "scale"), [(0.3, 0.0, 1.0), (1.2, 0.7, 1.0), (2.6, 0.0, 1.0), (3.5, 0.0, 1e-3)]
)
def test_two_layer_map_is_gradient_descent(eta_lam, target, scale):
    """20 steps of torch's SGD, the catapult phase (eta lam > 2) included; output and NTK to 1e-12."""
    n, generator = 16, torch.Generator().manual_seed(1)
    u, v = (torch.randn(n, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    with torch.no_grad():
        v *= scale
    lam = float((u @ u + v @ v).detach() / n)
    eta = eta_lam / lam
    optimizer = torch.optim.SGD([u, v], lr=eta)
    outputs, ntks = [], []
    for _ in range(21):
        f = u @ v / math.sqrt(n)
        gradients = torch.autograd.grad(f, (u, v), retain_graph=True)
        outputs.append(f.detach())
        ntks.append(sum(gradient @ gradient for gradient in gradients))
        optimizer.zero_grad()
        ((f - target) ** 2 / 2).backward()
        optimizer.step()
    f, lam = two_layer_linear_map(outputs[0], ntks[0], eta, n, 20, target)
    torch.testing.assert_close(f, torch.stack(outputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lam, torch.stack(ntks), rtol=1e-12, atol=1e-12)
    assert float((lam[-1] - lam[0]).abs()) > 1e-8  # the NTK did move


def test_catapult():
    """2/lam < eta < 4/lam: the output first grows, then converges, to lam < 2/eta; below, it shrinks at once."""
    f, lam = torch.tensor([1e-2, 1e-2], dtype=torch.float64), torch.tensor([2.0, 2.0], dtype=torch.float64)
    outputs, ntks = two_layer_linear_map(f, lam, 1.3, 100, 200)
    assert outputs.shape == ntks.shape == (201, 2)
    assert float(outputs.abs().max()) > 1
    assert float(outputs[-1].abs().max()) < 1e-3
    assert float(ntks[-1].max()) < 2 / 1.3
    outputs, ntks = two_layer_linear_map(f, lam, 0.3, 100, 200)
    assert bool((outputs.abs().diff(dim=0) <= 0).all())


TANH, RELU = MLPEnsemble([3, 4, 1], "tanh"), MLPEnsemble([3, 4, 1], "relu")
ZERO = Activation("zero", lambda z: 0 * z, slopes=(0.0, 0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_statistics(TANH, X), "activation tanh given; .* scale-invariant .* use initial_statistics"),
        (lambda: exact_statistics(TANH, X[:1]), "activation tanh given"),
        (lambda: dead_probability(TANH), "activation tanh given"),
        (lambda: dead_probability(MLPEnsemble([3, 4, 1], ZERO)), "activation zero given; .* not zero"),
        (lambda: exact_statistics(RELU, X), "x: 2 inputs given; .* linear activations only, not for relu"),
        (lambda: exact_statistics(MLPEnsemble([3, 4, 1], "abs"), X), "not for abs"),
        (lambda: exact_statistics(RELU, X[:, :2]), r"x: \(2, 2\) given"),
    ],
)
def test_unusable_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
