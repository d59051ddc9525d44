"""The examples run, and show what they say they show."""

import warnings

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
