"""Copies a module, so that nothing a forward does to the copy reaches the training.

``copy.deepcopy`` takes functions as they are: a wrapped or replaced ``forward``, a hook or a closure would go on using
the original's modules. Here they are made anew over the copies of what they hold.
"""

import collections
import contextlib
import copy
import functools
import types
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from torch_eft.measure.forward.isolation.hooks import KINDS, taking_part
from torch_eft.measure.forward.isolation.operations import RefusedForwardError

_LARGE = 1024
"""Containers with more entries are data: the container is copied, its entries are shared."""
_CONTAINERS = (dict, list, set, collections.OrderedDict)
_LARGE_TENSOR = 2**18
"""Tensors with more numbers, neither parameters nor buffers, are shared; nothing may write to them."""
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, torch.device, torch.dtype)
_SHARED = (
    *("torch.utils.data", "torch.optim", "torch.distributed", "torch.utils.tensorboard", "torch.cuda", "torch.fx"),
    *(
        "torch._dynamo",
        "torch.jit",
        "torch_eft",
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "wandb",
        "mlflow",
    ),
    *("logging", "threading", "multiprocessing", "concurrent", "subprocess", "socket", "asyncio", "weakref", "pathlib"),
    *("mlflow", "tensorboard", "tokenizers", "pandas", "pyarrow", "datasets", "re", "datetime", "_io", "io", "ctypes"),
)
"""Packages whose objects are data, or belong to the process: they are shared."""


class Copies:
    """Copies of modules and of what their attributes and closures hold; what is met twice is copied once.

    Args:
        model: The module. Frozen and trainable parameters of it are copied as well, unless ``share_parameters``.
        share_parameters: Its forward writes to none.

    Attributes:
        live: ``{id: name}`` of its parameters and buffers, and of their copies.
        aliases: ``{id: name}`` of tensors that are the memory of one, without its gradient.
        refused: ``{id: why}`` of tensors that a measurement must not use.
        shared: ``{place: tensor}`` of those that are not copied and must not be written to.
        parameters: The copies of its parameters, by name.
        buffers: Those of its buffers.
        module: The copy.
    """

    def __init__(self, model: nn.Module, share_parameters: bool = False) -> None:
        self.live: dict[int, str] = {}
        self.aliases: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        self.shared: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []
        self._memory: dict[int, tuple[str, Tensor]] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._place = ""
        for name, parameter in model.named_parameters():
            copied: Tensor = parameter
            if not share_parameters or parameter.is_inference():
                copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            self.parameters[name] = self._remember(parameter, copied, name)
        for name, buffer in model.named_buffers():
            self.buffers[name] = self._remember(buffer, buffer.detach().clone(), name)
        self.module: nn.Module = self.copy(model)

    def _remember(self, tensor: Tensor, copied: Tensor, name: str) -> Tensor:
        self._memo[id(tensor)] = copied
        self._kept.append(tensor)
        self.live[id(tensor)] = self.live[id(copied)] = name
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            self._memory[tensor.untyped_storage()._cdata] = name, tensor
        return copied

    def copy(self, value: Any) -> Any:
        """Return the copy, or the value itself where nothing can change it."""
        if isinstance(value, _ATOMS):
            return value
        known = self._memo.get(id(value))
        if known is not None:
            return known
        self._kept.append(value)
        if isinstance(value, Tensor):
            return self._note(value, self._tensor(value))
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, list | dict | set | tuple | collections.deque):
            return self._container(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self._note(value, types.MethodType(self.copy(value.__func__), self.copy(value.__self__)))
        if isinstance(value, functools.partial):
            parts = self.copy((value.func, value.args, value.keywords))
            return self._note(value, type(value)(parts[0], *parts[1], **parts[2]))
        if isinstance(value, types.BuiltinMethodType):
            owner = self.copy(value.__self__)
            return value if owner is value.__self__ else getattr(owner, value.__name__)
        return self._object(value)

    def _note(self, value: Any, copied: Any) -> Any:
        self._memo[id(value)] = copied
        return copied

    def _tensor(self, value: Tensor) -> Tensor:
        if value.grad_fn is not None:  # an activation cached by an earlier forward
            cut = value.detach()
            self.refused[id(cut)] = "kept by an earlier forward, whose derivatives cannot be taken again"
            return cut
        if value.requires_grad or value.layout != torch.strided:
            return value
        own = self._memory.get(value.untyped_storage()._cdata) if value.device.type != "meta" else None
        if own is not None:
            cut, (name, whole) = value.detach(), own
            if cut.shape == whole.shape and cut.stride() == whole.stride() and cut.data_ptr() == whole.data_ptr():
                self.aliases[id(cut)] = name
            else:
                self.refused[id(cut)] = f"a part of the memory of {name!r}, which changes with it in training"
            return cut
        if value.numel() > _LARGE_TENSOR:
            self.shared[self._place] = value
            return value
        copied = value.detach().clone()
        return nn.Parameter(copied, requires_grad=False) if isinstance(value, nn.Parameter) else copied

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return self._script(module)
        copied = self._note(module, object.__new__(type(module)))
        own, prefix = vars(copied), self._names.get(id(module), type(module).__name__)
        replaced = stand_ins(module)
        for name, value in _state(module).items():
            if name in replaced:
                continue
            self._place = f"{prefix}.{name}".removeprefix(".")
            if name in KINDS:
                value = taking_part(module, name)
            elif name in ("_backward_hooks", "_backward_pre_hooks"):
                value = {}
            # Most attributes of most modules are empty containers.
            own[name] = type(value)() if type(value) in _CONTAINERS and not value else self.copy(value)
        with contextlib.suppress(Exception):  # one that takes something else than attributes; they are there already
            copied.__setstate__(dict(own))
        own.update(replaced)
        own["training"] = False
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            own["sparse"] = False  # the same gradients, in a form that can be differentiated
        own["_compiled_call_impl"] = None  # a compiled module's would go on calling the original
        inner = runs_in_place_of(copied)
        if inner is not None:
            own["forward"] = inner.__call__
        return copied

    def _script(self, module: nn.Module) -> nn.Module:
        """Copy a scripted module as torch does, with parameters of its own."""
        copied = self._note(module, copy.deepcopy(module).eval())
        prefix = self._names.get(id(module))
        for name, tensor in (*copied.named_parameters(), *copied.named_buffers()):
            self._kept.append(tensor)
            if prefix is not None:
                self.live[id(tensor)] = f"{prefix}.{name}".removeprefix(".")
        return copied

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple):
            parts = [self.copy(part) for part in value] if len(value) <= _LARGE else value
            if all(a is b for a, b in zip(parts, value, strict=True)):
                return value
            return self._note(value, type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts))
        copied = self._note(value, value.copy() if type(value) in (dict, list, set) else copy.copy(value))
        if len(value) > _LARGE:
            return copied
        if isinstance(value, dict):
            for key, entry in value.items():
                if isinstance(key, nn.Module | Tensor):
                    del copied[key]
                    key = self.copy(key)
                copied[key] = self.copy(entry)
        elif isinstance(value, set):
            copied.clear()
            copied.update(self.copy(entry) for entry in value)
        else:
            for index, entry in enumerate(value):
                copied[index] = self.copy(entry)
        return copied

    def _function(self, function: types.FunctionType) -> Any:
        compiled = getattr(function, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            return self._note(function, self.copy(compiled))
        cells = function.__closure__ or ()
        if not (cells or function.__defaults__ or function.__kwdefaults__ or vars(function)):
            return function
        places = tuple(types.CellType() for _ in cells)
        copied = self._note(
            function, types.FunctionType(function.__code__, function.__globals__, function.__name__, None, places)
        )
        for place, cell in zip(places, cells, strict=True):
            try:
                place.cell_contents = self.copy(cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
        copied.__defaults__ = self.copy(function.__defaults__)
        copied.__kwdefaults__ = self.copy(function.__kwdefaults__)
        vars(copied).update({name: self.copy(value) for name, value in vars(function).items()})
        return copied

    def _object(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, torch.Generator):
            return self._note(value, value.clone_state())
        if isinstance(value, numpy.ndarray) and value.size > _LARGE_TENSOR:
            shared = value.view()
            shared.setflags(write=False)
            return self._note(value, shared)
        if isinstance(value, numpy.ndarray | numpy.random.Generator):
            return self._note(value, copy.deepcopy(value))
        package = kind.__module__ + "."
        if any(package.startswith(f"{shared}.") for shared in _SHARED):
            return value
        if hasattr(kind, "__del__") or issubclass(kind, torch.utils.data.Dataset | torch.utils.data.Sampler):
            return value
        says_how = hasattr(kind, "__deepcopy__") or kind.__reduce_ex__ is not object.__reduce_ex__  # an enum, say
        if says_how or kind.__reduce__ is not object.__reduce__ or not hasattr(value, "__dict__"):
            try:
                return copy.deepcopy(value, self._memo)
            except Exception:
                return value
        try:
            copied = object.__new__(kind)
        except TypeError:  # built on a type of C
            return value
        self._note(value, copied)
        vars(copied).update({name: self.copy(entry) for name, entry in vars(value).items()})
        for owner in kind.__mro__:
            for name in getattr(owner, "__slots__", ()) if not isinstance(getattr(owner, "__slots__", ()), str) else ():
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    object.__setattr__(copied, name, self.copy(getattr(value, name)))
        return copied


def private_copy(module: nn.Module) -> nn.Module:
    """Copy a module with its parameters, in evaluation mode and without hooks that only look.

    Args:
        module: Any; of an isolated network its ``shadow``.

    Returns:
        The copy, whose forwards, hooks and closures use its own modules and parameters.
    """
    return Copies(module).module


def runs_in_place_of(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper that distributes or compiles it, and returns what it returns; else None."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    for wrapper, name in (
        ("DataParallel", "module"),
        ("DistributedDataParallel", "module"),
        ("OptimizedModule", "_orig_mod"),
    ):
        if wrapper in kinds and name in module._modules:
            return module._modules[name]
    return None


class TrainerState:
    """What a forward may read of Lightning's trainer in a measurement: its numbers and flags, not its loggers.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._numbers_of = trainer

    def __getattr__(self, name: str) -> Any:
        """Return a number, text or flag of the trainer as it is now."""
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._numbers_of, name)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise RefusedForwardError(
            f"its forward uses trainer.{name}, which would reach the training; let it take numbers alone from there "
            "(current_epoch, global_step), or measure the part of the module that does"
        )


def _logs_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand for a LightningModule's ``log``: a measurement is no step of the training."""


def stand_ins(module: nn.Module) -> dict[str, Any]:
    """Attributes in whose place others stand in a measurement: those that the class leaves out of copies, a trainer."""
    state = _state(module)
    own: dict[str, Any] = {
        key: None for key, value in state.items() if value is None and vars(module).get(key) is not None
    }
    if "_trainer" in own:
        trainer = vars(module)["_trainer"]
        own |= {"_trainer": TrainerState(trainer), "log": _logs_nothing, "log_dict": _logs_nothing}
    return own


def _state(module: nn.Module) -> dict[str, Any]:
    """The attributes as the class gives them away for copies."""
    get = getattr(type(module), "__getstate__", None)
    if get is None or get is getattr(object, "__getstate__", None) or runs_in_place_of(module) is not None:
        return vars(module)
    try:
        state = get(module)
    except Exception:  # a parametrized module refuses to be pickled
        return vars(module)
    return state if isinstance(state, dict) else vars(module)
