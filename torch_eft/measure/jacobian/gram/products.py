"""Products of matrices, by whichever of torch's two ways to them is faster on this processor.

On some processors torch's own products (MKL's) run at half the rate of oneDNN's, which torch carries for linear layers.
Which it is here is measured once a process, so that equal products are equal to the last bit in every visit of a run.
oneDNN's way is taken only where it is faster by a quarter at least: a processor on which both are alike takes torch's
in every process, and so does a process that is to be deterministic (``torch.use_deterministic_algorithms``).
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ROWS = 80
"""Of symmetric products on a CPU only blocks of so many rows on and below the diagonal are computed."""

ROWS_ELSEWHERE = 2048
"""The same on a GPU, where smaller products leave most of it idle."""

_LEAST = 2**21
"""Multiplications below which oneDNN's overhead is more than it gains."""

_ADVANTAGE = 1.25

_log = logging.getLogger("torch_eft")


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T.

    Args:
        a: (M, K), outside the autograd graph.
        b: (N, K), likewise.

    Returns:
        (M, N).

    Example:
        >>> import torch
        >>> product(torch.ones(1, 3), torch.ones(2, 3)).tolist()
        [[3.0, 3.0]]
    """
    return _by_onednn(a, b) if _suits_onednn(a, b) else torch.mm(a, b.T)


def add_product(out: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add scale a b^T to ``out``, (M, N)."""
    if _suits_onednn(a, b):
        out.add_(_by_onednn(a, b), alpha=scale)
    else:
        out.addmm_(a, b.T, alpha=scale)


def lower_blocks(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Return rows, and the columns up to the diagonal, of the blocks of a symmetric matrix."""
    size, step = len(matrix), rows_at_once(matrix)
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield slice(start, stop), slice(0, stop)


def rows_at_once(like: Tensor) -> int:
    """Return the number of rows in a block of a symmetric product."""
    return ROWS if like.device.type == "cpu" else ROWS_ELSEWHERE


def takes_onednn(like: Tensor) -> bool:
    """Return whether large products of such matrices are oneDNN's."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and onednn_is_faster()


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    # Another layout than these falls to a reference kernel that is hundreds of times slower.
    return (
        len(a) * b.numel() >= _LEAST
        and a.dtype == b.dtype
        and takes_onednn(a)
        and a.is_contiguous()
        and (b.is_contiguous() or b.T.is_contiguous())
    )


def _by_onednn(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return result


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN's float32 products are faster on this processor, measured at the first call."""
    try:
        if torch.are_deterministic_algorithms_enabled() or not torch.backends.mkldnn.is_available():
            return False
        a = torch.full((256, 256), 0.5, dtype=torch.float32, device="cpu")
        ways: tuple[Callable[[], Tensor], ...] = (lambda: torch.mm(a, a.T), lambda: _by_onednn(a, a))
        seconds = [float("inf"), float("inf")]
        for _ in range(6):  # in turn, so that another program's load falls on both
            for index, way in enumerate(ways):
                begun = time.perf_counter()
                way()
                seconds[index] = min(seconds[index], time.perf_counter() - begun)
    except (AttributeError, RuntimeError):  # the operator is torch's own affair, and may go
        return False
    faster = seconds[1] * _ADVANTAGE < seconds[0]
    _log.info("torch_eft: float32 products by %s in this process", "oneDNN" if faster else "torch.mm")
    return faster
