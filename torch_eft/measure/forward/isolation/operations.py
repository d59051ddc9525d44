"""Watches the operations of a forward: they meet the given parameters, in one precision, and nothing from outside."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NARROWING = {
    Tensor.float: torch.float32,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}
_EMBEDDINGS = (nn.functional.embedding, nn.functional.embedding_bag)
_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
_METADATA = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad")
)
_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class RefusedForwardError(ValueError):
    """The forward does what cannot be measured; the message says what, and a remedy."""


class LiveWriteError(RefusedForwardError):
    """The forward writes to a tensor of the training, which was stopped before it did.

    Args:
        name: Of the tensor.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"model: its forward writes to {name!r} in place, in evaluation mode, too; let it work on a copy, or make "
            "it a buffer (register_buffer), which measurements copy"
        )


class GivenTensors(TorchFunctionMode):
    """A context in which a network's operations use the given tensors in the place of the training's.

    Whatever way a parameter takes into an operation (a list, a closure, a global name), it is recognized by its
    identity. Autocast is off in every operation, and none casts to less than the network's precision: islands of
    float32 in float64, or of half precision in a widened network, would only add rounding.

    Args:
        given: ``{id: tensor}`` to take in the place of others.
        refused: ``{id: why}`` of tensors that must not be used.
        dtype: The network's precision.
        inputs: Of the forward, which may have gradients, too.
        note: Called with every narrower dtype in which an operation would have been computed.
        without_gradient: Ids of given tensors are added that an operation used while the forward had gradients off.
    """

    def __init__(
        self,
        given: dict[int, Tensor],
        refused: dict[int, str],
        dtype: torch.dtype,
        inputs: Any,
        note: Callable[[torch.dtype], None],
        without_gradient: set[int],
    ) -> None:
        super().__init__()
        self._given, self._refused, self._dtype, self._note = given, refused, dtype, note
        self._without_gradient, self._on = without_gradient, torch.is_grad_enabled()
        self._own = {id(tensor) for tensor in given.values()}
        # Leaves of the forward's own, kept alive: no id is given twice.
        self._made = {id(leaf): leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Exchange the arguments of ``func``, then call it."""
        if func in _METADATA:
            return func(self._given.get(id(args[0]), args[0]))
        args = tuple(self._replaced(value) for value in args)
        if kwargs:
            kwargs = {name: self._replaced(value) for name, value in kwargs.items()}
            if kwargs.get("sparse") is True and func in _EMBEDDINGS:
                kwargs["sparse"] = False
        narrow = _NARROWING.get(func)
        if narrow is not None and args[0].is_floating_point():
            func, args = Tensor.to, (args[0], self._widened(narrow))
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    self._note(torch.get_autocast_dtype(kind))
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                value = func(*args, **kwargs or {})
        else:
            value = func(*args, **kwargs or {})
        results = value if isinstance(value, tuple | list) else (args[0] if func is _SET_REQUIRES_GRAD else value,)
        for made in results:
            if type(made) is Tensor and made.requires_grad and made.is_leaf:
                self._made[id(made)] = made
        return value

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = self._given.get(id(value), value)
            if self._on and id(value) in self._own:
                if not torch.is_grad_enabled():
                    self._without_gradient.add(id(value))
                return value
            if type(value) in (Tensor, nn.Parameter):
                self._check(value)
            return value
        if type(value) in (list, tuple):
            return type(value)([self._replaced(part) for part in value])
        if isinstance(value, torch.dtype):
            return self._widened(value)
        return value

    def _check(self, value: Tensor) -> None:
        reason = self._refused.get(id(value))
        if reason is not None:
            raise RefusedForwardError(
                f"model: its forward uses a tensor {tuple(value.shape)} that is {reason}; compute it in the forward, "
                "from the parameters"
            )
        if value.requires_grad and value.is_leaf and id(value) not in self._own and id(value) not in self._made:
            raise RefusedForwardError(
                f"model: its forward uses a trainable tensor {tuple(value.shape)} that is not among its parameters "
                "(in a closure, a list or another module), so that it would be missing in the kernel; register it, as "
                "an attribute that is an nn.Parameter or a submodule, or set its requires_grad to False"
            )

    def _widened(self, dtype: torch.dtype) -> torch.dtype:
        if dtype.is_floating_point and dtype.itemsize < self._dtype.itemsize:
            self._note(dtype)
            return self._dtype
        if dtype.is_complex and dtype.itemsize < 2 * self._dtype.itemsize:
            self._note(dtype)
            return _COMPLEX.get(self._dtype, dtype)
        return dtype


class NoWrites(TorchDispatchMode):
    """Stops operations before they write to the memory of some tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage()._cdata: name for name, tensor in tensors.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments that ``func`` writes to, then call it."""
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name) if index >= len(args) else args[index]
            for tensor in tree_leaves(value):
                name = self._names.get(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else None
                if name is not None:
                    raise LiveWriteError(name)
        return func(*args, **kwargs)
