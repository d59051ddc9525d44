"""Problems that a diagnosis reports, each with its remedy.

What counts as a problem was compared with trainings (``python -m tests.benchmarks.diagnosis``): 500 steps of full-batch
gradient descent, depth 2 .. 40, width 8 .. 256, torch's default and critical initialization.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch_eft.theory.estimates.plateau import LARGEST

Code = Literal[
    "gradients vanish",
    "gradients explode",
    "too deep",
    "spread",
    "edge",
    "dead network",
    "frozen layer",
    "signal",
    "learning rate",
    "inputs",
    "nothing trains",
]

DEAD = 0.01
"""Probability of a silent layer above which it is worth a warning: one network in a hundred."""

FROZEN = 0.01
"""Part of its equal share of the NTK below which a layer practically does not train."""

SIGNAL = 1e4
"""Growth or decay of the kernel over the depth beyond which outputs are useless at the start."""

PLATEAU = 350
"""Expected steps to half of the loss, at a quarter of the largest stable learning rate, beyond which training suffers.

Of 500 steps: all networks that did not train were expected to take 420 or more, those that did as well as their shallow
counterparts at most 320.
"""

LARGE, ORDER_ONE, TOO_DEEP = 0.2, 1.0, 100.0
"""Relative variance from seed to seed from which it is called large, of order one, and too deep.

Networks train well far beyond order one, each at its own pace: critical ReLU networks of ten layers of eight neurons,
whose output variance has a relative variance of 78, trained as well as shallow ones. All beyond 130 did worse, with
some seeds left behind; at 30,000 most were.
"""

LONG = 3.0
"""r = L / n from which a spread of order one is too deep, too: it grows slowly where the kernel falls with depth, tanh.

Critical tanh networks of width 8 trained as well as shallow ones at 16 layers, worse at 24, and not at 40.
"""


@dataclass(frozen=True)
class Finding:
    """A warning.

    Args:
        code: Its kind.
        message: The problem, with the number and the limit.
        remedy: What to change; empty if there is nothing to recommend.
        line: The remedy as code; empty if it is none.

    Example:
        >>> import torch_eft as eft
        >>> report = eft.diagnose(eft.theory.MLPEnsemble([10, *[20] * 20, 1], "relu", C_W=2.0))
        >>> "spread" in [warning.code for warning in report.warnings]
        True
    """

    code: Code
    message: str
    remedy: str = ""
    line: str = ""

    def __str__(self) -> str:
        return self.message


def advice(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Return the remedies, each once, in order."""
    return tuple(dict.fromkeys(finding.remedy for finding in findings if finding.remedy))


def spread_finding(size: float, name: str, remedy: str, line: str = "", r: float = 0.0) -> Finding | None:
    """Return the warning that differences between seeds call for.

    Args:
        size: Relative variance of outputs or of the NTK from seed to seed, the larger one.
        name: Of the number, with its value.
        remedy: What to change.
        line: The same as code.
        r: L / n, where it is known.

    Returns:
        The warning, or None below the first border.
    """
    if size >= TOO_DEEP or (size >= ORDER_ONE and r >= LONG):
        what = "kernels of different seeds differ widely, and no learning rate suits all"
        return Finding("too deep", f"too deep for its width, {name} from seed to seed: {what}", remedy, line)
    if size >= ORDER_ONE:
        what = "one seed says little of the next, and order 1/n is useless"
        return Finding("spread", f"networks of different seeds differ by order one, {name}: {what}", remedy, line)
    if size >= LARGE:
        what = "finite-width corrections are large"
        small = f"small: below {100 * math.sqrt(LARGE):.0f} %"
        return Finding("edge", f"networks of different seeds differ, {name} ({small}): {what}", remedy, line)
    return None


def plateau_words(kappa: float, steps: float) -> str:
    """How long full-batch gradient descent takes to start, in words."""
    about = "over 10,000" if kappa >= LARGEST else f"about {float(f'{steps:.1g}'):,.0f}"
    return f"{about} full-batch steps to halve the loss"
