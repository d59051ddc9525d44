"""Pieces of Markdown that reads as plain text, too."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, line by line."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def bullets(sentences: Iterable[str], label: str = "") -> list[str]:
    """One line a sentence."""
    return [f"- {label}{sentence}" for sentence in sentences]


def with_error(value: float, error: float | None) -> str:
    """Four digits, and the standard error if there is one."""
    return f"{value:.4g}" if error is None else f"{value:.4g} +- {error:.1g}"


def or_dash(value: float | None, style: str) -> str:
    """A dash where there is nothing."""
    return "-" if value is None else f"{value:{style}}"
