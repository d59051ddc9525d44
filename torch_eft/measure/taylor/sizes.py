"""How large the Taylor terms of the real trajectory are, and how many of them this network needs (PDLT 0.5).

All relative to ||f - f_0||. At infinite width the term of order 1 is all there is; at order 1/n those of order 2 and 3
appear together, and what three terms leave is O(1/n^2).
"""

import math
from dataclasses import dataclass

import torch

from torch_eft.measure.taylor.series import TaylorSeries


@dataclass(frozen=True)
class TaylorSizes:
    """Norms over probe and outputs, relative to ||f - f_0||.

    Args:
        change: ||f - f_0|| itself.
        terms: Of the terms of order 1, 2, ..
        left: What is left after the terms up to order 1, 2, ..
        rounding: About what rounding alone leaves.
    """

    change: float
    terms: tuple[float, ...]
    left: tuple[float, ...]
    rounding: float

    def orders_needed(self, tolerance: float) -> int:
        """The fewest terms that leave at most ``tolerance``; one more than there are if none do."""
        return next((k for k, left in enumerate(self.left, start=1) if left <= tolerance), len(self.left) + 1)


def taylor_sizes(series: TaylorSeries) -> TaylorSizes | None:
    """The sizes of a series' terms; None where outputs have not moved."""
    moved = series.value - series.terms[0]
    partial = series.terms[1:].cumsum(0)
    scale = series.value.norm() + series.terms[1:].flatten(1).norm(dim=1).sum()
    numbers = torch.cat(
        [
            torch.stack([moved.norm(), scale]),
            series.terms[1:].flatten(1).norm(dim=1),
            (moved - partial).flatten(1).norm(dim=1),
        ]
    ).tolist()
    change, scale_of_sum, *rest = numbers
    if not change > 0 or not math.isfinite(change):
        return None
    count = len(rest) // 2
    # A forward's rounding is a few eps of its size; sums over layers make it some tens of eps.
    rounding = 32 * torch.finfo(series.value.dtype).eps * scale_of_sum / change
    return TaylorSizes(
        change,
        tuple(value / change for value in rest[:count]),
        tuple(value / change for value in rest[count:]),
        rounding,
    )
