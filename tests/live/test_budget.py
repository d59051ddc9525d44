"""The observer's own clock, and what it leaves out; on a clock that only moves when asked to."""

import math

import pytest

from torch_eft.live import budget as module
from torch_eft.live.budget import Budget, equal_level


class TimeGrid:
    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = TimeGrid()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_level_meets_small_demands_whole_and_shares_the_rest():
    assert equal_level([1, 2, 3], 6) == math.inf
    assert equal_level([1, 2, 3], 5) == 2
    assert equal_level([1, 10, 10], 5) == 2
    assert equal_level([4, 4], 2) == 1
    assert equal_level([1.0], -1.0) == -1
    for demands, amount in (([0.3, 2, 5, 7], 6.0), ([1, 1, 1], 2.5)):
        level = equal_level(demands, amount)
        assert sum(min(demand, level) for demand in demands) == pytest.approx(amount)


def test_time_is_ours_or_the_trainings(clock):
    budget = Budget(0.1)
    clock.now += 5  # before the training starts: nobody's
    budget.restart(spent=1.0)
    with budget.counting():
        clock.now += 2
        with budget.counting():  # nested: counted once
            clock.now += 1
        assert budget.seconds == 4
    clock.now += 16
    assert (budget.seconds, budget.training_seconds, budget.percent) == (4, 16, 25)
    budget.stop()
    clock.now += 1000
    assert budget.training_seconds == 16


def train(budget, clock, steps, costs, step_seconds=1.0, total=None, first=None):
    """A training with a visit due after every step; returns the steps at which each account was visited."""
    visited = {name: [] for name in costs}

    def visit(step, forced):
        with budget.counting():
            for name, cost in costs.items():
                if forced or budget.affordable(name, None if total is None else step / total):
                    with budget.account(name, forced):
                        clock.now += cost
                    visited[name].append(step)

    budget.restart()
    visit(0, forced=True)
    budget.started()
    for step in range(1, steps + 1):
        clock.now += step_seconds
        visit(step, forced=step == steps)
    budget.stop()
    return visited


def test_without_a_limit_everything_is_measured(clock):
    budget = Budget(None)
    assert len(train(budget, clock, 10, {"snapshot": 50.0})["snapshot"]) == 11
    assert budget.accounts["snapshot"].left_out == 0


def test_what_is_cheap_enough_is_never_left_out(clock):
    budget = Budget(0.05)
    # 0.04 a step of 1, and 2 x 0.04 for start and end, at 5 %: affordable from the eighth step at the latest.
    visited = train(budget, clock, 100, {"snapshot": 0.04}, total=100)["snapshot"]
    assert len(visited) > 97
    assert budget.percent <= 5


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("cost", [0.3, 2.0])
def test_the_total_stays_within_the_limit(clock, known, cost):
    budget = Budget(0.05)
    visited = train(budget, clock, 1000, {"snapshot": cost}, total=1000 if known else None)["snapshot"]
    assert visited[0] == 0
    assert visited[-1] == 1000
    # All of the 50 s are used, up to the cost of one measurement; the start is apart.
    assert 50 - cost - 1e-9 <= budget.limited <= 50 + 1e-9
    assert (budget.start, budget.seconds) == (pytest.approx(cost), pytest.approx(budget.limited + cost))
    assert len(visited) == budget.accounts["snapshot"].made
    assert budget.accounts["snapshot"].left_out == 1001 - len(visited)
    gaps = [later - earlier for earlier, later in zip(visited[2:-2], visited[3:-1], strict=True)]
    assert max(gaps) - min(gaps) <= 2  # evenly spread


def test_what_is_made_at_any_budget_is_spread_over_the_planned_steps(clock):
    """Figures of 20 s: at 5 % of 1000 s they leave 30 s; without the plan nothing could be measured before step 400."""
    first = {}
    for known in (True, False):
        budget = Budget(0.05)
        budget.restart()
        with budget.counting(), budget.account("snapshot", forced=True):
            clock.now += 1
        budget.started()
        with budget.counting(), budget.once():
            clock.now += 20
        for step in range(1, 1000):
            clock.now += 1
            if budget.affordable("snapshot", step / 1000 if known else None):
                with budget.counting(), budget.account("snapshot", forced=False):
                    clock.now += 1
                first.setdefault(known, step)
        assert budget.limited <= 50
    assert first[True] < 50
    assert 400 < first[False] < 450


def test_measurements_that_are_owed_are_saved_for(clock):
    """Ten of 2 s to come, of 50 s in all: they leave room for ten fewer besides."""
    made = {}
    for owed in (0, 10):
        budget = Budget(0.05)
        budget.restart()
        with budget.counting(), budget.account("snapshot", forced=True):
            clock.now += 2
        budget.started()
        for step in range(1, 1000):
            clock.now += 1
            if budget.affordable("snapshot", step / 1000, owed):
                with budget.counting(), budget.account("snapshot", forced=False):
                    clock.now += 2
        made[owed] = budget.accounts["snapshot"].made - 1
    assert made[0] in (23, 24) and made[10] == made[0] - 10


def test_forecasts_are_told_but_thin_nothing(clock):
    budget = Budget(0.05)
    budget.restart()
    with budget.forecasting(), budget.counting():
        clock.now += 30
    budget.started()
    clock.now += 100
    assert budget.affordable("snapshot", None)
    assert budget.room(4.9)
    assert not budget.room(5.1)
    assert (budget.forecasts, budget.start, budget.percent) == (30, 0, 0)


def test_a_dear_part_thins_itself_and_not_the_cheap_one(clock):
    budget = Budget(0.05)
    visited = train(budget, clock, 1000, {"snapshot": 0.01, "expensive": 5.0}, total=1000)
    assert budget.accounts["snapshot"].left_out <= 5
    assert 6 <= len(visited["expensive"]) <= 8  # 50 s - 10 s for the cheap one, at 5 s
    assert budget.percent <= 5.0001


def test_two_dear_parts_get_equal_parts(clock):
    budget = Budget(0.05)
    visited = train(budget, clock, 1000, {"snapshot": 0.001, "five": 5.0, "half": 0.5}, total=1000)
    spent = {name: budget.accounts[name].spent for name in ("five", "half")}
    assert spent["five"] == pytest.approx(spent["half"], abs=5.0)
    assert len(visited["half"]) > 5 * len(visited["five"])


@pytest.mark.parametrize("wrong", [0, -0.1, math.nan, math.inf, True])
def test_an_unusable_limit_is_refused(wrong):
    with pytest.raises(ValueError, match=r"budget: .* given; give the share .* such as 0.05, or None"):
        Budget(wrong)
