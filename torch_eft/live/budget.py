"""The cost of measuring, by the observer's own clock, and which due measurements the budget leaves out.

Everything that runs inside the observer is on its account; everything else since the start is the training's own time
(validation, loading and logging included). ``limit`` is the ratio of the two that may be reached. Not within it are the
start (checks, theta_0 and the first measurement after it, which plan and verify) and forecasts, which set their own
limits: both fall once, and are shown apart.

What is made at any budget (the measurements that draw the curves, the last one, figures) is spread over the planned
steps, where their number is known; measurements to come are assumed to cost what the latest one did. The rest of the
allowance is shared among the accounts (the snapshot, and each instrument): equal shares, and what one does not need
goes to the others, so that an expensive instrument thins itself before it starves a cheap one.
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
        spent: Seconds, on measurements that the budget allowed.
        latest: Seconds, of the latest measurement: the estimate for the next.
        thorough: Seconds, of the latest one with all its checks; 0: not known.
        made: Measurements.
        left_out: Due measurements that were left out.
        shortened: Measurements of which a part was left out.
        part: That part, in words.
    """

    spent: float = 0.0
    latest: float = 0.0
    thorough: float = 0.0
    made: int = 0
    left_out: int = 0
    shortened: int = 0
    part: str = ""


class Budget:
    """The observer's clock and accounts.

    Args:
        limit: Time spent measuring / the training's own; None for no limit.
        clock: Seconds; None for the wall clock.

    Attributes:
        start: Seconds at the start, up to the first measurement after theta_0.
        forecasts: Seconds spent on forecasts.
        fixed: Seconds since then on what is made at any budget.
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
        self.reserve = self.forecasts = self.start = self.fixed = 0.0
        self.accounts: dict[str, Account] = {}

    @property
    def seconds(self) -> float:
        """Time spent measuring, until the clock is stopped."""
        if self._stopped is not None:
            return self._spent
        return self._spent + (self.clock() - self._begun if self._depth else 0.0)

    @property
    def training_seconds(self) -> float:
        """The training's own time."""
        until = self.clock() if self._stopped is None else self._stopped
        return max(until - self._started - self.seconds, 1e-9)

    @property
    def limited(self) -> float:
        """Time spent measuring that is within the limit: all but the start and forecasts."""
        return self.seconds - self.start - self.forecasts

    @property
    def percent(self) -> float:
        """Time spent measuring that is within the limit, in % of the training's own."""
        return 100 * max(0.0, self.limited) / self.training_seconds

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
            if self._depth == 0 and self._stopped is None:
                self._spent += self.clock() - self._begun

    @contextmanager
    def account(self, name: str, forced: bool, thorough: bool = False) -> Iterator[None]:
        """Book a measurement on an account.

        Args:
            name: The account.
            forced: Whether it is made at any budget.
            thorough: Whether nothing of it was left out, not even checks.

        Yields:
            Nothing.
        """
        account = self.accounts.setdefault(name, Account())
        begun = self.clock()
        try:
            yield
        finally:
            account.latest = self.clock() - begun
            if thorough:
                account.thorough = account.latest
            account.made += 1
            if forced:
                self.fixed += account.latest
            else:
                account.spent += account.latest

    @contextmanager
    def forecasting(self) -> Iterator[None]:
        """Count the time spent inside as a forecast."""
        before = self.seconds
        try:
            yield
        finally:
            self.forecasts += self.seconds - before

    @contextmanager
    def once(self) -> Iterator[None]:
        """Count the time spent inside as made at any budget."""
        before = self.seconds
        try:
            yield
        finally:
            self.fixed += self.seconds - before

    def started(self) -> None:
        """Book everything spent so far, except forecasts, as the start."""
        self.start, self.fixed = self.seconds - self.forecasts, 0.0
        for account in self.accounts.values():
            account.spent = 0.0

    def room(self, seconds: float) -> bool:
        """Return whether ``seconds`` more stay within the limit now."""
        return self.limit is None or self.limited + seconds <= self.limit * self.training_seconds

    def stop(self) -> None:
        """Stop all clocks: the training is over."""
        self._spent, self._stopped = self.seconds, self.clock()

    def affordable(self, name: str, progress: float | None, owed: int = 0) -> bool:
        """Return whether a due measurement on an account stays within the budget; if not, count it as left out.

        Args:
            name: The account.
            progress: The share of the planned steps already taken; None if their number is not known.
            owed: Measurements that are yet to be made at any budget, besides the last one.
        """
        if self.limit is None:
            return True
        account = self.accounts.setdefault(name, Account())
        intermediate = sum(each.spent for each in self.accounts.values())
        hooks = self.limited - self.fixed - intermediate
        allowance = self.limit * self.training_seconds
        passed = 1.0 if progress is None else min(1.0, progress)
        fixed = passed * (self.fixed + (1 + owed) * sum(each.latest for each in self.accounts.values()))
        fixed += min(passed * self.reserve, allowance / 4)
        demands = [each.spent + each.latest * (1 + each.left_out) for each in self.accounts.values()]
        level = equal_level(demands, allowance - hooks - fixed)
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


def cost_sentence(budget: Budget, measurements: int, skipped: int) -> str:
    """One sentence on the cost of measuring: within the limit, and what falls once.

    Args:
        budget: The account.
        measurements: Measurements made.
        skipped: Those that failed.

    Returns:
        The sentence.
    """
    failed = f", {skipped} skipped" if skipped else ""
    once = [f"{budget.start:.2f} s at the start"]
    once += [f"{budget.forecasts:.2f} s of forecasts"] if budget.forecasts > 0.01 else []
    return f"{measurements} measurements{failed}, {budget.percent:.1f} % of training time (besides {', '.join(once)})"


def left_out(budget: Budget, undrawn: int) -> str:
    """Return what the budget left out, and the argument that brings it; empty if that is nothing.

    Args:
        budget: The account.
        undrawn: Figures that were left out.

    Returns:
        A phrase.
    """
    if budget.limit is None:
        return ""
    whole = budget.accounts[SNAPSHOT].left_out if SNAPSHOT in budget.accounts else 0
    items = [f"{whole} due measurements"] * bool(whole)
    for name, account in budget.accounts.items():
        if name != SNAPSHOT and account.left_out > whole:
            items.append(f"{name} at {account.left_out - whole} others")
        if account.shortened:
            items.append(f"{account.part} at {account.shortened}")
    items += [f"{undrawn} figures"] * bool(undrawn)
    return f"{', '.join(items)}; budget=None brings them" if items else ""


def cost_page(budget: Budget, measurements: int) -> str:
    """The cost of measuring, account by account, and what was left out, as Markdown."""
    limit = "no limit" if budget.limit is None else f"limit {100 * budget.limit:g} %"
    lines = [
        f"{measurements} measurements. {budget.start:.2f} s were spent at the start, on checks, theta_0 and the first "
        f"measurement after it, and {budget.forecasts:.2f} s on forecasts; since then {max(0.0, budget.limited):.2f} "
        f"s, {budget.percent:.1f} % of the training's own {budget.training_seconds:.2f} s ({limit}).",
        "",
        "| account | measurements | left out | seconds as the budget allowed | ms of the latest |",
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
