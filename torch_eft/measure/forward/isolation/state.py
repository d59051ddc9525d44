"""The Python state that a forward can reach outside of its module: closures, globals, class attributes, generators.

The module's own attributes are copied with it. Whatever else its code reaches is noted before a measurement and put
back after it: counters and lists in closure cells and global names, attributes of classes and of objects, random
generators.
Only code of the user's own files is followed; that of installed packages keeps no such state.
"""

import array
import copy
import copyreg
import functools
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from torch_eft.measure.forward.isolation.hooks import KINDS

_LARGE = 1024
"""Containers with more entries are taken as data: their entries are not looked into."""
_SMALL = 2**16
"""Tensors with more numbers are not kept."""


class PythonState:
    """What some modules' forwards and hooks can change outside of the modules, as it is now.

    Args:
        modules: Their ``forward`` and hooks are followed.
        inside: Note the attributes of the modules, too.
    """

    def __init__(self, modules: Iterable[nn.Module], *, inside: bool = False) -> None:
        self._undo: list[Callable[[], Any]] = []
        self._seen: dict[int, Any] = {}  # keeps what is seen alive: no id is given twice
        self._names: set[str] = set()
        self._owners: list[type] = []
        modules = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        if inside:
            self._seen |= {id(module): module for module in modules}
        for module in modules:
            self._owners += [owner for owner in type(module).__mro__ if owner not in self._owners and _is_own(owner)]
            own = vars(module)
            if inside:
                self._module(module)
            elif "forward" in own:
                self._visit(own["forward"])
            for kind in KINDS:
                for hook in own[kind].values():
                    self._visit(hook)
        self._follow({"forward"})

    def restore(self) -> None:
        """Put everything back that is no longer what it was."""
        for undo in self._undo:
            undo()

    def _follow(self, names: Iterable[str]) -> None:
        """Visit the methods of these names of the modules' own classes, and their data."""
        for name in set(names) - self._names:
            self._names.add(name)
            for owner in self._owners:
                if name in vars(owner):
                    value = vars(owner)[name]
                    self._visit(value.fget if isinstance(value, property) else value)
                    self._binding(owner, name)

    def _visit(self, value: Any) -> None:
        if value is None or isinstance(value, int | float | str | bytes) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, list | dict | set | deque):
            self._container(value)
            if len(value) <= _LARGE:
                for entry in list(value.values() if isinstance(value, dict) else value):
                    self._visit(entry)
        elif isinstance(value, tuple):
            for entry in value[:_LARGE]:
                self._visit(entry)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._visit(value.__func__)
            self._visit(value.__self__)
        elif isinstance(value, functools.partial):
            self._visit((value.func, value.args, value.keywords))
        elif isinstance(value, classmethod | staticmethod):
            self._visit(value.__func__)
        elif isinstance(value, types.BuiltinMethodType):
            self._visit(value.__self__)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, torch.Generator):
            self._undo.append(functools.partial(value.set_state, value.get_state()))
        elif isinstance(value, numpy.random.Generator):
            numbers, drawn = value.bit_generator, value.bit_generator.state
            self._undo.append(lambda: setattr(numbers, "state", drawn))
        elif isinstance(value, random.Random):
            before = value.getstate()
            self._undo.append(lambda: value.setstate(before))
        elif isinstance(value, numpy.random.RandomState):
            self._undo.append(functools.partial(value.set_state, value.get_state()))
        elif isinstance(value, numpy.ndarray | bytearray | array.array):
            self._numbers(value)
        elif isinstance(value, nn.Module):  # one of the network's, or one that its code reaches
            self._module(value)
            self._visit(value._buffers)
            self._visit(value._modules)
        elif isinstance(value, types.ModuleType):
            return
        elif isinstance(value, type):
            if _is_own(value):
                self._owners.append(value)
                for name in self._names & set(vars(value)):
                    self._binding(value, name)
        elif _is_own(type(value)) or isinstance(value, types.SimpleNamespace):
            if hasattr(value, "__dict__"):
                self._container(vars(value))
                for entry in list(vars(value).values())[:_LARGE]:
                    self._visit(entry)
            for name in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
                if hasattr(value, name):
                    before = getattr(value, name)
                    self._undo.append(functools.partial(object.__setattr__, value, name, before))
                    self._visit(before)
            for name in ("__call__", *self._names):
                method = getattr(type(value), name, None)
                if isinstance(method, types.FunctionType):
                    self._visit(method)

    def _module(self, module: nn.Module) -> None:
        self._container(vars(module))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                self._container(value)
            elif not name.startswith(("_forward_", "_backward_")):  # hooks are followed, not put back
                self._visit(value)

    def _function(self, function: types.FunctionType) -> None:
        self._visit(function.__defaults__)
        self._visit(function.__kwdefaults__)
        if vars(function):
            self._visit(vars(function))
        for cell in function.__closure__ or ():
            try:
                contents = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._undo.append(functools.partial(setattr, cell, "cell_contents", contents))
            self._visit(contents)
        if not _is_own(function):
            return
        names = _names_in(function.__code__)
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType):
                if _is_own(value):
                    for inner in names & vars(value).keys():
                        self._entry(vars(value), inner)
                        self._visit(vars(value)[inner])
                continue
            self._entry(function.__globals__, name)
            self._visit(value)
        self._follow(names)

    def _numbers(self, value: Any) -> None:
        whole: Any = slice(None)
        if isinstance(value, numpy.ndarray):
            whole = ...
            if not value.flags.writeable:
                return
            if value.size > _SMALL:  # too much to keep: numpy refuses a write meanwhile
                self._undo.append(functools.partial(value.setflags, write=True))
                value.setflags(write=False)
                return
        before = copy.copy(value[whole])

        def undo() -> None:
            if bytes(value) != bytes(before):
                value[whole] = before

        self._undo.append(undo)

    def _container(self, value: Any) -> None:
        before = value.copy()
        self._undo.append(lambda: _refill(value, before))

    def _entry(self, names: dict[str, Any], name: str) -> None:
        before = names[name]
        self._undo.append(lambda: names.__setitem__(name, before) if names.get(name) is not before else None)

    def _binding(self, owner: type, name: str) -> None:
        before = vars(owner)[name]
        self._undo.append(lambda: setattr(owner, name, before) if vars(owner).get(name) is not before else None)
        if not callable(before):
            self._visit(before)

    def _tensor(self, value: Tensor) -> None:
        if type(value) is not Tensor or value.numel() > _SMALL or value.is_inference():
            return
        version, before = value._version, value.detach().clone()

        def undo() -> None:
            # A batch norm writes to its statistics without counting it.
            if value._version != version or (value.device.type == "cpu" and not torch.equal(value, before)):
                with torch.no_grad():
                    value.copy_(before)

        self._undo.append(undo)


def _refill(value: Any, before: Any) -> None:
    same = len(value) == len(before)
    if same and isinstance(value, dict):
        same = all(a is b and value[a] is before[b] for a, b in zip(value, before, strict=True))
    elif same and not isinstance(value, set):
        same = all(map(operator.is_, value, before))
    elif same:
        same = value == before
    if not same:
        value.clear()
        value.extend(before) if isinstance(value, list | deque) else value.update(before)


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    """Global names and attributes that the code, and functions made in it, use."""
    inner = [_names_in(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _is_own(value: Any) -> bool:
    """Whether a class, function or module is the user's own, not that of an installed package."""
    if isinstance(value, types.FunctionType):
        return _is_own_file(value.__code__.co_filename)
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return _is_own_module(name, getattr(sys.modules.get(name), "__file__", None) or "")


@functools.lru_cache(maxsize=4096)
def _is_own_module(name: str, file: str) -> bool:
    top = name.partition(".")[0]
    return top not in sys.builtin_module_names and top not in ("torch", "torch_eft") and _is_own_file(file)


@functools.lru_cache(maxsize=4096)
def _is_own_file(file: str) -> bool:
    installed = ("site-packages", "dist-packages", random.__file__.rpartition("/")[0] + "/", "<frozen")
    return not any(part in file for part in installed)
