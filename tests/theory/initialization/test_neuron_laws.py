"""Weights and biases that are not Gaussian, on several inputs: kernels and vertices against integrals and draws."""

import math

import pytest
import torch

from tests.oracles.drawn_networks import drawn, mean_and_error
from torch_eft.theory import MLPEnsemble, initial_statistics, leaky_relu, vertex_block
from torch_eft.theory.estimates.seed_spread import single_input_statistics
from torch_eft.theory.gaussian.quadrature import gauss_legendre
from torch_eft.theory.initialization.infinite_width import infinite_width
from torch_eft.theory.initialization.vertex_tiles import VertexTiles

LAWS = {
    "default": {"weight_law": "uniform", "bias_law": "uniform", "C_b": [1 / 9, 1 / 48, 1 / 60], "C_W": 1 / 3},
    "truncated": {"weight_law": "truncated normal", "bias_law": "truncated normal", "C_b": 0.3, "C_W": 1.5},
    "orthogonal": {"weight_law": "orthogonal", "bias_law": "uniform", "C_b": 0.2, "C_W": 1.4},
}


def inputs(count, n_0, seed=0):
    return torch.randn(count, n_0, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def neuron(law, weight_law, C_b, C_W, x, count):
    """Preactivations of layer 1, drawn, (count, N)."""
    generator = torch.Generator().manual_seed(0)
    W = drawn(weight_law, C_W / x.shape[1], (count, x.shape[1]), generator)
    return W @ x.T + drawn(law, C_b, (count, 1), generator)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("tanh", "default"),
        pytest.param("gelu", "truncated", marks=pytest.mark.slow),
        pytest.param("tanh", "orthogonal", marks=pytest.mark.slow),
    ],
)
def test_equal_labels_are_the_scalar_recursions_of_one_input(name, law):
    ensemble = MLPEnsemble([3, 16, 20, 2], name, lambda_b=0.7, lambda_W=[2, 1.0, 1.5], **LAWS[law])
    x = inputs(1, 3)
    names = ("V", "D", "F", "A", "B", "G1", "E_zzzz", "E_HH")
    last = initial_statistics(ensemble, x, statistics=names)[-1]
    one = single_input_statistics(ensemble, x)
    for field in ("K", "Theta", *names):
        value, expected = float(getattr(last, field).flatten()[0]), float(getattr(one, field)[0])
        assert value == pytest.approx(expected, rel=1e-6), field  # 1e-7: the response of G1 differentiates twice


@pytest.mark.parametrize("C_W", [pytest.param(0.7, marks=pytest.mark.slow), 0.02])
def test_two_slopes_with_a_uniform_bias_against_a_nested_integral(C_W):
    """<s s> and <s' s'>: for every b of a fine grid, over u_a the exact mean over u_b given u_a.

    The standard deviation of u is as large as the bias, or a tenth of it, as in deep default networks.
    """
    slopes = (0.2, 1.0)
    ensemble = MLPEnsemble(
        [2, 8, 8, 1], leaky_relu(slopes[0]), C_b=[0.0, 0.5, 0.0], C_W=[1.0, C_W, 1.0], bias_law="uniform"
    )
    x = torch.tensor([[1.0, 0.3], [0.9, 0.5], [-0.4, 1.2]], dtype=torch.float64)
    K, Theta, pairs = infinite_width(ensemble, x)
    g = K[1] - 0.5
    nodes, weights = gauss_legendre(40, x)

    def mean(a, b, order):
        s = float(g[a, a]) ** 0.5
        slope, left = float(g[a, b] / g[a, a]), float(g[b, b] - g[a, b] ** 2 / g[a, a]) ** 0.5
        total = 0.0
        for bias, share in zip((1.5**0.5 * nodes).tolist(), (weights / 2).tolist(), strict=True):
            # Panels between the kink of s(u_a + b) and the place where that of s(u_b + b) is crossed.
            edges = sorted({-9 * s, -bias, -bias / slope, 9 * s} | {-bias / slope + k * left for k in (-4, 4)})
            edges = [edge for edge in edges if -9 * s <= edge <= 9 * s]
            for low, high in zip(edges[:-1], edges[1:], strict=True):
                u = low + (high - low) / 2 * (nodes + 1)
                density = torch.exp(-((u / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi)) * weights * (high - low) / 2
                z, center = u + bias, slope * u + bias
                up = (1 + torch.erf(center / (left * 2**0.5))) / 2
                edge = left * torch.exp(-((center / left) ** 2) / 2) / math.sqrt(2 * math.pi)
                one = torch.where(z > 0, 1.0, slopes[0])
                if order == 0:
                    inner = slopes[0] * center + (1 - slopes[0]) * (center * up + edge)
                    one = one * z
                else:
                    inner = slopes[0] + (1 - slopes[0]) * up
                total += share * float((density * one * inner).sum())
        return total

    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert float(pairs[1].explicit((0,), (0,))[a, b]) == pytest.approx(mean(a, b, 0), abs=1e-6)
        assert float(pairs[1].explicit((1,), (1,))[a, b]) == pytest.approx(mean(a, b, 1), abs=1e-6)
    torch.testing.assert_close(K[2], pairs[1].explicit((0,), (0,)))
    torch.testing.assert_close(Theta[2].diagonal()[0], single_input_statistics(ensemble, x).Theta[0])


@pytest.mark.parametrize("name", ["tanh", "gelu", "relu"])
def test_first_layer_of_uniform_weights(name):
    """K and Theta of two layers against drawn neurons; a Gaussian first layer is up to 40 standard errors off."""
    x = inputs(3, 8, seed=3)
    ensemble = MLPEnsemble([8, 16, 1], name, C_b=0.1, C_W=1.0, weight_law="uniform", bias_law="uniform", lambda_W=1.0)
    K, Theta, _ = infinite_width(ensemble, x)
    z = neuron("uniform", "uniform", 0.1, 1.0, x, 200_000)
    s, d = ensemble.activation(z), ensemble.activation(z, 1)
    for a in range(3):
        for b in range(a + 1):
            value, error = mean_and_error(0.1 + s[:, a] * s[:, b])
            assert abs(float(K[1][a, b]) - value) < 4 * error + 2e-3  # cumulants of layer 1 beyond the fourth
            value, error = mean_and_error(1 + s[:, a] * s[:, b] + d[:, a] * d[:, b] * Theta[0][a, b])
            assert abs(float(Theta[1][a, b]) - value) < 4 * error + 4e-3


def patterns(ensemble, z, Theta):
    """Of one hidden layer, neuron by neuron: the joint moments that V, A, D, B, F and E of layer 2 are made of."""
    s, d, dd = (ensemble.activation(z, order) for order in range(3))
    ddd = ensemble.activation(z, 3)
    a, b = 0, 1
    C_W, k4 = ensemble.C_W[1], -1.2
    T = Theta[0]
    ss, O = s[:, a] * s[:, b], s[:, a] * s[:, b] + C_W * T[a, b] * d[:, a] * d[:, b]  # noqa: E741 - lambda_W = 1
    square = s[:, a] ** 2
    slope = (d[:, a] * d[:, b]).square()
    return {
        "V": C_W**2 * (square - square.mean()) * (ss - ss.mean()),
        "D": C_W * (square - square.mean()) * (O - O.mean()),
        "A": (O - O.mean()).square(),
        "F": C_W**2 * ss * d[:, a] * d[:, b] * T[a, b],  # printed 1, 3, 2, 4
        "B": C_W**2 * slope * T[a, a] * T[b, b],
        "E_zzzz": k4 * C_W**2 * ss.square(),
        "E_dHz": k4 * C_W**2 * dd[:, a] * d[:, b] * d[:, a] * s[:, b] * T[a, b] * T[a, a],
        "E_ddI": k4 * C_W**2 * ddd[:, a] * d[:, b] ** 2 * d[:, a] * T[a, b] ** 2 * T[a, a],
    }


LABELS = {"V": "aaab", "D": "aaab", "A": "abab", "F": "aabb", "B": "abab", "E_zzzz": "abab"}
LABELS |= {"E_dHz": "abab", "E_ddI": "abba"}


@pytest.mark.slow
def test_vertices_of_layer_2_are_those_of_drawn_neurons():
    x = inputs(2, 8, seed=5)
    laws = {"C_b": 0.12, "C_W": 1.2, "weight_law": "uniform", "bias_law": "uniform"}
    ensemble = MLPEnsemble([8, 16, 1], "tanh", **laws, lambda_W=1.0)
    Theta = infinite_width(ensemble, x)[1]
    values = patterns(ensemble, neuron("uniform", "uniform", 0.12, 1.2, x, 200_000), Theta)
    sets = {"a": torch.tensor([0]), "b": torch.tensor([1])}
    for vertex, labels in LABELS.items():
        block = vertex_block(ensemble, x, name=vertex, labels=labels, label_sets=sets)
        measured, error = mean_and_error(values[vertex])
        assert abs(float(block.value) - measured) < 4 * error + 0.02 * abs(measured), vertex


def test_sampled_vertices_agree_with_integrated_ones():
    """Five inputs are sampled, four integrated; both under the laws, within the errors they give."""
    x = inputs(5, 6, seed=1)
    options = {"C_b": 0.04, "C_W": 1.3, "weight_law": "uniform", "bias_law": "uniform", "lambda_W": 1.0}
    ensemble = MLPEnsemble([6, 16, 16, 1], "tanh", **options)
    names = ("V",)
    whole = initial_statistics(ensemble, x, statistics=names, num_samples=2**13)[-1]
    part = initial_statistics(ensemble, x[:2], statistics=names)[-1]
    tiles = VertexTiles(ensemble, infinite_width(ensemble, x), 2**13, 2, 0)
    sets = dict.fromkeys("abcd", torch.arange(2))
    tiled = tiles.replicas(sets).combined(lambda source: [(name, source.array(name, 3, "abcd")) for name in names])
    for name in names:
        exact, some = getattr(part, name), getattr(whole, name)[:2, :2, :2, :2]
        assert float((some - exact).square().mean().sqrt()) < 4 * whole.error[name], name
        value, error = tiled[name]
        assert float((value - exact).square().mean().sqrt()) < 6 * error, name


def test_relu_refuses_vertices_with_biases_far_from_gaussian():
    x = torch.eye(2, dtype=torch.float64)
    for C_b, said in ((0.1, True), (0.0, False)):
        ensemble = MLPEnsemble([2, 30, 1], "relu", C_b=C_b, C_W=2.0, bias_law="uniform")
        reason = initial_statistics(ensemble, x, statistics=("V",))[-1].validity.reason
        assert ("take the hidden biases and the first layer's weights as Gaussian" in reason) == said
    deep = MLPEnsemble([2] + [64] * 8 + [1], "relu", C_b=1 / 192, C_W=1 / 3, bias_law="uniform")
    with pytest.raises(ValueError, match=r"theory\.seed_spread is exact for one input"):
        initial_statistics(deep, x, statistics=("V",))
    assert "uniform, which is counted" in initial_statistics(deep, x, statistics=())[-1].validity.reason


@pytest.mark.slow
def test_mean_corrections_of_deep_networks_of_uniform_weights():
    """n (E G - K) and n (E H - Theta) of two inputs, three hidden layers; without E_zzzz and E_zzH ten errors off."""
    widths, count = [32, 16, 16, 16, 1], 60_000
    x = inputs(2, 32)
    options = {"C_W": 1.5, "lambda_W": 1.0}
    ensemble = MLPEnsemble(widths, "tanh", weight_law="uniform", **options)
    last = initial_statistics(ensemble, x, statistics=("G1", "Theta1"))[-1]
    hidden = MLPEnsemble(widths, "tanh", weight_law=["uniform", *["gaussian"] * 3], **options)
    other = initial_statistics(hidden, x, statistics=("G1",))[-1]
    generator, G, H = torch.Generator().manual_seed(0), [], []
    for _ in range(12):
        signal, weights, slopes, shares = x.expand(count // 12, -1, -1), [], [], []
        for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
            shares.append(1 + signal @ signal.mT / n_in)
            if n_out == 1:
                G.append(1.5 * signal @ signal.mT / n_in)
            weights.append(drawn("uniform", 1.5 / n_in, (count // 12, n_out, n_in), generator))
            signal = (signal @ weights[-1].mT).tanh()
            slopes.append(1 - signal**2)
        back, kernel = torch.ones(count // 12, 2, 1, dtype=torch.float64), 0.0
        for layer in reversed(range(4)):
            kernel = kernel + shares[layer] * (back @ back.mT)
            if layer:
                back = (back @ weights[layer]) * slopes[layer - 1]
        H.append(kernel)
    for values, start, correction in ((torch.cat(G), last.K, last.G1), (torch.cat(H), last.Theta, last.Theta1)):
        for a, b in ((0, 0), (0, 1), (1, 1)):
            measured, error = mean_and_error(16 * (values[:, a, b] - start[a, b]))
            assert abs(measured - float(correction[a, b])) < 4 * error
    measured, error = mean_and_error(16 * (torch.cat(G)[:, 0, 0] - last.K[0, 0]))
    assert abs(measured - float(other.G1[0, 0])) > 8 * error
