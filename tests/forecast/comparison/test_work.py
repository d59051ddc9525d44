"""Counted work: which parts an allowance covers, what is said of the others, and how far the work is."""

import pytest
import torch

from torch_eft.forecast.comparison.operations import OperationCount
from torch_eft.forecast.comparison.work import Allowance, shown
from torch_eft.results.progress.work import worked
from torch_eft.theory import MLPEnsemble, predict_training
from torch_eft.theory.training.corrections.work import corrections_work

PARTS = {"the law": 4.0, "the NTK": 3.0, "the mean output": 40.0, "the covariance": 2.5}


def test_the_most_useful_parts_come_first():
    allowance = Allowance(10.0)
    allowance.plan(PARTS)
    assert [name for name in PARTS if allowance.covers(name)] == ["the law", "the NTK", "the covariance"]
    assert allowance.planned == 9.5
    assert allowance.left_out == "the mean output; forecast_seconds=48 brings it"
    enough = Allowance(48.0)
    enough.plan(PARTS)
    assert enough.covers("the mean output") and not enough.covers("the covariance")
    assert (
        enough.refusal("the covariance")
        == "about 2.5 s of work of one core, 48 s are allowed: forecast_seconds=50 brings it"
    )
    allowance.plan({"the mean output": 1.0, "the NTK": 8.0})  # a longer training: its parts take the place of the old
    assert [name for name in PARTS if allowance.covers(name)] == ["the law", "the mean output", "the covariance"]
    none = Allowance(0.0)
    none.plan(PARTS)
    assert none.left_out.endswith("forecast_seconds=50 brings them")
    assert (shown(0.123), shown(40.4), shown(1234.0)) == ("0.12 s", "40 s", "1234 s")


def test_the_share_of_work_grows_to_all_of_it():
    told = []
    allowance = Allowance(10.0, lambda part, share: told.append((part, share)))
    allowance.plan({"first": 1.0, "second": 3.0, "too much": 20.0})
    with allowance.working("first"):
        worked(6e9)
        worked(1e12)  # more than was counted: not all of it is done until it is
    with allowance.working("second"):
        pass
    worked(1e9)
    parts, shares = zip(*told, strict=True)
    assert parts == ("first",) * 4 + ("second",) * 2
    assert shares == pytest.approx((0, 0.125, 0.2475, 0.25, 0.25, 1))


def test_work_grows_with_everything_and_the_covariance_is_the_most():
    options = dict(times=40, steps=100, momentum=False)
    base = corrections_work(16, 8, 2, 3, **options)
    assert base["mean"] < base["covariance"]
    more = [corrections_work(*sizes, **options) for sizes in ((17, 8, 2, 3), (16, 9, 2, 3), (16, 8, 2, 4))]
    more.append(corrections_work(16, 8, 2, 3, **options | {"times": 41, "steps": 101}))
    assert all(work[name] > base[name] for work in more for name in base)
    assert corrections_work(16, 8, 2, 3, **options | {"momentum": True})["mean"] > base["mean"]
    assert corrections_work(16, 8, 2, 3, **options, gaussian=False)["mean"] > base["mean"]


def test_every_long_loop_of_the_theory_says_what_it_has_done():
    """So that no bar stands still."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=generator).double(), torch.randn(5, 1, generator=generator)
    ensemble = MLPEnsemble([3, 64, 64, 1], "tanh", C_b=0.1, C_W=1.5)
    told = []
    allowance = Allowance(10.0, lambda part, share: told.append(share))
    for correction in ("ntk", "mean", "covariance"):
        allowance.plan({correction: 1.0})
        told.clear()
        with allowance.working(correction):
            predict_training(ensemble, x[:5], y, x[5:], learning_rate=1e-3, steps=40, corrections=(correction,))
        assert len(told) > 100


def test_operations_are_counted():
    x = torch.ones(3, 4)
    with OperationCount() as count:
        (x @ x.T).add_(1.0)
    assert (count.multiplications, count.entries) == (36, 18)  # of the transpose, a view, none
    assert count.calls == 3
    with OperationCount() as again:
        torch.nn.functional.conv2d(torch.ones(1, 2, 5, 5), torch.ones(4, 2, 3, 3))
    assert again.multiplications == 4 * 3 * 3 * 2 * 9
    assert again.seconds > 0
