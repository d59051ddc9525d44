"""The cost of measuring, by the observer's own clock, and which due measurements the budget leaves out.

Everything that runs inside the observer is on its account; everything else since the start is the training's own time
(validation, loading and logging included). ``limit`` is the ratio of the two that may be reached.

One-off costs (start, first and last measurement, figures) are spread over the planned steps, where their number is
known; the last measurement is assumed to cost what the latest one did. Forecasts, made once before the first step, are
counted and reported, but thin nothing: they set their own limits, and without measurements beside them they would be in
vain. The rest of the allowance is shared among the accounts (the snapshot, and each instrument): equal shares, and what
one does not need goes to the others, so that an expensive instrument thins itself before it starves a cheap one.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SNAPSHOT = "snapshot"
"""The account of what all instruments share: outputs, NTK, hidden kernels."""


@dataclass
class Account:
    """The cost of one kind of work.

    Args:
        spent: Seconds, on measurements between the first and the last.
        latest: Seconds, of the latest measurement: the estimate for the next.
        made: Measurements.
        left_out: Due measurements that were left out.
    """

    spent: float = 0.0
    latest: float = 0.0
    made: int = 0
    left_out: int = 0


class Budget:
    """The observer's clock and accounts.

    Args:
        limit: Time spent measuring / the training's own; None for no limit.
        clock: Seconds; None for the wall clock.

    Attributes:
        once: Seconds of one-off costs.
        forecasts: Seconds spent on forecasts before the first step.
        reserve: Seconds kept for the end besides the last measurement, at most a quarter of the allowance.
        accounts: By name.

    Raises:
        ValueError: If ``limit`` is not positive, or above 1.
    """

    def __init__(self, limit: float | None, clock: Callable[[], float] | None = None) -> None:
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and (not number or not math.isfinite(limit) or limit <= 0):
            raise ValueError(
                f"budget: {limit!r} given; give the share of the training's time that measuring may take, such as "
                "0.05, or None for no limit"
            )
        if limit is not None and limit > 1:
            raise ValueError(
                f"budget: {limit:g} given, {100 * limit:g} % of the training's time; 5 % is 0.05, and None is no limit"
            )
        self.limit = limit
        self.clock = clock or time.perf_counter
        self.restart()

    def restart(self, spent: float = 0.0) -> None:
        """Set all clocks to zero as a training starts, except for ``spent`` seconds of measuring just before."""
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
        """Count the time spent inside as measuring; may be nested."""
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
        """Book a measurement on an account; ``forced``: the first or last one, a one-off cost."""
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
        """Count the time spent inside as a forecast."""
        before = self.seconds
        try:
            yield
        finally:
            self.forecasts += self.seconds - before

    def settle(self) -> None:
        """Book everything spent so far, except intermediate measurements, as one-off cost."""
        self.once = self.seconds - self.forecasts - sum(account.spent for account in self.accounts.values())

    def room(self, seconds: float) -> bool:
        """Return whether ``seconds`` more stay within the limit now."""
        return self.limit is None or self.seconds - self.forecasts + seconds <= self.limit * self.training_seconds

    def stop(self) -> None:
        """Stop the training's clock."""
        self._stopped = self.clock()

    def affordable(self, name: str, progress: float | None) -> bool:
        """Return whether a due measurement on an account stays within the budget; if not, count it as left out.

        Args:
            name: The account.
            progress: The share of the planned steps already taken; None if their number is not known.
        """
        if self.limit is None:
            return True
        account = self.accounts.setdefault(name, Account())
        intermediate = sum(each.spent for each in self.accounts.values())
        hooks = self.seconds - self.forecasts - self.once - intermediate
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


def cost_sentence(budget: Budget, measurements: int, skipped: int, undrawn: int) -> str:
    """One sentence on the cost of measuring and on what was left out."""
    failed = f", {skipped} skipped" if skipped else ""
    text = (
        f"torch_eft: {measurements} measurements{failed} took {budget.seconds:.2f} s, {budget.percent:.1f} % on top of "
        "the training's own time"
    )
    if budget.forecasts > 0.1 * budget.seconds:
        text += f" ({budget.forecasts:.2f} s of it forecasts before the first step, outside the budget)"
    left = {name: account.left_out for name, account in budget.accounts.items() if account.left_out}
    if budget.limit is None or not (left or undrawn):
        return text
    whole = left.pop(SNAPSHOT, 0)
    items = [f"{whole} due measurements"] * bool(whole) + [f"{name} at {count}" for name, count in left.items()]
    items += [f"{undrawn} figures"] * bool(undrawn)
    return f"{text}; left out to stay within {100 * budget.limit:g} %: {', '.join(items)} (budget=None makes them all)"


def thinning_sentence(budget: Budget, step: int) -> str:
    """One sentence saying that due measurements are left out from now on, and why."""
    latest = sum(account.latest for account in budget.accounts.values())
    return (
        f"torch_eft: the latest measurement took {1000 * latest:.0f} ms; from step {step} on due ones are left out "
        f"where they would take more than {100 * (budget.limit or 0):g} % of the training's time "
        "(budget=None makes them all)"
    )


def cost_page(budget: Budget, measurements: int) -> str:
    """The cost of measuring, account by account, and what was left out, as Markdown."""
    limit = "no limit" if budget.limit is None else f"limit {100 * budget.limit:g} %"
    lines = [
        f"{measurements} measurements took {budget.seconds:.2f} s, {budget.percent:.1f} % on top of the training's own "
        f"time of {budget.training_seconds:.2f} s ({limit}). {budget.once:.2f} s of it was spent at the start, "
        f"{budget.forecasts:.2f} s on forecasts before the first step, which the budget does not limit.",
        "",
        "| account | measurements | left out | seconds between first and last | ms of the latest |",
        "|---|---|---|---|---|",
    ]
    for name, account in budget.accounts.items():
        spent, latest = f"{account.spent:.3f}", f"{1000 * account.latest:.1f}"
        lines.append(f"| {name} | {account.made} | {account.left_out} | {spent} | {latest} |")
    if any(account.left_out for account in budget.accounts.values()):
        lines += [
            "",
            "Due measurements were left out to stay within the budget. `budget=None` makes them all; fewer due ones, a "
            "smaller probe or a lighter preset cost less.",
        ]
    return "\n".join(lines)
