"""A result as a cell of a notebook: the fields of its ``repr`` in a table, the verdict in front."""

from html import escape
from typing import Any

_COLORS = {"valid": "#1a7f37", "caution": "#9a6700", "invalid": "#cf222e"}


def table_html(title: str, rows: dict[str, str], flag: str = "") -> str:
    """Return a small table.

    Args:
        title: Its title.
        rows: ``{name: text}``.
        flag: ``"valid"``, ``"caution"`` or ``"invalid"``, beside the title.

    Returns:
        HTML without scripts, whose colors are read on light and on dark ground.
    """
    badge = ""
    if flag:
        style = f"border:1px solid;border-radius:3px;padding:0 6px;color:{_COLORS.get(flag, '#57606a')}"
        badge = f' <span style="{style}">{escape(flag)}</span>'
    cells = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(text)}</td></tr>'
        for name, text in rows.items()
    )
    return f"<div><b>{escape(title)}</b>{badge}<table>{cells}</table></div>"


def text_html(text: str) -> str:
    """Return a text whose columns are aligned as they are."""
    return f"<pre>{escape(text)}</pre>"


def result_html(result: Any, rows: dict[str, str]) -> str:
    """Return the table of a result, with the flag of its validity if it has one."""
    flag = getattr(getattr(result, "validity", None), "flag", "")
    return table_html(type(result).__name__, rows, flag)
