"""A run comes back from its files: from eft.jsonl, and from TensorBoard's alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_eft as eft
from torch_eft.live import Observer
from torch_eft.tensorboard import tag


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small MLP, trained beside its theory, and where its files are."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    observer = Observer(model, x[:3], optimizer, logdir=folder, every=2, budget=None, forecast_seconds=0.01)
    observer.begin(total_steps=4)
    for step in range(1, 5):
        observer.observe_batch((x, y))
        loss = F.mse_loss(model(x), y)
        observer.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        observer.before_step()
        optimizer.step()
        observer.measure(step)
    observer.finish()
    return observer, folder


def test_it_comes_back(trained):
    observer, folder = trained
    for path in (folder, folder / "eft.jsonl", folder.parent):
        run = eft.load_run(path)
        assert run.history == observer.history and run.path == folder / "eft.jsonl"
    assert run.validity.flag == observer.validity.flag and run.info["width"] == 32
    measured = {step: scalars[tag("ntk_trace", "order_0")] for step, scalars in run.history.items()}
    assert run.forecasts["ntk_trace"]["order_0"] == measured
    assert "measured" not in run.forecasts["ntk_trace"]
    assert run.pages["overhead"] and isinstance(run.events, tuple)
    assert eft.tensorboard.verdict(run.history, "ntk_drift") == run.verdict("ntk_drift")
    assert run.reading("ntk_drift") == eft.tensorboard.reading(observer.history, "ntk_drift")


def test_it_shows_itself(trained):
    run = eft.load_run(trained[1])
    text = repr(run)
    assert len(text) < 2000 and "network: MLP" in text and "history: RunHistory: " in text and "validity: " in text
    assert "<b>SavedRun</b>" in run._repr_html_()
    assert len(run.plot("ntk_drift", "ntk_trace").axes) == 2


def test_tensorboard_files_alone_hold_it_in_single_precision(trained, tmp_path):
    observer, folder = trained
    for file in folder.glob("*tfevents*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    run = eft.load_run(tmp_path)
    assert run.history.keys() == observer.history.keys() and run.info["width"] == 32
    for step, scalars in observer.history.items():
        assert run.history[step] == pytest.approx(scalars, rel=1e-6)
    assert run.validity.flag == observer.validity.flag
    assert run.pages == eft.load_run(folder).pages


def test_what_is_no_run_is_refused_in_words(trained, tmp_path):
    file = trained[1] / "eft.jsonl"
    with pytest.raises(FileNotFoundError, match=r"no eft\.jsonl at or below it; torch_eft's callbacks write one"):
        eft.load_run(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eft.jsonl").write_text(file.read_text())
    with pytest.raises(ValueError, match=r"2 runs are below it; give one of .*a/eft\.jsonl, .*b/eft\.jsonl"):
        eft.load_run(tmp_path)
    (tmp_path / "a" / "eft.jsonl").write_text('{"kind":"page","name":"notes","text":"","step":0}\n')
    with pytest.raises(ValueError, match="it holds no measurement; the run ended before its first one"):
        eft.load_run(tmp_path / "a")
