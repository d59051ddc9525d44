"""The change of a snapshot along a displacement d of the parameters, to first and second order about theta_0.

    H(theta_0 + d) = H_0 + (dH d + transpose) + (ddI d d + transpose + 2 ddII d d) / 2 + O(d^3):

dNTK first, then the ddNTKs (PDLT 11.1 and chapter infinity); for hidden kernels K likewise. Both orders are central
differences of snapshots at theta_0 + s d and theta_0 - s d: derivatives of all that a snapshot does with parameters,
the statistics of BatchNorm included, and of H and every K at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.measure.network.snapshot import Snapshot
from torch_eft.results.presentation.repr import short_repr

ROUNDING = 16
"""A kernel's relative rounding in units of eps, as assumed where the length of the differences is chosen."""


@dataclass(frozen=True, repr=False)
class SnapshotExpansion:
    """Changes from theta_0 to theta_0 + d: each is a snapshot whose tensors are differences.

    Args:
        change: Realized.
        first: Of first order in d: H by the dNTK.
        second: Of second order: H by the ddNTKs.
        distance: s.

    Example:
        >>> import torch
        >>> from torch_eft.measure import Snapshot
        >>> from torch_eft.measure.network.expansion import SnapshotExpansion
        >>> parts = [Snapshot(torch.zeros(2, 1), size * torch.eye(2), {}) for size in (1.2, 1.0, 0.3)]
        >>> round(SnapshotExpansion(*parts, distance=0.1).gauge, 3)
        0.3
    """

    change: Snapshot
    first: Snapshot
    second: Snapshot
    distance: float

    __repr__ = short_repr

    @property
    def gauge(self) -> float:
        """||second order|| / ||first order|| of the NTK's change; waits for the device once."""
        assert self.first.ntk is not None and self.second.ntk is not None
        return float(self.second.ntk.norm() / self.first.ntk.norm())


def expand_snapshot(
    snapshot_at: Callable[[float], Snapshot], start: Snapshot, end: Snapshot
) -> SnapshotExpansion | None:
    """Expand the change from one snapshot to another along the straight line between them.

    The distance s balances what the differences leave out, of relative size s^2, against rounding, which they divide by
    s^2: s^4 = rounding / relative change of H.

    Args:
        snapshot_at: Takes the snapshot at theta_0 + t d.
        start: At theta_0, with the NTK.
        end: At theta_0 + d, likewise.

    Returns:
        The terms; None where H has changed by so little that rounding hides its second order.
    """
    change = _sum(1.0, end, -1.0, start)
    assert change.ntk is not None and start.ntk is not None
    relative = float(change.ntk.norm() / start.ntk.norm().to(change.ntk))
    rounding = ROUNDING * torch.finfo(change.ntk.dtype).eps
    if not relative > ROUNDING * rounding:
        return None
    s = (rounding / relative) ** 0.25
    ahead, behind = (_sum(1.0, snapshot_at(t), -1.0, start) for t in (s, -s))  # differences first: they round nothing
    first, second = _sum(0.5 / s, ahead, -0.5 / s, behind), _sum(0.5 / s**2, ahead, 0.5 / s**2, behind)
    return SnapshotExpansion(change, first, second, s)


def _sum(a: float, x: Snapshot, b: float, y: Snapshot) -> Snapshot:
    """Return a x + b y, of what both have, where x is."""

    def total(left: Tensor, right: Tensor) -> Tensor:
        return a * left + b * right.to(left)

    return Snapshot(
        total(x.output, y.output),
        None if x.ntk is None or y.ntk is None else total(x.ntk, y.ntk),
        {name: total(K, y.hidden[name]) for name, K in x.hidden.items() if name in y.hidden},
    )
