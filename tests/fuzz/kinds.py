"""What building blocks are made of: a registry, a function with parameters as a module, and places to work in.

A block takes features of one kind, ``f`` (N, d), ``s`` (N, T, d), ``c`` (N, d, L), ``i`` (N, d, H, W), ``v``
(N, d, D, H, W) or tokens ``t`` (N, T), and returns some of the same kind unless its ``to`` says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

BLOCKS: dict[str, "Block"] = {}


@dataclass(frozen=True)
class Block:
    """One building block.

    Args:
        name: Of the block.
        kinds: Letters of the kinds that it takes; ``*`` is all but tokens.
        make: Takes a ``random.Random`` and the shape without N; returns the module.
        to: Kind of what it returns; None is the kind of what it takes.
        notes: ``cut``: its backward pass is not the derivative of its forward, or not differentiable once more, so that
            autodiff's higher derivatives are not those of its first ones. ``coarse``: rounds to fewer digits than
            float64, which differences of first derivatives do not survive. ``once``: torch has no second derivatives.
        eps: Rounding of its numbers.
    """

    name: str
    kinds: str
    make: Callable
    to: str | None = None
    notes: frozenset = frozenset()
    eps: float = 2.0**-52


def block(name, kinds, make, to=None, notes=(), eps=2.0**-52):
    assert name not in BLOCKS, name
    BLOCKS[name] = Block(name, "fsciv" if kinds == "*" else kinds, make, to, frozenset(notes), eps)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64) / 2


class Op(nn.Module):
    """A function of the input and of parameters."""

    def __init__(self, function, *parts, **parameters):
        super().__init__()
        self.function, self.names = function, list(parameters)
        self.parts = nn.ModuleList(parts)
        for name, value in parameters.items():
            self.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))

    def forward(self, x):
        return self.function(x, *self.parts, *(getattr(self, name) for name in self.names))


def width(r):
    return r.choice([2, 3, 4])


def last_axis(kinds):
    """Whether features come last, for the kinds of a block."""
    return set(kinds) <= {"f", "s"}


def side(x):
    """On which side of a plane the last axis is; one of no symmetry, as of plain sums after a norm rounding decides."""
    return x.detach() @ torch.arange(1, x.shape[-1] + 1, dtype=x.dtype).cos() > 0
