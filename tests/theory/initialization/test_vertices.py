"""Every vertex against Monte Carlo of really drawn finite networks, and its structural properties.

The Monte Carlo averages over the output layer in closed form (``tests.oracles.differentials``, its layer identities
held to automatic differentiation in ``test_layer_identities``) and compares the projection of the measured tensor on
the predicted one, ratio = <measured, theory> / <theory, theory>, with the standard error of batch means.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles.differentials import (
    Patterns,
    kernels_only,
    last_layer_means,
    ntk_sector_means,
    second_layer_patterns,
)
from torch_eft.theory import MLPEnsemble, get_activation
from torch_eft.theory.gaussian.four_point_moments import SummedMoments
from torch_eft.theory.gaussian.points import GridPoints, quadrature_spacings
from torch_eft.theory.gaussian.two_point_moments import two_point_moments
from torch_eft.theory.initialization.statistics import STATISTICS, initial_statistics
from torch_eft.theory.initialization.vertex_blocks import vertex_block, vertex_tiles

C_B, C_W = (0.2, 0.1, 0.3, 0.1), (1.3, 1.5, 1.2, 1.4)
LAMBDA_B, LAMBDA_W = (0.5, 1.0, 0.2, 0.3), (1.0, 0.7, 1.2, 0.8)
FOUR = ("V", "A", "B", "D", "F", "P", "Q", "R", "S", "T", "U")


def ensemble_of(name, hidden):
    layers = len(hidden) + 1
    return MLPEnsemble(
        [3, *hidden, 2],
        name,
        C_b=C_B[:layers],
        C_W=C_W[:layers],
        lambda_b=LAMBDA_B[:layers],
        lambda_W=LAMBDA_W[:layers],
    )


def inputs(count=2, seed=7):
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def first_layer_patterns(x, sigma, widths, count, generator):
    """Layer 1: independent Gaussian neurons with a constant NTK and nothing above it."""
    (n,), samples = widths, len(x)
    z = torch.randn(count, n, 3, dtype=x.dtype, generator=generator) @ x.T * math.sqrt(C_W[0] / 3)
    z = z + torch.randn(count, n, 1, dtype=x.dtype, generator=generator) * math.sqrt(C_B[0])
    H = torch.einsum("km,ab->kmab", torch.eye(n, dtype=x.dtype), LAMBDA_B[0] + LAMBDA_W[0] * x @ x.T / 3)
    cubic, quartic = x.new_zeros(1, 1, 1, *[samples] * 3), x.new_zeros(1, 1, 1, *[samples] * 4)
    cubic, quartic = cubic.expand(count, n, n, -1, -1, -1), quartic.expand(count, n, n, -1, -1, -1, -1)
    return Patterns(z, H.expand(count, -1, -1, -1, -1), cubic, cubic, cubic, quartic, quartic, quartic, quartic)


def sampled(name, hidden, networks, chunk, seed=0):
    """(G, h, means) of drawn networks with the given hidden widths, in single precision, far below the noise."""
    sigma, x = get_activation(name), inputs().float()
    generator = torch.Generator().manual_seed(seed)
    last = len(hidden)
    hyper = (C_B[last], C_W[last], LAMBDA_B[last], LAMBDA_W[last])
    found = []
    for _ in range(networks // chunk):
        if last == 1:
            patterns = first_layer_patterns(x, sigma, hidden, chunk, generator)
            found.append(last_layer_means(patterns, sigma, *hyper))
        elif last == 2:
            patterns = second_layer_patterns(x, sigma, hidden, C_B, C_W, LAMBDA_B, LAMBDA_W, chunk, generator)
            found.append(last_layer_means(patterns, sigma, *hyper))
        else:
            z, H = kernels_only(x, sigma, hidden, C_B, C_W, LAMBDA_B, LAMBDA_W, chunk, generator)
            found.append(ntk_sector_means(z, H, sigma, *hyper))
    means = {key: torch.cat([part[2][key] for part in found]).double() for key in found[0][2]}
    return torch.cat([part[0] for part in found]).double(), torch.cat([part[1] for part in found]).double(), means


def estimates(G, h, means, n, theory):
    """{name: estimate of the vertex}: n times cumulants."""
    Gc, hc = G - G.mean(0), h - h.mean(0)

    def covariance(a, b):
        return n * torch.einsum("sab,scd->abcd", a, b) / (len(a) - 1)

    result = {"V": covariance(Gc, Gc), "A": covariance(hc, hc), "D": covariance(Gc, hc)}
    result |= {key: n * value.mean(0) for key, value in means.items()}
    return result | {"G1": n * (G.mean(0) - theory.K), "Theta1": n * (h.mean(0) - theory.Theta)}


def ratios(name, hidden, networks, chunk, batches=20):
    """{vertex: (measured / theory, standard error)} at the layer above ``hidden``."""
    theory = initial_statistics(ensemble_of(name, hidden), inputs(), statistics=STATISTICS)[-1]
    G, h, means = sampled(name, hidden, networks, chunk)

    def project(values):
        projected = {}
        for key, value in values.items():
            expected = getattr(theory, key)
            if expected.any():
                projected[key] = float((value * expected).sum() / expected.square().sum())
        return projected

    whole = project(estimates(G, h, means, hidden[-1], theory))
    parts = [
        project(estimates(G[part], h[part], {k: v[part] for k, v in means.items()}, hidden[-1], theory))
        for part in torch.arange(len(G)).chunk(batches)
    ]
    return {
        key: (whole[key], float(torch.tensor([part[key] for part in parts]).std()) / math.sqrt(batches))
        for key in whole
    }


@pytest.mark.parametrize(
    "name", ["tanh", *(pytest.param(name, marks=pytest.mark.slow) for name in ("relu", "gelu", "elu", "selu"))]
)
def test_layer_2_is_exact_at_any_width(name):
    """No remainder: 4 standard errors, for all eleven four-label vertices; at a kink as autograd sees them."""
    found = ratios(name, (10,), networks=4000, chunk=200)
    absent = "PRU" if name == "relu" else ""
    assert sorted(found) == sorted(set(FOUR) - set(absent))
    for key, (ratio, error) in found.items():
        assert abs(ratio - 1) < 4 * error, f"{key}: {ratio:.4f} +- {error:.4f}"
        assert error < (0.05 if key in "VAD" else 0.02)


def extrapolated(name, narrow, wide, networks):
    """2 r(2n) - r(n): what is left is of second order, about the square of the remainder seen."""
    first, second = (
        ratios(name, hidden, count, chunk) for hidden, (count, chunk) in zip((narrow, wide), networks, strict=True)
    )
    for key in first:
        (r, e), (r2, e2) = first[key], second[key]
        left = max(abs(r - 1), abs(r2 - 1)) ** 2
        value, error = 2 * r2 - r, math.hypot(e, 2 * e2)
        yield key, value, error, left


@pytest.mark.slow
@pytest.mark.parametrize(("name", "narrow", "wide"), [("tanh", 3200, 2000), ("gelu", 8000, 5000)])
def test_layer_3_tends_to_theory(name, narrow, wide):
    """Unequal widths (n, 3n/2), n = 16 and 32, extrapolated in 1/n; an error of a tenth in any of B .. U is seen."""
    for key, value, error, left in extrapolated(name, (16, 24), (32, 48), ((narrow, 50), (wide, 20))):
        assert abs(value - 1) < 4 * error + left, f"{key}: {value:.3f} +- {error:.3f} (second order {left:.3f})"
        if key in "BFPQRSTU":
            assert 4 * error < 0.12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_layer_4_tends_to_theory(name):
    """Three hidden layers, z and NTK sector; here G1 and Theta1 feed on those of the layer before."""
    counts = ((100_000, 500), (60_000, 250))
    for key, value, error, left in extrapolated(name, (16, 24, 16), (32, 48, 32), counts):
        assert abs(value - 1) < 4 * error + left, f"{key}: {value:.3f} +- {error:.3f} (second order {left:.3f})"


def test_moments_with_four_labels_against_an_exact_result():
    """sigma = sin: <sin sin sin sin> is a sum of sixteen Gaussian characteristic functions."""
    sigma, x = get_activation("sin"), torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    K = 1.2 * x @ x.T / 6
    moments = SummedMoments(sigma, K, GridPoints(K, quadrature_spacings(sigma, K)), two_point_moments(sigma, K))
    for orders in ((0, 0, 0, 0), (0, 0, 1, 1), (2, 1, 1, 0), (3, 1, 1, 1), (2, 2, 1, 1)):
        value = moments.moment([((order,), torch.tensor([label])) for label, order in enumerate(orders)])
        expected = 0.0
        for signs in torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * 4):
            # d^p sin: sin(z + p pi/2) = (e^{iz} i^p - e^{-iz} (-i)^p) / (2 i)
            factor = math.prod(
                complex(0, sign) ** p * sign / 2j for sign, p in zip(signs.tolist(), orders, strict=True)
            )
            expected += (factor * math.exp(-float(signs @ K @ signs) / 2)).real
        assert float(value) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_quadrature_of_four_labels_does_not_depend_on_the_step(name):
    """The rule at the step it chose, and at two thirds of it."""
    sigma, x = get_activation(name), inputs(3)
    K = 0.1 + 1.3 * x @ x.T / 3
    pairs, chosen = two_point_moments(sigma, K), quadrature_spacings(sigma, K)
    coarse, fine = (SummedMoments(sigma, K, GridPoints(K, [h / finer for h in chosen]), pairs) for finer in (1.0, 1.5))
    everything = torch.arange(3)
    for orders in ((0, 0, 0, 0), (1, 1, 1, 1), (2, 1, 1, 0), (3, 1, 1, 1), (2, 2, 1, 1)):
        factors = [((order,), everything) for order in orders]
        torch.testing.assert_close(coarse.moment(factors), fine.moment(factors), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["B", "V", "Q", "T"])
def test_sampling_agrees_with_integration_within_its_own_error(name):
    """Digits: a block of 40 inputs, entries on random four-subsets, against the integrated values of those four."""
    from torch_eft.cli.demo import load_digits_split

    x_train, _, x_probe = load_digits_split(32, 8)
    x = 0.5 * torch.cat([x_probe, x_train]).double()  # K of order 1/2, where four labels can be integrated
    ensemble = MLPEnsemble([64, 128, 128, 10], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    probe, train = torch.arange(8), torch.arange(8, 40)
    sets = {"x": probe, "y": probe, "g": train, "d": train}
    generator = torch.Generator().manual_seed(3)
    block = vertex_block(ensemble, x, name=name, labels="xygd", label_sets=sets, num_samples=8192, num_replicas=4)
    single, deviations = {label: torch.tensor([index]) for index, label in enumerate("xygd")}, []
    for _ in range(3):
        a, b = torch.randperm(8, generator=generator)[:2].tolist()
        c, d = torch.randperm(32, generator=generator)[:2].tolist()
        exact = vertex_block(ensemble, x[[a, b, 8 + c, 8 + d]], name=name, labels="xygd", label_sets=single)
        assert exact.error == 0  # integrated
        deviations.append(float(block.value[a, b, c, d] - exact.value))
    rms = math.sqrt(sum(v * v for v in deviations) / 3)
    # rms of three deviates over the estimated error (itself from 4 replicas of many entries): chi with 3 degrees.
    assert rms < 2.4 * block.error, f"{name}: rms deviation {rms:.2g}, estimated error {block.error:.2g}"


def test_tiles_fit_together():
    x = inputs(10)
    ensemble = ensemble_of("tanh", (20, 20))
    found = torch.full((10,) * 4, math.nan, dtype=torch.float64)
    for tile in vertex_tiles(ensemble, x, name="S", tile=4, num_samples=4096):
        found[tile.rows, tile.columns] = tile.value
        assert tile.error > 0
    sets = dict.fromkeys("abcd", torch.arange(10))
    whole = vertex_block(ensemble, x, name="S", labels="abcd", label_sets=sets, num_samples=4096)
    assert float((found - whole.value).square().mean().sqrt()) < 4 * whole.error


@pytest.mark.parametrize("name", ["V", "Q", "T", "Theta1"])
def test_equal_label_sets_give_the_same_values_whether_or_not_they_are_one_tensor(name):
    labels = "xy" if name == "Theta1" else "xygd"
    x, ensemble, one = inputs(3), ensemble_of("tanh", (20, 30)), torch.tensor([2, 0])
    shared, apart = dict.fromkeys(labels, one), {label: one.clone() for label in labels}
    block = vertex_block(ensemble, x, name=name, labels=labels, label_sets=shared)
    other = vertex_block(ensemble, x, name=name, labels=labels, label_sets=apart)
    torch.testing.assert_close(block.value, other.value, rtol=1e-11, atol=1e-13)


def statistics(name, hidden, x, names=STATISTICS):
    return initial_statistics(ensemble_of(name, hidden), x, statistics=names)


SYMMETRIES = {
    "V": ["bacd", "cdab"],
    "A": ["bacd", "cdab"],
    "D": ["bacd", "abdc"],
    "B": ["badc", "cdab"],
    "F": ["cdab"],
    "P": ["acbd"],
    "R": ["abdc"],
    "S": ["badc"],
    "T": ["cdab"],
    "U": ["cdab"],
}


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 1000), name=st.sampled_from(["tanh", "gelu", "erf"]))
def test_structure(seed, name):
    """Symmetries, sample permutations, vanishing at layer 1, width scaling, positive covariance of DH."""
    x = inputs(3, seed)
    layers = statistics(name, (16, 24), x)
    wider = statistics(name, (32, 48), x)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    permuted = statistics(name, (16, 24), x[order])[-1]
    last = layers[-1]
    for key in STATISTICS:
        value = getattr(last, key)
        scale = float(value.abs().max())
        if key not in ("K", "Theta"):
            assert not getattr(layers[0], key).any()
        # Only the ratios of widths enter.
        torch.testing.assert_close(getattr(wider[-1], key), value, rtol=0, atol=1e-9 * scale)
        reordered = value
        for axis in range(value.ndim):
            reordered = reordered.index_select(axis, order)
        torch.testing.assert_close(getattr(permuted, key), reordered, rtol=0, atol=1e-8 * scale)
        for image in SYMMETRIES.get(key, []):
            torch.testing.assert_close(torch.einsum(f"abcd->{image}", value), value, rtol=0, atol=1e-8 * scale)
    # Cov(DH_{i1 i2;12}, DH_{i3 i4;34}) for one output: A + B_1324 + B_1423, as a matrix over pairs of samples.
    covariance = last.A + torch.einsum("acbd->abcd", last.B) + torch.einsum("adbc->abcd", last.B)
    matrix = covariance.reshape(9, 9)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-8 * float(matrix.abs().max()))
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-8 * float(matrix.abs().max())


def test_relu_by_exact_results():
    """E[G^2]/E[G]^2 = prod (1 + 5 / n_l): V / K^2 = 5 (l - 1); the mean NTK is corrected off the diagonal only."""
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ensemble = MLPEnsemble([4, 100, 100, 100, 1], "relu", C_W=2.0, lambda_b=0.0, lambda_W=2.0)
    layers = initial_statistics(ensemble, x)
    for layer in layers:
        assert not layer.error
        for a in range(3):
            assert float(layer.V[a, a, a, a] / layer.K[a, a] ** 2) == pytest.approx(5 * (layer.layer - 1), rel=1e-11)
        assert float(layer.Theta1.diagonal().abs().max()) < 1e-11 * float(layer.Theta.max())
        assert not layer.P.any()
        assert not layer.R.any()
        assert not layer.U.any()
    off = layers[-1].Theta1[~torch.eye(3, dtype=torch.bool)].abs()
    assert float(off.max()) > 0.01


def test_deep_linear_networks_by_isserlis():
    """sigma = z, one input: V = 2 K^2 (l - 1) at order 1/n (PDLT 3.2); K and Theta have no correction."""
    x = torch.ones(1, 4, dtype=torch.float64)
    layers = initial_statistics(MLPEnsemble([4, 50, 50, 50, 1], "linear"), x, statistics=STATISTICS)
    for layer in layers:
        assert float(layer.V) == pytest.approx(2 * (layer.layer - 1), abs=1e-9)
        assert float(layer.G1) == pytest.approx(0, abs=1e-9)
        assert float(layer.Theta1) == pytest.approx(0, abs=1e-9)
        assert float(layer.P) == pytest.approx(0, abs=1e-9)


def test_errors_name_the_argument():
    x, ensemble = inputs(), ensemble_of("tanh", (8,))
    with pytest.raises(ValueError, match=r"statistics: 'W' given; give one of 'K', 'G1', 'V'"):
        initial_statistics(ensemble, x, statistics=["V", "W"])
    with pytest.raises(ValueError, match=r"x: 200 inputs need about 286.1 GiB .* memory allows 8.0 GiB"):
        initial_statistics(ensemble, inputs(200), statistics=["V", "A"])
    with pytest.raises(ValueError, match=r"name: 'W' given; give one of 'G1'"):
        vertex_block(ensemble, x, name="W", labels="aabb", label_sets={"a": torch.arange(2), "b": torch.arange(2)})
    with pytest.raises(ValueError, match=r"labels: 'aaz' given; V has 4 labels, 3 given"):
        vertex_block(ensemble, x, name="V", labels="aaz", label_sets={"a": torch.arange(2)})
    with pytest.raises(ValueError, match=r"num_samples: 6 given per replica; 4 independent inputs need more than 8"):
        initial_statistics(ensemble_of("tanh", (8,)), inputs(5), statistics=["A"], num_samples=24)
    with pytest.raises(ValueError, match=r"num_replicas: 1 given; at least 2"):
        initial_statistics(ensemble, inputs(5), statistics=["V"], num_replicas=1)
    with pytest.raises(ValueError, match=r"name: 'G1' given; tiles are for the vertices with four and more labels"):
        next(vertex_tiles(ensemble, x, name="G1"))
    with pytest.raises(ValueError, match=r"layer: 3 given; the layers are 1 .. 2"):
        next(vertex_tiles(ensemble, x, name="V", layer=3))


def test_results_print_shapes():
    last = initial_statistics(ensemble_of("linear", (8,)), inputs(), statistics="V")[-1]
    assert "V: (2, 2, 2, 2) float64" in repr(last)
    assert len(repr(last).splitlines()) < 10
    assert last.validity.numbers["aspect_ratio"] == pytest.approx(0.25)
