"""Whether a measured quantity lies where the theory expects it, in words: the same in the tab, reports and the demo."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch_eft.results.regime import amount, regime
from torch_eft.results.tags import BAND_90, EXPANSIONS, GIVEN_START_BAND, MEASURED, QUANTILE, SERIES, tag

Series = Mapping[int, float]

_LINES = ("order_1", *reversed(EXPANSIONS))
"""What is predicted at finite width, the best first."""

_READINGS = {"ntk_drift": "the NTK moved {}", "representation_change": "the features moved {}"}
"""What a relative change is of."""


@dataclass(frozen=True)
class Verdict:
    """A measured value beside its prediction, at the last step that has both.

    Args:
        step: That step.
        measured: The measured value.
        predicted: The predicted one: the median over initializations, where there is a band.
        low: 5 % of networks lie below this; None without a band.
        high: 5 % of networks lie above this.
        state: Where the measured value lies: ``"inside"``, ``"above"`` or ``"below"`` the band of 90 %; ``"no band"``.
        since: The step at which it left the band, if it is outside.
        outside: The number of measurements outside the band.
        compared: The number of measurements beside a band.
        ends: Whether the prediction ended before the measurements.
        expansion: Whether it is the expansion about theta_0 along the realized path.
        quantile: Share of networks below the measured value.
        given_low: The same as ``low`` for networks that start with this network's outputs.
        given_high: The same as ``high`` for them.

    Example:
        >>> from torch_eft.tensorboard import Verdict
        >>> Verdict(90, 0.5, 0.2, 0.1, 0.4, "above", since=40, outside=2, compared=5).words
        'left the 90 % band at step 40 (above)'
    """

    step: int
    measured: float
    predicted: float | None
    low: float | None
    high: float | None
    state: Literal["inside", "above", "below", "no band"]
    since: int | None = None
    outside: int = 0
    compared: int = 0
    ends: bool = False
    expansion: bool = False
    quantile: float | None = None
    given_low: float | None = None
    given_high: float | None = None

    @property
    def words(self) -> str:
        """The verdict, e.g. ``left the 90 % band at step 40 (above)``."""
        if self.expansion:
            name = "expansion about theta_0"
            return f"the {name} ends at step {self.step}" if self.ends else f"beside the {name}"
        if self.state == "no band":
            words = "predicted, without quantiles"
        elif self.state != "inside":
            words = f"left the 90 % band at step {self.since} ({self.state})"
            if self.outside == self.compared:
                words = f"{self.state} the 90 % band since step {self.since}"
        else:
            words = "inside the 90 % band"
            if self.outside:
                words += f"; outside at {self.outside} of {self.compared} measurements"
        return words + (f"; the prediction ends at step {self.step}" if self.ends else "")

    @property
    def short(self) -> str:
        """The same in two or three words."""
        if self.expansion:
            return f"ends at {self.step}" if self.ends else "expansion"
        return f"{self.state} since {self.since}" if self.since is not None else self.state

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain types, the words included."""
        return {**asdict(self), "words": self.words, "short": self.short}


def verdict(history: Mapping[int, Mapping[str, float]], quantity: str) -> Verdict | None:
    """Compare a quantity of one run with its finite-width prediction.

    Args:
        history: ``{step: {tag: value}}``, as an observer or a monitor keeps it.
        quantity: A registered name.

    Returns:
        The verdict; None where the history has no finite-width prediction of the quantity beside a measured value.

    Raises:
        ValueError: If the quantity is not registered.

    Example:
        >>> from torch_eft.tensorboard import tag, verdict
        >>> band = {tag("ntk_drift", "band_90_low"): 0.1, tag("ntk_drift", "band_90_high"): 0.2}
        >>> median = {tag("ntk_drift", "order_1"): 0.14}
        >>> history = {step: {tag("ntk_drift"): 0.01 * step, **median, **band} for step in (10, 15, 20, 25, 30)}
        >>> verdict(history, "ntk_drift").words
        'left the 90 % band at step 25 (above)'
    """
    names = {series: tag(quantity, series) for series in (MEASURED, *SERIES)}
    return verdict_of(
        {
            series: {step: scalars[name] for step, scalars in history.items() if name in scalars}
            for series, name in names.items()
        }
    )


def reading(history: Mapping[int, Mapping[str, float]], quantity: str) -> str | None:
    """Say what the last measured value means by itself: for any training, whether anything is predicted or not.

    The words are those of ``torch_eft.results.regime``: lazy below 10 %, weakly moving below 30 %, moving below 100 %,
    rich beyond.

    Args:
        history: ``{step: {tag: value}}``, as an observer or a monitor keeps it.
        quantity: A registered name.

    Returns:
        The sentence; None for a quantity that has no such reading, and before anything has changed.

    Raises:
        ValueError: If the quantity is not registered.

    Example:
        >>> from torch_eft.tensorboard import reading, tag
        >>> reading({0: {tag("ntk_drift"): 0.0}, 90: {tag("ntk_drift"): 7.7}}, "ntk_drift")
        'the NTK moved 770 %: rich'
    """
    name = tag(quantity)
    return reading_of(quantity, {step: scalars[name] for step, scalars in history.items() if name in scalars})


def reading_of(quantity: str, measured: Series) -> str | None:
    """Return the same of ``{step: value}``; values are finite."""
    if quantity not in _READINGS or not measured or not measured[max(measured)]:
        return None
    value = measured[max(measured)]
    return f"{_READINGS[quantity].format(amount(value))}: {regime({quantity: value}).name}"


def verdict_of(series: Mapping[str, Series]) -> Verdict | None:
    """Return the same of ``{series: {step: value}}``; values are finite."""
    measured = series.get(MEASURED) or {}
    line = next((name for name in _LINES if any((series.get(name) or {}).values())), None)  # not its start alone
    predicted = series[line] if line is not None else {}
    low, high = (series.get(name) or {} for name in BAND_90)
    # A band of no width, as at the start, says nothing.
    banded = [step for step in sorted(measured) if step in low and step in high and high[step] > low[step]]
    steps = banded or [step for step in sorted(measured) if step in predicted]
    if not steps:
        return None
    last = steps[-1]
    where = [_place(measured[step], low[step], high[step]) for step in banded]
    since = None
    for step, place in zip(banded, where, strict=True):
        since = None if place == "inside" else (step if since is None else since)
    given_low, given_high = ((series.get(name) or {}).get(last) for name in GIVEN_START_BAND)
    return Verdict(
        step=last,
        measured=measured[last],
        predicted=predicted.get(last),
        low=low[last] if banded else None,
        high=high[last] if banded else None,
        state=where[-1] if banded else "no band",
        since=since,
        outside=sum(place != "inside" for place in where),
        compared=len(banded),
        ends=max(measured) > last,
        expansion=line in EXPANSIONS and not banded,
        quantile=(series.get(QUANTILE) or {}).get(last),
        given_low=given_low,
        given_high=given_high,
    )


def _place(value: float, low: float, high: float) -> Literal["inside", "above", "below"]:
    return "above" if value > high else "below" if value < low else "inside"
