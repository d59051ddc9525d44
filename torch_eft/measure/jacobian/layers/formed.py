"""Jacobians of layers that are formed as the gradients of one output after the other come in."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_eft.measure.jacobian.capture import LayerCall
from torch_eft.measure.jacobian.gram import DenseFactor, Factor
from torch_eft.measure.jacobian.gram.forms import add_outer_products, outputs_at_once, splits
from torch_eft.measure.jacobian.layers.places import (
    Axis,
    each,
    edges,
    gradients_at_places,
    inputs_at_places,
    windows,
)

_FEW_PLACES = 64  # of a group, at which the outputs of the network go into one product
_MANY_PLACES = 512  # of a group, from which its windows take more time and memory than oneDNN's own way


class Formed:
    """The Jacobian of a layer used at more places than it has inputs, formed as gradients come in.

    It is then smaller than the gradients: of a convolution on large images by an order of magnitude.

    Args:
        call: The call.
        axis: The samples' axis.
        samples: N.
        outputs: C.
    """

    def __init__(self, call: LayerCall, axis: Axis, samples: int, outputs: int) -> None:
        self.call, self.axis, self.samples, self.outputs = call, axis, samples, outputs
        self._layer = _Groups(call, axis, samples) if call.options.get("groups", 1) > 1 else _Whole(call, axis, samples)
        self._jacobians: tuple[Tensor, ...] = ()
        self._done = 0
        self._waiting: list[Sequence[Tensor]] = []
        self._biases: list[list[Tensor]] = []

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Take the next output's g_0, g_1, ..."""
        self._waiting.append(gradients)
        if self.call.bias is not None:
            self._biases.append(
                [gradients_at_places(part, self.call, self.axis, self.samples).sum(1) for part in gradients]
            )
        if len(self._waiting) == self._layer.at_once or self._done + len(self._waiting) == self.outputs:
            self._form()

    def _form(self) -> None:
        orders = range(len(self._waiting[0]))
        if not self._jacobians:
            like, shape = self._waiting[0][0], (self.outputs, self.samples, *self._layer.shape)
            self._jacobians = tuple(like.new_empty(shape) for _ in orders)
        rows = slice(self._done, self._done + len(self._waiting))
        for order, J in enumerate(self._jacobians):
            begun = False
            for p, q in splits(order):
                if self.call.inputs[q] is not None:
                    self._layer.add(J[rows], [given[p] for given in self._waiting], q, begun)
                    begun = True
        self._done = rows.stop
        self._waiting = []

    def factors(self) -> list[Factor]:
        """Return J_m of the weight and of the bias."""
        result: list[Factor] = [DenseFactor(self.call.names[0], tuple(J.flatten(2) for J in self._jacobians))]
        if self.call.bias is not None:
            result.append(DenseFactor(self.call.bias, tuple(torch.stack(J) for J in zip(*self._biases, strict=True))))
        return result


class FormedScale:
    """The Jacobian of what a layer's output is multiplied with and added to it, one number for many places.

    Args:
        call: The call.
        axis: The samples' axis.
        samples: N.
    """

    def __init__(self, call: LayerCall, axis: Axis, samples: int) -> None:
        self.call, self.axis, self.samples = call, axis, samples
        shape = [*[1] * (len(call.shape) - len(call.options["shape"])), *call.options["shape"]]
        del shape[axis.index]
        self._stretched = [1, *(index + 2 for index, size in enumerate(shape) if size == 1)]
        self._weights: list[list[Tensor]] = []
        self._biases: list[list[Tensor]] = []

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Take the next output's g_0, g_1, ..."""
        if self.call.weight is not None:
            row = []
            for order in range(len(gradients)):
                pairs = [(gradients[p], a) for p, q in splits(order) if (a := self.call.inputs[q]) is not None]
                terms = [g * a for g, a in pairs]
                row.append(self._reduced(sum(terms[1:], terms[0])))
            self._weights.append(row)
        if self.call.bias is not None:
            self._biases.append([self._reduced(g) for g in gradients])

    def _reduced(self, x: Tensor) -> Tensor:
        """Sum a call's output over what the parameter is stretched along, (N, P)."""
        return self.axis.split(x, self.samples).sum(self._stretched).reshape(self.samples, -1)

    def factors(self) -> list[Factor]:
        """Return J_m of the weight and of the bias."""
        named = ((self.call.weight, self._weights), (self.call.bias, self._biases))
        return [
            DenseFactor(name, tuple(torch.stack(J) for J in zip(*rows, strict=True)))
            for name, rows in named
            if name is not None
        ]


class _Whole:
    """A layer of one group.

    Args:
        call: The call.
        axis: The samples' axis.
        samples: N.
    """

    def __init__(self, call: LayerCall, axis: Axis, samples: int) -> None:
        self.call, self.axis, self.samples = call, axis, samples
        self.inputs = inputs_at_places(call, axis, samples)
        self.width = call.shape[-1] if call.kind == "linear" else call.shape[1]
        a = next(a for a in self.inputs if a is not None)
        self.shape = (self.width, a.shape[2])
        self.at_once = max(1, outputs_at_once(a, self.width))

    def add(self, J: Tensor, gradients: Sequence[Tensor], order: int, begun: bool) -> None:
        """Add sum_t g a_order^T to ``J``, (c, N, E, D), or write it there."""
        a = self.inputs[order]
        assert a is not None
        places = [gradients_at_places(g, self.call, self.axis, self.samples) for g in gradients]
        add_outer_products(J, places, a, begun)


class _Groups:
    """A convolution of several groups, which take one product of many small matrices.

    Args:
        call: The call.
        axis: The samples' axis.
        samples: N.
    """

    def __init__(self, call: LayerCall, axis: Axis, samples: int) -> None:
        self.call, self.axis, self.samples = call, axis, samples
        x = call.given
        self.groups, self.outputs = call.options["groups"], call.shape[1]
        self.kernel = torch.Size(call.options["kernel"])
        self.shape = (self.outputs, self.kernel.numel() * x.shape[1] // self.groups)
        places = call.shape.numel() // (samples * self.outputs)
        self.by_convolution = places > _MANY_PLACES and x.device.type == "cpu" and x.dtype == torch.float32
        self.at_once = 16 if places <= _FEW_PLACES or x.device.type != "cpu" else 1
        self.inputs = tuple(None if a is None or self.by_convolution else self._inputs(a) for a in call.inputs)

    def _inputs(self, a: Tensor) -> Tensor:
        """Return (N G, T, D)."""
        seen = self.axis.split(windows(a, self.call), self.samples)  # (N, m, T, kernel, channels)
        seen = seen.unflatten(4, (self.groups, -1)).permute(0, 4, 1, 2, 3, 5)
        return seen.reshape(self.samples * self.groups, -1, self.shape[1])

    def add(self, J: Tensor, gradients: Sequence[Tensor], order: int, begun: bool) -> None:
        """Add sum_t g a_order^T to ``J``, (c, N, E, D), or write it there."""
        if self.by_convolution:
            for row, g in zip(J, gradients, strict=True):
                value = self._by_convolution(g, self.call.inputs[order])
                row.add_(value) if begun else row.copy_(value)
            return
        a = self.inputs[order]
        assert a is not None
        count, width = len(gradients), self.outputs // self.groups
        parts = [self.axis.split(g.flatten(2), self.samples) for g in gradients]  # (N, m, E, T)
        g = torch.stack(parts, 1).unflatten(3, (self.groups, width)).permute(0, 3, 1, 4, 2, 5)  # (N, G, c, E, m, T)
        values = torch.bmm(g.reshape(len(a), count * width, -1), a)
        values = values.view(self.samples, self.groups, count, width, -1).permute(2, 0, 1, 3, 4)
        target = J.unflatten(2, (self.groups, width))
        target.add_(values) if begun else target.copy_(values)

    def _by_convolution(self, g: Tensor, a: Tensor | None) -> Tensor:
        """Return (N, E, D) by the gradient of a convolution of which every sample's groups are groups."""
        assert a is not None
        count = len(self.kernel)
        stride, dilation = (each(self.call.options[name], count) for name in ("stride", "dilation"))
        a = F.pad(a, edges(self.call.options["padding"], self.kernel, dilation))
        weight = a.new_empty(len(a) * self.outputs, a.shape[1] // self.groups, *self.kernel)
        _, gradient, _ = torch.ops.aten.convolution_backward(
            g.reshape(1, -1, *g.shape[2:]),
            a.reshape(1, -1, *a.shape[2:]),
            weight,
            None,
            stride,
            [0] * count,
            dilation,
            False,
            [0] * count,
            len(a) * self.groups,
            (False, True, False),
        )
        value = gradient.view(len(a), self.outputs, -1, self.kernel.numel()).mT.flatten(2)
        return value if len(a) == self.samples else self.axis.split(value, self.samples).sum(1)


def formed_as_it_comes(call: LayerCall, axis: Axis, samples: int, outputs: int) -> Formed | FormedScale | None:
    """Return what forms the Jacobian of a call that alone has its parameters, so that no gradient of it is kept.

    Args:
        call: The call.
        axis: The samples' axis.
        samples: N.
        outputs: C.

    Returns:
        None where the Jacobian is larger than the gradients.
    """
    if call.kind == "scale":
        return FormedScale(call, axis, samples)
    if call.kind not in ("linear", "convolution"):
        return None
    if call.options.get("groups", 1) == 1:
        x = call.given
        if call.kind == "linear":
            inputs, width = x.shape[-1], call.shape[-1]
        else:
            inputs, width = x.shape[1] * torch.Size(call.options["kernel"]).numel(), call.shape[1]
        if call.shape.numel() // (samples * width) <= inputs:
            return None
    return Formed(call, axis, samples, outputs)
