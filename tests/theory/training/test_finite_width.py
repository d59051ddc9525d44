"""Order-1/n corrections of training: the reduced formulas against the naive operator, limits and cost."""

import itertools

import pytest
import torch

from tests.oracles.naive_operator import first_order
from torch_eft import Training
from torch_eft.theory import MLPEnsemble, initial_statistics, predict_training
from torch_eft.theory.initialization.estimators import Replicas
from torch_eft.theory.initialization.evaluator import SINGLE_NEURON, SYMMETRIES, printed_labels
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.corrections.mean_output import mean_output
from torch_eft.theory.training.corrections.ntk_change import ntk_change
from torch_eft.theory.training.corrections.output_covariance import output_covariance
from torch_eft.theory.training.infinite_width import FrozenTraining, InfiniteWidthPath

PROBES, TRAIN, OUTPUTS = 1, 2, 2
STEPS = torch.tensor([1, 2, 4])
RATE = 0.08


class KnownTensors:
    """Vertices given as tensors over all points, in the place of the evaluators."""

    depth, kind = 3, "refined"

    def __init__(self, tensors):
        self.tensors = tensors

    def replicas(self, label_sets):
        return Replicas(self.kind, iter([KnownOnSets(self.tensors, label_sets)]))


class KnownOnSets:
    def __init__(self, tensors, sets):
        self.tensors, self.sets, self.axes = tensors, sets, list(sets)

    def array(self, name, layer, letters):
        index = []
        for letter in letters:
            shape = [1] * len(self.axes)
            shape[self.axes.index(letter)] = -1
            index.append(self.sets[letter].reshape(shape))
        return self.tensors[name][tuple(index)]


NAMES = [name for name in SYMMETRIES if len(printed_labels(name)) <= 4]


def symmetrized(tensor, generators):
    """The mean over the group that the generators span."""
    identity = tuple(range(tensor.ndim))
    group, new = {identity}, [identity]
    while new:
        word = new.pop()
        for generator in generators:
            image = tuple(word[slot] for slot in generator)
            if image not in group:
                group.add(image)
                new.append(image)
    return torch.stack([tensor.permute(word) for word in group]).mean(0)


def exact_case():
    """Vertices of a tanh ensemble of unequal widths on 1 probe and 2 training points."""
    ensemble = MLPEnsemble([3, 20, 30, 2], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0)
    x = torch.randn(PROBES + TRAIN, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    last = initial_statistics(ensemble, x)[-1]
    return last.K, last.Theta, {name: getattr(last, name) for name in NAMES}


def random_case():
    """Nothing but the symmetries."""
    generator = torch.Generator().manual_seed(6)
    count = PROBES + TRAIN

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    K, Theta = (root @ root.T / count for root in (normal(count, count), normal(count, count)))
    tensors = {}
    for name in NAMES:
        tensors[name] = symmetrized(normal(*[count] * len(printed_labels(name))), SYMMETRIES[name])
    return K, Theta + 0.3 * torch.eye(count, dtype=torch.float64), tensors


SUMMED = dict(steps=int(STEPS.max()), reduction="sum")
PLAIN = Training(learning_rate=RATE, **SUMMED)
HEAVY_BALL = Training(learning_rate=RATE, momentum=0.7, **SUMMED)
SCHEDULED = Training(schedule=lambda step: RATE * (1 + step) / (2 + step**2), momentum=0.6, nesterov=True, **SUMMED)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((exact_case, PLAIN), id="plain"),
        pytest.param((random_case, HEAVY_BALL), id="heavy ball", marks=pytest.mark.slow),
        pytest.param((random_case, SCHEDULED), id="Nesterov with a schedule", marks=pytest.mark.slow),
    ],
)
def case(request):
    tensors_of, training = request.param
    K, Theta, tensors = tensors_of()
    y = torch.randn(TRAIN, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    naive = first_order(K, Theta, tensors, y, PROBES, OUTPUTS, training, STEPS.tolist())
    path = InfiniteWidthPath(K, Theta, y, training)
    return KnownTensors(tensors), path, naive


def test_mean_output_is_that_of_the_naive_operator(case):
    vertices, path, naive = case
    found, error = mean_output(vertices, path, STEPS, tile=2)
    expected = naive["z"].reshape(len(STEPS), PROBES + TRAIN, OUTPUTS)
    assert error == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    infinite_width = naive["z0"].reshape(len(STEPS), PROBES + TRAIN, OUTPUTS)
    torch.testing.assert_close(path.mean_output(STEPS), infinite_width, rtol=0, atol=1e-12)


def test_drift_is_that_of_the_naive_operator(case):
    """All points stand as probes, so that x = y, probe and train are all there; tiles of one training label."""
    vertices, path, naive = case
    count = PROBES + TRAIN
    found, _ = ntk_change(vertices, path, count, STEPS, tile=1)
    expected = naive["H"].reshape(len(STEPS), count, OUTPUTS, count, OUTPUTS).permute(0, 1, 3, 2, 4)
    Theta1 = vertices.tensors["Theta1"]  # there before training
    expected = expected - torch.einsum("xy,ij->xyij", Theta1, torch.eye(OUTPUTS, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    trace, _ = ntk_change(vertices, path, count, STEPS, trace=True)
    mean_trace = expected.diagonal(dim1=3, dim2=4).mean(3)
    torch.testing.assert_close(trace, mean_trace, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_covariance_is_that_of_the_naive_operator(case):
    """Cov = E zz - E z E z, its part of order 1/n; all points as probes, in tiles of two."""
    vertices, path, naive = case
    count = PROBES + TRAIN
    found, _ = output_covariance(vertices, path, count, STEPS, tile=2)
    cross = torch.einsum("ta,tb->tab", naive["z"], naive["z0"])
    expected = (naive["zz"] - cross - cross.mT).reshape(len(STEPS), count, OUTPUTS, count, OUTPUTS)
    expected = expected.permute(0, 1, 3, 2, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.slow
def test_uniform_read_out_weights_are_those_of_the_naive_operator():
    """E_zzzz .. E_ddII, where all outputs are one, enter the operator as they are, and the theory output by output."""
    ensemble = MLPEnsemble([3, 20, 2], "tanh", C_b=0.01, C_W=1.5, lambda_b=0.3, weight_law="uniform")
    x = torch.randn(PROBES + TRAIN, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y = torch.randn(TRAIN, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    last = initial_statistics(ensemble, x, statistics=(*NAMES, *SINGLE_NEURON))[-1]
    tensors = {name: getattr(last, name) for name in (*NAMES, *SINGLE_NEURON)}
    naive = first_order(last.K, last.Theta, tensors, y, PROBES, OUTPUTS, PLAIN, STEPS.tolist())
    finite = FiniteWidthTraining(FrozenTraining(ensemble, x[PROBES:], y, x[:PROBES], PLAIN))

    def on_points(value):
        return value.reshape(len(STEPS), PROBES + TRAIN, OUTPUTS, PROBES + TRAIN, OUTPUTS).permute(0, 1, 3, 2, 4)

    cross = torch.einsum("ta,tb->tab", naive["z"], naive["z0"])
    covariance = on_points(naive["zz"] - cross - cross.mT)[:, :PROBES, :PROBES]
    Theta1 = torch.einsum("xy,ij->xyij", tensors["Theta1"], torch.eye(OUTPUTS, dtype=torch.float64))
    drift = (on_points(naive["H"]) - Theta1)[:, :PROBES, :PROBES]
    mean = naive["z"].reshape(len(STEPS), PROBES + TRAIN, OUTPUTS)
    for found, expected in (
        (finite.mean_output(STEPS).value, mean),
        (finite.covariance(STEPS).value, covariance),
        (finite.ntk_change(STEPS).value, drift),
        (finite.ntk_trace_drift(STEPS)[0], drift.diagonal(dim1=3, dim2=4).mean(3)),
    ):
        torch.testing.assert_close(20 * found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    without = ntk_change(finite.vertices, finite.path, PROBES, STEPS)[0]
    assert float((without - drift).norm()) > 0.03 * float(drift.norm())  # they are not small


def corrections(vertices, path, steps):
    return [
        mean_output(vertices, path, steps)[0],
        ntk_change(vertices, path, PROBES, steps)[0],
        output_covariance(vertices, path, PROBES, steps)[0],
    ]


def test_gradient_flow_is_the_limit_of_small_steps():
    """Linear in eta: halving the step halves the distance to the flow, but for the next order, a part in 12 * 64."""
    K, Theta, tensors = random_case()
    y = torch.randn(TRAIN, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    vertices = KnownTensors(tensors)

    def at_time_12(parts=1, dynamics="gradient_descent"):
        training = Training(learning_rate=RATE / parts, steps=12 * parts, reduction="sum", dynamics=dynamics)
        return corrections(vertices, InfiniteWidthPath(K, Theta, y, training), torch.tensor([12 * parts]))

    flow = at_time_12(dynamics="gradient_flow")
    fine, finer = at_time_12(64), at_time_12(128)
    for value, first, second in zip(flow, fine, finer, strict=True):
        assert float((first - value).norm() / (second - value).norm()) == pytest.approx(2, rel=0.02)


@pytest.mark.slow
def test_sampled_vertices_agree_with_integrated_ones():
    """One probe and 2 training points, integrated; with two more probes, sampled. Probes do not enter one another's
    corrections, so that the difference is the sampling error: a few entries within 4 of it."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    ensemble = MLPEnsemble([3, 40, 40, 2], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    steps = torch.tensor([5, 20])
    training = Training(learning_rate=0.1, steps=20, reduction="sum")
    exact = FiniteWidthTraining(FrozenTraining(ensemble, x[3:], y, x[:1], training))
    sampled = FiniteWidthTraining(
        FrozenTraining(ensemble, x[3:], y, x[:3], training), num_samples=2**15, num_replicas=8
    )
    assert sampled.vertices.sampled
    assert not exact.vertices.sampled
    drift, expected = sampled.ntk_change(steps), exact.ntk_change(steps)
    assert expected.error == 0
    assert float((drift.value[:, :1, :1] - expected.value).square().mean().sqrt()) < 4 * drift.error
    mean, expected = sampled.mean_output(steps), exact.mean_output(steps)
    assert float((mean.value[:, [0, 3, 4]] - expected.value).square().mean().sqrt()) < 4 * mean.error
    covariance, expected = sampled.covariance(steps), exact.covariance(steps)
    assert float((covariance.value[:, :1, :1] - expected.value).square().mean().sqrt()) < 4 * covariance.error
    torch.testing.assert_close(sampled.initial_ntk()[:1, :1], exact.initial_ntk(), rtol=1e-4, atol=1e-6)


def sampled_case():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    y = 3 * torch.randn(4, 2, dtype=torch.float64, generator=generator)
    training = Training(learning_rate=0.1, steps=20, reduction="sum")
    return FrozenTraining(MLPEnsemble([3, 30, 2], "tanh", C_W=1.5, lambda_b=0.3), x[1:], y, x[:1], training)


def test_stated_errors_are_those_of_the_mean_over_samples():
    """Of all entries, those between different outputs too: each sample by itself, and the spread of what it gives."""

    class Alone:
        """One of the samples."""

        def __init__(self, vertices, number):
            self._vertices, self._number = vertices, number
            self.depth, self.kind, self.sampled = vertices.depth, vertices.kind, True

        def replicas(self, label_sets):
            members = self._vertices.replicas(label_sets).members
            return Replicas(self.kind, itertools.islice(members, self._number, self._number + 1))

    finite = FiniteWidthTraining(sampled_case(), num_samples=1024, num_replicas=4)
    together, at = finite.vertices, torch.tensor([20])
    for name in ("ntk_change", "covariance", "mean_output"):
        finite.vertices = together
        found, parts = getattr(finite, name)(at), []
        for number in range(4):
            finite.vertices = Alone(together, number)
            parts.append(getattr(finite, name)(at).value)
        parts = torch.stack(parts)
        torch.testing.assert_close(found.value, parts.mean(0))
        assert found.error == pytest.approx(float((parts.var(0).mean() / 4).sqrt()), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ntk_change", "covariance", "mean_output"])
def test_stated_errors_are_the_spread_over_seeds(name):
    """To three standard errors of either mean square; the part of one output alone would be a fifth of it."""
    frozen, at = sampled_case(), torch.tensor([20])
    found = [
        getattr(FiniteWidthTraining(frozen, num_samples=512, num_replicas=8, seed=10**5 * run), name)(at)
        for run in range(64)
    ]
    values = torch.stack([correction.value for correction in found])
    squares = (values - values.mean(0)).square().flatten(1).mean(1) * len(found) / (len(found) - 1)
    stated = torch.tensor([correction.error**2 for correction in found], dtype=torch.float64)
    uncertain = ((squares.var() + stated.var()) / len(found)).sqrt()
    assert abs(stated.mean() - squares.mean()) < 3 * uncertain
    assert 3 * uncertain < 0.8 * squares.mean()


def test_equal_points_are_integrated_once():
    """Five points of which two are different: integrated, to the vertices of the two, and near those of a sample."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    ensemble = MLPEnsemble([3, 40, 2], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    steps, training = torch.tensor([20]), Training(learning_rate=0.1, steps=20, reduction="sum")
    place = torch.tensor([1, 0, 1, 0, 1])  # three probes, two training points
    frozen = FrozenTraining(ensemble, x, y, x[place[:3]], training)
    merged = FiniteWidthTraining(frozen)
    assert not merged.vertices.sampled
    drift, covariance, mean = merged.ntk_change(steps), merged.covariance(steps), merged.mean_output(steps)
    assert drift.error == covariance.error == mean.error == 0
    last = initial_statistics(ensemble, x)[-1]
    tensors = {}
    for name in NAMES:
        tensor = getattr(last, name)
        tensors[name] = tensor[torch.meshgrid(*[place] * tensor.ndim, indexing="ij")]
    known = KnownTensors(tensors)
    expected = (
        ntk_change(known, frozen, 3, steps)[0],
        output_covariance(known, frozen, 3, steps)[0],
        mean_output(known, frozen, steps)[0],
    )
    for found, value in zip((drift, covariance, mean), expected, strict=True):
        torch.testing.assert_close(40 * found.value, value, rtol=1e-8, atol=1e-10)
    sampled = FiniteWidthTraining(frozen)
    sampled.vertices = VertexTiles(ensemble, frozen.layers, 2**13, 8, 0)  # each point by itself
    assert sampled.vertices.sampled
    for exact, rough in ((drift, sampled.ntk_change(steps)), (covariance, sampled.covariance(steps))):
        assert float((rough.value - exact.value).square().mean().sqrt()) < 4 * rough.error
    forecast = predict_training(ensemble, x, y, x[place[:3]], training)
    torch.testing.assert_close(forecast.output_mean[:, 1], forecast.train_output_mean[:, 0])


def test_forecast_of_order_1():
    """Infinite width plus the corrections, each over n; what is not asked for stays at infinite width."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    ensemble = MLPEnsemble([3, 64, 80, 2], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    training = Training(learning_rate=0.05, steps=6, reduction="sum")
    arguments = (ensemble, x[1:], y, x[:1], training)
    infinite_width = predict_training(*arguments, order=0)
    first = predict_training(*arguments, num_samples=1024)
    theory = FiniteWidthTraining(FrozenTraining(*arguments), num_samples=1024)
    mean = theory.mean_output(first.steps)
    torch.testing.assert_close(first.output_mean - infinite_width.output_mean, mean.value[:, :1], rtol=0, atol=1e-12)
    torch.testing.assert_close(mean.infinite_width[:, :1], infinite_width.output_mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(first.ntk_change, theory.ntk_change(first.steps).value)
    assert not first.ntk_change[0].any()
    started = first.ntk_mean[0, 0, 0, 0, 0] - infinite_width.ntk_mean[0, 0, 0, 0, 0]
    assert float(started) == pytest.approx(float(theory.initial_ntk()), rel=1e-6)
    assert float(first.output_truncation[6, 0, 0]) > 0
    assert first.train_output_mean.shape == (7, 4, 2)
    assert "order 1/n, n = 80" in first.provenance
    assert "standard errors of sampled moments (rms): mean output" in first.provenance
    for word in ("|z1| / |z0|", "|Cov1| / |Cov0|", "|H1| / |Theta|", "|e|^2 / (n lambda_min)"):
        assert word in first.validity.reason
        assert first.validity.numbers[word] > 0
    ntk = predict_training(*arguments, num_samples=1024, corrections=("ntk",))
    assert torch.equal(ntk.output_mean, infinite_width.output_mean)
    assert ntk.output_truncation is None
    assert "(mean, covariance at order 0)" in ntk.provenance


def test_momentum_of_nothing_is_gradient_descent():
    """To rounding, at order 1, where momentum goes step by step and descent does not."""
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y = torch.ones(2, 2, dtype=torch.float64)
    ensemble = MLPEnsemble([3, 64, 80, 2], "erf", C_b=0.1, C_W=1.5, lambda_b=0.3)
    arguments, options = (ensemble, x[1:], y, x[:1]), dict(learning_rate=0.1, steps=6, reduction="sum")
    plain, stepped = (predict_training(*arguments, momentum=momentum, **options) for momentum in (0.0, 1e-300))
    for name in ("output_mean", "output_covariance", "ntk_change", "train_output_mean"):
        torch.testing.assert_close(getattr(stepped, name), getattr(plain, name), rtol=1e-12, atol=1e-14)
    moved = predict_training(*arguments, momentum=0.9, **options)
    assert float((moved.ntk_change[6] / plain.ntk_change[6]).abs().max()) > 1.5
    assert "gradient descent with momentum 0.9" in moved.provenance


def test_what_order_1_does_not_cover_is_refused():
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y = torch.ones(3, 2, dtype=torch.float64)
    y[2] = -1
    ensemble = MLPEnsemble([3, 64, 64, 2], "tanh")
    twice = torch.cat([x[:2], x[:1]])
    with pytest.raises(ValueError, match=r"points 0 and 2 coincide .* conflicting targets \(they differ by 2.83\)"):
        predict_training(ensemble, twice, y, x[:1], learning_rate=0.05, steps=6)
    with pytest.raises(
        ValueError, match=r"activation: relu has a kink; its ddNTK contains products of delta functions"
    ):
        predict_training(MLPEnsemble([3, 64, 64, 2], "relu"), x, y, x[:1], learning_rate=0.05, steps=6)
    with pytest.raises(ValueError, match=r"beyond the linear stability bound"):
        predict_training(ensemble, x, y, x[:1], learning_rate=50.0, steps=6)


def test_a_forecast_that_cannot_hold_says_so():
    """Targets of 20 at width 64: terms of order 1/n as large as those of order 0; and r = L/n >= 1."""
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y = torch.randn(2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    wide = MLPEnsemble([3, 64, 64, 1], "erf", C_b=0.1, C_W=1.5, lambda_b=0.3)
    options = dict(learning_rate=0.05, reduction="sum", corrections=("ntk",))
    large = predict_training(wide, x[1:], 20 * y, x[:1], steps=30, **options)
    assert large.validity.flag == "invalid"
    assert "smaller targets" in large.validity.reason
    narrow = MLPEnsemble([3, 3, 3, 1], "erf", C_b=0.1, C_W=1.5, lambda_b=0.3)
    assert predict_training(narrow, x[1:], y, x[:1], steps=3, **options).validity.flag == "invalid"
