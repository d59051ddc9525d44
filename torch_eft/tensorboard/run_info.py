"""The description of a run, and the file that keeps every measurement.

The *run info* is one JSON object: the network, r = L/n, the level of theory, validity, quantities, events, and how far
the training came (``"progress"``: ``{"state": "running", "ended" or "interrupted", "step", "planned", "diverged"}``,
steps or None). It is written twice: as a summary of the event files, which our TensorBoard tab reads, and as a line
of ``eft.jsonl``, which ``torch-eft report`` reads. The last one written holds.

``eft.jsonl`` is append-only, one JSON object a line; its ``kind`` is ``run`` (the run info), ``measurement``
(``step``, ``scalars``), ``resumed`` (``step``: what is above of later steps was made by an interrupted process and
made anew), ``event`` (``step``, ``quantity``, ``text``) or ``page`` (``name``, ``text``, ``step``).
"""

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_eft.results.quantities import HEADLINES
from torch_eft.results.tags import MEASURED, split_tag
from torch_eft.tensorboard.verdicts import reading_of, verdict_of

PLUGIN_NAME = "eft"
RUN_INFO_TAG = "eft/run"
JSONL_NAME = "eft.jsonl"
SCHEMA = 1


def run_info_summary(info: Mapping[str, Any]) -> Any:
    """Return the run info as a TensorBoard ``Summary``: a string tensor under ``eft/run``.

    Raises:
        TypeError: If the info holds what JSON cannot say.
    """
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    text = dump_json({"schema": SCHEMA, **info}).encode()
    tensor = TensorProto(dtype="DT_STRING", string_val=[text], tensor_shape=TensorShapeProto())
    # Without a data class TensorBoard's data server drops tensors of plugins that it does not know.
    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME), data_class=DATA_CLASS_TENSOR
    )
    return Summary(value=[Summary.Value(tag=RUN_INFO_TAG, tensor=tensor, metadata=metadata)])


def scalar_summary(name: str, value: float) -> Any:
    """Return a number as a TensorBoard ``Summary`` of our tab: the Scalars tab does not show it."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    tensor = TensorProto(dtype="DT_FLOAT", float_val=[value], tensor_shape=TensorShapeProto())
    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME), data_class=DATA_CLASS_SCALAR
    )
    return Summary(value=[Summary.Value(tag=name, tensor=tensor, metadata=metadata)])


def write_run_info(writer: Any, info: Mapping[str, Any]) -> None:
    """Write the run info to a ``torch.utils.tensorboard.SummaryWriter``.

    The event's step is the time in milliseconds: of two events at one step TensorBoard's two data providers keep
    different ones, and a resumed run starts again at a lower step.

    Raises:
        TypeError: If the info holds what JSON cannot say.
    """
    writer.file_writer.add_summary(run_info_summary(info), time.time_ns() // 1_000_000)


def parse_run_info(text: str | bytes) -> dict[str, Any] | None:
    """The run info in a JSON text; None if it is none, is damaged, or of a schema that this version cannot read."""
    try:
        info = finite(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    return info if isinstance(info, dict) and info.get("schema", SCHEMA) == SCHEMA and _sound(info) else None


def _sound(info: dict[str, Any]) -> bool:
    """Return whether every entry is of its kind: pages that show several runs rely on it."""
    words = ("network", "regime", "criticality", "optimizer", "level", "diagnosis")
    numbers = ("depth", "width", "r", "epsilon", "parameters")
    validity, quantities, probe = info.get("validity"), info.get("quantities"), info.get("probe")
    unpredicted, claims, progress = (info.get(key) for key in ("unpredicted", "claims", "progress"))
    lists = [info.get(key) or [] for key in ("events", "skipped")]
    left_out, expected = info.get("left_out") or [], info.get("expected_drift") or [0, 0]
    return (
        all(isinstance(info.get(key), str | None) for key in words)
        and all(isinstance(info.get(key), int | float | None) for key in numbers)
        and (not validity or _judged(validity))
        and (unpredicted is None or _strings(unpredicted))
        and (claims is None or (isinstance(claims, list) and all(map(_strings, claims))))
        and (progress is None or _progress(progress))
        and (isinstance(expected, list) and [isinstance(edge, int | float) for edge in expected] == [True, True])
        and isinstance(left_out, list)
        and all(isinstance(sentence, str) for sentence in left_out)
        and (probe is None or (isinstance(probe, list) and len(probe) == 2))
        and (quantities is None or (isinstance(quantities, dict) and all(map(_strings, quantities.values()))))
        and all(isinstance(entries, list) and all(_marked(entry) for entry in entries) for entries in lists)
    )


def _progress(value: Any) -> bool:
    """How far the training came: a state in one word, and steps."""
    return isinstance(value, dict) and all(
        isinstance(entry, str if name == "state" else int) or entry is None for name, entry in value.items()
    )


def _strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, str | None) for entry in value.values())


def _judged(value: Any) -> bool:
    return _strings(value) and all(isinstance(value.get(key), str) for key in ("flag", "reason"))


def _marked(entry: Any) -> bool:
    """An event or a failure: a step, and words."""
    return isinstance(entry, dict) and isinstance(entry.get("step"), int) and _strings({**entry, "step": None})


def unpredicted_sentences(info: Mapping[str, Any] | None) -> dict[str, str]:
    """Return ``{quantity: sentence}``: what the cards of the first quantities say where a run does not predict them.

    Args:
        info: The run info; None if there is none that can be read.
    """
    if info is None:
        return {}
    validity = info.get("validity") or {}
    reason = validity.get("reason")
    sentence = "no prediction of this quantity at finite width"
    if validity.get("flag") == "invalid" and reason:
        sentence = f"no prediction for this run: {reason}"
    elif info.get("level") == "measurements only" and reason:
        sentence = reason
    given = {name: words for name, words in (info.get("unpredicted") or {}).items() if words}
    return {name: sentence for names in HEADLINES for name in names} | given


def verdicts(series: Mapping[str, Mapping[str, Iterable[Sequence[Any]]]]) -> dict[str, dict[str, Any]]:
    """Return ``{quantity: verdict}``, as plain types, of ``{quantity: {series: [[step, value], ...]}}``."""
    found = {}
    for quantity, lines in series.items():
        known = {name: {step: v for step, v in points if v is not None} for name, points in lines.items()}
        if (verdict := verdict_of(known)) is not None:
            found[quantity] = verdict.to_dict()
    return found


def readings(series: Mapping[str, Mapping[str, Iterable[Sequence[Any]]]]) -> dict[str, str]:
    """Return ``{quantity: sentence}`` on the last measured values of the same."""
    found = {}
    for quantity, lines in series.items():
        measured = {step: v for step, v in lines.get(MEASURED, ()) if v is not None}
        if (sentence := reading_of(quantity, measured)) is not None:
            found[quantity] = sentence
    return found


def dump_json(value: Any) -> str:
    """Return strict JSON, on one line: numbers that are not finite become null.

    Raises:
        TypeError: If the value holds what JSON cannot say.
    """
    return json.dumps(finite(value), allow_nan=False, separators=(",", ":"))


def finite(value: Any) -> Any:
    """The same nested value with None for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


@dataclass
class Records:
    """The content of one ``eft.jsonl``.

    Attributes:
        path: The file.
        info: The last run info; None if the file has none.
        measurements: ``{step: {tag: value}}``. Of values repeated at a step, as after a resume, the last holds.
        events: ``[{"step", "quantity", "text"}]``, of the event lines and of the run info, each once, by step.
        pages: ``{name: text}``, the last of each name.
        corrupt: Lines that could not be read and were skipped.
    """

    path: Path
    info: dict[str, Any] | None = None
    measurements: dict[int, dict[str, float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    pages: dict[str, str] = field(default_factory=dict)
    corrupt: int = 0

    @property
    def note(self) -> str:
        """A sentence on skipped lines; empty if there are none."""
        if not self.corrupt:
            return ""
        lines = "1 line was" if self.corrupt == 1 else f"{self.corrupt} lines were"
        return f"{self.path}: {lines} cut off or corrupt and skipped."

    def series(self) -> dict[str, dict[str, list[list[float]]]]:
        """``{quantity: {series: [[step, value], ...]}}``, by step."""
        found: dict[str, dict[str, list[list[float]]]] = {}
        for step, scalars in sorted(self.measurements.items()):
            for name, value in scalars.items():
                names = split_tag(name)
                if names is not None:
                    quantity, series = names
                    found.setdefault(quantity, {}).setdefault(series, []).append([step, value])
        return found


def read_jsonl(path: str | Path) -> Records:
    """Return the content of an ``eft.jsonl``; lines that cannot be read are skipped and counted.

    Raises:
        OSError: If the file cannot be opened.
    """
    records = Records(Path(path))
    events: list[Any] = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                _take(records, events, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                records.corrupt += 1
    for event in [*events, *((records.info or {}).get("events") or [])]:
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            kept = {
                "step": event["step"],
                "quantity": str(event.get("quantity", "")),
                "text": str(event.get("text", "")),
            }
            if kept not in records.events:
                records.events.append(kept)
    records.events.sort(key=lambda event: event["step"])
    return records


def _take(records: Records, events: list[Any], line: dict[str, Any]) -> None:
    """Add one line's content; kinds that this version does not know are passed over.

    Raises:
        ValueError: If the run info has another schema; like KeyError, TypeError and AttributeError, which come from
            lines that are not what their kind says, it marks a damaged line.
    """
    kind = line["kind"]
    if kind == "run":
        info = parse_run_info(json.dumps(line))
        if info is None:
            raise ValueError("a run info of another schema")
        records.info = {key: value for key, value in info.items() if key != "kind"}
    elif kind == "measurement":
        values = {str(name): float(value) for name, value in line["scalars"].items() if value is not None}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        records.measurements.setdefault(_step(line), {}).update(values)
    elif kind == "resumed":
        latest = _step(line)
        records.measurements = {step: values for step, values in records.measurements.items() if step <= latest}
        events[:] = [event for event in events if event["step"] <= latest]
    elif kind == "event":
        events.append({**line, "step": _step(line)})
    elif kind == "page":
        records.pages[str(line["name"])] = str(line["text"])


def _step(line: dict[str, Any]) -> int:
    step = line["step"]
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f"step {step!r} is no integer")
    return step


def _natural(path: Path) -> list[str | int]:
    """An order in which version_2 comes before version_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", str(path)))]


def find_jsonl(path: str | Path) -> list[Path]:
    """Return the ``eft.jsonl`` files at or below a path, sorted.

    Raises:
        FileNotFoundError: If there is no such path, or none of our files below it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory; give a run's log directory or its {JSONL_NAME}")
    if path.is_file():
        return [path]
    found = sorted(path.rglob(JSONL_NAME), key=_natural)
    if not found:
        raise FileNotFoundError(
            f"{path}: no {JSONL_NAME} at or below it; torch_eft's callbacks write one into a run's log directory"
        )
    return found
