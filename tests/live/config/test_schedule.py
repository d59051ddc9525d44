"""When measurements are due."""

import pytest

from torch_eft.live import linear, logarithmic
from torch_eft.live.config.schedule import Curve, checked_every, due, not_before


def steps_of(every, until=1000):
    every = checked_every(every)
    return [step for step in range(until + 1) if due(every, step)]


def test_linear_is_every_k_steps():
    assert (
        steps_of(250) == steps_of("250") == steps_of("linear:250") == steps_of(linear(250)) == [0, 250, 500, 750, 1000]
    )


def test_logarithmic_has_so_many_a_decade():
    assert steps_of(logarithmic(1)) == steps_of("log:1") == [1, 10, 100, 1000]
    # round(10^(j/3)): 1, 2.15, 4.64, 10, 21.5, 46.4, 100, 215.4, 464.2, 1000
    assert steps_of("log:3") == [1, 2, 5, 10, 22, 46, 100, 215, 464, 1000]
    assert len([step for step in steps_of("log:10") if 100 <= step < 1000]) == 10


def test_any_function_of_the_step():
    assert steps_of(lambda step: step in (3, 5)) == [3, 5]


def test_epochs_are_announced_by_the_loop():
    assert steps_of("epoch") == []


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "step", "log:", "log:0", "log:-3", "cubic:3", "", None])
def test_anything_else_is_refused_with_what_is_allowed(wrong):
    with pytest.raises(ValueError, match=r"every: .* given; give 'auto', 'epoch', a positive number .*'log:10'"):
        checked_every(wrong)


@pytest.mark.parametrize("make", [linear, logarithmic])
@pytest.mark.parametrize("wrong", [0, 1.5, True, "3"])
def test_schedules_take_positive_integers(make, wrong):
    with pytest.raises(ValueError, match="give a positive integer"):
        make(wrong)


@pytest.mark.parametrize("every", [10, "log:3", linear(7), lambda step: step % 9 == 4])
@pytest.mark.parametrize("stride", [1, 2, 7, 23])
def test_what_fell_due_between_two_looks_is_due_at_the_second(every, stride):
    every = checked_every(every)
    looks = range(0, 400, stride)
    steps = set(steps_of(every, looks[-1]))
    for since, step in zip(looks, looks[1:], strict=False):
        assert due(every, step, since) == bool(steps & set(range(since + 1, step + 1))), (since, step)
    assert due(10, 20, 20) and not due(10, 7, 500)  # asked again; a loop that counts anew


def test_by_itself_it_is_due_at_the_points_of_a_curve_and_ten_times_a_decade():
    steps = steps_of("auto", 200)
    assert set(steps) == set(Curve().points(200)) | set(steps_of("log:10", 200))
    assert due("auto", 1031, 1027, Curve(7, 5000)) and not due("auto", 1031, 1027)  # 1031 = 7 + 1024


@pytest.mark.parametrize("origin", [0, 37])
@pytest.mark.parametrize("length", [1, 5, 12, 13, 20, 45, 300, 2000, 2048, 2049, 100_000])
def test_a_curve_has_thirteen_measurements_of_any_training_that_has_as_many_steps(length, origin):
    total = origin + length
    known, unknown = Curve(origin, total).points(total), Curve(origin, None).points(total)
    assert known == sorted(set(known)) and known[0] == origin + 1 and known[-1] == total
    assert min(length, 12) <= len(known) <= 20
    gaps = [(later - origin) / (earlier - origin) for earlier, later in zip(known, known[1:], strict=False)]
    assert max(gaps, default=1) <= 2.001
    assert len(unknown) >= 12 or length < 64
    assert max(gaps, default=1) <= 2.001
    assert Curve(origin, total).left(origin) == len(known) - 1


@pytest.mark.parametrize("curve", [Curve(0, 300), Curve(5, 4000), Curve(3, None)])
def test_a_loop_need_not_ask_before_the_next_step_that_is_due(curve):
    for every in ("auto", 7, "log:3"):
        every = checked_every(every)
        for step in range(1, 300):
            quiet = not_before(every, step, curve)
            assert quiet > step and not any(due(every, later, None, curve) for later in range(step + 1, quiet))
            assert every != "auto" or due(every, quiet, None, curve)


@pytest.mark.parametrize("curve", [Curve(0, 300), Curve(5, 4000), Curve(3, None)])
@pytest.mark.parametrize("stride", [1, 3, 40])
def test_a_point_that_was_passed_is_known(curve, stride):
    points = set(curve.points(400))
    for since in range(0, 400 - stride, stride):
        assert curve.passed(since, since + stride) == bool(points & set(range(since + 1, since + stride + 1)))
