"""Two badges of a run, the same in the tab, the terminal and reports: its regime, and how far the theory reaches.

They are two because they answer two questions. A wide network may be lazy without any theory of its training, and a
network of which the theory says everything may learn features.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch_eft.results.quantities import HEADLINES
from torch_eft.results.tags import tag

LAZY, WEAK, RICH = 0.1, 0.3, 1.0
"""Relative changes: below the first a network is lazy, below the second it moves weakly, from the third on it is rich.

Order 0 freezes the NTK, so that its relative error is about the drift d itself; order 1/n predicts d, so that its error
is about d^2. Below 0.1 frozen kernels are right to ten percent; below 0.3 order 1/n is, as 0.3^2 = 0.09; from 1 on
nothing that expands about the start converges, since the change exceeds what was there.
"""

REGIMES = (("lazy", LAZY), ("weakly moving", WEAK), ("moving", RICH), ("rich", math.inf))
"""The regimes with their upper bounds."""

BEYOND = "beyond 1/n"
"""The badge of a run whose forecast does not hold: of a training that moves too far, or a network too deep."""

MEASUREMENTS_ONLY = "measurements only"
"""The level of a run without a forecast."""

_FLAGS = ("valid", "caution", "invalid")

Tone = Literal["good", "plain", "caution", "bad", "none"]


@dataclass(frozen=True)
class Badge:
    """A verdict in one or two words.

    Args:
        name: The words, e.g. ``"weakly moving"``.
        tone: How to color it: ``"good"``, ``"plain"`` (neither good nor bad), ``"caution"``, ``"bad"``, or ``"none"``
            (not known).
        reason: One sentence on why.
        meaning: Its end, without the numbers.

    Example:
        >>> from torch_eft.results.regime import regime
        >>> regime({"ntk_drift": 0.05, "representation_change": 0.045}).name
        'lazy'
    """

    name: str
    tone: Tone
    reason: str
    meaning: str = ""

    def to_dict(self) -> dict[str, str]:
        """All of it as plain types."""
        return asdict(self)


def amount(value: float) -> str:
    """Return a relative change in words: ``5.0 %``, ``770 %``, or from 10 on ``12×``.

    Args:
        value: The change, at least 0.

    Returns:
        The words.

    Example:
        >>> from torch_eft.results.regime import amount
        >>> amount(0.05), amount(0.1234), amount(7.68), amount(3027.4)
        ('5.0 %', '12 %', '770 %', '3.03e+03×')
    """
    if value >= 10:
        return f"{value:.3g}\N{MULTIPLICATION SIGN}"
    if value >= 0.995:
        return f"{round(100 * value, -1):.0f} %"
    return f"{100 * value:#.2g} %".replace(". %", " %")


def latest(history: Mapping[int, Mapping[str, float]], quantities: Collection[str]) -> dict[str, float]:
    """Return the last measured value of some quantities, where there is one.

    Args:
        history: ``{step: {tag: value}}``, as an observer or a monitor keeps it.
        quantities: Registered names.

    Returns:
        ``{quantity: value}``.

    Example:
        >>> from torch_eft.results.regime import latest
        >>> latest({0: {"eft/ntk_drift/measured": 0.0}, 9: {"eft/ntk_drift/measured": 0.2}}, ["ntk_drift", "dntk"])
        {'ntk_drift': 0.2}
    """
    found: dict[str, float] = {}
    names = {quantity: tag(quantity) for quantity in quantities}
    for _, scalars in sorted(history.items()):
        found |= {quantity: scalars[name] for quantity, name in names.items() if name in scalars}
    return found


DECIDING = ("ntk_drift", "representation_change", "ntk_kernel_distance", "ntk_batch_norm_share")
"""The quantities that ``regime`` reads."""


def regime(last: Mapping[str, float], optimizer: str = "") -> Badge:
    """Say how far a network has left the kernel regime, by the larger of two changes: of its NTK and of its features.

    The bounds are ``LAZY``, ``WEAK`` and ``RICH``. An NTK that has only grown keeps its eigenvectors, and is not called
    rich: that takes a change of direction, too.

    Args:
        last: ``{quantity: last measured value}``; ``ntk_drift`` and ``representation_change`` decide,
            ``ntk_kernel_distance`` (1 - cos(H, H_0)) tells turning from growing, and ``ntk_batch_norm_share`` goes into
            the reason. Those unknown may be absent.
        optimizer: As in the run info, e.g. ``"Adam, lr 0.001"``: only gradient descent follows this NTK.

    Returns:
        The badge: lazy, weakly moving, moving or rich; ``"not moved"`` before the first step, ``"not measured"``.

    Example:
        >>> from torch_eft.results.regime import regime
        >>> print(regime({"ntk_drift": 0.16, "representation_change": 0.04}).reason)
        the NTK moved 16 %, features 4.0 %: kernels are not frozen, and order 1/n can still say how they move
    """
    drift, features = last.get("ntk_drift"), last.get("representation_change")
    known = [value for value in (drift, features) if value is not None]
    if not known:
        return Badge("not measured", "none", "neither the NTK nor the hidden kernels were measured after the start")
    size = max(known)
    if size == 0:
        return Badge("not moved", "none", "no parameter has moved yet")
    name = next((name for name, bound in REGIMES if size < bound), "rich")
    turned = turn(last.get("ntk_kernel_distance"))
    grown = name == "rich" and turned is not None and turned < WEAK and (features is None or features < RICH)
    if grown:
        name = "moving"
    moved = [f"the NTK moved {amount(drift)}"] if drift is not None else []
    if features is not None:
        moved.append(f"{'features' if moved else 'the features moved'} {amount(features)}")
    meaning = _MEANINGS[name]
    if grown and turned is not None:
        meaning = f"it grew and hardly turned ({amount(turned)} once its size is fitted)"
    share = last.get("ntk_batch_norm_share")
    if share is not None and share >= 0.5:
        meaning += "; most of it through BatchNorm's statistics"
    if (rule := optimizer.partition(",")[0].strip()) and rule not in ("SGD", "not given"):
        meaning += f"; {rule} does not follow this NTK as gradient descent does"
    return Badge(name, "plain", f"{', '.join(moved)}: {meaning}", meaning)


_MEANINGS = {
    "lazy": "frozen kernels describe it to about ten percent",
    "weakly moving": "kernels are not frozen, and order 1/n can still say how they move",
    "moving": "kernels move too far for order 1/n to be accurate",
    "rich": "kernels are no longer those of the start",
}


def turn(distance: float | None) -> float | None:
    """Return the relative change of the NTK once its size is fitted: min over c of ||H - c H_0|| / ||c H_0||.

    Args:
        distance: 1 - cos(H, H_0); None: not known.

    Returns:
        The tangent of the angle between them; infinite from a right angle on.

    Example:
        >>> from torch_eft.results.regime import turn
        >>> f"{turn(0.005):.3f}"
        '0.100'
    """
    if distance is None:
        return None
    cosine = 1 - max(distance, 0.0)
    return math.sqrt(max(1 / cosine**2 - 1, 0.0)) if cosine > 0 else math.inf


def theory(info: Mapping[str, Any], predicted: Collection[str] | None = None, diverged: int | None = None) -> Badge:
    """Say how far the theory reaches for a run: of several forecasts, the worst verdict counts.

    Args:
        info: The run info: ``level`` and ``validity`` of the forecast that is shown, and ``claims``, those of all
            (``[{"level", "flag", "reason"}]``), where it has them.
        predicted: The quantities with a line at finite width; None: not known.
        diverged: The step at which the numbers were not finite any more; None: never.

    Returns:
        The badge: to 1/n, order 0, beyond 1/n (a forecast was made, and does not hold), measured only, or diverged.

    Example:
        >>> from torch_eft.results.regime import theory
        >>> validity = {"flag": "invalid", "reason": "not an MLP: Conv2d lies between its inputs and its outputs"}
        >>> print(theory({"level": "measurements only", "validity": validity}).name)
        measured only
    """
    if diverged is not None:
        return Badge("diverged", "bad", f"the numbers are not finite at step {diverged}: nothing holds from there on")
    made = [claim for claim in _claims(info) if claim["level"] != MEASUREMENTS_ONLY]
    if not made:
        validity = info.get("validity") or {}
        why = first_sentence(str(validity.get("reason") or "")) or "no forecast was made"
        return Badge("measured only", "none", f"no forecast: {why}")
    worst = max(made, key=lambda claim: _FLAGS.index(claim["flag"]))
    reason = first_sentence(worst["reason"])
    if worst["flag"] == "invalid":
        return Badge(BEYOND, "caution", f"the forecast does not hold: {reason}")
    tone: Tone = "good" if worst["flag"] == "valid" else "caution"
    if not any(claim["level"].endswith("order 1") for claim in made):
        return Badge("order 0", "caution", "infinite width alone, where the NTK and the features stand still")
    missing = [] if predicted is None else [names for names in HEADLINES if not set(names) & set(predicted)]
    if len(missing) == len(HEADLINES):
        return Badge("to 1/n", "caution", f"of the outputs alone, none of the NTK's or the features' change: {reason}")
    return Badge("to 1/n", tone, reason if tone == "good" else f"with caution: {reason}")


def _claims(info: Mapping[str, Any]) -> list[dict[str, str]]:
    """All forecasts of a run; the shown one where the run info knows no other."""
    validity = info.get("validity") or {}
    shown = {"level": info.get("level"), "flag": validity.get("flag"), "reason": validity.get("reason")}
    given = [*(info.get("claims") or []), shown]
    return [
        {"level": str(claim["level"]), "flag": str(claim["flag"]), "reason": str(claim.get("reason") or "")}
        for claim in given
        if claim.get("level") and claim.get("flag") in _FLAGS
    ]


def first_sentence(text: str) -> str:
    """Return the first of several reasons, which decides; the others are for the long text.

    Args:
        text: Reasons, with semicolons between them.

    Returns:
        The first.

    Example:
        >>> from torch_eft.results.regime import first_sentence
        >>> first_sentence("r = 0.4: corrections are of order one; neurons move by 12 %. Wider layers help")
        'r = 0.4: corrections are of order one'
    """
    return text.partition("; ")[0].partition(". ")[0].strip().removesuffix(".")
