"""The law of the drift by draws of z(0): against explicit draws of the Gaussian field, and against the closed law."""

import math
from functools import cache

import pytest
import torch

from tests.theory.hierarchy.test_drift import RATE, STEPS, X, Y, average, covers, ensemble, same, trained_field
from torch_eft import theory

DRAWS = 12_000


@cache
def forecast(networks=None, **keywords):
    options = {"learning_rate": RATE, "steps": STEPS, "reduction": "sum", "hidden_ntk": False, "num_draws": DRAWS}
    targets = Y.argmax(1) if keywords.get("loss") == "cross_entropy" else Y
    return theory.predict_drift(networks or ensemble(), X, targets, X, **options | keywords)


SHALLOW = theory.MLPEnsemble([3, 40, 2], "gelu", C_b=0.1, C_W=1.4, lambda_b=0.3)


@cache
def entropy():
    return forecast(loss="cross_entropy", at_steps=(STEPS,))


def agree(values, predicted):
    """With the forecast's error too: it averages over draws that spread less than the field."""
    mean, error = average(values)
    same(mean, error * (1 + len(values) / DRAWS) ** 0.5, predicted)


def test_moments_under_cross_entropy_are_those_of_draws_of_the_field():
    _, drift, *_ = trained_field("cross_entropy")
    n, law = ensemble().widths[-2], entropy()
    averaged = drift.diagonal(dim1=1, dim2=2).mean(-1) / n
    agree(averaged, law.ntk.mean[0])
    agree((averaged - averaged.mean(0)).square(), law.ntk.variance[0])
    diagonal = averaged.diagonal(dim1=1, dim2=2).mean(1)
    agree(diagonal, law.ntk.diagonal_mean[0])
    agree((diagonal - diagonal.mean()).square(), law.ntk.diagonal_sd[0] ** 2)
    squares = (drift / n).square().sum((1, 2, 3, 4)) / (2 * law.ntk.reference.square().sum())
    agree(squares, law.ntk.relative_rms_full[0] ** 2)
    assert 0 < law.error["ntk"] < 0.06 and f"{DRAWS} draws of z(0)" in law.provenance


@pytest.mark.parametrize("name", ["dntk", "ddntk"])
def test_sizes_along_the_gradient_are_those_of_draws_of_the_field(name):
    *_, first, second, moved = trained_field("cross_entropy")
    n, reference, predicted = ensemble().widths[-2], entropy().ntk.reference, getattr(entropy(), name)
    value, divisor = (first, 1) if name == "dntk" else (second / 2, 2)
    motion = float(moved.square().mean()) ** (divisor / 2)
    unit = n * motion * float(reference.norm())
    agree(value.diagonal(dim1=1, dim2=2).mean(-1).square().sum((1, 2)) / unit**2, predicted.rms[0] ** 2)
    agree(value.square().sum((1, 2, 3, 4)) / unit**2 / 2, predicted.rms_full[0] ** 2)


def test_quantiles_under_cross_entropy_are_those_of_draws_of_the_field():
    _, drift, *_ = trained_field("cross_entropy")
    law, n, q = entropy(), ensemble().widths[-2], torch.tensor([0.05, 0.16, 0.5, 0.84, 0.95])
    averaged, reference = drift.diagonal(dim1=1, dim2=2).mean(-1) / n, law.ntk.reference.norm()
    found = law.quantiles(q, num_draws=20_000)
    covers(averaged.flatten(1).norm(dim=1) / reference, found.ntk[0], q, 20_000)
    covers(averaged.diagonal(dim1=1, dim2=2).mean(1), found.diagonal[0], q, 20_000)
    everything = drift.flatten(1).norm(dim=1) / (n * 2**0.5 * reference)
    covers(everything, found.ntk_full[0], q, 20_000, allowed=0.02)  # the docstring's 2 % for two outputs
    assert bool((found.hidden[1].diff(dim=1) > 0).all()) and sorted(found.hidden) == [1, 2]


def test_a_batch_of_all_samples_is_a_full_batch():
    """The same law in closed form and by draws; given z(0) there is nothing to draw."""
    closed, drawn = forecast(SHALLOW), forecast(SHALLOW, batches=((0, 1),))
    for one, other, name in ((closed.ntk, drawn.ntk, "ntk"), (closed.hidden[1], drawn.hidden[1], "hidden 1")):
        assert abs(float(other.relative_rms[-1] / one.relative_rms[-1]) - 1) < 4 * drawn.error[name] < 0.2
    largest = float(closed.ntk.mean.abs().max())
    torch.testing.assert_close(drawn.ntk.mean, closed.ntk.mean, rtol=0.0, atol=4 * drawn.error["ntk"] * largest)
    for one, other in zip(closed.along_mean(), drawn.along_mean(), strict=True):
        torch.testing.assert_close(other, one, rtol=4 * drawn.error["ntk"], atol=0.0)
    given = [law.given(2 * Y) for law in (closed, drawn)]
    for name in ("mean", "variance", "diagonal_mean", "diagonal_sd"):
        torch.testing.assert_close(*(getattr(law.ntk, name) for law in given), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(given[0].hidden[1].variance, given[1].hidden[1].variance, rtol=1e-9, atol=1e-12)
    q = torch.tensor([0.25, 0.5, 0.75])
    one, other = (law.quantiles(q, num_draws=4000) for law in given)
    torch.testing.assert_close(one.ntk[-1], other.ntk[-1], rtol=0.1, atol=0.0)
    torch.testing.assert_close(one.ntk_full[-1], other.ntk_full[-1], rtol=0.1, atol=0.0)


def test_norms_over_two_points_are_those_over_one_scaled_to_the_mean_square():
    law = forecast(SHALLOW, batches=((0, 1),), at_steps=(STEPS,), joint_points=1)
    networks = law.draws(20_000)
    agree(networks.ntk_drift(STEPS).square(), law.ntk.relative_rms[0] ** 2)
    agree(networks.hidden_change(1, STEPS).square(), law.hidden[1].relative_rms[0] ** 2)
    with pytest.raises(ValueError, match="joint_points: 1 of 2 probe points"):
        law.along_mean()


def test_a_batch_of_one_sample_is_training_on_it_alone():
    options = {"learning_rate": RATE, "steps": STEPS, "reduction": "sum", "momentum": 0.6, "hidden_ntk": False}
    alone = theory.predict_drift(SHALLOW, X[1:], Y[1:], X, **options)
    drawn = theory.predict_drift(SHALLOW, X, Y, X, batches=[[1]], num_draws=DRAWS, **options)
    assert abs(float(drawn.ntk.relative_rms[-1] / alone.ntk.relative_rms[-1]) - 1) < 4 * drawn.error["ntk"] < 0.2
    # Given more outputs, less is left open; the path is the same.
    more, less = drawn.given(2 * Y).ntk.variance[-1], alone.given(2 * Y[1:]).ntk.variance[-1]
    assert bool((more > 0).all()) and bool((more < less).all())


def test_what_draws_do_not_cover_is_refused():
    with pytest.raises(ValueError, match=r"steps: inf given; draws of z\(0\) are trained step by step"):
        forecast(loss="cross_entropy", steps=math.inf, at_steps=(4,))
    with pytest.raises(ValueError, match="num_draws: 3 given; at least 16"):
        forecast(num_draws=3)
    networks = entropy().draws(20)
    with pytest.raises(ValueError, match=r"step: 2 given; .* \[4\]: name it in at_steps"):
        networks.ntk_drift(2)
    with pytest.raises(ValueError, match=r"z: shape .* finite numbers"):
        entropy().given(Y[:1])
