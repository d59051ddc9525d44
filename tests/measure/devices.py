"""Checks of devices for machines without accelerators: "meta" tensors, and counted waits for the device."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = (
    torch.ops.aten._local_scalar_dense.default,  # .item(), float(), bool(), int(), a tensor in an if
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
)


class Waits(TorchDispatchMode):
    """Counts operations for which the process would wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masked = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += func in _WAITS or masked
        return func(*args, **(kwargs or {}))


def waits(measurement):
    """Count how often ``measurement()`` would wait."""
    with Waits() as counter:
        measurement()
    return counter.count


@contextmanager
def poisoned():
    """Any tensor made without a device has no data: computing with it is an error, or its result has none."""
    with torch.device("meta"):
        yield
