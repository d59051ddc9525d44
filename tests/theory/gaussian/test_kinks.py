"""Activations with a kink: exact four-label moments, responses against explicit derivatives, what diverges."""

import itertools
import math
import warnings

import pytest
import torch
from scipy import integrate, stats

from torch_eft.theory import Activation, MLPEnsemble, get_activation, initial_statistics, leaky_relu, vertex_block
from torch_eft.theory.gaussian.four_point_moments import SummedMoments
from torch_eft.theory.gaussian.orthant import SignedMoments
from torch_eft.theory.gaussian.piecewise import PiecewisePairs
from torch_eft.theory.gaussian.points import KinkedPoints
from torch_eft.theory.gaussian.scale_invariant import ScaleInvariantMoments, ScaleInvariantPairs
from torch_eft.theory.gaussian.two_point_moments import two_point_moments

HYPERPARAMETERS = dict(C_b=(0.2, 0.1, 0.3), C_W=(1.3, 1.5, 1.2), lambda_b=(0.5, 1.0, 0.2), lambda_W=(1.0, 0.7, 1.2))


def covariance(count, seed=0, C_b=0.2, dimension=5):
    x = torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return C_b + 1.1 * x @ x.T / dimension


def inputs(count=2, seed=7):
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_monomials_times_signs_against_sampling():
    """<prod z^k prod sgn z> for every choice of signs; 4 standard errors, 700 numbers of which 56 are not trivial."""
    K = covariance(4)
    moments = SignedMoments(tuple(tuple(K[i, j] for j in range(4)) for i in range(4)))
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1_000_000, 4, dtype=torch.float64, generator=generator) @ torch.linalg.cholesky(K).T
    for powers in ((0, 0, 0, 0), (1, 0, 0, 1), (1, 1, 1, 1), (2, 1, 1, 0), (2, 0, 1, 0), (0, 1, 0, 0), (2, 0, 0, 0)):
        monomial = (z ** torch.tensor(powers)).prod(1)
        for count in range(5):
            for signs in itertools.combinations(range(4), count):
                if (sum(powers) + count) % 2:
                    assert float(moments(powers, signs)) == 0
                    continue
                value = monomial * z[:, list(signs)].sign().prod(1)
                error = float(value.std()) / 1000
                assert abs(float(value.mean() - moments(powers, signs))) <= 4 * error + 1e-12, (powers, signs)


def test_signs_of_coinciding_labels_multiply_to_one():
    K = covariance(2)
    rho = float(K[0, 1] / (K[0, 0] * K[1, 1]).sqrt())
    for word in itertools.product((0, 1), repeat=4):
        moments = SignedMoments(tuple(tuple(K[i, j] for j in word) for i in word))
        odd = word.count(0) % 2
        expected = 2 / math.pi * math.asin(rho) if odd else 1.0
        assert float(moments((0, 0, 0, 0), (0, 1, 2, 3))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_two_exact_routes_agree_on_four_labels(seed):
    """Plackett's one-dimensional integral against a four-dimensional rule split at every kink, and its error.

    With 14 nodes a side the second is right to 1e-10 here (its difference from 18), the first to rounding.
    """
    sigma, K = leaky_relu(0.1), covariance(4, seed)
    exact = ScaleInvariantMoments(sigma.slopes, K, False)
    summed = SummedMoments(sigma, K, KinkedPoints(K, 14), two_point_moments(sigma, K))
    everything = torch.arange(4)
    for orders in ((0, 0, 0, 0), (0, 0, 1, 1), (1, 1, 1, 1), (1, 0, 1, 0)):
        factors = [((order,), everything) for order in orders]
        torch.testing.assert_close(exact.moment(factors), summed.moment(factors), rtol=0, atol=1e-9)


@pytest.mark.parametrize("distributional", [False, True])
def test_two_exact_routes_agree_on_two_labels(distributional):
    """Quadrants and delta functions, which know nothing of slopes, against the closed forms."""
    K, slopes = covariance(4), (0.1, 1.0)
    sigma = Activation("leaky", lambda z: torch.where(z > 0, z, 0.1 * z), kinks=(0.0,))
    general, closed = PiecewisePairs(sigma, K, distributional), ScaleInvariantPairs(slopes, K, distributional)
    words = [((0,), (0,)), ((1,), (1,)), ((0, 0), (1, 1)), ((1, 1), (1, 0)), ((2,), (0,)), ((2, 1), (1, 0))]
    words += [((2,), (1, 1, 0)), ((2, 1, 1), (0,)), ((2, 0), (1, 1))]
    for first, second in words:
        torch.testing.assert_close(general.explicit(first, second), closed.explicit(first, second), rtol=0, atol=1e-12)
    for p, q, i, j in [
        *((0, 0, *ij) for ij in ((2, 0), (1, 1), (0, 2), (4, 0), (3, 1), (2, 2))),
        *((1, 1, *ij) for ij in ((2, 0), (1, 1), (4, 0), (3, 1), (2, 2))),
        (1, 0, 1, 0),
        (1, 0, 0, 1),
    ]:
        torch.testing.assert_close(general.response(p, q, i, j), closed.response(p, q, i, j), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["elu", "selu", "softsign"])
@pytest.mark.parametrize("order", [0, 1])
def test_responses_are_derivatives_of_expectations(name, order):
    """Differences of <s_a s_b> and <s'_a s'_b> in K, entries and (merged labels) the diagonal; error h^2."""
    sigma, K = get_activation(name), covariance(2)

    def mean(changed):
        return PiecewisePairs(sigma, changed, False).explicit((order,), (order,))

    def response(i, j):
        return PiecewisePairs(sigma, K, False).response(order, order, i, j)

    def differences(direction, entry, h):
        up, down = mean(K + h * direction)[entry], mean(K - h * direction)[entry]
        return float(up - down) / (2 * h), float(up + down - 2 * mean(K)[entry]) / h**2

    aa, ab = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    second = response(2, 0) / 2 + response(1, 1) + response(0, 2) / 2
    fourth = response(4, 0) + 4 * response(3, 1) + 6 * response(2, 2) + 4 * response(1, 3) + response(0, 4)
    for direction, entry, slope, curvature in (
        (aa, (0, 1), response(2, 0)[0, 1] / 2, response(4, 0)[0, 1] / 4),
        (ab, (0, 1), response(1, 1)[0, 1], response(2, 2)[0, 1]),
        (aa, (0, 0), second[0, 0], fourth[0, 0] / 4),
    ):
        coarse, fine = differences(direction, entry, 4e-3), differences(direction, entry, 2e-3)
        for expected, a, b in zip((float(slope), float(curvature)), coarse, fine, strict=True):
            richardson = (4 * b - a) / 3
            assert abs(richardson - expected) < max(0.2 * abs(b - a), 1e-8), (expected, a, b)


def mollified_relu(beta):
    """E[relu(z + u / beta)], u ~ N(0, 1): smooth, ReLU as beta grows, corrections in 1 / beta^2."""
    return Activation(
        f"relu smoothed {beta}",
        lambda z: (
            z * torch.special.ndtr(beta * z) + torch.exp(-((beta * z) ** 2) / 2) / (beta * math.sqrt(2 * math.pi))
        ),
    )


def mollified_elu(beta):
    """E[elu(z + u / beta)]."""
    return Activation(
        f"elu smoothed {beta}",
        lambda z: (
            z * torch.special.ndtr(beta * z)
            + torch.exp(-((beta * z) ** 2) / 2) / (beta * math.sqrt(2 * math.pi))
            + torch.exp(z + 0.5 / beta**2) * torch.special.ndtr(-beta * z - 1 / beta)
            - torch.special.ndtr(-beta * z)
        ),
    )


def ensemble_of(activation):
    return MLPEnsemble([3, 30, 40, 2], activation, **HYPERPARAMETERS)


@pytest.mark.parametrize(
    ("kinked", "smooth", "names"),
    [
        pytest.param("relu", mollified_relu, ("V", "P", "Q"), marks=pytest.mark.slow),
        pytest.param("elu", mollified_elu, ("P", "Q", "R", "T"), marks=pytest.mark.slow),
        pytest.param("elu", mollified_elu, ("S", "U"), marks=pytest.mark.slow),
    ],
)
def test_distributional_statistics_are_the_limit_of_smooth_ones(kinked, smooth, names):
    """Layer 3, entries with repeated labels included; sharpness 4, 8, 16, extrapolated.

    Where jumps are squared the correction is of first order in 1 / beta, else of second: eliminating the first order
    leaves ``linear``, eliminating both ``quadratic``, and their difference bounds the error of the latter.
    """
    x = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of R .. U, which are not asked for where they are NaN
        limit = initial_statistics(ensemble_of(kinked), x, statistics=names, kinks="distributional")[-1]
    runs = [initial_statistics(ensemble_of(smooth(beta)), x, statistics=names)[-1] for beta in (4.0, 8.0, 16.0)]
    for name in names:
        assert not any(run.error for run in runs)
        coarse, middle, fine = (getattr(run, name) for run in runs)
        linear, quadratic = 2 * fine - middle, (8 * fine - 6 * middle + coarse) / 3
        expected = getattr(limit, name)
        scale, error = float(expected.abs().max()), float((linear - quadratic).abs().max())
        assert error < 0.03 * scale, (name, error / scale)
        assert float((quadratic - expected).abs().max()) < error, name


@pytest.mark.slow
def test_autograd_and_distributional_differ_for_the_differentials_alone():
    x = inputs()
    autograd, limit = (
        initial_statistics(ensemble_of("selu"), x, statistics=("V", "A", "P", "Q"), kinks=k)[-1]
        for k in ("autograd", "distributional")
    )
    for name in ("V", "A"):
        torch.testing.assert_close(getattr(autograd, name), getattr(limit, name), rtol=0, atol=1e-9)
    for name in ("P", "Q"):
        difference = (getattr(autograd, name) - getattr(limit, name)).abs().max()
        assert float(difference) > 0.1 * float(getattr(limit, name).abs().max())


def test_what_diverges_is_nan_and_named():
    x = inputs()
    with pytest.warns(UserWarning, match=r"R, S, T, U of relu are NaN with kinks='distributional'"):
        layers = initial_statistics(ensemble_of("relu"), x, kinks="distributional")
    assert not torch.isnan(layers[0].R).any()
    for name in ("R", "S", "T", "U"):
        assert bool(torch.isnan(getattr(layers[-1], name)).all())
    for name in ("V", "A", "B", "D", "F", "P", "Q", "G1", "Theta1"):
        assert bool(torch.isfinite(getattr(layers[-1], name)).all())


def test_the_divergence_is_linear_in_the_sharpness():
    """S of smoothed ReLU, one input, layer 2: slope <s''^2 s'^2> T^3 / beta = T^3 int phi^2 Phi^2 / sqrt(2 pi K)."""
    x = inputs()[:1]
    K = float(x[0] @ x[0]) / 3
    integral, _ = integrate.quad(lambda u: stats.norm.pdf(u) ** 2 * stats.norm.cdf(u) ** 2, -9, 9)
    slope = integral * (1 + K) ** 3 / math.sqrt(2 * math.pi * K)
    a, b, c = (
        float(initial_statistics(MLPEnsemble([3, 30, 2], mollified_relu(beta)), x, statistics=["S"])[-1].S)
        for beta in (4.0, 8.0, 16.0)
    )
    coarse, fine = (b - a) / 4, (c - b) / 8
    assert abs(2 * fine - coarse - slope) < abs(fine - coarse)  # S = slope beta + c_0 + c_1 / beta + ..


def test_bad_input_says_which_and_what_to_do():
    x = inputs(3)
    ensemble = ensemble_of("relu")
    with pytest.raises(ValueError, match=r"x: inputs 0 and 2 have correlation 1 .* Keep one of them"):
        initial_statistics(ensemble, torch.stack([x[0], x[1], x[0]]))
    parallel = MLPEnsemble([3, 30, 2], "selu")
    with pytest.raises(ValueError, match=r"x: inputs 0 and 1 have correlation -1"):
        initial_statistics(parallel, torch.stack([x[0], -x[0]]))
    with pytest.raises(ValueError, match=r"x: input 1 has zero norm and C_b = 0"):
        initial_statistics(MLPEnsemble([3, 30, 2], "tanh"), torch.stack([x[0], 0 * x[0]]))
    with pytest.raises(ValueError, match=r"ensemble: r = L/n = 1.5 >= 1.*check_validity=False"):
        initial_statistics(MLPEnsemble([3, 2, 2, 1], "tanh"), x)
    with pytest.raises(ValueError, match=r"r = L/n"):
        vertex_block(MLPEnsemble([3, 2, 2, 1], "tanh"), x, name="V", labels="aaaa", label_sets={"a": torch.arange(3)})
    assert (
        initial_statistics(MLPEnsemble([3, 2, 2, 1], "tanh"), x, statistics=["V"], check_validity=False)[-1]
        .V.isfinite()
        .all()
    )
    initial_statistics(MLPEnsemble([3, 2, 2, 1], "tanh"), torch.stack([x[0], 0 * x[0]]), statistics=("K", "Theta"))
    with pytest.raises(ValueError, match=r"kinks: 'both' given"):
        initial_statistics(ensemble, x, kinks="both")
    with pytest.raises(ValueError, match=r"activation: hardswish has kinks at -3, 3"):
        initial_statistics(ensemble_of("hardswish"), x)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            (z,) = ctx.saved_tensors
            return gradient * (1 - z.tanh() ** 2)

    with pytest.raises(ValueError, match=r"activation: once has no derivative of order 2 by automatic differentiation"):
        initial_statistics(ensemble_of(Activation("once", Once.apply)), x)


@pytest.mark.parametrize("name", ["gelu", "tanh"])
def test_control_variate_lowers_the_sampling_error(name):
    """Eight inputs, exact four-label values on subsets: the error with the lowest chaos removed is smaller."""
    from torch_eft.theory.gaussian.points import GridPoints, quadrature_spacings, sample_points

    sigma, K = get_activation(name), 0.4 * covariance(8, dimension=6)
    pairs, errors = two_point_moments(sigma, K), {True: [], False: []}
    samples = {
        (control, seed): SummedMoments(sigma, K, sample_points(K, 4096, seed), pairs, control)
        for control in errors
        for seed in range(4)
    }
    for subset in ([0, 3, 5, 6], [1, 2, 4, 7]):
        index = torch.tensor(subset)
        small = K[index][:, index]
        # Right to 3e-5 at this step; the samples are to 1e-2.
        points = GridPoints(small, [1.5 * h for h in quadrature_spacings(sigma, small)])
        exact = SummedMoments(sigma, small, points, two_point_moments(sigma, small))
        for orders in ((0, 0, 0, 0), (0, 0, 1, 1), (1, 1, 1, 1), (2, 1, 1, 0), (3, 1, 1, 1)):
            expected = exact.moment([((order,), torch.arange(4)) for order in orders])
            for (control, _), moments in samples.items():
                value = moments.moment([((order,), index) for order in orders])
                errors[control].append(float((value - expected).square().mean()) / float(expected.square().mean()))
    assert sum(errors[True]) < 0.7 * sum(errors[False])
    assert math.sqrt(max(errors[True])) < 0.1
