"""Run info and eft.jsonl: what is written is read back; what is damaged is skipped and counted."""

import json
import math

import pytest
from tensorboard.compat.proto import summary_pb2
from tensorboard.util import tensor_util

from torch_eft.tensorboard.run_info import (
    dump_json,
    find_jsonl,
    parse_run_info,
    read_jsonl,
    readings,
    run_info_summary,
    split_tag,
    unpredicted_sentences,
    verdicts,
)


def test_tags_split_into_quantity_and_series():
    assert split_tag("eft/ntk_drift/measured") == ("ntk_drift", "measured")
    assert split_tag("eft-theory/ntk_drift/order_1") == ("ntk_drift", "order_1")
    assert split_tag("eft-more/ntk_drift/measured") == ("ntk_drift", "measured")
    assert split_tag("eft-layers/representation_change/body.2") == ("representation_change", "layer/body.2")
    for other in ("loss", "eft/run", "eft//measured", "eft/ntk_drift/", "other/ntk_drift/measured"):
        assert split_tag(other) is None


def test_the_summary_holds_the_info_and_strict_json():
    info = {"network": "tanh <b>σ</b>", "r": math.nan, "validity": {"flag": "valid", "reason": "r small"}}
    (value,) = run_info_summary(info).value
    assert value.tag == "eft/run"
    assert value.metadata.plugin_data.plugin_name == "eft"
    assert value.metadata.data_class == summary_pb2.DATA_CLASS_TENSOR
    text = tensor_util.make_ndarray(value.tensor).item()
    assert parse_run_info(text) == {"schema": 1, **info, "r": None}
    assert "NaN" not in text.decode()


def test_run_info_of_another_schema_or_damaged_is_none():
    assert parse_run_info("{") is None
    assert parse_run_info("[1]") is None
    assert parse_run_info('{"schema": 99}') is None
    assert parse_run_info('{"validity": {"flag": "valid"}}') is None


def test_cards_say_why_there_is_no_prediction():
    none = {"validity": {"flag": "invalid", "reason": "not an MLP"}, "level": "measurements only"}
    own = unpredicted_sentences({**none, "unpredicted": {"dntk": "ReLU has kinks", "ntk_drift": None}})
    assert own["ntk_drift"] == own["representation_change"] == "no prediction for this run: not an MLP"
    assert own["dntk"] == "ReLU has kinks"
    waiting = {"validity": {"flag": "caution", "reason": "not decided yet"}, "level": "measurements only"}
    assert unpredicted_sentences(waiting)["dntk"] == "not decided yet"
    valid = {"validity": {"flag": "valid", "reason": "r small"}, "level": "ensemble, order 1"}
    assert unpredicted_sentences(valid)["dntk"] == "no prediction of this quantity at finite width"
    assert unpredicted_sentences(None) == {}
    assert parse_run_info(json.dumps({"unpredicted": {"dntk": 3}})) is None


def test_verdicts_leave_out_what_is_not_finite():
    points = {"measured": [[0, 1.5], [1, None]], "band_90_low": [[0, 1], [1, 1]], "band_90_high": [[0, 2], [1, 2]]}
    found = verdicts({"ntk_drift": points, "ntk_trace": {"measured": [[0, 1.0]]}})
    assert {quantity: verdict["words"] for quantity, verdict in found.items()} == {"ntk_drift": "inside the 90 % band"}
    assert readings({"ntk_drift": points, "dntk": points, "representation_change": {"measured": [[0, None]]}}) == {
        "ntk_drift": "the NTK moved 150 %: rich"
    }


def test_what_json_cannot_say_is_an_error():
    with pytest.raises(TypeError):
        dump_json({"network": object()})


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def measurement(step, **scalars):
    return {
        "kind": "measurement",
        "step": step,
        "scalars": {f"eft/{q}/measured": value for q, value in scalars.items()},
    }


def test_jsonl_last_of_a_step_holds_and_late_values_join_it(tmp_path):
    file = write(
        tmp_path / "eft.jsonl",
        {"kind": "run", "schema": 1, "network": "old"},
        measurement(0, a=1.0),
        measurement(10, a=2.0, b=5.0),
        measurement(10, a=3.0),  # repeated after a resume
        measurement(0, c=7.0),  # late
        {"kind": "run", "schema": 1, "network": "new", "events": [{"step": 10, "quantity": "a", "text": "left"}]},
        {"kind": "event", "step": 10, "quantity": "a", "text": "left"},
        {"kind": "event", "step": 5, "quantity": "", "text": "clipping seen"},
        {"kind": "page", "name": "diagnosis", "text": "old", "step": 0},
        {"kind": "page", "name": "diagnosis", "text": "new", "step": 0},
        {"kind": "of a later version"},
    )
    records = read_jsonl(file)
    assert records.info["network"] == "new"
    assert records.series() == {
        "a": {"measured": [[0, 1.0], [10, 3.0]]},
        "b": {"measured": [[10, 5.0]]},
        "c": {"measured": [[0, 7.0]]},
    }
    assert [(event["step"], event["text"]) for event in records.events] == [(5, "clipping seen"), (10, "left")]
    assert records.pages == {"diagnosis": "new"}
    assert records.corrupt == 0 and records.note == ""


def test_jsonl_corrupt_lines_are_skipped_and_counted(tmp_path):
    file = write(
        tmp_path / "eft.jsonl",
        measurement(0, a=1.0),
        "",
        "not json",
        "[1, 2]",
        '"text"',
        '{"step": 3}',
        {"kind": "measurement", "step": "three", "scalars": {}},
        {"kind": "measurement", "step": 3},
        {"kind": "measurement", "step": 3, "scalars": {"eft/a/measured": "x"}},
        {"kind": "run", "schema": 99},
        "[" * 100_000,
        measurement(4, a=math.nan),
        json.dumps(measurement(5, a=2.0))[:-3],  # cut off: the run goes on, or was killed
    )
    with open(file, "ab") as end:
        end.write(b"\n\xff\xfe\x00\n")
    records = read_jsonl(file)
    assert records.series() == {"a": {"measured": [[0, 1.0]]}}
    assert records.corrupt == 11
    assert records.note == f"{file}: 11 lines were cut off or corrupt and skipped."


def test_files_are_found_below_a_directory(tmp_path):
    (tmp_path / "run" / "version_0").mkdir(parents=True)
    file = write(tmp_path / "run" / "version_0" / "eft.jsonl", measurement(0, a=1.0))
    assert find_jsonl(tmp_path) == [file] == find_jsonl(file)
    for version in (10, 2):
        (tmp_path / "run" / f"version_{version}").mkdir()
        write(tmp_path / "run" / f"version_{version}" / "eft.jsonl", measurement(0, a=1.0))
    assert [found.parent.name for found in find_jsonl(tmp_path)] == ["version_0", "version_2", "version_10"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_jsonl(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no eft\.jsonl at or below"):
        find_jsonl(tmp_path / "empty")
