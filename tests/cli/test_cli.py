"""The command line: what it prints, what it writes, how it refuses."""

import json
import shlex
import sys

import pytest

import torch_eft
from torch_eft.cli.main import _parser, main


def test_diagnose_prints_the_report(capsys):
    assert main(["diagnose", "--widths", "64", "128", "128", "10", "--activation", "relu", "--C_W", "2"]) == 0  # fine
    printed = capsys.readouterr().out
    assert "MLP 64-128-128-10, relu" in printed
    assert "verdict   trains: near criticality, seeds differ little" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "criticality" not in printed.replace("near criticality", "")
    assert main(["diagnose", "--widths", "64", "128", "128", "10", "--activation", "relu", "--C_W", "2", "-v"]) == 0
    printed = capsys.readouterr().out
    assert "critical within a factor of 2" in printed
    assert "r = L/n = 0.02344" in " ".join(printed.split())
    assert "|---" not in printed


def test_diagnose_judges_a_learning_rate_in_its_own_unit(capsys):
    widths = ["diagnose", "--widths", "100", "100", "3", "--activation", "relu", "--C_W", "2"]
    assert main([*widths, "--lr", "40"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "lr = 40 is 2.69e+03 times the largest stable one, 0.0149" in printed  # n_L / Theta = 3 / 202
    assert main([*widths, "--lr", "0.02", "--momentum", "0.9"]) == 0
    assert "lr = 0.02 is 0.71 of it" in " ".join(capsys.readouterr().out.split())
    assert main([*widths, "--momentum", "0.9"]) == 2
    assert "--momentum: give --lr, too" in capsys.readouterr().err


def test_diagnose_json_is_machine_readable(capsys):
    assert main(["diagnose", "--widths", "4", "80", "2", "--C_W", "1", "1.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [layer["C_W"] for layer in report["layers"]] == [1.0, 1.5]
    assert report["aspect_ratio"]["epsilon"] > 0
    assert report["kind"] == "derived"
    assert report["warnings"] == []


def test_warnings_are_status_1(capsys):
    assert main(["diagnose", "--widths", "64", "30", "30", "30", "10", "--activation", "relu", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {warning["code"] for warning in report["warnings"]} == {"edge"}


FACTORIES = """
import torch
from torch import nn

convolutional = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
number = 3


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 100), nn.Tanh(), nn.Linear(100, 3))


def with_inputs():
    return nn.Sequential(nn.Embedding(7, 8), nn.Flatten(), nn.Linear(24, 2)), torch.arange(6).reshape(2, 3)


def needs(width):
    return nn.Linear(width, 1)


def broken():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module of factories in the working directory, under a name of its own."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_model_is_named_as_package_module_factory(factories, capsys):
    assert main(["diagnose", "--model", f"{factories}:perceptron", "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["network"] == "MLP 10-100-3, tanh"
    arguments = [
        "diagnose",
        "--model",
        f"{factories}:convolutional",
        "--input-shape",
        "1",
        "8",
        "8",
        "--num-networks",
        "4",
    ]
    assert main(arguments) in (0, 1)
    assert "as no theory covers it: not an MLP" in " ".join(capsys.readouterr().out.split())
    assert main(["diagnose", "--model", f"{factories}:with_inputs", "--json", "--num-networks", "3"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["inputs"]) == ("measured", 2)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "give package.module:factory"),
        ("no_such_module:x", "ModuleNotFoundError"),
        ("{}:absent", "has no 'absent'"),
        ("{}:number", "gives int, not a torch.nn.Module"),
        ("{}:needs", "it must take no arguments"),
        ("{}:broken", "RuntimeError: no weights"),
        ("{}:convolutional", "--input-shape"),
    ],
)
def test_unusable_models_are_one_sentence_and_status_2(reference, message, factories, capsys):
    assert main(["diagnose", "--model", reference.format(factories)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_options_that_do_not_belong_together(factories, capsys):
    assert main(["diagnose", "--model", f"{factories}:perceptron", "--C_W", "1"]) == 2
    assert "--C_b, --C_W: given with --model" in capsys.readouterr().err
    assert main(["diagnose", "--widths", "4", "8", "2", "--input-shape", "4"]) == 2
    assert "--input-shape: given with --widths" in capsys.readouterr().err
    assert main(["diagnose", "--model", f"{factories}:convolutional", "--input-shape", "0"]) == 2
    assert "give positive sizes" in capsys.readouterr().err


def test_pictures(factories, capsys, tmp_path):
    for arguments in (
        ["--widths", "8", "30", "30", "3", "--activation", "relu", "--C_W", "2"],
        ["--model", f"{factories}:perceptron"],
        ["--model", f"{factories}:convolutional", "--input-shape", "1", "8", "8", "--num-networks", "3"],
    ):
        picture = tmp_path / "picture.png"
        assert main(["diagnose", *arguments, "--picture", str(picture)]) in (0, 1)
        assert picture.stat().st_size > 10_000
        picture.unlink()
    assert (
        main(["diagnose", "--widths", "8", "30", "3", "--activation", "relu", "--picture", str(tmp_path / "p.x")]) == 2
    )
    assert main(["diagnose", "--widths", "8", "3", "--picture", str(tmp_path / "picture.png")]) == 2
    assert "without a hidden layer" in capsys.readouterr().err


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
        (
            ["diagnose", "--widths", "4", "8", "2", "--activation", "tahn"],
            "activation: 'tahn' given (did you mean 'tanh'?)",
        ),
        (["demo", "--depth", "1"], "--depth 1"),
        (["demo", "--steps", "0"], "--steps 0 given"),
        (["demo", "--activation", "sigmoid"], "no critical initialization"),
    ],
)
def test_unusable_arguments_are_one_sentence_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_examples_of_the_help_are_commands(capsys):
    """Each is understood as it stands, and every command has some."""
    seen = set()
    for words in ([], ["demo"], ["diagnose"], ["report"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        _, _, examples = capsys.readouterr().out.partition("examples:\n")
        lines = [line.strip() for line in examples.splitlines()]
        assert lines and all(line.startswith("torch-eft ") for line in lines)
        for line in lines:
            seen.add(_parser().parse_args(shlex.split(line)[1:]).command)
    assert seen == {"demo", "diagnose", "report"}


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and f"torch-eft {torch_eft.__version__}, torch 2." in capsys.readouterr().out


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "demo" in (text := capsys.readouterr().out)
    assert "diagnose" in text
