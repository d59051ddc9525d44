"""``torch-eft report``: the EFT tab of one or more runs as one HTML file, rebuilt from their ``eft.jsonl``.

The file holds the tab's own modules, style and data, and asks nothing of the network.
"""

import base64
import hashlib
import html
import json
import posixpath
import re
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch_eft.results.quantities import HEADLINES, is_drawn
from torch_eft.tensorboard.answers import bounds, summary
from torch_eft.tensorboard.run_info import Records, find_jsonl, read_jsonl, readings, unpredicted_sentences, verdicts

STATIC = Path(__file__).parent / "plugin" / "static"
ENTRY = "report.js"
_IMPORT = re.compile(r'^import [^;]*? from "(\.[\w./-]+)";\n', re.MULTILINE)


def write_report(runs: Sequence[str | Path], out: str | Path) -> str:
    """Write the report of some runs.

    Args:
        runs: Log directories, searched for ``eft.jsonl`` files, or such files.
        out: The HTML file; its directory is made.

    Returns:
        What was written and what was skipped, in sentences.

    Raises:
        FileNotFoundError: If a path does not exist or has none of our files at or below it.
        ValueError: If the files hold no measurement.
        OSError: If a file cannot be read or ``out`` cannot be written.
    """
    files = list(dict.fromkeys(file for run in runs for file in find_jsonl(run)))
    records = [read_jsonl(file) for file in files]
    usable = [record for record in records if record.measurements]
    notes = [record.note for record in records if record.note]
    notes += [
        f"{record.path}: it holds no measurement and was left out." for record in records if not record.measurements
    ]
    if not usable:
        raise ValueError(" ".join(["no measurement in what was given.", *notes]))
    page = report_page(report_data(usable, " ".join(notes)))
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error.strerror}); give another --out") from error
    runs_word = "1 run" if len(usable) == 1 else f"{len(usable)} runs"
    return "\n".join([f"{out}: {runs_word}", *notes])


def report_data(records: Sequence[Records], note: str = "") -> dict[str, Any]:
    """Return the data of the tab: the answer of ``/runs``, ``series``, ``verdicts``, ``readings`` and ``pages``."""
    names = _names([record.path for record in records])
    runs, series, judged, read, pages = [], {}, {}, {}, {}
    for name, record in zip(names, records, strict=True):
        found = {quantity: values for quantity, values in record.series().items() if is_drawn(quantity)}
        info = {**record.info, "events": record.events} if record.info is not None else None
        problem = "" if info else "This run's file does not describe it: r and validity are not known."
        quantities = {quantity: list(values) for quantity, values in found.items()}
        runs.append(
            {
                "name": name,
                "info": info,
                "problem": problem,
                "unpredicted": unpredicted_sentences(info),
                "quantities": quantities,
                "summary": summary(info, found),
            }
        )
        series[name], judged[name], read[name] = found, verdicts(found), readings(found)
        # The diagnosis is part of the run info.
        pages[name] = {page: text for page, text in record.pages.items() if text != (info or {}).get("diagnosis")}
    return {
        "runs": runs,
        "headlines": HEADLINES,
        "bounds": bounds(),
        "series": series,
        "verdicts": judged,
        "readings": read,
        "pages": pages,
        "others": 0,
        "note": note,
    }


def report_page(data: dict[str, Any]) -> str:
    """The self-contained HTML page of such data."""
    # "</script>" inside a string would end the element.
    content = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    script = f"\n{bundle(ENTRY)}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:"
    style = (STATIC / "style.css").read_text("utf-8")
    title = html.escape(_title([run["name"] for run in data["runs"]]))
    made = time.strftime("%Y-%m-%d %H:%M")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title} - torch_eft</title>\n'
        f"<style>\n{style}</style>\n"
        f'</head>\n<body>\n<header class="report"><strong>torch_eft report</strong> <span>{title}</span> '
        f"<time>{made}</time> <span>torch_eft {_version()}</span></header>\n"
        f"<main></main>\n<noscript>This report draws its charts with JavaScript.</noscript>\n"
        f'<script type="application/json" id="eft-data">{content}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n</html>\n'
    )


def _title(names: Sequence[str]) -> str:
    """The runs' names, the first three of many."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _version() -> str:
    try:
        return version("torch_eft")
    except PackageNotFoundError:  # a source tree that was never installed
        return "(not installed)"


def bundle(entry: str) -> str:
    """Return a module and all that it imports as one text, each before those that need it.

    The modules share one scope there, so their top-level names must differ, and imports are of the one form
    ``import { a, b } from "./x.js";``.

    Raises:
        ValueError: If an import of another form is left.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        for imported in _IMPORT.findall(_module(name)):
            visit(posixpath.normpath(posixpath.join(posixpath.dirname(name), imported)))
        order.append(name)

    visit(entry)
    return "\n".join(_inlined(name) for name in order)


def _module(name: str) -> str:
    return (STATIC / name).read_text("utf-8")


def _inlined(name: str) -> str:
    text = re.sub(
        r"^export (?=(async )?(function|class|const|let))", "", _IMPORT.sub("", _module(name)), flags=re.MULTILINE
    )
    if left := re.search(r"^(import|export)\b.*", text, re.MULTILINE):
        raise ValueError(f"{name}: {left.group()!r} cannot be inlined")
    return f"// ---- {name}\n{text}"


def _names(paths: Iterable[Path]) -> list[str]:
    """The shortest ends of the directories' paths that tell them apart, as far as two parts if they allow."""
    parts = [path.resolve().parent.parts for path in paths]
    for length in range(min(2, max(map(len, parts))), max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
