"""The tab's server side: routes, through TensorBoard's own application and data provider."""

import json
import math
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from tensorboard.backend import application
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from tests.tensorboard.eft_runs import STEPS, drift, run_info, write_run
from torch_eft.live import TensorBoardSink
from torch_eft.results.quantities import HEADLINES
from torch_eft.tensorboard.answers import bounds
from torch_eft.tensorboard.plugin import STATIC, EFTPlugin, reader
from torch_eft.tensorboard.run_info import run_info_summary, write_run_info

NOTHING = {"runs": [], "headlines": [list(names) for names in HEADLINES], "bounds": bounds(), "others": 0}


def serve(logdir):
    """A client of a TensorBoard with our tab alone."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(logdir))
    context = base_plugin.TBContext(data_provider=provider, logdir=str(logdir))
    return Client(application.TensorBoardWSGI([EFTPlugin(context)], data_provider=provider))


def get(client, route, status=200):
    answer = client.get(f"/data/plugin/eft/{route}")
    assert answer.status_code == status, answer.text
    assert answer.content_type == "application/json"
    return json.loads(answer.text)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("logs")
    write_run(logdir / "narrow", 0.2, run_info(network="narrow")).close()
    write_run(logdir / "wide" / "version_0", 0.1, run_info(network="wide")).close()
    other = SummaryWriter(str(logdir / "other"))
    other.add_scalar("loss", 1.0, 0)
    other.close()
    return serve(logdir)


def test_runs_and_their_info(two_runs):
    listing = get(two_runs, "runs")
    assert listing["others"] == 1
    assert [run["name"] for run in listing["runs"]] == ["narrow", "wide/version_0"]
    assert [run["info"]["network"] for run in listing["runs"]] == ["narrow", "wide"]
    assert listing["headlines"] == NOTHING["headlines"]
    assert "no prediction" in listing["runs"][0]["unpredicted"]["dntk"]
    quantities = listing["runs"][0]["quantities"]
    assert set(quantities) == {"ntk_drift", "ntk_top_eigenvalue", "replay_output_error", "taylor_terms"}
    assert set(quantities["ntk_drift"]) == {"measured", "order_0", "order_1", "minus_sigma", "plus_sigma"}


def test_a_run_is_read_again_where_it_goes_on(tmp_path, monkeypatch):
    summarized = []
    monkeypatch.setattr(reader, "summary", lambda info, series: summarized.append(series) or len(summarized))
    first, second = (write_run(tmp_path / name, info=run_info()) for name in "ab")
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    read = reader.Reader(data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path)))

    def numbers():
        return {run["name"]: run["summary"] for run in read.runs(RequestContext(), "")["runs"]}

    before = numbers()
    assert sorted(before.values()) == [1, 2] and numbers() == before
    assert set(summarized[0]) == {"ntk_drift"}
    TensorBoardSink(second).scalars(40, drift(40, 0.1))
    first.close()
    second.close()
    multiplexer.Reload()
    assert numbers() == before | {"b": 3}
    assert summarized[2]["ntk_drift"]["measured"][-1][0] == 40


def test_series_of_a_run_all_or_chosen(two_runs):
    found = get(two_runs, "series?run=wide/version_0")
    assert found["run"] == "wide/version_0"
    assert [step for step, _ in found["quantities"]["ntk_drift"]["order_1"]] == list(STEPS)
    values = [value for _, value in found["quantities"]["ntk_drift"]["order_1"]]
    assert values == pytest.approx([0.1 * step for step in STEPS])
    assert {quantity: verdict["words"] for quantity, verdict in found["verdicts"].items()} == {
        "ntk_drift": "predicted, without quantiles"
    }
    assert found["readings"] == {"ntk_drift": "the NTK moved 250 %: rich"}
    one = get(two_runs, "series?run=narrow&quantity=ntk_top_eigenvalue")
    assert one["quantities"] == {"ntk_top_eigenvalue": {"measured": [[step, 300.0 + step] for step in STEPS]}}


def test_events_of_a_run(two_runs):
    event = {"step": 5, "quantity": "ntk_drift", "text": "it left its band"}
    assert get(two_runs, "events?run=narrow") == {"run": "narrow", "events": [event]}


@pytest.mark.parametrize(
    ("route", "status", "words"),
    [
        ("series", 400, "no run given"),
        ("events", 400, "no run given"),
        ("series?run=absent", 404, "'absent' has no scalars"),
        ("series?run=other", 404, "'other' has no scalars"),
        ("series?run=narrow&quantity=absent", 404, "no quantity absent"),
        ("events?run=absent", 404, "'absent' has no data"),
    ],
)
def test_bad_requests_are_answered_with_a_sentence(two_runs, route, status, words):
    assert words in get(two_runs, route, status)["error"]


def test_the_last_info_holds_even_at_one_step(tmp_path):
    writer = SummaryWriter(str(tmp_path / "run"))
    for network in ("first", "second"):
        write_run_info(writer, run_info(network=network))
        writer.add_scalar("eft/ntk_drift/measured", math.nan, 0)
    writer.close()
    client = serve(tmp_path)
    (run,) = get(client, "runs")["runs"]
    assert run["info"]["network"] == "second"
    assert get(client, "series?run=run")["quantities"] == {"ntk_drift": {"measured": [[0, None]]}}


DAMAGED = {
    "cut off": b"{",
    "no object": b"3",
    "no text": b"\xff\xfe{}",
    "endless": b'{"a":' * 100_000,
    "nothing": b"",
    **{
        str(number): json.dumps({"schema": 1, **entry}).encode()
        for number, entry in enumerate(
            (
                {"events": 3},
                {"events": [None]},
                {"events": [{"step": "first"}]},
                {"quantities": ["ntk_drift"]},
                {"quantities": {"ntk_drift": {"title": {}}}},
                {"validity": "valid"},
                {"validity": {"flag": 3}},
                {"probe": 16},
                {"regime": 1.5},
                {"r": "small"},
                {"skipped": "none"},
                {"diagnosis": ["#"]},
            )
        )
    },
}


def test_runs_without_info_or_with_a_damaged_one_say_so_and_the_others_are_shown(tmp_path):
    write_run(tmp_path / "plain").close()
    write_run(tmp_path / "whole", info=run_info()).close()
    for name, text in DAMAGED.items():
        damaged = SummaryWriter(str(tmp_path / name))
        summary = run_info_summary({})
        summary.value[0].tensor.string_val[0] = text
        damaged.file_writer.add_summary(summary, 0)
        damaged.add_scalar("eft/ntk_drift/measured", 0.5, 1)
        damaged.close()
    several = SummaryWriter(str(tmp_path / "several values"))
    summary = run_info_summary({})
    summary.value[0].tensor.string_val.append(b"{}")
    summary.value[0].tensor.tensor_shape.dim.add(size=2)
    several.file_writer.add_summary(summary, 0)
    several.close()
    with open(next((tmp_path / "cut off").glob("events*")), "ab") as file:
        file.write(b"\x07 half a record")
    runs = {run["name"]: run for run in get(serve(tmp_path), "runs")["runs"]}
    assert "no description" in runs["plain"]["problem"]
    assert runs["whole"]["problem"] == "" and runs["whole"]["info"]["network"] == run_info()["network"]
    for name in (*DAMAGED, "several values"):
        assert "cannot be read" in runs[name]["problem"] and runs[name]["info"] is None, name
    assert all(runs[name]["quantities"] == {"ntk_drift": ["measured"]} for name in DAMAGED)


def test_without_data_there_are_no_runs_and_the_tab_is_inactive(tmp_path, two_runs):
    client = serve(tmp_path)
    assert get(client, "runs") == NOTHING
    assert get(client, "series?run=x", 404)["error"]
    for served, active in ((client, False), (two_runs, True)):
        listing = json.loads(served.get("/data/plugins_listing").text)["eft"]
        assert listing["enabled"] is active
        assert listing["tab_name"] == "EFT"
        assert listing["loading_mechanism"] == {"type": "IFRAME", "module_path": "/data/plugin/eft/static/index.js"}


def test_no_data_provider_means_no_runs():
    client = Client(application.TensorBoardWSGI([EFTPlugin(base_plugin.TBContext())]))
    assert get(client, "runs") == NOTHING
    assert get(client, "series?run=x", 404)["error"]


def test_every_module_is_served_with_its_type_and_no_other_file(two_runs):
    files = [file for file in STATIC.rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        answer = two_runs.get(f"/data/plugin/eft/static/{file.relative_to(STATIC).as_posix()}")
        assert answer.status_code == 200
        assert answer.mimetype == {".js": "text/javascript", ".css": "text/css"}[file.suffix]
        assert answer.get_data(as_text=True) == file.read_text("utf-8")
    assert two_runs.get("/data/plugin/eft/static/../reader.py").status_code == 404


def test_modules_make_no_markup_of_data_and_ask_nothing_of_the_network():
    for file in STATIC.rglob("*.js"):
        code = file.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", code), (
            file
        )
    for file in STATIC.rglob("*.*"):
        addresses = set(re.findall(r"https?://[^\s\"']+", file.read_text("utf-8")))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file  # a namespace, never fetched


def test_tensorboard_finds_the_tab():
    (found,) = [entry for entry in entry_points(group="tensorboard_plugins") if entry.name == "eft"]
    assert found.load() is EFTPlugin


def test_the_tab_does_not_make_tensorboard_load_torch():
    program = "import sys, torch_eft.tensorboard.plugin; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "False"
