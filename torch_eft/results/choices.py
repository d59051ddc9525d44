"""Checks an argument that is one of a few names, and suggests the nearest one."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def nearest(value: Any, allowed: Iterable[str]) -> str:
    """Return `` (did you mean ...?)`` with the nearest allowed name, or nothing if none is near."""
    if not isinstance(value, str):
        return ""
    names = {name.lower(): name for name in allowed}
    near = get_close_matches(value.lower(), names, n=1)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


def check_choice(name: str, value: Any, allowed: Iterable[str], instead: str = "") -> None:
    """Raise unless ``value`` is one of ``allowed``.

    Args:
        name: Name of the argument, as its user writes it.
        value: What was given.
        allowed: The names that are allowed.
        instead: What else may be given, as the end of the sentence "give one of ..., or".

    Raises:
        ValueError: If it is none of them: what was given, what is allowed, and the nearest name.
    """
    names = list(allowed)
    if isinstance(value, str) and value in names:
        return
    also = f", or {instead}" if instead else ""
    raise ValueError(f"{name}: {value!r} given{nearest(value, names)}; give one of {', '.join(map(repr, names))}{also}")


def one_line(value: Any) -> str:
    """Return what was given as a message shows it: its ``repr``, or its kind where that is long."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else type(value).__name__
