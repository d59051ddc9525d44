"""Files of unknown origin: states and JSONL lines never run code, and a model's name imports only what it names."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_eft
from tests.callbacks.trainings import PROBE, run, simple_mlp
from torch_eft.callbacks import EFTMonitor
from torch_eft.live import Observer
from torch_eft.tensorboard.report import write_report
from torch_eft.tensorboard.run_info import read_jsonl


class Mark:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "code-was-run"


def test_the_mark_works(mark):
    pickle.loads(pickle.dumps(Mark(mark)))
    assert mark.exists()


def plain(value):
    if isinstance(value, dict):
        return all(type(key) in (str, int) and plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str, torch.Tensor)


@pytest.mark.parametrize("preset", ["light", "standard", "full"])
def test_states_are_of_plain_types_and_tensors(tmp_path, preset):
    monitor = EFTMonitor(PROBE, preset=preset, budget=None, every=3)
    trainer, _ = run([monitor], epochs=1)
    state = monitor.state_dict()
    assert plain(state)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["history"] == state["history"]
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert [plain(each) for each in stored["callbacks"].values()] == [True]


@pytest.mark.parametrize("where", ["history", "reference", "parts", "theta_0"])
def test_a_state_with_code_in_it_is_refused_by_torch(tmp_path, mark, where):
    torch.manual_seed(0)
    observer = Observer(simple_mlp(), PROBE, preset="light", budget=None)
    observer.begin()
    torch.save(observer.state_dict() | {where: Mark(mark)}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(tmp_path / "state.pt", weights_only=True)
    assert not mark.exists()


def test_a_probe_file_with_code_in_it_is_refused(tmp_path, mark):
    torch.save({"x": Mark(mark)}, tmp_path / "probe.pt")
    with pytest.raises(ValueError, match=r"probe: .*probe.pt' is not a file of tensors"):
        EFTMonitor(str(tmp_path / "probe.pt"))
    assert not mark.exists()


def test_nothing_in_the_package_unpickles_freely():
    """Every ``torch.load`` says weights_only=True, and there is no other unpickler, eval or exec."""
    package = Path(torch_eft.__file__).parent
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    assert len(sources) > 50
    for path, text in sources.items():
        for word in ("import pickle", "pickle.load", "import dill", "import joblib", "allow_pickle=True", "yaml.load("):
            assert word not in text, (path, word)
        for line in text.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, (path, line)
            assert not line.strip().startswith(("eval(", "exec(")) and "= eval(" not in line, (path, line)


HOSTILE = [
    b"\x80\x04\x95" + bytes(range(256)),
    b'{"kind": "measurement", "step": "__import__(\'os\').mkdir(\'x\')", "scalars": {}}',
    b'{"kind": "measurement", "step": 1, "scalars": {"eft/ntk_drift/measured": "nan"}}',
    b'{"kind": "measurement", "step": 1, "scalars": ["eft/ntk_drift/measured"]}',
    b'{"kind": "measurement", "step": true, "scalars": {}}',
    b'{"kind": "measurement", "step": 1e400, "scalars": {}}',
    b'{"kind": "measurement", "scalars": {"eft/ntk_drift/measured": 1}}',
    b'{"kind": ["run"], "schema": {"py/object": "os.system"}}',
    b'{"kind": "run", "schema": 99}',
    b'{"kind": "event", "step": 1, "quantity": {"a": "b"}, "text": 3}',
    b'{"kind": "page", "name": "../../etc/passwd"}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"null",
    b"3",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"kind": "measurement", "step": 2, "scalars": {"eft/ntk_drift/measured": 1' + b"0" * 5000 + b"}}",
]


def test_hostile_lines_are_skipped_and_counted(tmp_path, mark):
    good = {"kind": "measurement", "step": 7, "epoch": 0, "time": 0.0, "scalars": {"eft/ntk_drift/measured": 0.5}}
    lines = [*HOSTILE, pickle.dumps(Mark(mark), protocol=0).replace(b"\n", b" "), json.dumps(good).encode()]
    (tmp_path / "eft.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    records = read_jsonl(tmp_path / "eft.jsonl")
    assert records.measurements.pop(7) == {"eft/ntk_drift/measured": 0.5}
    assert not any(records.measurements.values())
    assert records.corrupt >= len(HOSTILE) - 2
    assert not mark.exists()


def test_a_report_of_hostile_names_holds_no_markup_of_theirs(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    lines = [
        {"kind": "run", "schema": 1, "network": evil, "optimizer": evil, "diagnosis": f"# {evil}", "level": evil},
        {"kind": "measurement", "step": 0, "scalars": {"eft/ntk_drift/measured": 0.0, f"eft/{evil}/measured": 1.0}},
        {"kind": "measurement", "step": 1, "scalars": {"eft/ntk_drift/measured": 0.1, f"eft-layers/x/{evil}": 1.0}},
        {"kind": "event", "step": 1, "quantity": evil, "text": evil},
        {"kind": "page", "name": evil, "text": evil, "step": 1},
    ]
    (tmp_path / "eft.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    write_report([tmp_path], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script>alert(1)" not in text
    assert "<img src=x" not in text


PROGRAM = """
import sys
before = set(sys.modules)
from torch_eft.cli.main import main
sys.argv = ["torch-eft", "diagnose", "--model", "named:net", "--input-shape", "3"]
try:
    main()
except SystemExit:
    pass
print("IMPORTED", sorted(name for name in sys.modules if name in ("named", "beside", "conftest", "sitecustomize_own")))
"""


def test_a_models_name_imports_only_what_it_names(tmp_path):
    (tmp_path / "named.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))\n"
    )
    for name in ("beside", "conftest", "sitecustomize_own", "setup", "__main__"):
        (tmp_path / f"{name}.py").write_text(f"open('{name}-was-imported', 'w')\n")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert "IMPORTED ['named']" in done.stdout, done.stdout + done.stderr
    assert not list(tmp_path.glob("*-was-imported"))


@pytest.mark.parametrize(
    "reference", ["named.py:net", "named", ":net", "named:", "named:net()", "named:__import__('os')"]
)
def test_what_is_no_name_is_refused_in_words(tmp_path, monkeypatch, reference):
    from torch_eft.cli.main import _model

    (tmp_path / "named.py").write_text("net = None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "named", raising=False)
    with pytest.raises(ValueError, match="--model "):
        _model(reference)
    sys.modules.pop("named", None)
