"""What measuring costs, by its own clock, and which due measurements the budget leaves out.

Everything that runs inside the observer is on its account; everything else since the start is the training's own time
(validation, loading and logging included). ``limit`` is the ratio of the two that may be reached.

What falls once (start, first and last visit, figures) is spread over the planned steps, where their number is known;
the last visit is taken to cost what the latest one did. Forecasts, made once before the first step, are counted and
told, but thin nothing: they set their own limits, and without measurements beside them they were in vain. What is left
of the allowance is shared among the accounts (the snapshot, and each part): equal parts, and what one does not need
goes to the others, so that a dear part thins itself before it starves a cheap one.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SNAPSHOT = "snapshot"
"""The account of what all parts look at together: outputs, NTK, hidden kernels."""


@dataclass
class Account:
    """What one kind of work has cost.

    Args:
        spent: Seconds, on visits between the first and the last.
        latest: Seconds, of the latest visit, which is the estimate of the next.
        made: Visits.
        left_out: Due visits that were left out.
    """

    spent: float = 0.0
    latest: float = 0.0
    made: int = 0
    left_out: int = 0


class Budget:
    """The observer's clock.

    Args:
        limit: Time spent measuring / the training's own; None for no limit.
        clock: Seconds; None for the wall clock.

    Attributes:
        once: Seconds spent on what falls once.
        forecasts: Seconds spent on forecasts before the first step.
        reserve: Seconds kept for the end besides the last visit, a quarter of the allowance at most.
        accounts: By name.

    Raises:
        ValueError: If ``limit`` is not positive.
    """

    def __init__(self, limit: float | None, clock: Callable[[], float] | None = None) -> None:
        if limit is not None and (isinstance(limit, bool) or not math.isfinite(limit) or limit <= 0):
            raise ValueError(
                f"budget: {limit!r} given; give the share of the training's time that measuring may take, such as "
                "0.05, or None for no limit"
            )
        self.limit = limit
        self.clock = clock or time.perf_counter
        self.restart()

    def restart(self, spent: float = 0.0) -> None:
        """A training starts: all clocks at zero, but for ``spent`` seconds of measuring just before."""
        self._started = self.clock() - spent
        self._stopped: float | None = None
        self._spent = spent
        self._depth = 0
        self._begun = 0.0
        self.reserve = self.forecasts = 0.0
        self.once = 0.0
        self.accounts: dict[str, Account] = {}

    @property
    def seconds(self) -> float:
        """Time spent measuring."""
        return self._spent + (self.clock() - self._begun if self._depth else 0.0)

    @property
    def training_seconds(self) -> float:
        """The training's own time."""
        until = self.clock() if self._stopped is None else self._stopped
        return max(until - self._started - self.seconds, 1e-9)

    @property
    def percent(self) -> float:
        """Time spent measuring, in % of the training's own."""
        return 100 * self.seconds / self.training_seconds

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What happens inside is measuring; may be nested."""
        if self._depth == 0:
            self._begun = self.clock()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._spent += self.clock() - self._begun

    @contextmanager
    def account(self, name: str, forced: bool) -> Iterator[None]:
        """What happens inside is a visit on an account; ``forced``: the first or last one, which falls once."""
        account = self.accounts.setdefault(name, Account())
        begun = self.clock()
        try:
            yield
        finally:
            account.latest = self.clock() - begun
            account.made += 1
            if not forced:
                account.spent += account.latest

    @contextmanager
    def forecasting(self) -> Iterator[None]:
        """What happens inside is a forecast."""
        before = self.seconds
        try:
            yield
        finally:
            self.forecasts += self.seconds - before

    def settle(self) -> None:
        """What was spent so far, but for visits between the first and the last, falls once."""
        self.once = self.seconds - self.forecasts - sum(account.spent for account in self.accounts.values())

    def room(self, seconds: float) -> bool:
        """Whether so much more time stays within the limit now."""
        return self.limit is None or self.seconds - self.forecasts + seconds <= self.limit * self.training_seconds

    def stop(self) -> None:
        """The training is over."""
        self._stopped = self.clock()

    def affordable(self, name: str, progress: float | None) -> bool:
        """Whether a due visit on an account stays within the budget; if not, it is counted as left out.

        Args:
            name: The account.
            progress: The share of the planned steps that is behind; None if their number is not known.
        """
        if self.limit is None:
            return True
        account = self.accounts.setdefault(name, Account())
        visits = sum(each.spent for each in self.accounts.values())
        hooks = self.seconds - self.forecasts - self.once - visits
        allowance = self.limit * self.training_seconds
        passed = 1.0 if progress is None else min(1.0, progress)
        once = passed * (self.once + sum(each.latest for each in self.accounts.values()))
        once += min(passed * self.reserve, allowance / 4)
        demands = [each.spent + each.latest * (1 + each.left_out) for each in self.accounts.values()]
        level = equal_level(demands, allowance - hooks - once)
        if account.spent + account.latest <= level:
            return True
        account.left_out += 1
        return False


def equal_level(demands: Iterable[float], amount: float) -> float:
    """The level h with sum_i min(demand_i, h) = amount; infinite if all demands can be met."""
    left = sorted(demands)
    for index, demand in enumerate(left):
        share = amount / (len(left) - index)
        if demand > share:
            return share
        amount -= demand
    return math.inf
