"""The rank protocol of a distributed training: rank 0 keeps the history and decides when to measure; the others follow.

Where other ranks are needed (``distributed="sharded"``, or parameters that are sharded themselves), they wait for rank
0's word wherever a measurement may fall, and take their share of the snapshot that it announces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from torch_eft.measure.network.ranks import Ranks


class RankProtocol:
    """This process among the ranks of a training.

    Args:
        collective: Whether a snapshot takes all ranks.
        place: (rank, number of ranks), where a trainer knows it; None: those of torch's default process group.
    """

    def __init__(self, collective: bool, place: tuple[int, int] | None = None) -> None:
        self.collective = collective
        self._given = place
        self._announced = True

    @property
    def _place(self) -> tuple[int, int]:
        if self._given is not None:
            return self._given
        grouped = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)

    @property
    def leads(self) -> bool:
        """True if this process decides and records: rank 0, or the only one."""
        return self._place[0] == 0

    @property
    def several(self) -> bool:
        """True if a snapshot takes more than this process."""
        return self.collective and self._place[1] > 1

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Rank 0 works while the others wait: for a snapshot announced inside, or for the word that there is none."""
        self._announced = not self.several
        try:
            yield
        finally:
            if not self._announced:
                self._announced = True
                Ranks().tell(None)

    def announce(self, message: Any) -> None:
        """Send the waiting ranks a snapshot's plan; at most once inside each ``awaited``.

        Raises:
            RuntimeError: If nobody waits.
        """
        if not self.several:
            return
        if self._announced:
            raise RuntimeError("the other ranks do not wait for a snapshot here")
        self._announced = True
        Ranks().tell(message)

    def wait(self) -> Any:
        """Wait for rank 0: what it announces, or None."""
        return Ranks().tell(None) if self.several else None
