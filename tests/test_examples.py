"""The examples run, and show what they say they show."""

import warnings

from examples import finite_width_forecast
from examples.attach_to_your_training import main


def test_attaching_to_an_ordinary_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        monitor = main(epochs=1)
    assert "not an MLP" in monitor.validity.reason
    assert list(monitor.history) == [0, 28]
    assert monitor.history[28]["eft/ntk_drift/measured"] > 0.01
    assert not monitor.skipped


def test_the_forecast_with_finite_width_comes_closer(tmp_path):
    """Medians of three networks a width: the error of order 1 falls faster with it than that of order 0."""
    slopes = finite_width_forecast.main(networks=3, steps=60, widths=(64, 256), figure=str(tmp_path / "figure.png"))
    for quantity in ("outputs", "NTK"):
        assert slopes[1, quantity] < slopes[0, quantity] < 0
    assert (tmp_path / "figure.png").stat().st_size > 10_000
