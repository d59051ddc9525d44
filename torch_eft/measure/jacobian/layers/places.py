"""The places at which a layer uses its weight: its inputs there, and the gradients at its outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_eft.measure.jacobian.capture import LayerCall


@dataclass(frozen=True)
class Axis:
    """Axis of a layer's output on which the samples are.

    Args:
        index: The axis; its length may be a multiple of N.
        inner: True if samples run faster than the other index on this axis.
    """

    index: int
    inner: bool = False

    def split(self, x: Tensor, samples: int) -> Tensor:
        """Return (..., N m, ...) as (N, m, ...)."""
        x = x.movedim(self.index, 0)
        return x.unflatten(0, (-1, samples)).transpose(0, 1) if self.inner else x.unflatten(0, (samples, -1))


def inputs_at_places(call: LayerCall, axis: Axis, samples: int) -> tuple[Tensor | None, ...]:
    """Return the inputs of a linear layer or an ungrouped convolution, (N, T, D) each."""
    if call.kind == "linear":
        return tuple(None if a is None else axis.split(a, samples).flatten(1, -2) for a in call.inputs)
    return tuple(None if a is None else merged(windows(a, call).flatten(2), axis, samples) for a in call.inputs)


def gradients_at_places(x: Tensor, call: LayerCall, axis: Axis, samples: int) -> Tensor:
    """Return the gradient at its output, (N, T, E)."""
    return axis.split(x, samples).flatten(1, -2) if call.kind == "linear" else merged(x.flatten(2).mT, axis, samples)


def merged(x: Tensor, axis: Axis, samples: int) -> Tensor:
    """Return (N m, places, channels) as (N, m places, channels)."""
    return x if len(x) == samples else axis.split(x, samples).flatten(1, 2)


def windows(x: Tensor, call: LayerCall, places: Sequence[int] | None = None) -> Tensor:
    """Return what a convolution's kernel sees, (N, places, kernel, channels)."""
    kernel = call.options["kernel"]
    count = len(kernel)
    stride, dilation = (each(call.options[name], count) for name in ("stride", "dilation"))
    around = edges(call.options["padding"], kernel, dilation)
    if places is None and torch.Size(kernel).numel() == 1 and not any(around):
        seen = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
        return x[seen].flatten(2).mT[:, :, None]  # a view
    x = F.pad(x, around)
    if places is None:
        places = [
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
        ]
    else:  # an output that output_padding has made longer than the windows reach, or shorter
        short = [
            max(0, (n - 1) * s + d * (k - 1) + 1 - size)
            for size, n, k, s, d in zip(x.shape[2:], places, kernel, stride, dilation, strict=True)
        ]
        if any(short):
            x = F.pad(x, [edge for extra in reversed(short) for edge in (0, extra)])
    x = x.movedim(1, -1).contiguous()  # channels last: then windows are copied in long runs
    steps = x.stride()
    strides = (
        steps[0],
        *(s * step for s, step in zip(stride, steps[1:-1], strict=True)),
        *(d * step for d, step in zip(dilation, steps[1:-1], strict=True)),
        1,
    )
    view = x.as_strided((len(x), *places, *kernel, x.shape[-1]), strides)
    return view.reshape(len(x), torch.Size(places).numel(), torch.Size(kernel).numel(), x.shape[-1])


def each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Return a setting of a convolution for every axis."""
    return (value,) * count if isinstance(value, int) else tuple(value) * (count if len(value) == 1 else 1)


def edges(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return the padding before and after, last axis first, as ``torch.nn.functional.pad`` takes it."""
    if padding == "same":
        whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in whole]
    else:
        pairs = [(p, p) for p in each(0 if isinstance(padding, str) else padding, len(kernel))]
    return [edge for pair in reversed(pairs) for edge in pair]
