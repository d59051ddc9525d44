"""What a terminal shows of a run: the numbers of the tab, on lines of their own."""

import re
import sys

import pytest
import torch
from torch.nn import functional as F

from tests.live.instruments.loop import data, mlp
from torch_eft.live import Observer
from torch_eft.live.instruments.forecasts.instance import InstanceInstrument
from torch_eft.live.record.terminal import first_lines, last_lines, terminal
from torch_eft.results.tags import BAND_90, tag
from torch_eft.tensorboard.answers import summary
from torch_eft.tensorboard.run_info import Records

INFO = {
    "network": "MLP 64-256-256-10, tanh",
    "depth": 3,
    "width": 256.0,
    "r": 0.0117,
    "epsilon": 0.01,
    "parameters": 85_000,
    "optimizer": "SGD, lr 0.1",
    "level": "ensemble, order 1",
    "validity": {"flag": "valid", "reason": "r is small"},
    "claims": [{"level": "ensemble, order 1", "flag": "valid", "reason": "r is small"}],
    "progress": {"state": "ended", "step": 300, "planned": 300, "diverged": None},
}
LOW, HIGH = (tag("ntk_drift", name) for name in BAND_90)
HISTORY = {
    0: {tag("ntk_drift"): 0.0, tag("representation_change"): 0.0},
    300: {
        tag("ntk_drift"): 0.05,
        tag("ntk_drift", "order_1"): 0.045,
        LOW: 0.034,
        HIGH: 0.061,
        tag("representation_change"): 0.045,
        tag("output_projection"): 1.0,
        tag("output_projection", "order_1"): 0.9,
        tag("output_projection", "minus_sigma"): 0.8,
        tag("output_projection", "plus_sigma"): 1.0,
        tag("output_projection", "z_score"): 0.9,
    },
}


def test_the_start_says_what_is_expected_what_is_left_out_and_where_to_look():
    lines = first_lines(INFO, (0.034, 0.061), ["the mean output; forecast_seconds=60 brings it"], "tensorboard")
    assert lines == [
        "MLP 64-256-256-10, tanh | r = L/n = 0.012 | expected NTK drift 3.4 .. 6.1 % | theory: to 1/n",
        "left out of the forecast: the mean output; forecast_seconds=60 brings it",
        "tensorboard",
    ]
    reason = "not an MLP: Conv2d lies between its inputs and its outputs; it is measured"
    other = {"network": "ResNet", "parameters": 11_000_000, "level": "measurements only"}
    (line,) = first_lines(other | {"validity": {"flag": "invalid", "reason": reason}}, None, (), "")
    assert line == f"ResNet, 11,000,000 parameters | theory: measured only ({reason.partition(';')[0]})"


def test_the_end_says_the_numbers_of_the_tab_the_verdict_and_the_cost():
    lines = last_lines(INFO, HISTORY, "40 measurements, 4.1 % of training time", "30 due; budget=None brings them")
    assert lines[0] == "step 300: NTK moved 5.0 % (predicted 3.4 .. 6.1), features moved 4.5 %, outputs +0.9 σ"
    found = summary(INFO, Records("", measurements=HISTORY).series())
    assert lines[1].startswith(f"{found['regime']['name']}: ")
    assert lines[1].endswith("; 40 measurements, 4.1 % of training time")
    assert lines[2] == "left out: 30 due; budget=None brings them"
    deep = last_lines(INFO | {"r": 0.4, "depth": 100}, HISTORY, "", "")
    assert deep[1].startswith("Deep for order 1/n: hidden widths x2 bring r") and len(deep) == 2
    diverged = INFO | {"progress": {"state": "ended", "step": 13, "planned": 300, "diverged": 13}}
    assert last_lines(diverged, HISTORY, "", "")[0].startswith("diverged at step 13")


def bare(steps=6, batch=None, lr=0.02, change=None, **options):
    """A bare loop; returns what was said."""
    said, (x, y, x_probe) = [], data()
    model = mlp(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    observer = Observer(model, x_probe, optimizer, budget=None, say=said.append, on_error="raise", **options)
    observer.begin(total_steps=steps)
    torch.manual_seed(1)
    for step in range(1, steps + 1):
        rows = torch.arange(len(x)) if batch is None else torch.randperm(len(x))[:batch]
        observer.observe_batch((x[rows], y[rows]))
        loss = F.mse_loss(model(x[rows]), y[rows])
        observer.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        observer.before_step()
        optimizer.step()
        observer.measure(step)
        if change == step:
            optimizer.param_groups[0]["lr"] /= 2
    observer.finish()
    return said


def test_everything_is_said_once(tmp_path):
    first, where, last, cost = bare(instruments=["ntk", InstanceInstrument(seconds=0.1)], logdir=tmp_path)
    assert first == "torch_eft  Sequential, 370 parameters | theory: to 1/n"
    assert where.startswith("torch_eft  tensorboard --logdir ") and where.endswith("(tab EFT)")
    assert re.match(r"torch_eft  step 6: NTK moved \d", last) and "; 7 measurements, " in cost


def test_a_training_on_minibatches_is_said_to_be_measured_only_when_that_is_seen():
    first, *_ = bare(batch=3, instruments=["ntk", InstanceInstrument(seconds=0.1)])
    assert first.endswith("| theory: measured only (a later batch holds other samples than the first: not full-batch "
                          "training)")  # fmt: skip


@pytest.mark.slow
def test_a_forecast_that_ends_is_said_to():
    said = bare(change=3, instruments=["ntk", "theory"])
    (ended,) = [line for line in said if "no forecast from here on" in line]
    assert ended.startswith("torch_eft  step 4: ") and "learning rate changed at step 3" in ended


def test_lines_are_their_own_beside_a_bar_of_tqdm(capsys):
    from tqdm import tqdm

    with tqdm(total=3, file=sys.stdout, leave=False) as bar:
        bar.update(1)
        terminal.info("torch_eft  one")
        bar.update(1)
    terminal.info("torch_eft  two")
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == ["torch_eft  one", "torch_eft  two"]


def test_lines_are_their_own_beside_a_bar_of_rich():
    import io

    rich = pytest.importorskip("rich.progress", reason="rich is optional: pip install rich")
    from rich.console import Console

    stream = io.StringIO()
    with rich.Progress(console=Console(file=stream, force_terminal=True, width=80)) as bar:
        bar.add_task("training", total=3)
        terminal.info("torch_eft  one")
    lines = re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", stream.getvalue())
    assert "torch_eft  one" in [line.strip() for line in lines]


def test_silence_is_one_line(capsys):
    level = terminal.level
    terminal.setLevel("ERROR")
    try:
        terminal.info("torch_eft  hidden")
    finally:
        terminal.setLevel(level)
    assert not capsys.readouterr().err
