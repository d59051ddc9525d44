"""Finds the several objects under which torch knows one operation."""

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
    """Yield all builtin functions, methods and getters of torch with one of ``names``.

    The Python methods of ``Tensor`` count as such; torch's other Python functions are made of these.

    Args:
        names: Names in one string, separated by spaces.

    Yields:
        The objects.

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
    """The name of an operation, for messages."""
    return torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))


OF_THE_PRIMAL = frozenset(
    builtins(
        "size dim __len__ ndimension numel nelement stride storage_offset is_floating_point is_complex is_contiguous "
        "element_size get_device is_signed is_conj is_neg is_inference is_same_size result_type "
        "shape dtype device ndim layout is_cuda is_cpu is_meta is_mps is_xpu is_xla is_mtia is_vulkan is_ipu "
        "is_sparse is_sparse_csr is_mkldnn is_quantized is_nested is_maia itemsize nbytes requires_grad is_leaf grad "
        "grad_fn _version new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like "
        "empty_like isnan isinf isfinite isposinf isneginf argsort"
    )
)
"""Operations that return metadata, or do not depend on the values."""

COMPARISONS = frozenset(
    builtins(
        "gt ge lt le eq ne greater greater_equal less less_equal not_equal __gt__ __ge__ __lt__ __le__ __eq__ "
        "__ne__ argmax argmin signbit int long short bool"
    )
)
"""Operations that are constant except for jumps."""

CONSTANT = frozenset(builtins("detach data"))
"""Operations whose purpose is a derivative of zero."""
