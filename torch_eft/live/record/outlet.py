"""From reports to sinks: what is known of the run, its events and pages, each told when it changes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.part import Event, History, Instrument
from torch_eft.live.record.events import events_page
from torch_eft.live.record.sinks import Sink
from torch_eft.results.quantities import documented
from torch_eft.results.tags import logged_tags, quantity_of

_UNDECIDED = {"flag": "caution", "reason": "not decided yet: the theory looks at the first step of the training"}
_NO_THEORY = {"flag": "caution", "reason": "measurements only: no part of this monitor compares with the theory"}


class Outlet:
    """Hands results to the sinks; a sink that fails does not keep the others from getting them.

    Args:
        guard: Runs an action and takes care of its failure.
    """

    def __init__(self, guard: Callable[[Callable[[], Any]], None]) -> None:
        self._guard = guard
        self.open(())

    def open(self, sinks: Sequence[Sink]) -> None:
        """A training starts, with these sinks."""
        self.sinks = list(sinks)
        self._info: dict[str, Any] = {}
        self._charted: set[str] = set()

    @property
    def draws(self) -> bool:
        """Whether any sink shows figures."""
        return any(sink.draws for sink in self.sinks)

    def each(self, action: Callable[[Sink], None]) -> None:
        """Let every sink do something."""
        for sink in self.sinks:
            self._guard(lambda sink=sink: action(sink))  # type: ignore[misc]

    def scalars(self, step: int, values: Mapping[str, float], epoch: int | None) -> None:
        """``{tag: value}``, sorted."""
        ordered = dict(sorted(values.items()))
        if ordered:
            self.each(lambda sink: sink.scalars(step, ordered, epoch))

    def pages(self, pages: Mapping[str, str], step: int) -> None:
        """``{name: Markdown}``."""
        for name, text in pages.items():
            self.each(lambda sink, name=name, text=text: sink.text(name, text, step))  # type: ignore[misc]

    def histograms(self, histograms: Mapping[str, Tensor], step: int) -> None:
        """``{tag: values}``."""
        for tag, values in histograms.items():
            self.each(lambda sink, tag=tag, values=values: sink.histogram(tag, values, step))  # type: ignore[misc]

    def events(self, new: Sequence[Event], all_of_them: list[Event], step: int) -> None:
        """New events one by one, and all of them as a page."""
        for event in new:
            self.each(lambda sink, event=event: sink.event(event))  # type: ignore[misc]
        if new:
            self.pages({"events": events_page(all_of_them)}, step)

    def info(self, info: dict[str, Any], history: History) -> None:
        """What is known of the run, and the charts, if anything is new."""
        if info != self._info:
            self._info = info
            self.each(lambda sink: sink.run_info(info))
        logged = logged_tags(history)
        if not logged <= self._charted:
            self._charted |= logged
            self.each(lambda sink: sink.layout(logged))


def run_info(
    parts: Sequence[Instrument],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    probe: list[int],
    diagnosis: str,
    history: History,
    events: Sequence[Event],
    skipped: Sequence[tuple[int, str]],
) -> dict[str, Any]:
    """What is known of the run: the parts' own knowledge, and what is the same for every run."""
    merged: dict[str, Any] = dict.fromkeys(("depth", "width", "r", "epsilon", "regime", "criticality"))
    merged["network"] = type(model).__name__
    claims = []
    for info in (part.info() for part in parts):
        if "validity" in info:
            claims.append((info.get("level"), info["validity"] or _UNDECIDED))
        known = {key: value for key, value in info.items() if key not in ("level", "validity") and value is not None}
        merged |= {key: value for key, value in known.items() if merged.get(key) is None or key == "network"}
    holding = [claim for claim in claims if claim[1]["flag"] != "invalid" and claim[1] is not _UNDECIDED]
    level, validity = next(iter(holding or claims), (None, _NO_THEORY))
    quantities = {quantity for name in logged_tags(history) if (quantity := quantity_of(name)) is not None}
    return merged | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "probe": probe,
        "optimizer": "; ".join(described(optimizer) for optimizer in optimizers) or "not given",
        "level": level if holding and level else "measurements only",
        "validity": validity,
        "diagnosis": diagnosis,
        "quantities": documented(list(quantities)),
        "events": [{"step": event.step, "quantity": event.quantity, "text": event.text} for event in events],
        "skipped": [{"step": step, "reason": reason} for step, reason in skipped],
    }


def described(optimizer: Optimizer) -> str:
    """An optimizer in words, e.g. ``SGD, lr 0.1, momentum 0.9``."""
    words = [type(optimizer).__name__]
    for option in ("lr", "momentum", "betas", "weight_decay"):
        values = list(dict.fromkeys(_short(group.get(option, "")) for group in optimizer.param_groups))
        if any(value not in ("", "0") for value in values):
            words.append(f"{option} {'/'.join(values)}")
    return ", ".join(words)


def _short(value: object) -> str:
    """Numbers to six digits."""
    if isinstance(value, Tensor):  # a capturable optimizer's learning rate
        value = value.item()
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_short, value))})"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def skipped_page(skipped: Sequence[tuple[int, str]]) -> str:
    """What failed, as Markdown."""
    lines = ["Measurements that failed and were skipped:", ""]
    return "\n".join(lines + [f"- step {step}: {reason}" for step, reason in skipped])
