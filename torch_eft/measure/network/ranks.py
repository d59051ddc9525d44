"""Processes that measure together: no collective is entered unless every rank comes to it.

Every rank runs its own work under ``Ranks.together``, which ends in one small all_reduce(MIN): an exception on one rank
becomes an exception on all, and none waits for another until the process group's timeout kills the job.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another rank failed: this one gives up the measurement together with it."""


class Ranks:
    """The ranks of a process group.

    Args:
        group: The process group; None for the default one.

    Attributes:
        rank: This process's number in the group.
        size: The number of processes.

    Raises:
        ValueError: If there is no process group, or this process is not in it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "group: torch.distributed has no process group; call torch.distributed.init_process_group first, or "
                "measure in one process with take_snapshot"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not in it; only its members may call, and all of them must")
        # NCCL moves tensors of CUDA devices only, gloo those of the CPU.
        cuda = "nccl" in str(dist.get_backend(group))
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    @property
    def timeout(self) -> float | None:
        """Return the seconds after which the group gives up on a rank; None where torch does not say."""
        group = dist.group.WORLD if self.group is None else self.group
        try:
            options = group._get_backend(self._device).options  # type: ignore[union-attr]
            return float(options._timeout.total_seconds())
        except (AttributeError, RuntimeError):
            return None

    def together(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank; if it fails on one, all raise.

        Args:
            action: What to run; it must not enter a collective.

        Returns:
            What it returns on this rank.

        Raises:
            PeerError: On the ranks where it did not fail. Where it did, what it raised.
        """
        error: BaseException | None = None
        try:
            result = action()
        except BaseException as caught:  # an interrupt, too, must not leave the others waiting
            error = caught
        flag = torch.tensor([self.size if error is None else self.rank], device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        if error is not None:
            raise error
        failed = int(flag)
        if failed < self.size:
            raise PeerError(f"rank {failed} failed (its own message says why); all ranks skip the measurement with it")
        return result

    def check_equal(self, values: Mapping[str, Tensor]) -> None:
        """Compare numbers between the ranks.

        Args:
            values: Scalars by name, the same names on all ranks.

        Raises:
            ValueError: On all ranks, if they differ on any; the message names the first.
        """
        own = torch.stack([value.detach().to(self._device, torch.float64).nan_to_num() for value in values.values()])
        both = torch.cat([own, -own])
        dist.all_reduce(both, dist.ReduceOp.MIN, group=self.group)
        least, greatest = both[: len(own)].tolist(), (-both[len(own) :]).tolist()
        for name, low, high in zip(values, least, greatest, strict=True):
            if low != high:
                raise ValueError(
                    f"model: {name} differs between the ranks, from {low:.17g} to {high:.17g}; a sharded measurement "
                    "needs the same model and probe on all of them (as DistributedDataParallel keeps it)"
                )

    def from_first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return rank 0's values in new tensors; shapes and dtypes must be the same on all ranks."""
        if not tensors:
            return []
        packed = torch.cat([_bytes(tensor) for tensor in tensors]).to(self._device)
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast(packed, source, group=self.group)
        return _unpacked(packed, tensors)

    def gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the tensors of every rank, in the order of ranks; shapes and dtypes must be the same on all."""
        packed = torch.cat([_bytes(tensor) for tensor in tensors]).to(self._device)
        parts = [torch.empty_like(packed) for _ in range(self.size)]
        dist.all_gather(parts, packed, group=self.group)
        return [_unpacked(part, tensors) for part in parts]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks."""
        total = tensor.to(self._device)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def tell(self, message: Any) -> Any:
        """Return rank 0's ``message``, of plain types, on all ranks."""
        box = [message]
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(box, source, group=self.group, device=self._device)
        return box[0]


def _bytes(tensor: Tensor) -> Tensor:
    """Copy the bytes, padded so that whatever follows stays aligned."""
    flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % 16))


def _unpacked(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    tensors, start = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        part = packed[start : start + size].to(tensor.device)
        tensors.append(part.view(tensor.dtype).reshape(tensor.shape))
        start += size + -size % 16
    return tensors
