"""Results come back from files as they were, and files that are not ours are refused in words."""

import json
import math
import zipfile
from dataclasses import dataclass, fields

import numpy
import pytest
import torch
from torch import nn

import torch_eft as eft
from torch_eft import Trajectory, Validity, theory
from torch_eft.live import RunHistory
from torch_eft.results.presentation.files import VERSION, load_result, save_result

X, Y = torch.eye(2, 3).double(), torch.ones(2, 1).double()
ENSEMBLE = theory.MLPEnsemble([3, 16, 16, 1], "tanh")


def trajectory():
    return theory.predict_training(ENSEMBLE, X, Y, X, learning_rate=0.1, steps=3, order=0)


def same(first, second):
    """Bit by bit; NaN is itself."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(7.5), second.nan_to_num(7.5))
    if hasattr(first, "__dataclass_fields__"):
        names = [field.name for field in fields(first) if not field.name.startswith("_")]
        return type(first) is type(second) and all(same(getattr(first, n), getattr(second, n)) for n in names)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def test_a_trajectory_comes_back(tmp_path):
    found = trajectory()
    found.save(tmp_path / "deep" / "forecast.npz")
    again = Trajectory.load(tmp_path / "deep" / "forecast.npz")
    assert same(found, again) and again.validity.numbers == found.validity.numbers
    assert again.ntk_mean.stride()[0] == 0, "one copy for all times, as it was"
    assert again.output_truncation is None


def test_a_forecast_of_the_drift_comes_back_with_its_moments(tmp_path):
    found = theory.predict_drift(theory.MLPEnsemble([3, 16, 16, 1], "linear"), X, Y, X, learning_rate=0.1, steps=3)
    found.save(tmp_path / "drift.npz")
    again = theory.DriftForecast.load(tmp_path / "drift.npz")
    assert same(found, again) and set(again.hidden) == {1, 2}
    for call in (lambda: again.draws(3), again.along_mean, lambda: again.given(Y)):
        with pytest.raises(ValueError, match=r"forecast: read from a file, .*; predict it again"):
            call()


def test_a_history_comes_back(tmp_path):
    found = RunHistory({0: {"eft/ntk_drift/measured": 0.0}, 7: {"a": 0.1 + 0.2, "b": -0.0}, 3: {"a": 5e-324}, 9: {}})
    found.save(tmp_path / "run.npz")
    again = RunHistory.load(tmp_path / "run.npz")
    assert again == found and list(again) == [0, 7, 3, 9] and math.copysign(1, again[7]["b"]) == -1
    RunHistory().save(tmp_path / "none.npz")
    assert RunHistory.load(tmp_path / "none.npz") == {}


def test_hidden_layers_and_seeds_come_back(tmp_path):
    forecast = theory.predict_representation(ENSEMBLE, X, Y, X, learning_rate=0.1, steps=3)
    forecast.save(tmp_path / "hidden.npz")
    assert same(forecast, theory.RepresentationForecast.load(tmp_path / "hidden.npz"))
    seeds = eft.measure.statistics_over_seeds(nn.Linear(3, 2), torch.ones(1, 3), num_networks=4)
    seeds.save(tmp_path / "seeds.npz")
    assert same(seeds, eft.measure.SeedStatistics.load(tmp_path / "seeds.npz"))


def test_diagnoses_come_back(tmp_path):
    derived = eft.diagnose(theory.MLPEnsemble([3, 16, 1], "relu", C_W=2.0), X)
    derived.save(tmp_path / "derived.npz")
    again = eft.Diagnosis.load(tmp_path / "derived.npz")
    assert same(derived, again) and str(again) == str(derived) and again.ensemble == derived.ensemble
    assert "<pre>" in derived._repr_html_() and derived.verdict in derived._repr_html_()
    network = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
    measured = eft.diagnose(network, torch.ones(2, 1, 4), num_networks=3)
    measured.save(tmp_path / "measured.npz")
    again = eft.diagnosis.MeasuredDiagnosis.load(tmp_path / "measured.npz")
    assert same(measured, again) and str(again) == str(measured)
    with pytest.raises(ValueError, match=r"holds a MeasuredDiagnosis; read it by MeasuredDiagnosis\.load"):
        eft.Diagnosis.load(tmp_path / "measured.npz")
    own = theory.MLPEnsemble([3, 16, 1], lambda z: z / (1 + z**2))
    with pytest.raises(TypeError, match="is a function, which files do not hold; register_activation it"):
        save_result(own, tmp_path / "own.npz")


@dataclass
class Numbers:
    tensors: dict[str, torch.Tensor]
    numbers: tuple[float, ...]
    names: list[str]
    nested: Validity | None = None


def test_every_kind_of_number_comes_back(tmp_path):
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64)
    bits = torch.randn(5, generator=torch.Generator().manual_seed(0)).mul(3)
    found = Numbers(
        {str(dtype): bits.to(dtype) for dtype in dtypes} | {"scalar": torch.tensor(0.1), "none": torch.empty(0, 3)},
        (0.1, math.inf, -math.inf, 1e-310),
        ["a", "β"],
        Validity("caution", ["one", "two"], {"r": 0.1}),
    )
    save_result(found, tmp_path / "x.npz")
    assert same(found, load_result(Numbers, tmp_path / "x.npz"))


def test_what_has_no_place_in_a_file_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"Numbers\.tensors: function cannot be saved"):
        save_result(Numbers({"f": lambda: 0}, (), []), tmp_path / "x.npz")


def edited(path, change):
    with numpy.load(path) as stored:
        arrays = dict(stored)
    header = json.loads(arrays["header"].tobytes())
    change(header)
    numpy.savez(path, **arrays | {"header": numpy.frombuffer(json.dumps(header).encode(), numpy.uint8)})


def test_other_files_are_refused_in_words(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError, match=r"no such file; give one that Trajectory\.save wrote"):
        Trajectory.load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"not a result of torch_eft; give a file that Trajectory\.save wrote"):
        Trajectory.load(path)
    numpy.savez(path, a=numpy.ones(3))
    with pytest.raises(ValueError, match="not a result of torch_eft"):
        Trajectory.load(path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not a result of torch_eft"):
        Trajectory.load(path)
    RunHistory({0: {}}).save(path)
    with pytest.raises(ValueError, match=r"holds a RunHistory; read it by RunHistory\.load"):
        Trajectory.load(path)
    trajectory().save(path)
    edited(path, lambda header: header.update(version=VERSION + 1))
    with pytest.raises(ValueError, match=r"written by a later version of torch_eft .*; upgrade"):
        Trajectory.load(path)
    trajectory().save(path)
    edited(path, lambda header: header["content"]["fields"].pop("steps"))
    with pytest.raises(ValueError, match="damaged, or of another version"):
        Trajectory.load(path)
    trajectory().save(path)
    edited(path, lambda header: header["content"]["fields"]["validity"].update({"is": "Popen"}))
    with pytest.raises(ValueError, match="damaged, or of another version"):
        Trajectory.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("holds"),
        lambda header: header.update(version="1"),
        lambda header: header["content"]["fields"].update(steps=7),
        lambda header: header["content"]["fields"]["values"].update(shape=[1]),
        lambda header: header["content"]["fields"]["tags"]["tuple"].append("another"),
        lambda header: header["content"]["fields"]["tags"]["tuple"].__setitem__(0, []),
    ],
)
def test_a_damaged_header_is_told_in_words(tmp_path, change):
    path = tmp_path / "x.npz"
    RunHistory({0: {"eft/ntk_drift/measured": 0.0}, 3: {"eft/ntk_drift/measured": 0.5}}).save(path)
    edited(path, change)
    with pytest.raises(ValueError, match=r"x\.npz: damaged.*; make it anew"):
        RunHistory.load(path)


def test_arrays_that_are_none_of_ours_are_told_in_words(tmp_path):
    path = tmp_path / "x.npz"
    for header in (numpy.zeros(3), numpy.array([object()])):
        numpy.savez(path, header=header)
        with pytest.raises(ValueError, match=r"x\.npz: damaged .*; make it anew"):
            RunHistory.load(path)


def test_a_file_cut_off_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    trajectory().save(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("t1.npy").header_offset
    path.write_bytes(whole[: start + 60] + b"\0" * 40 + whole[start + 100 :])
    with pytest.raises(ValueError, match="damaged"):
        Trajectory.load(path)
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="not a result"):
        Trajectory.load(path)


def test_an_earlier_file_stays_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "run.npz"
    trajectory().save(path)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(numpy, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        trajectory().save(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["run.npz"]
