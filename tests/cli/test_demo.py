"""The demo, end to end, and its TensorBoard files through TensorBoard's own event reader."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from torch_eft.cli.demo import demo_ensemble, load_digits_split
from torch_eft.cli.main import main
from torch_eft.results.tags import BAND_90, quantity_of
from torch_eft.tensorboard import tag as tag_of


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One short demo run: its printed text and its directory."""
    import contextlib
    import io

    logdir = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_eft.cli.demo.PROBE_IMAGES", 3)  # the law of the drift is drawn in a second or two
        patch.setattr("torch_eft.cli.demo.FORECAST_SECONDS", 90.0)  # other jobs beside the tests take time
        assert main(["demo", "--width", "32", "--steps", "12", "--logdir", str(logdir)]) == 0
    (run,) = (logdir / "tanh-32x3").iterdir()
    return printed.getvalue(), run


@pytest.fixture(scope="module")
def events(demo):
    accumulator = EventAccumulator(str(demo[1]), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    return accumulator.Reload()


def test_data_are_centered_images_of_unit_scale():
    x_train, y_train, x_probe = load_digits_split()
    assert x_train.shape == (16, 64)
    assert y_train.shape == (16, 10)
    assert x_probe.shape == (6, 64)
    torch.testing.assert_close(torch.cat([x_train, x_probe]).square().mean(1), torch.ones(22))
    assert (y_train.sum(1) == 1).all()
    assert not (x_train[:, None] == x_probe).all(-1).any()  # the probe was held out


def test_ensemble_is_critical_and_has_one_torch_learning_rate():
    ensemble = demo_ensemble(32, 4, "relu", 64)
    assert ensemble.widths == (64, 32, 32, 32, 10)
    assert ensemble.C_W == (2.0,) * 4
    assert ensemble.lambda_W == (64.0, 32.0, 32.0, 32.0)


def test_it_prints_diagnosis_table_and_the_tensorboard_line(demo):
    text, run = demo
    assert "MLP 64-32-32-10, tanh" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line[:3] in ("ntk", "out", "rep", "dnt")}
    for name in ("ntk_drift", "dntk", "representation_change"):
        measured, predicted, low, _, high, *verdict = rows[name][1:]
        assert 0 < float(low) < float(predicted) < float(high)
        assert (float(low) <= float(measured) <= float(high)) == (verdict[0] == "inside")
    measured, theory, sigma = map(float, rows["output_projection"][1:4])
    assert rows["output_projection"][4] == f"{(measured - theory) / sigma:+.1f}"
    assert f"tensorboard --logdir {run.parent.parent}" in text
    for level, word in (("ensemble", "order 1/n"), ("instance", "H1 / H along the path")):
        (line,) = (line for line in text.splitlines() if line.startswith(f"theory ({level}, order 1) "))
        assert line.split(") ", 1)[1].split(": ")[0] in ("valid", "caution", "invalid")
        assert word in line
    assert float(rows["ntk_mean_drift"][2]) > 0  # at order 1/n


def test_it_draws_a_picture(demo):
    picture = demo[1] / "measured_against_theory.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 20_000


BANDED = ["ntk_trace", "output_chi_squared", "output_projection"]
MEASURED = [
    *BANDED,
    "ntk_drift",
    "ntk_kernel_distance",
    "ntk_top_eigenvalue",
    "overhead_percent",
    "representation_cka_distance",
    "representation_change",
]
EXPECTED_SCALARS = sorted(
    [tag_of(q) for q in MEASURED]
    + [tag_of(q, s) for q in BANDED for s in ("minus_sigma", "order_0", "plus_sigma", "z_score")]
    + [tag_of(q, s) for q in ("ntk_drift", "representation_change") for s in ("order_0", "order_1", *BAND_90)]
)


def test_the_tags_are_there_and_the_first_group_is_small(events):
    tags = events.Tags()
    ours = {tag for tag in tags["scalars"] + tags["tensors"] if quantity_of(tag) is not None}
    assert set(EXPECTED_SCALARS) <= ours
    assert all(tag.startswith("eft/") for tag in tags["scalars"] if tag.startswith("eft"))
    assert len([tag for tag in tags["scalars"] if tag.startswith("eft")]) <= 12
    assert not any("custom_scalars" in tag for tag in tags["tensors"])
    kernels = {"eft/ntk_matrix/change", "eft/ntk_matrix/end", "eft/ntk_matrix/start"}
    assert set(tags["images"]) == {*kernels, "eft/representation_change"}
    assert "eft/ntk_spectrum/log10_eigenvalues" in tags["histograms"]
    assert {"eft/diagnosis/text_summary", "eft/validity/text_summary", "eft/run"} <= set(tags["tensors"])


def values_of(events, tag):
    """``{step: value}`` of a scalar of the Scalars tab, or of the tab EFT alone."""
    if tag in events.Tags()["scalars"]:
        return {event.step: event.value for event in events.Scalars(tag)}
    return {event.step: tensor_util.make_ndarray(event.tensor_proto).item() for event in events.Tensors(tag)}


def test_every_measured_step_has_its_theory_and_all_are_finite(events):
    steps = list(values_of(events, "eft/ntk_trace/measured"))
    assert steps == list(range(13))
    for tag in EXPECTED_SCALARS:
        values = values_of(events, tag)
        assert list(values) == (steps[1:] if "overhead" in tag else steps)
        assert all(map(math.isfinite, values.values()))
    low, high = (values_of(events, f"eft-theory/ntk_trace/{side}_sigma") for side in ("minus", "plus"))
    assert all(low[step] < high[step] for step in steps)


def test_pages_hold_the_diagnosis_and_the_validity(events):
    def page(name):
        (event,) = events.Tensors(f"eft/{name}/text_summary")
        return tensor_util.make_ndarray(event.tensor_proto).item().decode()

    assert "| critical | 0 | 1 | K* = 0 | 1 | 1 |" in page("diagnosis")
    assert "mean over samples and outputs (torch's MSELoss)" in page("validity")
    assert "the NTK at order 1/n; hidden kernels at order 1/n" in page("validity")


def test_an_address_is_no_logdir(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--logdir", "s3://bucket/demo"]) == 2
    assert "--logdir: 's3://bucket/demo' is an address" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
