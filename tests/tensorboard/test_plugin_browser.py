"""The tab in a real TensorBoard and a headless Chromium: choose a run, switch quantity, read a value, export."""

import csv
import os
import re
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.tensorboard.chromium import EXECUTABLE, NAMES, Browser
from tests.tensorboard.eft_runs import drift, run_info, write_run, write_scalars
from torch_eft.results.quantities import documented
from torch_eft.results.tags import BAND_90
from torch_eft.tensorboard import QUANTITIES, layer_tag, layer_theory_tag, tag
from torch_eft.tensorboard.report import write_report

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"no browser found ({', '.join(NAMES)}); on Debian: apt-get install chromium"
)

HOSTILE = "<img src=x onerror=hacked=1>"
PAGE = "document.querySelector('iframe').contentDocument"


@pytest.fixture
def browser(tmp_path):
    (tmp_path / "downloads").mkdir()
    found = Browser(tmp_path / "profile", tmp_path / "downloads")
    found.downloads = tmp_path / "downloads"
    yield found
    found.close()


@pytest.fixture
def tensorboard(tmp_path):
    """Address of a TensorBoard on an empty ``logs``, as a user starts it."""
    (tmp_path / "logs").mkdir()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "logs"), "--port", "0"]
    # The environment's own name for a proxy would catch the browser's way to localhost.
    server = subprocess.Popen([*command, "--reload_interval", "1"], stderr=subprocess.PIPE, text=True)
    said = ""
    for line in server.stderr:
        said += line
        if address := re.search(r"http://\S+?:\d+/", line):
            break
    else:
        pytest.fail(f"TensorBoard did not start: {said}")
    yield address.group()
    server.terminate()
    server.wait(20)
    server.stderr.close()


def unfold(browser, page=PAGE):
    """Open the groups below the first quantities, which are folded at first."""
    browser.until(f"{page}.querySelectorAll('.headline svg').length == 1")
    assert browser.run(f"{page}.querySelectorAll('.card svg').length") == 1
    browser.run(f"{page}.querySelectorAll('.group:not([open]) summary').forEach((e) => e.click())")
    browser.until(f"{page}.querySelectorAll('.card svg').length == 4")


def text(selector, page=PAGE):
    return f"{page}.querySelector({selector!r}).textContent"


def card(quantity):
    return f"[data-quantity={quantity}]"


def press(browser, selector, page=PAGE):
    browser.run(f"{page}.querySelector({selector!r}).click()")


def hover(browser, selector, share, page=PAGE):
    """The mouse over an element, at a share of its width."""
    frame = "document.querySelector('iframe').getBoundingClientRect()" if page == PAGE else "{left: 0, top: 0}"
    x, y = browser.run(
        f"(() => {{ const f = {frame}, r = {page}.querySelector({selector!r}).getBoundingClientRect();"
        f"return [f.left + r.left + {share} * r.width, f.top + r.top + 60]; }})()"
    )
    browser.mouse(x, y)


def downloaded(browser, suffix):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for file in browser.downloads.glob(f"*{suffix}"):
            content = file.read_bytes()
            if content:
                file.unlink()
                return file.name, content
        time.sleep(0.1)
    raise AssertionError(f"no {suffix} came: {os.listdir(browser.downloads)} {browser.console}")


def test_the_tab_from_start_to_export(tmp_path, tensorboard, browser):
    logs = tmp_path / "logs"
    write_run(logs / "narrow", 0.2, run_info(r=0.05)).close()
    hostile = run_info(
        validity={"flag": "caution", "reason": HOSTILE},
        diagnosis=f"### {HOSTILE}\n\n{HOSTILE}",
        events=[{"step": 5, "quantity": "ntk_drift", "text": HOSTILE}],
    )
    writer = write_run(logs / HOSTILE, 0.1, hostile)
    other = SummaryWriter(str(logs / "other"))
    other.add_scalar("loss", 1.0, 0)
    other.close()

    browser.go(f"{tensorboard}#eft")
    unfold(browser)
    browser.until(f"/1 other run has no data/.test({text('.status')})")
    names = browser.run(f"[...{PAGE}.querySelectorAll('.runs .name')].map((e) => e.textContent)")
    assert names == ["narrow", HOSTILE]
    badges = browser.run(f"[...{PAGE}.querySelectorAll('.runs .badge')].map((e) => e.textContent)")
    assert badges == ["◆ rich", "● to 1/n", "◆ rich", "▲ to 1/n"]

    # Two runs in one chart: a row each, and each its z-score.
    hover(browser, f"{card('ntk_drift')} .chart", 0.97)
    shown = browser.until(f"{PAGE}.querySelector('.tooltip:not([hidden])').innerText")
    assert "step 20" in shown and "4.5" in shown and "2.5" in shown and shown.count("+1") == 2

    # One run: the values of every series, and the last one on the card.
    browser.run(f"{PAGE}.querySelector('.runs input').click()")
    browser.until(text(f"{card('ntk_drift')} .value"))
    press(browser, ".runs [data-action=only]")
    browser.until(f"{text(card('ntk_drift') + ' .value')} == '4.5 times'")
    press(browser, ".runs tbody tr:nth-child(2) [data-action=only]")
    browser.until(f"{text(card('ntk_drift') + ' .value')} == '2.5 times'")
    assert browser.run(text(f"{card('ntk_drift')} .verdict")) == "predicted, without quantiles ▲ with caution"
    assert browser.run(text(f"{card('ntk_top_eigenvalue')} .latest")) == "320"
    hover(browser, f"{card('ntk_drift')} .chart", 0.03)
    hover(browser, f"{card('ntk_drift')} .chart", 0.97)
    rows = browser.until(
        f"[...{PAGE}.querySelectorAll('.tooltip:not([hidden]) tr')].map((row) => row.innerText.replace('\\t', ': '))"
    )
    assert rows == [
        "measured: 2.5 times",
        "order 0 (infinite width): 0 %",
        "order 1 (finite width): 2.0 times ± 50 %",
        "(measured \N{MINUS SIGN} theory) / σ: +1",
    ]

    # New measurements appear by themselves.
    for name, value in drift(40, 0.1).items():
        writer.add_scalar(name, value, 40)
    writer.close()
    browser.until(f"{text(card('ntk_drift') + ' .value')} == '4.5 times'")
    assert "step 20" in browser.run(
        f"{PAGE}.querySelector('.tooltip:not([hidden])').innerText"
    )  # it stays where it was

    # Exports hold what is shown: one run, all quantities.
    press(browser, ".toolbar [data-export=csv]")
    _, content = downloaded(browser, ".csv")
    lines = list(csv.DictReader(content.decode().splitlines()))
    assert {line["run"] for line in lines} == {HOSTILE}
    measured = {
        int(line["step"]): float(line["value"])
        for line in lines
        if (line["quantity"], line["series"]) == ("ntk_drift", "measured")
    }
    expected = {step: drift(step, 0.1)["eft/ntk_drift/measured"] for step in (0, 1, 2, 5, 10, 20, 40)}
    assert measured == pytest.approx(expected, rel=1e-6)
    press(browser, ".toolbar [data-export=svg]")
    drawing = ElementTree.fromstring(downloaded(browser, ".svg")[1])
    assert any(HOSTILE in (element.text or "") for element in drawing.iter("{http://www.w3.org/2000/svg}text"))

    # Enlarge, switch quantity, export that one as a picture.
    press(browser, f"{card('ntk_drift')} .title")
    assert "PDLT 11.2" in browser.run(text("dialog dl"))
    assert HOSTILE in browser.run(text("dialog .events"))
    browser.run(
        f"(() => {{ const s = {PAGE}.querySelector('dialog select'); s.value = 'ntk_top_eigenvalue';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    hover(browser, "dialog .chart", 0.97)
    assert "340" in browser.until(f"{PAGE}.querySelector('dialog .tooltip:not([hidden])').innerText")
    press(browser, "dialog [data-export=png]")
    name, picture = downloaded(browser, ".png")
    assert name.startswith("eft_ntk_top_eigenvalue") and picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture[16:20], "big") > 1000
    press(browser, "dialog .close")

    # The run's own words, and TensorBoard's dark mode.
    press(browser, ".runs tbody tr:nth-child(2) [data-action=details]")
    assert browser.run(text("dialog .markdown h3")) == HOSTILE
    browser.run("document.body.classList.add('dark-mode')")
    browser.until(f"{PAGE}.documentElement.dataset.theme == 'dark'")

    # A server that has gone is a sentence, and what was there stays.
    browser.run("document.querySelector('iframe').contentWindow.fetch = () => Promise.reject(new TypeError())")
    browser.until(f"/TensorBoard does not answer.* as of the last answer/.test({text('.status')})")
    assert browser.run(f"{PAGE}.querySelectorAll('.card svg').length") == 4

    # No name became markup, and the browser had nothing to complain of.
    assert browser.run(f"{PAGE}.querySelectorAll('img').length") == 0
    assert browser.run("'hacked' in window || 'hacked' in document.querySelector('iframe').contentWindow") is False
    assert browser.console == []


def test_without_data_the_tab_says_what_to_do_and_fills_when_data_come(tmp_path, tensorboard, browser):
    browser.go(f"{tensorboard}data/plugin_entry.html?name=eft")
    page = "document"
    assert "No run here has data of torch_eft yet" in browser.until(text(".empty", page))
    write_run(tmp_path / "logs" / "run").close()
    browser.until("document.querySelectorAll('.card svg').length == 1")
    assert "no description of itself" in browser.run(text(".problem-mark", page))


def test_a_report_shows_the_same_page_without_a_server(tmp_path, browser):
    write_run(tmp_path / "logs" / HOSTILE, 0.1, run_info()).close()
    with open(tmp_path / "logs" / HOSTILE / "eft.jsonl", "a") as lines:
        lines.write('{"kind": "page", "name": "validity", "text": "**small** r", "step": 0}\n{"kind": ')
    write_report([tmp_path / "logs"], tmp_path / "report.html")
    page = "document"
    browser.go((tmp_path / "report.html").as_uri())
    unfold(browser, page)
    assert browser.run(text(".run-row .name", page)) == f"logs/{HOSTILE}"
    assert "1 line was cut off" in browser.run(text(".status", page))
    browser.run(f"document.querySelector('{card('ntk_drift')} .chart').focus()")
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    assert "step 1" in browser.until("document.querySelector('.tooltip:not([hidden])').innerText")
    press(browser, ".run-row [data-action=details]", page)
    assert browser.run(text("dialog section strong", page)) == "small"
    assert browser.run("document.querySelectorAll('img').length") == 0
    press(browser, ".toolbar [data-export=png]", page)
    assert downloaded(browser, ".png")[1][:4] == b"\x89PNG"
    # What was opened is kept for the next visit.
    kept = browser.run("JSON.parse(localStorage.getItem('torch_eft.settings')).open")
    assert kept == {"Other quantities": True}
    assert browser.console == []


def test_the_first_quantities_are_judged_in_words(tmp_path, browser):
    known = documented(["ntk_drift", "dntk", "representation_change"])
    doubtful = {"flag": "caution", "reason": "r is large"}
    why = "no line for the dNTK: <b>kinks</b>"
    ended = {"step": 3, "quantity": "ntk_drift", "text": "expansion about theta_0 ends here, step 3, outputs moved 0.4"}
    write_scalars(tmp_path / "mlp", forecast, run_info(events=[], quantities=known, validity=doubtful))
    none = {"level": "measurements only", "validity": {"flag": "invalid", "reason": "not an MLP"}}
    info = run_info(events=[ended], unpredicted={"dntk": why}, quantities=known, **none)
    write_scalars(tmp_path / "cnn", expansion, info)
    for run in ("mlp", "cnn"):
        write_report([tmp_path / run], tmp_path / f"{run}.html")
    inside, doubt = "inside the 90 % band", " ▲ with caution"
    page, shown = "document", "[...document.querySelectorAll('.headline {}')].map((e) => e.textContent.trim())"

    browser.go((tmp_path / "mlp.html").as_uri())
    browser.until("document.querySelectorAll('.headline svg').length == 3")
    titles = [QUANTITIES[name].title for name in ("ntk_drift", "dntk", "representation_change")]
    assert browser.run(shown.format(".title")) == titles
    assert browser.run(shown.format(".value")) == ["2.2 times", "1.5", "1.5 times"]
    assert browser.run(shown.format(".verdict")) == [
        f"left the 90 % band at step 3 (above){doubt}",
        inside + doubt,
        inside + doubt,
    ]
    numbers = browser.run(shown.format(".numbers"))
    assert numbers[0].startswith(
        "predicted 1.4 times 90 % of networks 1.0 times .. 2.0 times given its start 1.2 times"
    )
    assert numbers[1] == "predicted 1.4 90 % of networks 1 .. 2 given its start 1.2 .. 1.8"
    # 68 and 90 %, and the line that knows the start; no second chart of what the bands show.
    drift = f"document.querySelector('{card('ntk_drift')} svg')"
    assert browser.run(f"{drift}.querySelectorAll('path[opacity]').length") == 2
    lines = browser.run(f"[...{drift}.querySelectorAll('[data-series]')].map((e) => e.dataset.series)")
    assert lines == ["order_0", "order_1", "given_start", "measured"]
    legend = browser.run(text(".legend", page))
    assert "median, given this network's outputs at the start" in legend and "68 % of networks" in legend
    hover(browser, f"{card('ntk_drift')} .chart", 0.97, page)
    assert "90 % of networks\t1.0 times .. 2.0 times" in browser.until(
        "document.querySelector('.tooltip:not([hidden])').innerText"
    )
    # The enlarged view has the rest: expansions, layers.
    press(browser, f"{card('representation_change')} .title", page)
    series = browser.run("[...document.querySelectorAll('dialog [data-series]')].map((e) => e.dataset.series)")
    assert {"layer/net.1", "layer-theory/net.1", "taylor_2"} <= set(series)

    browser.go((tmp_path / "cnn.html").as_uri())
    browser.until("document.querySelectorAll('.headline svg').length == 2")
    assert browser.run(shown.format(".verdict")) == [ended["text"], why]
    assert browser.run(text(".run-row .tone-none", page)) == "○ theory: measured only"
    numbers = browser.run(shown.format(".numbers"))
    assert numbers[0].startswith("at step 2: measured 20 % predicted 22 %")
    assert browser.run(text(".headline .end title", page)) == f"step 2: {ended['text']}"
    assert browser.run("document.querySelectorAll('b').length") == 0
    assert browser.console == []


def forecast(step):
    edges = {"band_90_low": 1.0, "band_68_low": 1.2, "band_68_high": 1.7, "band_90_high": 2.0, "quantile": 0.6}
    lines = {
        "taylor_2": 1.6,
        "order_0": 0.0,
        "order_1": 1.4,
        "given_start": 1.5,
        "given_start_low": 1.2,
        "given_start_high": 1.8,
    }
    names = {"ntk_drift": 1.5 if step < 3 else 2.2, "dntk": 1.5, "representation_change": 1.5}
    found = {tag(name): value for name, value in names.items()}
    found |= {tag(name, series): value for name in names for series, value in (edges | lines).items()}
    layer = "representation_change", "net.1"
    return (
        found
        | {layer_tag(*layer): 1.5}
        | {layer_theory_tag(*layer, s): edges.get(s, 1.4) for s in ("order_1", *BAND_90)}
    )


def expansion(step):
    measured = {tag("ntk_drift"): 0.1 * step, tag("dntk"): 1.0}
    return measured | ({tag("ntk_drift", "taylor_2"): 0.11 * step} if step < 3 else {})


NUMBERS = """
(async () => {
  const model = await import(new URL('plugin/eft/static/data/model.js', location).href);
  const scale = await import(new URL('plugin/eft/static/data/scale.js', location).href);
  const format = await import(new URL('plugin/eft/static/data/format.js', location).href);
  const raw = {
    measured: [[0, 1], [1, null], [2, 5], [3, 7]], order_0: [[0, 2], [1, 2], [2, 2]], order_1: [[0, 1], [1, 2], [2, 4]],
    minus_sigma: [[0, 1], [1, 1], [2, 2]], plus_sigma: [[0, 1], [1, 3], [2, 6]], truncation: [[2, 0.5]],
    z_score: [[2, 0.5]], 'layer/a': [[0, 1]], other: [[0, 3]],
  };
  const q = model.readQuantity(raw);
  return {
    best: q.best, others: q.others.map((o) => o.series), layers: q.layers.map((o) => o.series),
    truncation: q.truncation,
    z: model.residual(q, 'order_1', 'z'), z0: model.residual(q, 'order_0', 'z'),
    relative: model.residual(q, 'order_1', 'relative'), difference: model.residual(q, 'order_0', 'difference'),
    kinds: [[q], [model.readQuantity({measured: [[0, 1]], order_0: [[0, 2]]})],
      [model.readQuantity({measured: [[0, 1]], order_0: [[0, 0]]})],
      [model.readQuantity({measured: [[0, 1]], order_1: [[0, 1], [1, 1e-4]]})],
      [model.readQuantity({measured: [[0, 1]]})],
      [model.readQuantity({measured: [[0, 1]], order_0: [[0, 0]], quantile: [[0, .7]]})],
    ].map((list) => model.residualKind(list, 'auto')),
    ranges: model.valuesAt(model.readQuantity({
      measured: [[0, 0], [1, 2]], quantile: [[0, 1], [1, .5]],
      band_90_low: [[0, 0], [1, 1]], band_90_high: [[0, 0], [1, 3]],
    }), 1),
    csv: model.toCsv({'a,"b': {q: {measured: [[1, null], [2, -0.5]]}}, '=1+1': {}, '@x': {q: {s: [[0, 1]]}}}),
    linear: scale.makeScale('linear', [0, 1], [0, 100]).ticks(5),
    log: scale.makeScale('log', [1e-6, 1], [0, 100]).ticks(4),
    steps: scale.makeScale('steps', [0, 1000], [0, 100]).ticks(4),
    back: [0, 7, 1000].map((v) => { const s = scale.makeScale('steps', [0, 1000], [0, 100]); return s.from(s.to(v)); }),
    many: scale.extent(Array.from({length: 500000}, (_, i) => i)),
    numbers: [0, 1234.5678, -0.00012356, 1e9, null, NaN].map((v) => format.number(v)),
  };
})()
"""


def test_numbers_of_the_modules(tensorboard, browser):
    browser.go(f"{tensorboard}data/plugin_entry.html?name=eft")
    browser.until(text(".empty", "document"))
    found = browser.run(NUMBERS)
    assert found["best"] == "order_1"
    assert found["others"] == ["other"] and found["layers"] == ["layer/a"]
    assert found["truncation"] == [[2, 3.5, 4.5]]
    assert found["z"] == [[2, 0.5]]  # sigma is 0 at step 0, nothing measured at 1, no theory at 3
    assert found["z0"] == [[2, 1.5]]
    assert found["relative"] == [[0, 0], [2, 0.25]]
    assert found["difference"] == [[0, -1], [2, 3]]
    # No residual of a theory that is 0: it would be what was measured once more.
    assert found["kinds"] == ["z", "relative", None, "difference", None, "quantile"]
    assert found["ranges"]["ranges"] == {"90 % of networks": [1, 3]} and found["ranges"]["quantile"] == 0.5
    assert found["csv"].splitlines() == [
        "run,quantity,series,step,value",
        '"a,""b",q,measured,1,',
        '"a,""b",q,measured,2,-0.5',
        "'@x,q,s,0,1",
    ]
    assert found["linear"] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert found["log"] == pytest.approx([1e-6, 1e-4, 1e-2, 1])
    assert found["steps"] == [0, 1, 10, 100, 1000]
    assert found["back"] == pytest.approx([0, 7, 1000])
    assert found["many"] == [0, 499999]  # more than a call takes as arguments
    minus, none = "\N{MINUS SIGN}", "\N{EN DASH}"
    assert found["numbers"] == ["0", "1235", f"{minus}1.236e{minus}4", "1e9", none, none]
