"""What the tab's first screen says of one run, as plain types: badges, how it ended, four answers, the table's row.

Everything here follows from the run info and the logged series, without torch: TensorBoard's process reads it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from torch_eft.results.regime import BEYOND, DECIDING, LAZY, REGIMES, Badge, amount, regime, theory
from torch_eft.results.tags import BAND_90, EXPANSIONS, MEASURED, ORDERS, QUANTILE
from torch_eft.tensorboard.verdicts import Verdict, verdict_of

Points = Iterable[Sequence[Any]]

EDGE, TOO_DEEP = 0.2, 1.0
"""Of the larger of r and epsilon: where corrections of order 1/n are no longer small, and where they are all there is;
those of ``theory.signal_propagation.regimes``."""

_LABELS = {
    "output_projection": "outputs",
    "ntk_drift": "NTK drift",
    "dntk": "dNTK",
    "dntk_along_gradient": "dNTK",
    "representation_change": "features",
    "instance_output": "outputs, its own forecast",
}
"""What is compared with the theory, in the order of the answer."""

NEEDED = (*_LABELS, *DECIDING)
"""The quantities that a summary reads."""

BY_CHANCE = 0.1
"""Share of networks outside the band of 90 %."""

READ = (MEASURED, *ORDERS, *EXPANSIONS, *BAND_90, QUANTILE, "z_score")
"""The series of them that it reads."""

_NOT_FINITE = 1e6
"""Relative changes beyond this are those of a training that diverges, on the way to overflow."""


def bounds() -> dict[str, Any]:
    """Return ``{"regimes": [[name, upper bound or None]], "edges": [r at the edge, r of too deep]}``, for drawing."""
    regimes = [[name, bound if math.isfinite(bound) else None] for name, bound in REGIMES]
    return {"regimes": regimes, "edges": [EDGE, TOO_DEEP]}


def summary(info: Mapping[str, Any] | None, series: Mapping[str, Mapping[str, Points]]) -> dict[str, Any]:
    """Summarize a run.

    Args:
        info: The run info; None if there is none that can be read.
        series: ``{quantity: {series: [[step, value], ...]}}``, those of ``NEEDED`` at least; None for values that are
            not finite.

    Returns:
        ``{"ending": {"state", "words", "short", "diverged"}, "regime": badge, "theory": badge, "drift": {"measured",
        "predicted", "low", "high"}, "features", "distance", "compared": {"state", "words", "rows": [[name, value,
        words]], "left"}, "advice": [sentence], "size": {"larger", "edge", "too_deep",
        "remedy"}, "alike": key}``.
    """
    try:
        return _summary(info, series)
    except (ArithmeticError, ValueError):  # numbers of a damaged file: the other runs are shown all the same
        return _summary(None, {})


def _summary(info: Mapping[str, Any] | None, series: Mapping[str, Mapping[str, Points]]) -> dict[str, Any]:
    known = {
        quantity: {name: {int(step): v for step, v in points if v is not None} for name, points in lines.items()}
        for quantity, lines in series.items()
    }
    last = {quantity: line[max(line)] for quantity in known if (line := known[quantity].get(MEASURED))}
    verdicts = {quantity: found for quantity in _LABELS if (found := verdict_of(known.get(quantity, {}))) is not None}
    ended = _ending(info, series, known)
    predicted = [quantity for quantity, found in verdicts.items() if not found.expansion]
    moved = {name: value for name, value in last.items() if max(known[name][MEASURED]) > 0}
    optimizer = str((info or {}).get("optimizer") or "")
    badges = {
        "regime": regime(moved, optimizer) if ended["diverged"] is None else _diverged(moved),
        "theory": _UNKNOWN if info is None else theory(info, predicted, ended["diverged"]),
    }
    drift = verdicts.get("ntk_drift")
    band = drift is not None and not drift.expansion
    return {
        "ending": ended,
        **{name: badge.to_dict() for name, badge in badges.items()},
        "drift": {
            "measured": last.get("ntk_drift"),
            "predicted": drift.predicted if drift is not None and band else None,
            "low": drift.low if drift is not None else None,
            "high": drift.high if drift is not None else None,
        },
        "features": last.get("representation_change"),
        "distance": last.get("ntk_kernel_distance"),
        "compared": _compared(verdicts, known, badges["theory"]),
        "advice": advice(info or {}, last.get("ntk_drift"), badges, verdicts),
        "size": _larger(info or {}),
        "alike": _alike(info or {}),
    }


def _alike(info: Mapping[str, Any]) -> str:
    """The same for runs of one network, optimizer and length, as other seeds are."""
    planned = (info.get("progress") or {}).get("planned")
    return "; ".join(str(entry) for entry in (*(info.get(name) for name in _SAME), planned))


_SAME = ("network", "depth", "width", "r", "parameters", "optimizer")


def _diverged(moved: Mapping[str, float]) -> Badge:
    drift = moved.get("ntk_drift")
    before = "" if drift is None else f"; at the last finite measurement the NTK had moved {amount(drift)}"
    return Badge("regime not known", "none", f"the training diverged{before}")


_UNKNOWN = Badge("not known", "none", "this run's description is missing or cannot be read")


def _ending(
    info: Mapping[str, Any] | None, series: Mapping[str, Mapping[str, Points]], known: Mapping[str, Any]
) -> dict[str, Any]:
    """How far the run came, and whether it ended there."""
    progress = (info or {}).get("progress") or {}
    steps = {step for lines in known.values() for step in lines.get(MEASURED, ())}
    charted = max(steps, default=None)
    diverged = progress.get("diverged")
    if diverged is None:
        diverged = _first_not_finite(series)
    step, planned, state = progress.get("step"), progress.get("planned"), progress.get("state")
    if step is None or (charted is not None and charted > step):
        step = charted
    if diverged is not None:
        words = f"diverged at step {diverged}" + (f"; charts end at {charted}" if charted is not None else "")
        return {"state": "diverged", "words": words, "short": f"diverged at {diverged}", "diverged": diverged}
    if step is None:
        return {"state": "empty", "words": "nothing measured yet", "short": "\N{EN DASH}", "diverged": None}
    of = f" of {planned}" if planned is not None and planned > step else ""
    early = state == "interrupted" or (state == "ended" and of)
    if early:
        words, kind = f"ended early at step {step}{of}", "early"
    elif state == "ended":
        words, kind = f"ended at step {step}", "ended"
    else:
        words, kind = f"at step {step}{of}" if state == "running" else f"last measured at step {step}", "running"
    return {"state": kind, "words": words, "short": f"{step}{of}", "diverged": None}


def _first_not_finite(series: Mapping[str, Mapping[str, Points]]) -> int | None:
    """The first step from which on a measured change is not finite, or overflows."""
    found = []
    for quantity in ("ntk_drift", "representation_change"):
        points = sorted((int(step), value) for step, value in series.get(quantity, {}).get(MEASURED, ()))
        first = None
        for step, value in reversed(points):
            if value is not None and abs(value) < _NOT_FINITE:
                break
            first = step
        if first is not None:
            found.append(first)
    return min(found, default=None)


def _sigmas(verdict: Verdict, lines: Mapping[str, Mapping[int, float]]) -> str:
    """How far the measured value is from the prediction, in standard deviations of a Gaussian, or in percent of it."""
    share, z = verdict.quantile, lines.get("z_score", {}).get(verdict.step)
    if share is not None:
        z = NormalDist().inv_cdf(share) if 0 < share < 1 else math.copysign(math.inf, share - 0.5)
    if z is not None:
        return f"{'above' if z > 0 else 'below'} 3 σ" if abs(z) > 3 else f"{z:+.1f} σ".replace("-", "\N{MINUS SIGN}")
    if verdict.predicted:
        percent = round(100 * (verdict.measured / verdict.predicted - 1))
        return f"{percent:+d} %".replace("-", "\N{MINUS SIGN}") if percent else "0 %"
    return "no band"


def _row(name: str, verdict: Verdict, lines: Mapping[str, Mapping[int, float]]) -> tuple[str, str]:
    """A line of the comparison; the expansion about theta_0 often ends long before the training: it says where."""
    if verdict.expansion:
        return f"{_LABELS[name]}, expansion", f"{_sigmas(verdict, lines)} at step {verdict.step}"
    return _LABELS[name], _sigmas(verdict, lines)


def _compared(verdicts: Mapping[str, Verdict], known: Mapping[str, Any], reach: Badge) -> dict[str, Any]:
    """The answer to "how far from theory?"."""
    rows = [[*_row(name, found, known[name]), found.words] for name, found in verdicts.items()]
    banded = {name: found for name, found in verdicts.items() if found.low is not None}
    outside = {name: found for name, found in banded.items() if found.state != "inside"}
    left, compared = (sum(getattr(found, name) for found in banded.values()) for name in ("outside", "compared"))
    counted = f"outside at {left} of {compared} measurements; one in ten is by chance" if compared else ""
    if reach.name == "diverged":
        state, words = "none", "the training diverged: there is nothing to compare"
    elif not verdicts:
        state, words = "none", reach.reason
    elif reach.name == BEYOND:
        state, words = "doubtful", reach.reason
    elif reach.name == "order 0" and not banded:
        state, words = "plain", "infinite width predicts no change of NTK and features"
    elif outside:
        inside = "inside the 90 % band; " if len(outside) < len(banded) else ""
        state, words = "outside", f"{inside}{', '.join(_LABELS[name] for name in outside)} outside"
        words += "" if inside else " the 90 % band"
    elif banded:
        state, words = "inside", "inside the 90 % band"
    elif all(found.expansion for found in verdicts.values()):
        state, words = "plain", "no forecast; beside the expansion about theta_0, which has no band"
    else:
        state, words = "plain", "predicted, without a band"
    return {"state": state, "words": words, "rows": rows, "left": counted}


def _larger(info: Mapping[str, Any]) -> dict[str, Any] | None:
    """The larger of r and epsilon; the r at the edge and at too deep; beyond the edge, the remedy."""
    r, epsilon = info.get("r"), info.get("epsilon")
    if not r or r <= 0:
        return None
    larger = max(r, epsilon or 0.0)
    remedy = _shallower(info, larger) if larger >= EDGE else ""
    return {"larger": larger, "edge": EDGE * r / larger, "too_deep": TOO_DEEP * r / larger, "remedy": remedy}


def advice(
    info: Mapping[str, Any], drift: float | None, badges: Mapping[str, Badge], verdicts: Mapping[str, Verdict]
) -> list[str]:
    """Return what one can do, with numbers from the 1/n law: the NTK's drift halves where the hidden widths double.

    Args:
        info: The run info.
        drift: The last measured NTK drift.
        badges: ``"regime"`` and ``"theory"``.
        verdicts: By quantity.

    Returns:
        Sentences, the most important first.
    """
    if badges["theory"].name == "diverged":
        return [
            f"Lower the learning rate (here: {info.get('optimizer') or 'not known'}) until the numbers stay finite."
        ]
    found, size = [], _larger(info)
    larger = 0.0 if size is None else size["larger"]
    if size is not None and size["remedy"]:
        found.append(size["remedy"])
    left, compared = (sum(getattr(each, name) for each in verdicts.values()) for name in ("outside", "compared"))
    outside = left > BY_CHANCE * compared
    if badges["theory"].name == BEYOND:
        lines = "the bands" if compared else "the forecast"
        found.append(f"Do not rely on {lines}: what the theory neglects here is not smaller than what it predicts.")
    elif outside:
        found.append(
            f"Outside the bands at {left} of {compared} measurements: train other seeds before you conclude, as one "
            "network in ten leaves a band by chance."
        )
    if drift and badges["regime"].tone == "plain":
        found += _wider(info, drift, larger)
    if not found:
        return ["Nothing is measured yet."] if drift is None and badges["regime"].tone == "none" else []
    if larger < EDGE and not outside and badges["theory"].name == "to 1/n":
        found.insert(0, "Nothing is wrong.")
    return found


def _shallower(info: Mapping[str, Any], larger: float) -> str:
    depth = int(info.get("depth") or 0)
    shallow = math.floor(depth * EDGE / larger)
    what = "Too deep for order 1/n" if larger >= TOO_DEEP else "Deep for order 1/n"
    names = "r and ε" if (info.get("epsilon") or 0.0) > 0 else "r"
    sentence = f"{what}: hidden widths x{_factor(larger / EDGE)} bring {names} to {EDGE:g} or below"
    return sentence + (f"; so does L = {shallow}." if 1 <= shallow < depth else ".")


def _factor(value: float) -> str:
    """A factor rounded up to two digits."""
    power = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / power - 1e-9) * power:.3g}"


def _wider(info: Mapping[str, Any], drift: float, larger: float) -> list[str]:
    """What other widths would do, for networks whose width is known, trained by gradient descent."""
    if not info.get("r"):
        return ["No law of the width is known for this kind of network: train it at twice the width and compare."]
    if not str(info.get("optimizer") or "").startswith("SGD"):
        return ["The 1/n law is of gradient descent: with this optimizer, train at twice the width and compare."]
    if drift >= LAZY:
        factor = 2 ** math.ceil(math.log2(drift / LAZY) + 1e-9)
        return [f"To be lazy: hidden widths x{factor} → drift about {amount(drift / factor)}."]
    lazier = f"To be lazier: hidden widths x2 → drift about {amount(drift / 2)}."
    factor = min(4, math.floor(EDGE / larger)) if larger else 1
    if factor < 2:
        return [lazier]
    return [lazier, f"To learn features: hidden widths / {factor} → drift about {amount(drift * factor)}."]
