"""The tab in a real TensorBoard and a headless Chromium: choose a run, switch quantity, read a value, export."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.tensorboard.chromium import EXECUTABLE, NAMES, Browser
from tests.tensorboard.eft_runs import drift, run_info, write_run, write_scalars
from torch_eft.live import TensorBoardSink
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
    # Errors by order on a log axis, with a line at 1.
    errors = card("replay_output_error")
    assert browser.run(text(f"{errors} .reference text")) == "1: nothing predicted"
    ticks = browser.run(f"[...{PAGE}.querySelectorAll({errors + ' svg text'!r})].map((e) => e.textContent)")
    assert {"0.1", "1"} <= set(ticks)
    names = browser.run(f"[...{PAGE}.querySelectorAll('.runs .name')].map((e) => e.textContent)")
    assert names == ["narrow", HOSTILE]
    badges = browser.run(f"[...{PAGE}.querySelectorAll('.runs .badge')].map((e) => e.textContent)")
    assert badges == ["◆ rich", "● to 1/n", "◆ rich", "▲ to 1/n"]

    # Two runs in one chart: a row each, and each its z-score.
    hover(browser, f"{card('ntk_drift')} .chart", 0.97)
    shown = browser.until(f"{PAGE}.querySelector('.tooltip:not([hidden])').innerText")
    assert "step 20" in shown and "450 %" in shown and "250 %" in shown and shown.count("+1") == 2

    # One run: the values of every series, and the last one on the card.
    browser.run(f"{PAGE}.querySelector('.runs input').click()")
    browser.until(text(f"{card('ntk_drift')} .value"))
    press(browser, ".runs [data-action=only]")
    browser.until(f"{text(card('ntk_drift') + ' .value')} == '450 %'")
    press(browser, ".runs tbody tr:nth-child(2) [data-action=only]")
    browser.until(f"{text(card('ntk_drift') + ' .value')} == '250 %'")
    assert browser.run(text(f"{card('ntk_drift')} .verdict")) == "predicted, without quantiles ▲ with caution"
    assert browser.run(text(f"{card('ntk_top_eigenvalue')} .latest")) == "320"
    hover(browser, f"{card('ntk_drift')} .chart", 0.03)
    hover(browser, f"{card('ntk_drift')} .chart", 0.97)
    rows = browser.until(
        f"[...{PAGE}.querySelectorAll('.tooltip:not([hidden]) tr')].map((row) => row.innerText.replace('\\t', ': '))"
    )
    assert rows == [
        "measured: 250 %",
        "order 0 (infinite width): 0 %",
        "order 1 (finite width): 200 % ± 50 %",
        "(measured \N{MINUS SIGN} theory) / σ: +1",
    ]

    # New measurements appear by themselves.
    TensorBoardSink(writer).scalars(40, drift(40, 0.1))
    writer.close()
    browser.until(f"{text(card('ntk_drift') + ' .value')} == '450 %'")
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
    assert browser.run(shown.format(".value")) == ["220 %", "1.5", "150 %"]
    assert browser.run(shown.format(".verdict")) == [
        f"left the 90 % band at step 3 (above){doubt}",
        inside + doubt,
        inside + doubt,
    ]
    numbers = browser.run(shown.format(".numbers"))
    assert numbers[0].startswith("predicted 140 % 90 % of networks 100 % .. 200 % given its start 120 %")
    assert numbers[1] == "predicted 1.4 90 % of networks 1 .. 2 given its start 1.2 .. 1.8"
    # 68 and 90 %, and the line that knows the start; no second chart of what the bands show.
    drift = f"document.querySelector('{card('ntk_drift')} svg')"
    assert browser.run(f"{drift}.querySelectorAll('path[opacity]').length") == 2
    lines = browser.run(f"[...{drift}.querySelectorAll('[data-series]')].map((e) => e.dataset.series)")
    assert lines == ["order_0", "order_1", "given_start", "measured"]
    legend = browser.run(text(".legend", page))
    assert "median, given this network's outputs at the start" in legend and "68 % of networks" in legend
    hover(browser, f"{card('ntk_drift')} .chart", 0.97, page)
    assert "90 % of networks\t100 % .. 200 %" in browser.until(
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


AXE = next((Path(place) for place in [os.environ.get("AXE_CORE", "")] if place and Path(place).is_file()), None)
"""``axe.min.js`` of the npm package axe-core, which checks accessibility."""


def faults(browser):
    """Serious faults of accessibility that axe-core finds on the page; none where it is not there."""
    if AXE is None:
        return []
    browser.run(f"(() => {{ {AXE.read_text('utf-8')} }})()")
    return browser.run(
        "axe.run(document, {resultTypes: ['violations']}).then((result) => result.violations"
        ".filter(({impact}) => ['serious', 'critical'].includes(impact))"
        ".map(({id, nodes}) => [id, ...nodes.map(({html}) => html)]))"
    )


def many_runs(place):
    """Five widths, two of them with a second seed; a CNN; a damaged, a diverged and an interrupted run."""
    known = documented(["ntk_drift", "dntk", "representation_change"])
    for width, seed in [(16, 0), (32, 0), (64, 0), (64, 1), (128, 0), (128, 1)]:
        drift = (1.6 if seed else 1.5) / width

        def scalars(step, drift=drift, width=width):
            band = {"order_1": 1.5, "band_90_low": 1.2, "band_90_high": 1.9}
            found = {tag("ntk_drift"): drift * step, tag("representation_change"): drift * step / 2}
            return found | {tag("ntk_drift", name): value * step / width for name, value in band.items()}

        network = f"MLP 64-{width}-{width}-10, tanh"
        info = run_info(network=network, width=float(width), r=3 / width, epsilon=1 / width, quantities=known)
        progress = {"state": "ended", "step": 4, "planned": 4, "diverged": None}
        write_scalars(place / f"tanh-{width}-{seed}", scalars, info | {"events": [], "progress": progress})
    none = {"level": "measurements only", "validity": {"flag": "invalid", "reason": "not an MLP: Conv2d"}}
    shapeless = dict.fromkeys(("depth", "width", "r", "epsilon")) | {"network": "CNN", "optimizer": "Adam, lr 0.001"}
    direction = {tag("ntk_kernel_distance"): 0.1}
    write_scalars(place / "cnn", lambda step: {tag("ntk_drift"): 3.0 * step} | direction, run_info(**none, **shapeless))
    diverged = {"progress": {"state": "ended", "step": 9, "planned": 9, "diverged": 5}}
    write_scalars(place / "diverged", lambda step: {tag("ntk_drift"): 10.0 ** (3 * step)}, run_info(**diverged))
    early = {"progress": {"state": "interrupted", "step": 4, "planned": 300, "diverged": None}}
    write_scalars(place / "early", lambda step: {tag("ntk_drift"): 0.01 * step}, run_info(**early))
    write_scalars(place / "damaged", lambda step: {tag("ntk_drift"): 0.01 * step}, {"events": 3})


@pytest.mark.slow
def test_a_table_of_runs_is_sorted_grouped_searched_and_charted(tmp_path, browser):
    (tmp_path / "logs").mkdir()
    many_runs(tmp_path / "logs")
    write_report([tmp_path / "logs"], tmp_path / "report.html")
    page = "document"
    browser.go((tmp_path / "report.html").as_uri())
    browser.until("document.querySelectorAll('.headline svg').length > 0")

    def rows():
        return browser.run("[...document.querySelectorAll('.runs tbody th')].map((e) => e.textContent.trim())")

    def cells(name):
        row = f"document.querySelector('[data-run=\"logs/{name}\"]')"
        return browser.run(f"[...{row}.querySelectorAll('td')].map((e) => e.innerText.trim())")

    # Seeds are one row; a damaged run says so and harms no other.
    assert "▸ MLP 64-64-64-10, tanh 2 runs" in rows() and len(rows()) == 8
    assert "logs/damaged damaged" in rows()
    assert cells("diverged")[-2] == "diverged at 5" and cells("early")[-2] == "4 of 300"
    assert cells("tanh-32-0")[:8] == ["3", "32", "0.0938", "SGD", "19 %", "19 %", "15 % .. 24 %", "9.4 %"]
    assert cells("cnn")[8:10] == ["◆ rich", "○ measured only"]
    group = browser.run("[...document.querySelectorAll('.runs tr.alike')][0].innerText.replaceAll('\\t', '|')")
    assert "|64|0.0469|SGD|9.4 % .. 10 %|9.4 %|7.5 % .. 12 %|4.7 % .. 5.0 %|" in group
    press(browser, ".runs tr.alike .fold", page)
    assert "logs/tanh-64-1" in rows() and len(rows()) == 10

    # Sorting by the keyboard: upwards, downwards, what is not known last; the focus stays.
    browser.run("document.querySelector('[data-sort=r]').focus()")
    browser.run("document.activeElement.click()")
    assert browser.run("document.activeElement.closest('th').ariaSort") == "ascending"
    upwards = rows()
    assert "▸ MLP 64-128-128-10, tanh 2 runs" in upwards[:3]  # with two of the same r
    assert upwards[-2:] == ["logs/cnn", "logs/damaged damaged"]
    browser.run("document.activeElement.click()")
    assert rows()[0] == "logs/tanh-16-0" and rows()[-2:] == ["logs/cnn", "logs/damaged damaged"]

    # Searching leaves what is chosen alone.
    chosen = browser.run("document.querySelectorAll('.runs .chosen').length")
    browser.run(
        "(() => { const s = document.querySelector('input[type=search]'); s.value = 'cnn adam';"
        "s.dispatchEvent(new Event('input')); })()"
    )
    assert rows() == ["logs/cnn"] and browser.run(text(".find [role=status]", page)) == "1 of 10 runs"
    browser.run(
        "(() => { const s = document.querySelector('input[type=search]'); s.value = '';"
        "s.dispatchEvent(new Event('input')); })()"
    )
    assert browser.run("document.querySelectorAll('.runs .chosen').length") == chosen

    # The law of the width, of the runs that are charted; one that diverged sets no axis.
    browser.run("document.querySelectorAll('.runs tbody input:not(:checked)').forEach((e) => e.click())")
    law = browser.until("document.querySelector('[data-answer=law] svg')?.getAttribute('aria-label')")
    assert "6 runs" in law and "NTK moved 19 %" in law
    assert "drift ∝ r^" in browser.run(text("[data-answer=law] p", page))
    assert browser.run("document.querySelectorAll('[data-answer=law] [data-mark=theory]').length") == 1
    ticks = browser.run(f"[...document.querySelectorAll('{card('ntk_drift')} svg text')].map((e) => e.textContent)")
    assert "off the chart: measured" in ticks and not any("e1" in tick for tick in ticks)
    assert not faults(browser)

    # One run alone: four answers, and its place on the map among the others.
    press(browser, "[data-run='logs/tanh-32-0'] [data-action=only]", page)
    browser.until("document.querySelectorAll('.answer').length == 4")
    answers = browser.run("[...document.querySelectorAll('.answer')].map((e) => e.innerText)")
    assert "NTK moved 19 %" in answers[0] and "predicted 15 % .. 24 %" in answers[0]
    assert "inside the 90 % band" in answers[1]
    assert "small below 0.2" in answers[2] and "To be lazy: hidden widths x2 → drift about 9.4 %" in answers[3]
    assert browser.run("document.querySelectorAll('[data-answer=shape] [data-mark=star]').length") == 1
    assert browser.run("document.querySelectorAll('[data-answer=shape] circle').length") == 7

    # At other widths nothing runs out of the page, in the dark neither, and the folded groups open.
    for width in (900, 1440, 1920):
        browser.resize(width, 900)
        style = "getComputedStyle(document.querySelector('.answers')).gridTemplateColumns"
        browser.until(f"innerWidth == {width} && {style}.split(' ').length == {2 if width < 1000 else 4}")
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert not faults(browser)
    browser.darken()
    browser.until("document.documentElement.dataset.theme == 'dark'")
    assert not faults(browser)

    # A CNN without a theory: the bounded distance first, and a grey sentence.
    press(browser, "[data-run='logs/cnn'] [data-action=only]", page)
    browser.until("document.querySelector('.headline').dataset.quantity == 'ntk_kernel_distance'")
    assert "not an MLP: Conv2d" in browser.run(text(".headline .verdict.none", page))
    assert browser.console == []
