"""The summary of a run: what its instruments know of it, and what is the same for every run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.instrument import Claim, Event, History, RunFacts
from torch_eft.results.quantities import documented
from torch_eft.results.tags import logged_tags, quantity_of
from torch_eft.results.trajectory import Validity

_UNDECIDED = Validity("caution", "not decided yet: the theory looks at the first step of the training")
_NO_THEORY = Validity("caution", "measurements only: no instrument of this monitor compares with the theory")


def shown_claim(facts: Sequence[RunFacts]) -> Claim | None:
    """The first prediction that holds; if none does, the first of all; None where nothing is predicted."""
    claims = [known.claim for known in facts if known.claim is not None]
    holding = [claim for claim in claims if claim.validity is not None and claim.validity.flag != "invalid"]
    return next(iter(holding or claims), None)


def run_summary(
    facts: Sequence[RunFacts],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    probe: Sequence[int],
    diagnosis: str,
    history: History,
    events: Sequence[Event],
    skipped: Sequence[tuple[int, str]],
    progress: Mapping[str, Any],
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """The run info (``torch_eft.tensorboard.run_info``): plain types.

    Args:
        facts: Those of every instrument; of several that know one, the first counts.
        model: The measured network.
        optimizers: Those of the training.
        probe: [N, C].
        diagnosis: The diagnosis, as Markdown.
        history: Everything measured so far.
        events: All events so far.
        skipped: ``[(step, what went wrong)]``.
        progress: ``{"state", "step", "planned", "diverged"}``, as in ``torch_eft.tensorboard.run_info``.
        left_out: What the budget left out, and the argument that brings it, besides what forecasts did.

    Returns:
        A dictionary that JSON can hold.
    """
    merged: dict[str, Any] = dict.fromkeys(("depth", "width", "r", "epsilon", "regime", "criticality"))
    merged["network"] = type(model).__name__
    for known in facts:
        given = {key: value for key, value in vars(known).items() if key in merged and value is not None}
        merged |= {key: value for key, value in given.items() if merged[key] is None or key == "network"}
    unpredicted: dict[str, str] = {}
    for known in reversed(facts):
        unpredicted |= known.unpredicted or {}
    claim = shown_claim(facts)
    validity = _NO_THEORY if claim is None else claim.validity or _UNDECIDED
    holds = claim is not None and claim.validity is not None and claim.validity.flag != "invalid"
    quantities = {quantity for name in logged_tags(history) if (quantity := quantity_of(name)) is not None}
    return merged | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "probe": list(probe),
        "optimizer": "; ".join(described(optimizer) for optimizer in optimizers) or "not given",
        "level": claim.level if claim is not None and holds else "measurements only",
        "validity": {"flag": validity.flag, "reason": validity.reason},
        "diagnosis": diagnosis,
        "claims": [
            {"level": each.level, "flag": each.validity.flag, "reason": each.validity.reason}
            for known in facts
            if (each := known.claim) is not None and each.validity is not None
        ],
        "progress": dict(progress),
        "expected_drift": next((list(known.expected) for known in facts if known.expected is not None), None),
        "left_out": [*(known.left_out for known in facts if known.left_out), *left_out],
        "unpredicted": unpredicted,
        "quantities": documented(list(quantities)),
        "events": [asdict(event) for event in events],
        "skipped": [{"step": step, "reason": reason} for step, reason in skipped],
    }


def described(optimizer: Optimizer) -> str:
    """An optimizer and its options, e.g. ``SGD, lr 0.1, momentum 0.9``."""
    items = [type(optimizer).__name__]
    for option in ("lr", "momentum", "betas", "weight_decay"):
        values = list(dict.fromkeys(_short(group.get(option, "")) for group in optimizer.param_groups))
        if any(value not in ("", "0") for value in values):
            items.append(f"{option} {'/'.join(values)}")
    return ", ".join(items)


def _short(value: object) -> str:
    """Numbers to six digits."""
    if isinstance(value, Tensor):  # a capturable optimizer's learning rate
        value = value.item()
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_short, value))})"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def skipped_page(skipped: Sequence[tuple[int, str]]) -> str:
    """The failures, as Markdown."""
    lines = ["Measurements that failed and were skipped:", ""]
    return "\n".join(lines + [f"- step {step}: {reason}" for step, reason in skipped])
