"""The command line: what it prints, what it writes, how it refuses."""

import json

import pytest

from torch_eft.cli import main


def test_diagnose_prints_the_report(capsys):
    assert main(["diagnose", "--widths", "64", "128", "128", "10", "--activation", "relu", "--C_W", "2"]) == 0
    printed = capsys.readouterr().out
    assert "MLP 64-128-128-10, relu" in printed
    assert "r = L/n = 0.02344" in printed
    assert "critical within a factor of 2" in printed


def test_diagnose_json_is_machine_readable(capsys):
    assert main(["diagnose", "--widths", "4", "8", "2", "--C_W", "1", "1.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [layer["C_W"] for layer in report["layers"]] == [1.0, 1.5]
    assert report["aspect_ratio"]["epsilon"] > 0


def test_diagnose_speaks_of_plain_sgd(capsys):
    """Critical ReLU: g = 1, J = 1, so Theta = sum_l (1 + n_{l-1}) = 202, and MSELoss is stable below n_L / Theta."""
    assert main(["diagnose", "--widths", "100", "100", "3", "--activation", "relu", "--C_W", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["largest_learning_rate"] == pytest.approx(3 / 202, rel=1e-12)
    assert [layer["share"] for layer in report["layers"]] == pytest.approx([0.5, 0.5])
    assert [layer["lr_W"] for layer in report["layers"]] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diagnose", "--widths", "64"], "widths: (64,) given"),
        (["diagnose", "--widths", "4", "8", "2", "--C_W", "-1"], "C_W: -1 given"),
        (["diagnose", "--widths", "4", "8", "2", "--activation", "tahn"], "activation: 'tahn' is unknown"),
        (["demo", "--depth", "1"], "--depth 1"),
        (["demo", "--steps", "0"], "--steps 0 given"),
        (["demo", "--activation", "sigmoid"], "no critical initialisation"),
    ],
)
def test_unusable_arguments_are_one_sentence_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "demo" in (text := capsys.readouterr().out)
    assert "diagnose" in text
