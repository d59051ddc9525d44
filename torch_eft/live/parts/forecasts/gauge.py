"""When a forecast leaves its validity: its gauge, the size of order 1 over order 0, crosses a bound."""

from torch_eft.live.part import Event

CAUTION, INVALID = 0.2, 1.0


class GaugeWatch:
    """Tells once when a gauge passes 0.2, and once when it passes 1.

    Args:
        what: Of which forecast, in words.

    Attributes:
        told: 1 if the first bound has been told of, 2 if both.
    """

    def __init__(self, what: str) -> None:
        self.what, self.told = what, 0

    def events(self, step: int, gauge: float | None) -> list[Event]:
        """What to say at a step."""
        level = 0 if gauge is None else (gauge >= CAUTION) + (gauge >= INVALID)
        if level <= self.told:
            return []
        self.told = level
        meaning = (
            "order 1 is a rough correction from here on, what is neglected about the square of that"
            if level == 1
            else "order 1 is no small correction any more, the forecast is not valid from here on"
        )
        bound = CAUTION if level == 1 else INVALID
        return [
            Event(
                step,
                "validity",
                f"{self.what}: terms of order 1 are {gauge:.3g} times those of order 0, above {bound:g}; {meaning}",
            )
        ]
