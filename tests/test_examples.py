"""The examples run, and show what they say they show."""

import warnings
from functools import partial
from pathlib import Path

import pytest

from examples import (
    bare_pytorch,
    convolutional_kernels,
    depth_to_width,
    drift_against_width,
    finite_width_forecast,
    lightning_cli,
    too_deep,
)
from examples.attach_to_your_training import main


def test_attaching_to_an_ordinary_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        monitor = main(epochs=1)
    assert "not an MLP" in monitor.validity.reason
    assert len(monitor.history) >= 13 and {0, 1, 28} <= set(monitor.history)
    assert monitor.history[28]["eft/ntk_drift/measured"] > 0.01
    assert not monitor.skipped


@pytest.mark.slow
def test_a_bare_loop_beside_its_theory(tmp_path, monkeypatch):
    monkeypatch.setattr(bare_pytorch, "Observer", partial(bare_pytorch.Observer, forecast_seconds=0.5))
    observer = bare_pytorch.main(steps=30, logdir=str(tmp_path))
    assert observer.validity.flag in ("valid", "caution")
    assert {0, 1, 10, 30} <= set(observer.history)
    assert "eft-theory/output_projection/order_0" in observer.history[30]
    assert {"eft.jsonl"} < {path.name for path in tmp_path.iterdir()}
    assert not observer.skipped


def test_a_configuration_file_attaches_it(tmp_path):
    configuration = Path(lightning_cli.__file__).with_suffix(".yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = lightning_cli.main(
            ["fit", "--config", str(configuration), "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"]
        )
    (monitor,) = [callback for callback in cli.trainer.callbacks if hasattr(callback, "observer")]
    assert {0, 29} <= set(monitor.history)
    assert not monitor.skipped


def test_a_tiny_gpt2_is_measured_under_transformers(tmp_path):
    pytest.importorskip("transformers", reason="transformers is optional: pip install 'torch-eft[hf]'")
    from examples import hugging_face

    callback = hugging_face.main(steps=6, output_dir=str(tmp_path), disable_tqdm=True)
    assert {0, 6} <= set(callback.history) and not callback.skipped
    assert callback.history[6]["eft/ntk_drift/measured"] > 0.01


def test_the_forecast_with_finite_width_comes_closer(tmp_path):
    """Medians of three networks a width: the error of order 1 falls faster with it than that of order 0."""
    slopes = finite_width_forecast.main(networks=3, steps=60, widths=(64, 256), figure=str(tmp_path / "figure.png"))
    for quantity in ("outputs", "NTK"):
        assert slopes[1, quantity] < slopes[0, quantity] < 0
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_drift_falls_with_the_width_inside_its_band(tmp_path):
    """Of four networks each is inside with a probability of 0.9: fewer than two of them once in 270 runs."""
    found = drift_against_width.main(networks=4, steps=20, widths=(128,), figure=str(tmp_path / "figure.png"))
    ((drifts, (low, median, high)),) = found.values()
    assert low < median < high and sum(low <= drift <= high for drift in drifts) >= 2
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_depth_over_width_is_predicted_from_the_architecture(tmp_path):
    """Measured within four standard errors of the prediction, order 1/n being good to a tenth at these r."""
    shapes = ((2, 300), (3, 60), (6, 12))
    found = depth_to_width.main(networks=60, shapes=shapes, figure=str(tmp_path / "figure.png"))
    for (name, depth, width), (measured, error, diagnosis) in found.items():
        if diagnosis.aspect_ratio.r <= 0.2:
            assert abs(measured - diagnosis.spread.ntk) < 4 * error + 0.1 * measured, (name, depth, width)
    assert {depth_to_width.regime(diagnosis.aspect_ratio) for _, _, diagnosis in found.values()} == {0, 1, 2}
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_network_that_is_too_deep_is_repaired(tmp_path):
    results = too_deep.main(steps=60, seeds=1, depth=14, figure=str(tmp_path / "figure.png"))
    codes = [{finding.code for finding in diagnosis.warnings} for diagnosis, _ in results.values()]
    assert codes[0] == {"gradients vanish"}
    assert codes[1] & {"edge", "spread"}
    assert codes[-1] == set()
    first, *_, last = [curves[0] for _, curves in results.values()]
    assert last[-1] < 0.5 * first[-1]
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_spread_of_a_residual_cnn_is_predicted_and_its_kernels_read_digits():
    """Within four standard errors, a tenth left to the next order."""
    theory, (mean, sd, error), right = convolutional_kernels.main(networks=30, count=60)
    predicted = float(theory.ntk_relative_sd)
    assert abs(mean / float(theory.Theta) - 1) < 4 * sd / 30**0.5 + 0.03
    assert abs(sd - predicted) < 4 * max(error, predicted / 60**0.5) + 0.1 * predicted
    assert max(theory.shares, key=theory.shares.get).startswith("2 .. ")
    assert min(right.values()) > 0.7
