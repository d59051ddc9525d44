"""A ``repr`` of a few lines for results that hold tensors: shapes instead of numbers."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

_LONGEST = 100
"""Characters of a value; longer ones are cut."""


def short_repr(result: Any) -> str:
    """List the fields of a dataclass, one per line, tensors by shape and dtype, fields that are None left out."""
    shown = [f"  {name}: {_cut(text)}" for name, text in field_texts(result).items()]
    return "\n".join([f"{type(result).__name__}(", *shown, ")"])


def field_texts(result: Any) -> dict[str, str]:
    """Return ``{field: text}``, uncut."""
    values = {field.name: getattr(result, field.name) for field in fields(result) if field.repr}
    return {name: _value(value) for name, value in values.items() if value is not None}


def _value(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if value.ndim == 0:
            return f"{float(value):.6g}"
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple | list) and value and any(hasattr(part, "shape") for part in value):
        return f"{len(value)} of {_value(value[0])}"
    return str(value)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."
