"""Counts what torch does, for computations whose cost no formula knows: those of any network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_CALL, _ENTRY, _MULTIPLICATION = 4e-6, 2e-9, 5.5e-11
"""Seconds of one core for an operation, for an entry written and for a multiplication within a matrix product."""


class OperationCount(TorchDispatchMode):
    """Counts operations, the entries that they write, and multiplications of matrix products and convolutions.

    The counts are the same on any machine. While it is active everything is slower.

    Attributes:
        calls: Number of operations.
        entries: Number of entries of their results; views write none.
        multiplications: Of matrix products, convolutions and attention.

    Example:
        >>> import torch
        >>> from torch_eft.forecast.comparison.operations import OperationCount
        >>> with OperationCount() as count:
        ...     _ = torch.ones(3, 4) @ torch.ones(4, 5).abs()
        >>> count.multiplications
        60
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.entries = self.multiplications = 0

    @property
    def seconds(self) -> float:
        """The work, in seconds of one core."""
        return _CALL * self.calls + _ENTRY * self.entries + _MULTIPLICATION * self.multiplications

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        keywords = dict(kwargs or {})
        result = func(*args, **keywords)
        self.calls += 1
        if not _is_view(func):
            values = result if isinstance(result, tuple | list) else (result,)
            self.entries += sum(value.numel() for value in values if isinstance(value, Tensor))
        flops: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.multiplications += flops(*args, **keywords, out_val=result) // 2
        return result


def _is_view(func: Any) -> bool:
    """Whether an operation returns an alias of what it got, without writing to it."""
    aliases = (value.alias_info for value in func._schema.returns)
    return any(alias is not None and not alias.is_write for alias in aliases)
