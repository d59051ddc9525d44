"""Deviations of measured values from the theory beside them, and events when they leave the band.

z = (measured - theory) / sigma, with the highest order there is and sigma over initializations; where the theory says
no sigma, the ratio measured / theory. One network in three is outside one sigma by chance: "left" means beyond
``LEFT`` times sqrt(sigma^2 + truncation^2), "back" within ``BACK`` times that, so that noise at the border is silent.
Where the theory says quantiles over initializations, "left" means outside the band of 90 %, "back" inside that of 68 %.
"""

from collections.abc import Mapping

from torch_eft.live.instrument import Event
from torch_eft.results.quantities import QUANTITIES
from torch_eft.results.tags import BAND_68, BAND_90, sigma_of, tag, theory_of

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
            measured = scalars.get(tag(quantity))
            found = None if measured is None else _against_quantiles(scalars, quantity, measured)
            if found is None and measured is not None:
                found = _against_sigma(scalars, quantity, measured)
            if found is None:
                continue
            outside, back, text = found
            if outside and quantity not in self.outside:
                self.outside.add(quantity)
                left.append(Event(step, quantity, f"{item.title}: measured {measured:.4g}, {text}"))
            elif back:
                self.outside.discard(quantity)
        return left


def _against_quantiles(scalars: Mapping[str, float], quantity: str, measured: float) -> tuple[bool, bool, str] | None:
    """Whether it is outside, whether it is well inside, and the band in words; None without quantiles."""
    low, high = (scalars.get(tag(quantity, series)) for series in BAND_90)
    if low is None or high is None or not high > low:  # of no width at the start
        return None
    inner_low, inner_high = (scalars.get(tag(quantity, series)) for series in BAND_68)
    inside = (low if inner_low is None else inner_low) <= measured <= (high if inner_high is None else inner_high)
    side = "above" if measured > high else "below"
    return not low <= measured <= high, inside, f"{side} the band of 90 % of networks, {low:.4g} .. {high:.4g}"


def _against_sigma(scalars: Mapping[str, float], quantity: str, measured: float) -> tuple[bool, bool, str] | None:
    """The same of sigma and truncation; None without both."""
    theory, sigma = theory_of(scalars, quantity), sigma_of(scalars, quantity)
    truncation = scalars.get(tag(quantity, "truncation"))
    if theory is None or (sigma is None and truncation is None):
        return None
    scale = ((sigma or 0.0) ** 2 + (truncation or 0.0) ** 2) ** 0.5
    distance = abs(measured - theory)
    of = " and ".join(
        f"{name} {size:.3g}"
        for name, size in (("sigma over initializations", sigma), ("estimated truncation", truncation))
        if size is not None
    )
    text = f"theory {theory:.4g}, beyond {LEFT:g} times its uncertainty ({of})"
    return distance > LEFT * scale, distance < BACK * scale, text


def events_page(events: list[Event]) -> str:
    """All events so far, as a Markdown table."""
    rows = [f"| {event.step} | {event.quantity} | {event.text.replace('|', '&#124;')} |" for event in events]
    return "\n".join(["| step | quantity | what happened |", "|---|---|---|", *rows])
