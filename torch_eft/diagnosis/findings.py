"""Problems that a diagnosis reports, each with its remedy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch_eft.theory.signal_propagation.regimes import EDGE, TOO_DEEP

Code = Literal[
    "gradients vanish",
    "gradients explode",
    "no criticality",
    "too deep",
    "edge",
    "dead network",
    "frozen layer",
    "signal",
    "nothing trains",
]

DEAD = 0.01
"""Probability of a silent layer above which it is worth a warning: one network in a hundred."""

FROZEN = 0.01
"""Part of its equal share of the NTK below which a layer practically does not train."""

SIGNAL = 1e4
"""Growth or decay of the kernel over the depth beyond which outputs are useless at the start."""


@dataclass(frozen=True)
class Finding:
    """A warning.

    Args:
        code: Its kind.
        message: The problem, with the number and the limit.
        remedy: What to change; empty if there is nothing to recommend.

    Example:
        >>> import torch_eft as eft
        >>> report = eft.diagnose(eft.theory.MLPEnsemble([10, *[20] * 20, 1], "relu", C_W=2.0))
        >>> "too deep" in [warning.code for warning in report.warnings]
        True
    """

    code: Code
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return self.message


def advice(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Return the remedies, each once, in order."""
    return tuple(dict.fromkeys(finding.remedy for finding in findings if finding.remedy))


def depth_finding(size: float, name: str, remedy: str) -> Finding | None:
    """Return the warning that depth over width calls for, judged by the larger of r and epsilon or their stand-in.

    Args:
        size: The number.
        name: Of the number, with its value.
        remedy: What to change.

    Returns:
        The warning, or None below the first border.
    """
    if size >= TOO_DEEP:
        what = "networks of different seeds differ by order one, and the expansion in 1/n is useless"
        return Finding("too deep", f"too deep for its width, {name} >= {TOO_DEEP:g}: {what}", remedy)
    if size >= EDGE:
        what = "finite-width corrections are large"
        return Finding("edge", f"deep for its width, {name} >= {EDGE:g}: {what}", remedy)
    return None
