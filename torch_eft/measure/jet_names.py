"""The several objects under which torch knows one operation."""

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

SPACES = (
    torch,
    torch._C._VariableFunctions,
    Tensor,
    torch._C.TensorBase,
    torch._C._nn,
    torch._C._linalg,  # type: ignore[attr-defined]
    torch._C._special,  # type: ignore[attr-defined]
)


def builtins(names: str) -> Iterator[Callable[..., Any]]:
    """All builtin functions, methods and getters of torch with one of ``names``, words in one string.

    The Python methods of ``Tensor`` count as such; torch's other Python functions are made of these.

    Raises:
        AttributeError: If there is none of a name.
    """
    for name in names.split():
        found = False
        for space in SPACES:
            value = getattr(space, name, None)
            if isinstance(value, types.GetSetDescriptorType):
                value = value.__get__
            if callable(value) and (not isinstance(value, types.FunctionType) or value.__module__ == "torch._tensor"):
                found = True
                yield value
        if not found:
            raise AttributeError(f"torch has no operation {name}")


def name_of(func: Callable[..., Any]) -> str:
    """For messages."""
    return torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))
