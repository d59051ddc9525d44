"""What measuring has cost, in words."""

from torch_eft.live.budget import SNAPSHOT, Budget


def cost_sentence(budget: Budget, measurements: int, skipped: int, undrawn: int) -> str:
    """What measuring has cost, and what was left out, in a sentence."""
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
    words = [f"{whole} due measurements"] * bool(whole) + [f"{name} at {count}" for name, count in left.items()]
    words += [f"{undrawn} figures"] * bool(undrawn)
    return f"{text}; left out to stay within {100 * budget.limit:g} %: {', '.join(words)} (budget=None makes them all)"


def thinning_sentence(budget: Budget, step: int) -> str:
    """That due measurements are left out from now on, and why."""
    latest = sum(account.latest for account in budget.accounts.values())
    return (
        f"torch_eft: the latest measurement took {1000 * latest:.0f} ms; from step {step} on due ones are left out "
        f"where they would take more than {100 * (budget.limit or 0):g} % of the training's time "
        "(budget=None makes them all)"
    )


def cost_page(budget: Budget, measurements: int) -> str:
    """What measuring has cost, account by account, and what was left out, as Markdown."""
    limit = "no limit" if budget.limit is None else f"limit {100 * budget.limit:g} %"
    lines = [
        f"{measurements} measurements took {budget.seconds:.2f} s, {budget.percent:.1f} % on top of the training's own "
        f"time of {budget.training_seconds:.2f} s ({limit}). {budget.once:.2f} s of it fell at the start, "
        f"{budget.forecasts:.2f} s on forecasts before the first step, which the budget does not limit.",
        "",
        "| account | visits | left out | seconds between first and last visit | ms at the latest |",
        "|---|---|---|---|---|",
    ]
    for name, account in budget.accounts.items():
        spent, latest = f"{account.spent:.3f}", f"{1000 * account.latest:.1f}"
        lines.append(f"| {name} | {account.made} | {account.left_out} | {spent} | {latest} |")
    if any(account.left_out for account in budget.accounts.values()):
        lines += [
            "",
            "Due visits were left out to stay within the budget. `budget=None` makes them all; fewer due ones, a "
            "smaller probe or a lighter preset cost less.",
        ]
    return "\n".join(lines)
