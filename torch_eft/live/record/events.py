"""Deviations of measured values from the theory beside them, and events when they leave the band.

z = (measured - theory) / sigma, with the highest order there is and sigma over initializations; where the theory says
no sigma, the ratio measured / theory. One network in three is outside one sigma by chance: "left" means beyond
``LEFT`` times sqrt(sigma^2 + truncation^2), "back" within ``BACK`` times that, so that noise at the border is silent.
"""

from collections.abc import Mapping

from torch_eft.live.instrument import Event
from torch_eft.results.quantities import QUANTITIES
from torch_eft.results.tags import sigma_of, tag, theory_of

LEFT, BACK = 3.0, 2.0


def deviations(scalars: Mapping[str, float]) -> dict[str, float]:
    """``z_score`` or ``ratio`` of every quantity that is both measured and predicted.

    Args:
        scalars: ``{tag: value}`` of one step.

    Returns:
        ``{tag: value}``.
    """
    found = {}
    for quantity in QUANTITIES:
        measured, theory = scalars.get(tag(quantity)), theory_of(scalars, quantity)
        if measured is None or theory is None:
            continue
        sigma = sigma_of(scalars, quantity)
        if sigma is not None and sigma > 0:
            found[tag(quantity, "z_score")] = (measured - theory) / sigma
        elif sigma is None and theory != 0:
            found[tag(quantity, "ratio")] = measured / theory
    return found


class BandWatch:
    """Reports when a quantity leaves its band, once each time."""

    def __init__(self) -> None:
        self.outside: set[str] = set()

    def events(self, step: int, scalars: Mapping[str, float]) -> list[Event]:
        """The quantities that left their band between the last call and this one.

        Args:
            step: The optimizer step.
            scalars: ``{tag: value}`` of it.

        Returns:
            One event per quantity.
        """
        left = []
        for quantity, item in QUANTITIES.items():
            measured, theory = scalars.get(tag(quantity)), theory_of(scalars, quantity)
            sigma, truncation = sigma_of(scalars, quantity), scalars.get(tag(quantity, "truncation"))
            if measured is None or theory is None or (sigma is None and truncation is None):
                continue
            scale = ((sigma or 0.0) ** 2 + (truncation or 0.0) ** 2) ** 0.5
            distance = abs(measured - theory)
            if quantity not in self.outside and distance > LEFT * scale:
                self.outside.add(quantity)
                of = " and ".join(
                    f"{name} {size:.3g}"
                    for name, size in (("sigma over initializations", sigma), ("estimated truncation", truncation))
                    if size is not None
                )
                text = (
                    f"{item.title}: measured {measured:.4g}, theory {theory:.4g}, beyond {LEFT:g} times its "
                    f"uncertainty ({of})"
                )
                left.append(Event(step, quantity, text))
            elif quantity in self.outside and distance < BACK * scale:
                self.outside.discard(quantity)
        return left


def events_page(events: list[Event]) -> str:
    """All events so far, as a Markdown table."""
    rows = [f"| {event.step} | {event.quantity} | {event.text.replace('|', '&#124;')} |" for event in events]
    return "\n".join(["| step | quantity | what happened |", "|---|---|---|", *rows])
