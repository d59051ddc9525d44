"""Pieces of the two texts of a diagnosis: a short one for a terminal of 80 columns, and Markdown for the details."""

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 80
_LABEL = 10


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, line by line."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines, gap = [], 2 if sum(widths) + 2 * len(widths) <= WIDTH + 2 else 1
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append((" " * gap).join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def labeled(label: str, text: str) -> list[str]:
    """A sentence behind its label, wrapped."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=label.ljust(_LABEL), subsequent_indent=" " * _LABEL, break_on_hyphens=False
    )


def code(line: str) -> list[str]:
    """Lines of code under a sentence; they are never wrapped."""
    return [" " * (_LABEL + 2) + part for part in line.splitlines()]


def bullets(sentences: Iterable[str], label: str = "") -> list[str]:
    """One line a sentence."""
    return [f"- {label}{sentence}" for sentence in sentences]


def plain(markdown: str) -> str:
    """Markdown as these reports write it, for a terminal: tables in columns, sentences wrapped."""
    lines: list[str] = []
    rows: list[list[str]] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            if not line.startswith("|---"):
                rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            lines += aligned(rows)
            rows = []
        if line.startswith("- "):
            lines += textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        else:
            lines.append(line.removeprefix("### "))
    return "\n".join(lines).rstrip()


def with_error(value: float, error: float | None) -> str:
    """Four digits, and the standard error if there is one."""
    return f"{value:.4g}" if not error else f"{value:.4g} +- {error:.1g}"


def or_dash(value: float | None, style: str) -> str:
    """A dash where there is nothing."""
    return "-" if value is None else f"{value:{style}}"


def percent(value: float | None) -> str:
    """A part of one in percent, two digits, from ten on as a multiple; a dash where there is nothing."""
    if value is None:
        return "-"
    return f"{value:.2g} x" if value >= 10 else f"{100 * value:.0f} %" if value >= 0.995 else f"{100 * value:.2g} %"
