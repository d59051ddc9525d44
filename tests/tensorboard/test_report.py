"""``torch-eft report``: one HTML file from eft.jsonl files; a sentence for what cannot be done."""

import json
import os
import re

import pytest

from tests.tensorboard.eft_runs import STEPS, run_info, write_run
from torch_eft.cli.main import main
from torch_eft.tensorboard.report import STATIC, bundle, report_page, write_report


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="eft-data">(.*?)</script>', page, re.S)[1])


def test_the_report_holds_the_runs(tmp_path, capsys):
    write_run(tmp_path / "logs" / "a", 0.1, run_info()).close()
    write_run(tmp_path / "logs" / "b", 0.2).close()
    out = tmp_path / "new" / "report.html"
    assert main(["report", str(tmp_path / "logs"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == f"{out}: 2 runs"
    page = out.read_text("utf-8")
    assert "<title>logs/a, logs/b - torch_eft</title>" in page
    head = re.search(r"<header.*?</header>", page, re.S).group()
    assert "logs/a, logs/b" in head and re.search(r"<time>\d{4}-\d\d-\d\d \d\d:\d\d</time>", head)
    data = embedded(page)
    assert [run["name"] for run in data["runs"]] == ["logs/a", "logs/b"]
    first, second = data["runs"]
    assert first["info"]["r"] == 0.0234375 and first["problem"] == ""
    assert second["info"] is None and "not known" in second["problem"]
    measured = data["series"]["logs/a"]["ntk_drift"]["measured"]
    assert measured == [[step, pytest.approx(0.1 * step + 0.5)] for step in STEPS]
    assert data["note"] == ""
    assert data["headlines"][0] == ["ntk_drift"]
    assert data["verdicts"]["logs/a"]["ntk_drift"]["words"] == "predicted, without quantiles"
    assert set(data["readings"]["logs/a"]) == {"ntk_drift"}
    assert "no prediction" in first["unpredicted"]["dntk"] and second["unpredicted"] == {}


def test_the_same_file_given_twice_is_one_run(tmp_path):
    write_run(tmp_path / "a").close()
    assert write_report([tmp_path, tmp_path / "a"], tmp_path / "out.html").endswith("1 run")


def test_corrupt_lines_and_empty_files_are_told(tmp_path, capsys):
    write_run(tmp_path / "a", 0.1, run_info()).close()
    with open(tmp_path / "a" / "eft.jsonl", "a") as lines:
        lines.write('{"kind": "measurement", "step": 30, "sca')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "eft.jsonl").write_text("")
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "a/eft.jsonl: 1 line was cut off or corrupt and skipped." in printed
    assert "b/eft.jsonl: it holds no measurement and was left out." in printed
    assert "1 line was cut off" in embedded(out.read_text("utf-8"))["note"]


@pytest.mark.parametrize("given", ["absent", "empty", "nothing"])
def test_no_data_is_a_sentence_and_status_2(tmp_path, capsys, given):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "eft.jsonl").write_text("not json\n")
    words = {
        "absent": "no such file",
        "empty": "no eft.jsonl at or below",
        "nothing": "no measurement in what was given",
    }
    assert main(["report", str(tmp_path / given), "--out", str(tmp_path / "out.html")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("torch-eft report: ") and words[given] in printed and "Traceback" not in printed
    assert not (tmp_path / "out.html").exists()


def test_an_output_that_cannot_be_written_is_a_sentence(tmp_path, capsys):
    write_run(tmp_path / "a").close()
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "report.html", tmp_path):  # a directory below a file; a directory itself
        assert main(["report", str(tmp_path / "a"), "--out", str(out)]) == 2
        printed = capsys.readouterr().err
        assert f"{out} cannot be written" in printed and "give another --out" in printed


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path, capsys):
    write_run(tmp_path / "a").close()
    (tmp_path / "a" / "eft.jsonl").chmod(0)
    assert main(["report", str(tmp_path / "a")]) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_names_cannot_end_the_script_element():
    name = "</script><script>alert(1)</script><!--"
    data = {"runs": [{"name": name, "info": None, "problem": "", "quantities": {}}], "series": {}, "pages": {}}
    page = report_page(data)
    assert name not in page
    assert embedded(page)["runs"][0]["name"] == name
    assert page.count("</script>") == 2


def test_the_bundle_has_every_module_once_and_no_name_twice():
    text = bundle("report.js")
    assert not re.search(r"^(import|export)\b", text, re.M)
    modules = re.findall(r"^// ---- (\S+)$", text, re.M)
    assert len(modules) == len(set(modules))
    assert set(modules) == {file.relative_to(STATIC).as_posix() for file in STATIC.rglob("*.js")} - {"index.js"}
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", text, re.M)
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
