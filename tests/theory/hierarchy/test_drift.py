"""The law of one network's drift: against explicit draws of the Gaussian field, and against trained networks."""

import itertools
import math
from functools import cache

import pytest
import torch

from tests.theory.initialization.test_fluctuations import PAIRINGS as FOUND_PAIRINGS
from torch_eft import Training, theory
from torch_eft.theory.hierarchy.dntk_covariance import PAIRINGS
from torch_eft.theory.hierarchy.drift import law as law_module
from torch_eft.theory.hierarchy.drift import predict as predict_module
from torch_eft.theory.hierarchy.drift.forms import FormReader, mean_forms
from torch_eft.theory.hierarchy.drift.law import DriftForms
from torch_eft.theory.initialization.evaluator import FLUCTUATIONS
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.training.infinite_width import InfiniteWidthPath

RATE, STEPS, DRAWS = 0.1, 4, 60_000


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(measured, error, predicted):
    """Equal to four standard errors, which are small."""
    predicted = torch.as_tensor(predicted, dtype=torch.float64)
    scale = predicted.abs().max()
    assert float((error / scale).max()) < 0.06
    deviation = ((measured - predicted).abs() / error).max()
    assert float(deviation) < 4.5, f"{measured} against {predicted}: {float(deviation):.1f} standard errors"


def average(values):
    """Mean over draws and its standard error."""
    return values.mean(0), values.std(0) / math.sqrt(len(values))


# ---- the whole field, with every output


@cache
def ensemble():
    return theory.MLPEnsemble(
        [3, 40, 50, 2], "gelu", C_b=0.1, C_W=[1.4, 1.2, 1.5], lambda_b=0.25, lambda_W=[1.0, 0.8, 1.1]
    )


X, Y = normal(2, 3, seed=7), normal(2, 2, seed=1)


def covariances(last):
    """Of all z_ia and n dH_ijk;abc of two outputs at two inputs, pairing by pairing."""
    slots = [(i, a) for i in range(2) for a in range(2)]
    fields = [*((slot,) for slot in slots), *itertools.product(slots, repeat=3)]

    def entry(first, second):
        if len(first) > len(second):
            first, second = second, first
        outputs, labels = zip(*first, *second, strict=True)
        if len(second) == 1:
            return float(last.K[labels]) * (outputs[0] == outputs[1])
        if len(first) == 1:
            (k, i0, i1, i2), (u, a, b, c) = outputs, labels
            total = float(last.P[a, b, c, u]) * (k == i0 and i1 == i2)
            total += float(last.Q[a, b, c, u]) * (i0 == i1 and i2 == k)
            return total + float(last.Q[a, c, b, u]) * (i0 == i2 and i1 == k)
        return sum(
            float(getattr(last, name)[tuple(labels[int(slot)] for slot in order)])
            for pairing, (name, order) in FOUND_PAIRINGS.items()
            if all(outputs[one] == outputs[other] for one, other in pairing)
        )

    return torch.tensor([[entry(one, other) for other in fields] for one in fields], dtype=torch.float64)


@cache
def trained_field(loss="mse"):
    """z (S, a, i) and n D_ij;xy (S, i, j, x, y) after a few steps of the hierarchy of dNTK and ddNTK at order 1/n.

    And at the end n times dNTK and ddNTK along the gradient, likewise, and J v (S, i, x).
    """
    names = ("P", "Q", "R", "S", "T", "U", *FLUCTUATIONS)
    last = theory.initial_statistics(ensemble(), X, statistics=names)[-1]
    values, vectors = torch.linalg.eigh(covariances(last))
    field = normal(DRAWS, len(values), seed=3) @ (vectors * values.clamp_min(0).sqrt()).T
    z, dH = field[:, :4].reshape(-1, 2, 2), field[:, 4:].reshape(-1, *[2] * 6)
    dH = dH.permute(0, 1, 3, 5, 2, 4, 6)  # i, j, k, a, b, c
    e, one = torch.einsum, torch.eye(2, dtype=torch.float64)
    ddI = e("ij,kl,abcd->ijklabcd", one, one, last.R)
    ddI = ddI + e("ik,lj,acdb->ijklabcd", one, one, last.R) + e("il,jk,adbc->ijklabcd", one, one, last.R)
    ddII = e("ij,kl,abcd->ijklabcd", one, one, last.S) + e("ik,jl,acbd->ijklabcd", one, one, last.T)
    ddII = ddII + e("il,jk,adbc->ijklabcd", one, one, last.U)
    curved = ddI + ddI.permute(1, 0, 2, 3, 5, 4, 6, 7) + 2 * ddII
    slope = ddI + ddII + ddII.permute(0, 2, 1, 3, 4, 6, 5, 7)
    drift = torch.zeros(DRAWS, 2, 2, 2, 2, dtype=torch.float64)
    at = z  # (S, i, a)
    for _ in range(STEPS):
        error = error_of(loss, at)
        linear = e("sijkabc,skc->sijab", dH, error)
        drift = drift - RATE * (linear + linear.permute(0, 2, 1, 4, 3))
        drift = drift + RATE**2 / 2 * e("ijklabcd,skc,sld->sijab", curved, error, error)
        dH = dH - RATE * e("ijklabcd,sld->sijkabc", slope, error)
        at = at - RATE * error @ last.Theta
    error = error_of(loss, at)
    linear = e("sijkabc,skc->sijab", dH, error)
    along = linear + linear.permute(0, 2, 1, 4, 3), e("ijklabcd,skc,sld->sijab", curved, error, error)
    return z.mT, drift, *along, error @ last.Theta


def error_of(loss, z):
    """dLoss/dz of summed losses, (S, i, a); classes are those of the larger target."""
    return z - Y.T if loss == "mse" else z.softmax(1) - torch.nn.functional.one_hot(Y.argmax(1)).T


@cache
def forecast(**keywords):
    return theory.predict_drift(ensemble(), X, Y, X, learning_rate=RATE, steps=STEPS, reduction="sum", **keywords)


def test_mean_and_variance_of_every_entry_are_those_of_draws_of_the_field():
    _, drift, *_ = trained_field()
    n, predicted = ensemble().widths[-2], forecast().ntk
    averaged = drift.diagonal(dim1=1, dim2=2).mean(-1) / n
    assert forecast().error == {}  # integrated
    same(*average(averaged), predicted.mean[-1])
    same(*average((averaged - averaged.mean(0)).square()), predicted.variance[-1])
    diagonal = averaged.diagonal(dim1=1, dim2=2).mean(1)
    same(*average(diagonal), predicted.diagonal_mean[-1])
    same(*average((diagonal - diagonal.mean()).square()), predicted.diagonal_sd[-1] ** 2)
    squares = averaged.square().sum((1, 2)) / predicted.reference.square().sum()
    same(*average(squares), predicted.relative_rms[-1] ** 2)


def test_the_norm_of_the_full_kernel_is_that_of_draws_of_the_field():
    _, drift, *_ = trained_field()
    predicted = forecast().ntk
    squares = (drift / ensemble().widths[-2]).square().sum((1, 2, 3, 4)) / (2 * predicted.reference.square().sum())
    same(*average(squares), predicted.relative_rms_full[-1] ** 2)


@pytest.mark.parametrize("name", ["dntk", "ddntk"])
def test_sizes_along_the_gradient_are_those_of_draws_of_the_field(name):
    *_, first, second, moved = trained_field()
    n, reference, predicted = ensemble().widths[-2], forecast().ntk.reference, getattr(forecast(), name)
    value, divisor = (first, 1) if name == "dntk" else (second / 2, 2)
    motion = float(moved.square().mean()) ** (divisor / 2)
    averaged = value.diagonal(dim1=1, dim2=2).mean(-1).square().sum((1, 2)) / (n * motion * reference.norm()) ** 2
    same(*average(averaged), predicted.rms[-1] ** 2)
    full = value.square().sum((1, 2, 3, 4)) / (n * motion * reference.norm()) ** 2 / 2
    same(*average(full), predicted.rms_full[-1] ** 2)


def test_the_conditional_forecast_is_the_regression_on_the_outputs():
    """Its mean leaves no correlation with any function of z, and its variance is what is left, network by network."""
    z, drift, *_ = trained_field()
    averaged = drift.diagonal(dim1=1, dim2=2).mean(-1)[:200] / ensemble().widths[-2]
    law = forecast(at_steps=(STEPS,), hidden_ntk=False)
    found = [law.given(each).ntk for each in z[:200]]
    mean, variance = (torch.stack([getattr(each, name)[-1] for each in found]) for name in ("mean", "variance"))
    standard = (averaged - mean) / variance.sqrt()
    assert float(standard.mean(0).abs().max()) < 4 / math.sqrt(200)
    assert float((standard.square().mean(0) - 1).abs().max()) < 4 * math.sqrt(2 / 200) + 0.1
    total = mean.var(0) + variance.mean(0)
    torch.testing.assert_close(total, forecast().ntk.variance[-1], rtol=0.35, atol=0.0)
    assert bool((variance.mean(0) < 0.97 * total).all())
    with pytest.raises(ValueError, match="conditional on outputs already"):
        forecast().given(Y).given(Y)


def covers(values, quantiles, q, drawn, allowed=0.0):
    """Shares of the field's networks below the quantiles, up to four standard errors of both samples."""
    below = (values[:, None] <= quantiles).double().mean(0)
    error = (q * (1 - q) * (1 / drawn + 1 / len(values))).sqrt()
    assert bool(((below - q).abs() < 4 * error + allowed).all()), below


def test_quantiles_and_the_component_along_the_mean_are_those_of_draws_of_the_field():
    _, drift, first, second, moved = trained_field()
    law, n = forecast(at_steps=(STEPS,)), ensemble().widths[-2]
    averaged = drift.diagonal(dim1=1, dim2=2).mean(-1) / n
    q = torch.tensor([0.05, 0.16, 0.5, 0.84, 0.95])
    found = law.quantiles(q, num_draws=20_000)
    norms, diagonal = averaged.flatten(1).norm(dim=1), averaged.diagonal(dim1=1, dim2=2).mean(1)
    reference = law.ntk.reference.norm()
    covers(norms / reference, found.ntk[0], q, 20_000)
    covers(diagonal, found.diagonal[0], q, 20_000)
    direction = law.ntk.mean[0] / law.ntk.mean[0].norm()
    mean, sd = law.along_mean()
    component = (averaged * direction).sum((1, 2))
    same(*average(component), mean[0])
    same(*average((component - component.mean()).square()), sd[0] ** 2)
    assert sorted(found.hidden) == [1, 2] and sorted(found.hidden_ntk) == [2]
    networks = law.draws(20_000)
    motion = moved.square().mean((1, 2)).sqrt()
    sizes = zip((first, second / 2), (motion, motion**2), networks.along_gradient(STEPS), strict=True)
    for value, unit, drawn in sizes:
        kernels = value.diagonal(dim1=1, dim2=2).mean(-1).flatten(1).norm(dim=1) / n
        covers(kernels / unit / reference, torch.quantile(drawn, q.double()), q, 20_000)
    with pytest.raises(ValueError, match="over all initializations"):
        law.given(Y).along_mean()


def test_all_pairs_of_outputs_have_the_mean_given_the_outputs_and_nearly_the_law_of_the_field():
    """With two outputs what is modeled matters most; quantiles are right to 2 % of networks, from the docstring."""
    z, drift, first, *_ = trained_field()
    law, n = forecast(at_steps=(STEPS,)), ensemble().widths[-2]
    networks, q = law.draws(20_000), torch.tensor([0.05, 0.16, 0.5, 0.84, 0.95])
    norm = 2**0.5 * law.ntk.reference.norm() * n
    drawn = networks.ntk_drift(STEPS, full=True)
    squares = drift.square().sum((1, 2, 3, 4)) / norm**2
    difference, error = average(drawn.square())[0] - squares.mean(), squares.std() * (1 / DRAWS + 1 / 20_000) ** 0.5
    assert abs(float(difference / error)) < 4.5
    covers(squares.sqrt(), torch.quantile(drawn, q.double()), q, 20_000, allowed=0.02)
    # Given z: over what is predicted for its own z, each network's square is 1 in the mean.
    path = theory.FrozenTraining(ensemble(), X, Y, X, Training(learning_rate=RATE, steps=STEPS, reduction="sum"))
    forms = mean_forms(FormReader(VertexTiles(ensemble(), path.layers, 1, 1, 0), path, False, 2**31).replicas())
    weights = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    at = torch.tensor([float(STEPS)], dtype=torch.float64)
    for value, motion in ((drift, law_module.drift), (first, law_module.dntk)):
        factors = next(law_module.times(path, at, motion))
        given = forms.full.conditional_mean_squares(path, factors, path.U.T @ z, weights) * n**2
        same(*average(value.square().sum((1, 2, 3, 4)) / given), 1.0)
        assert float(given.std()) > 0.3 * float(value.square().sum((1, 2, 3, 4)).std())


def test_the_networks_with_given_outputs_are_those_of_the_conditional_forecast():
    law = forecast(at_steps=(STEPS,), hidden_ntk=False).given(2 * Y)
    networks = law.draws(20_000)
    squares = networks.ntk_drift(STEPS).square()
    same(*average(squares), law.ntk.relative_rms[0] ** 2)
    same(*average(networks.hidden_change(1, STEPS).square()), law.hidden[1].relative_rms[0] ** 2)
    same(*average(networks.diagonal_drift(STEPS)), law.ntk.diagonal_mean[0])
    assert bool((law.quantiles(torch.tensor([0.1, 0.9])).ntk.diff(dim=1) > 0).all())


def test_a_displacement_of_one_short_step_is_the_gradient():
    """The displacement from one step to the next is minus the learning rate times the gradient there."""
    networks = forecast(at_steps=(STEPS,), hidden_ntk=False).draws(10)
    for displaced, along in zip(networks.along_displacement(2, 3), networks.along_gradient(2), strict=True):
        torch.testing.assert_close(displaced, along)


def test_sensitivity_is_the_change_of_the_displacement_with_the_eigenvalues():
    """Of one mode: Delta phi = g^s (1 - g^(t-s)) / lambda with g = 1 - eta lambda, differentiated by hand."""
    single = theory.MLPEnsemble([3, 40, 1], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    keywords = {"steps": 9, "reduction": "sum", "at_steps": [9], "hidden_ntk": False}
    Theta = theory.initial_statistics(single, X[:1], statistics=("K", "Theta"))[-1].Theta
    networks = theory.predict_drift(
        single, X[:1], Y[:1, :1], X[:1], learning_rate=0.3 / float(Theta), **keywords
    ).draws(2)
    g, s, t = 0.7, 3, 5
    slope = -0.3 * (s * g ** (s - 1) - t * g ** (t - 1)) / (g**s - g**t) - 1
    assert networks.rate_sensitivity(s, t) == pytest.approx(abs(slope), rel=1e-6)
    assert networks.rate_sensitivity(s) == pytest.approx(0.3 * s / g, rel=1e-6)


@pytest.mark.slow
def test_norms_over_more_points_are_those_over_some_scaled_to_the_mean_square():
    x = torch.cat([X, normal(2, 3, seed=31)])
    keywords = {"learning_rate": RATE, "steps": STEPS, "reduction": "sum", "at_steps": (STEPS,), "hidden_ntk": False}
    law = theory.predict_drift(ensemble(), X, Y, x, joint_points=2, num_samples=2048, **keywords)
    networks = law.draws(20_000)
    same(*average(networks.ntk_drift(STEPS).square()), law.ntk.relative_rms[0] ** 2)
    same(*average(networks.hidden_change(2, STEPS).square()), law.hidden[2].relative_rms[0] ** 2)
    with pytest.raises(ValueError, match="joint_points: 2 of 4 probe points"):
        law.along_mean()


def test_samples_of_the_joint_law_are_those_of_single_pairs():
    """Six labels of five inputs, sampled: on the diagonal of pairs the covariance of each."""
    x, y = normal(5, 3, seed=11), normal(3, 1, seed=12)
    wide = theory.MLPEnsemble([3, 64, 64, 1], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    training = Training(learning_rate=0.05, steps=10, reduction="sum")
    frozen = theory.FrozenTraining(wide, x[2:], y, x[:2], training)
    reader = FormReader(VertexTiles(wide, frozen.layers, 2048, 1, 0), frozen, False, 2**31)
    forms, joint = mean_forms(reader.replicas()), reader.joint(torch.arange(2))
    for (observable, layer, _), X in joint.items():
        single = forms.ntk.X if observable == "output" else forms.hidden[layer].X
        for pair in range(3):
            away = float((X[pair, pair] - single[pair]).norm() / single[pair].norm())
            assert away < 0.06, f"{observable} {layer}: {away:.3f}"
        torch.testing.assert_close(X, X.permute(1, 0, 3, 2))


def test_every_pairing_of_six_is_there_with_a_label_order_of_its_tensor():
    assert len(PAIRINGS) == 15
    for pairing, (name, order) in PAIRINGS.items():
        kind, _ = FOUND_PAIRINGS[tuple(sorted(pairing))]
        standard = next(key for key, (other, word) in PAIRINGS.items() if (other, word) == (name, "012345"))
        at = [int(slot) for slot in order]
        assert kind == name
        assert {frozenset((at[i], at[j])) for i, j in standard} == {frozenset(pair) for pair in pairing}


# ---- the law by itself


def random_path(training, modes=3, outputs=2):
    root, kernel = normal(modes, modes, seed=1), normal(modes, 4, seed=2)
    Theta = root @ root.T + torch.eye(modes, dtype=torch.float64)
    return InfiniteWidthPath(kernel @ kernel.T, Theta, normal(modes, outputs, seed=4), training)


@pytest.mark.parametrize(
    "training",
    [
        Training(learning_rate=0.05, steps=9, reduction="sum"),
        Training(learning_rate=0.05, steps=9, reduction="sum", dynamics="gradient_flow"),
        Training(learning_rate=0.02, steps=9, reduction="sum", momentum=0.8, nesterov=True),
        Training(schedule=lambda step: 0.08 / (1 + step), steps=9, reduction="sum"),
    ],
    ids=["descent", "flow", "nesterov", "schedule"],
)
def test_moments_are_those_of_draws_whatever_the_optimizer(training):
    path = random_path(training)
    root = normal(1, 6, 6, seed=8)
    joint = root @ root.mT
    joint[:, :3, :3] = path.K_modes
    C = 0.2 * normal(1, 3, 3, seed=6)
    forms = DriftForms(0.5, C, normal(1, 3, 3, seed=9), normal(1, 3, 3, seed=10), joint[:, 3:, 3:])
    at = torch.tensor([9.0])
    mean, variance = forms.moments(path, at)
    _, phi, psi, _ = path.double(at)
    covariance = torch.cat([torch.cat([path.K_modes, C[0].T], 1), torch.cat([C[0], forms.X[0]], 1)])
    assert float(torch.linalg.eigvalsh(covariance)[0]) > 0
    factor = torch.linalg.cholesky(covariance)
    total = 0.0
    for k in range(2):
        z, eta = (normal(DRAWS, 6, seed=20 + k) @ factor.T).split(3, 1)
        a = z - path.y[:, k]
        p = -phi[0] * a
        q = torch.einsum("mn,sm,sn->smn", psi[0], a, a)
        total = total + 0.5 * ((eta * p).sum(1) + torch.einsum("mn,sm,sn->s", forms.A[0], p, p))
        total = total + 0.5 * (forms.B[0] * q).sum((1, 2))
    same(*average(total), mean[0, 0])
    same(*average((total - total.mean()).square()), variance[0, 0])


# ---- against other forecasts


def test_means_are_those_of_the_forecasts_of_the_mean():
    keywords = {"learning_rate": RATE, "steps": STEPS, "reduction": "sum"}
    trajectory = theory.predict_training(ensemble(), X, Y, X, corrections=("ntk",), **keywords)
    expected = trajectory.ntk_change.diagonal(dim1=3, dim2=4).mean(-1)
    torch.testing.assert_close(forecast().ntk.mean, expected, rtol=1e-6, atol=1e-10)
    layers = theory.predict_representation(ensemble(), X, Y, X, **keywords).layers
    for number, layer in enumerate(layers, 1):
        torch.testing.assert_close(forecast().hidden[number].mean, layer.kernel_change, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(forecast().hidden_ntk[2].mean, layers[1].ntk_change, rtol=1e-6, atol=1e-10)


def test_samples_and_tiles_agree_with_integration(monkeypatch):
    x, y = normal(5, 3, seed=11), normal(3, 1, seed=12)
    wide = theory.MLPEnsemble([3, 64, 1], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    keywords = {"learning_rate": 0.05, "steps": 10, "reduction": "sum", "at_steps": [10], "num_samples": 4096}
    keywords["hidden_ntk"] = False
    whole = theory.predict_drift(wide, x[2:], y, x[:2], **keywords)
    assert 0 < whole.error["ntk"] < 0.06
    tiled = theory.predict_drift(wide, x[2:], y, x[:2], **keywords, memory=70_000)
    for name in ("mean", "variance"):
        first, second = getattr(whole.ntk, name), getattr(tiled.ntk, name)
        torch.testing.assert_close(first, second, rtol=0.0, atol=0.02 * float(first.abs().max()))
    assert float((whole.ntk.relative_rms / tiled.ntk.relative_rms - 1).abs()) < 0.01


@pytest.mark.slow
def test_over_three_points_samples_agree_with_integration_within_their_error():
    """By default moments over three points and more are sampled: integrated, over four they take minutes."""
    single = theory.MLPEnsemble([3, 64, 1], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    x, y = normal(3, 3, seed=11), normal(2, 1, seed=12)
    training = Training(learning_rate=0.05, steps=10, reduction="sum")
    law = theory.predict_drift(single, x[1:], y, x[:1], training, at_steps=[10], num_samples=20_000)
    path, at = theory.FrozenTraining(single, x[1:], y, x[:1], training), torch.tensor([10])
    (exact,) = FormReader(VertexTiles(single, path.layers, 1, 1, 0), path, False, 2**31).replicas()
    for found, form in ((law.ntk, exact.ntk), (law.hidden[1], exact.hidden[1])):
        mean, variance = form.moments(path, at)
        ratio = float(found.relative_rms[0] * found.reference.norm() / (mean.square() + variance).sum().sqrt())
        assert abs(ratio - 1) < 8 * law.error["ntk"] < 0.1  # of two replicas: an error known to a factor of 2
    assert 0 < law.error["ntk"] < 0.01
    four = theory.predict_drift(single, x[1:], y, torch.cat([x[:1], X[:1]]), training, at_steps=[10])
    assert float(four.ntk.relative_rms[0]) > 0


@pytest.mark.slow
def test_moments_some_pairs_at_a_time_are_those_of_all(monkeypatch):
    """As for a thousand images, whose forms do not fit: means and variances only."""
    x, y = normal(5, 3, seed=11), normal(2, 2, seed=12)
    wide = theory.MLPEnsemble([3, 64, 2], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    keywords = {"learning_rate": 0.05, "steps": 10, "reduction": "sum", "at_steps": [5, 10], "num_samples": 1024}
    whole = theory.predict_drift(wide, x[3:], y, x[:3], **keywords)
    monkeypatch.setattr(predict_module, "_pairs_at_once", lambda *_: 1)
    parts = theory.predict_drift(wide, x[3:], y, x[:3], **keywords)

    def close(one, other):  # moments are split otherwise, which moves them within their error
        torch.testing.assert_close(one, other, rtol=0.0, atol=4 * whole.error["ntk"] * float(other.abs().max()))

    for name in ("mean", "variance", "relative_rms_full", "diagonal_mean", "diagonal_sd"):
        close(getattr(parts.ntk, name), getattr(whole.ntk, name))
    close(parts.hidden[1].variance, whole.hidden[1].variance)
    for size in ("dntk", "ddntk"):
        close(getattr(parts, size).rms_full, getattr(whole, size).rms_full)
    assert 0 < whole.error["ntk"] < 0.03 and 0 < parts.error["ntk"] < 0.03
    for ask in (lambda: parts.given(y), parts.draws, parts.along_mean):
        with pytest.raises(ValueError, match=r"memory: .* computed 1 pairs of probe points at a time"):
            ask()


def test_one_output_has_one_kernel():
    single = theory.MLPEnsemble([3, 40, 1], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3)
    law = theory.predict_drift(single, X, Y[:, :1], X[:1], learning_rate=0.1, steps=5, reduction="sum")
    found = law.ntk
    torch.testing.assert_close(found.relative_rms_full, found.relative_rms, rtol=1e-9, atol=0.0)
    networks = law.draws(50)
    torch.testing.assert_close(networks.ntk_drift(5, full=True), networks.ntk_drift(5), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found.diagonal_mean, found.mean[:, 0, 0])
    torch.testing.assert_close(found.diagonal_sd.square(), found.variance[:, 0, 0])


def test_nothing_moves_without_hidden_layers_and_training_ends():
    shallow = theory.predict_drift(theory.MLPEnsemble([3, 2], "tanh"), X, Y, X, learning_rate=0.1, steps=2)
    assert not shallow.ntk.relative_rms.any() and not shallow.hidden and not shallow.hidden_ntk
    keywords = {"reduction": "sum", "learning_rate": 0.1, "hidden_ntk": False}
    end = theory.predict_drift(
        theory.MLPEnsemble([3, 40, 1], "tanh"), X, Y[:, :1], X, steps=math.inf, at_steps=[10_000, math.inf], **keywords
    )
    torch.testing.assert_close(end.ntk.relative_rms[0], end.ntk.relative_rms[1])
    assert math.isnan(end.dntk.rms[1])  # the gradient vanishes


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_replicas": 1}, "num_replicas: 1 given; at least 2"),
        ({"joint_points": 0}, "joint_points: 0 given; at least 1"),
        ({"memory": 100}, "x_train: 2 points need about .* GiB for every two probe points"),
        ({"memory": 400, "loss": "cross_entropy"}, "x_train: 2 points with 2 outputs need .* for one draw of"),
        ({"memory": 4000, "loss": "cross_entropy"}, "x_train: 2 .* 2 probe points do not fit into memory all at once"),
    ],
)
def test_what_the_law_does_not_cover_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        theory.predict_drift(ensemble(), X, Y, X, learning_rate=0.1, steps=5, **change)


def test_kinks_and_narrow_networks_are_refused():
    for activation, widths, message in (
        ("relu", [3, 40, 50, 2], "relu has a kink.*gelu"),
        ("tanh", [3, 2, 2, 2], "r = L/n = 1.5 >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            theory.predict_drift(theory.MLPEnsemble(widths, activation), X, Y, X, learning_rate=0.1, steps=5)
