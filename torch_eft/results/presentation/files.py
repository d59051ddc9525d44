"""Keeps results in files: NumPy's ``.npz`` with the tensors, and all else as JSON in it; nothing is ever unpickled.

What a file holds is what was saved, bit by bit. A tensor that repeats one copy along an axis, as the NTK of infinite
width does along time, is stored and restored as that copy.
"""

import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy
import torch
from torch import Tensor

FORMAT, VERSION = "torch_eft", 1
"""What the header of a file says, and of which layout it is."""

_HEADER = "header"
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16}
"""NumPy has no bfloat16 and no eight-bit floats: their bits are stored as integers of that many bytes."""

T = TypeVar("T")


def save_result(result: Any, path: str | Path, name: str = "") -> None:
    """Write a dataclass of tensors, numbers, texts and more such dataclasses to a file; private fields are left out.

    Args:
        result: The dataclass.
        path: The file; its directory is made, and an earlier file replaced.
        name: What the file says that it holds; empty: the name of the class.

    Raises:
        TypeError: If it holds something else, such as a function.
    """
    arrays: dict[str, Any] = {}
    content = _plain(result, type(result).__name__, arrays)
    holds = name or type(result).__name__
    header = json.dumps({"format": FORMAT, "version": VERSION, "holds": holds, "content": content})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays[_HEADER] = numpy.frombuffer(header.encode(), dtype=numpy.uint8)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")  # an earlier file stays until this one is whole
    try:
        with open(beside, "wb") as file:
            numpy.savez(file, **arrays)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_result(
    kind: type[T], path: str | Path, device: torch.device | str = "cpu", *, name: str = "", **private: Any
) -> T:
    """Read a dataclass back.

    Args:
        kind: Its class.
        path: The file.
        device: Where its tensors go.
        name: What the file should say that it holds; empty: the name of the class.
        **private: Fields that are not saved.

    Returns:
        The dataclass.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of ours, is damaged, holds something else, or is of a later version.
    """
    content, arrays = _read(Path(path), name or kind.__name__)
    kinds = {each.__name__: each for each in _dataclasses_in(kind)}
    try:
        values = {name: _value(node, arrays, kinds, device) for name, node in content["fields"].items()}
        return _made(kind, values, private)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged, or of another version of torch_eft ({error}); make it anew") from error


def _read(path: Path, wanted: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header's content and the arrays."""
    foreign = f"{path}: not a result of torch_eft; give a file that {wanted}.save wrote"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give one that {wanted}.save wrote")
    if not zipfile.is_zipfile(path):
        raise ValueError(foreign)
    try:
        with numpy.load(path, allow_pickle=False) as stored:
            if _HEADER not in stored.files:
                raise ValueError(foreign)
            header = json.loads(stored[_HEADER].tobytes())
            arrays = {name: stored[name] for name in stored.files}
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError, OSError) as error:
        if str(error) == foreign:
            raise
        raise ValueError(f"{path}: damaged ({error}); make it anew") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(foreign)
    if not isinstance(header.get("version"), int) or not {"holds", "content"} <= header.keys():
        raise ValueError(f"{path}: damaged (its header is not complete); make it anew")
    if header["version"] > VERSION:
        raise ValueError(
            f"{path}: written by a later version of torch_eft (layout {header['version']}, this one reads {VERSION}); "
            "upgrade torch_eft"
        )
    if header["holds"] != wanted:
        raise ValueError(f"{path}: holds a {header['holds']}; read it by {header['holds']}.load")
    return header["content"], arrays


def _plain(value: Any, place: str, arrays: dict[str, Any]) -> Any:
    """The value as JSON has it, its tensors set aside in ``arrays``."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        name = f"t{len(arrays)}"
        arrays[name] = _array(value)
        return {"tensor": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if hasattr(value, "stored_as"):  # by a name, where fields hold what a file cannot
        return {"is": type(value).__name__, "stored": value.stored_as()}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
        fields = {name: _plain(getattr(value, name), f"{place}.{name}", arrays) for name in names}
        return {"is": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {"items": [[_plain(key, place, arrays), _plain(each, place, arrays)] for key, each in value.items()]}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_plain(each, place, arrays) for each in value]}
    raise TypeError(f"{place}: {type(value).__name__} cannot be saved; files hold tensors, numbers and texts")


def _array(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    one = tensor.detach()
    for axis, stride in enumerate(one.stride()):
        if stride == 0 and one.shape[axis] > 1:
            one = one.narrow(axis, 0, 1)
    one = one.cpu().contiguous()
    if one.is_floating_point() and one.dtype not in (torch.float16, torch.float32, torch.float64):
        one = one.view(_AS_INTEGERS[one.element_size()])
    array: numpy.ndarray[Any, Any] = one.numpy()
    return array


def _value(node: Any, arrays: Mapping[str, Any], kinds: Mapping[str, type], device: torch.device | str) -> Any:
    """The value of a node of JSON."""
    if not isinstance(node, dict):
        return node
    if "float" in node:
        return float(node["float"])
    if "tensor" in node:
        stored = torch.from_numpy(arrays[node["tensor"]])
        dtype = getattr(torch, node["dtype"])
        return (stored if stored.dtype == dtype else stored.view(dtype)).to(device).expand(node["shape"])
    if "stored" in node:
        return kinds[node["is"]].from_stored(node["stored"])  # type: ignore[attr-defined]
    if "is" in node:
        fields = {name: _value(each, arrays, kinds, device) for name, each in node["fields"].items()}
        return _made(kinds[node["is"]], fields)
    if "items" in node:
        return {_value(key, arrays, kinds, device): _value(each, arrays, kinds, device) for key, each in node["items"]}
    ((name, values),) = node.items()
    return {"tuple": tuple, "list": list}[name](_value(each, arrays, kinds, device) for each in values)


def _made(kind: type[T], fields: Mapping[str, Any], private: Mapping[str, Any] | None = None) -> T:
    """A dataclass of these fields, if they are of the kinds that it says."""
    hints = get_type_hints(kind)
    for name, value in fields.items():
        if not _is_of(value, hints[name]):
            raise TypeError(f"{kind.__name__}.{name} is a {type(value).__name__}")
    return kind(**fields, **private or {})


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; of one that is none of those in our results, True."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, each) for each in arguments)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if hint is float:
        return isinstance(value, int | float)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is ...):
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_is_of, value, arguments))
    if origin in (dict, Mapping):
        key, each = arguments
        return isinstance(value, Mapping) and all(_is_of(k, key) and _is_of(v, each) for k, v in value.items())
    if origin in (tuple, list, Sequence):
        return isinstance(value, tuple | list) and all(_is_of(each, arguments[0]) for each in value)
    return not isinstance(hint, type) or isinstance(value, hint)


def _dataclasses_in(kind: Any, found: frozenset[Any] = frozenset()) -> frozenset[Any]:
    """The dataclasses that the annotations of one reach, itself included: no others are made from a file."""
    if isinstance(kind, list):  # the arguments of a Callable
        return frozenset().union(found, *(_dataclasses_in(each, found) for each in kind))
    if kind in found:
        return found
    if dataclasses.is_dataclass(kind):
        found |= {kind}
        for hint in get_type_hints(kind).values():
            found = _dataclasses_in(hint, found)
    for argument in get_args(kind):
        found = _dataclasses_in(argument, found)
    return found
