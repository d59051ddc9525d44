"""Golden files of both texts. ``EFT_UPDATE_GOLDEN=1 pytest tests/diagnosis/test_diagnosis_text.py`` writes them."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_eft as eft
from torch_eft.theory import MLPEnsemble

GOLDEN = Path(__file__).parent / "golden"

DERIVED = {
    # By hand: K = 2, r = 3/50, epsilon = 10/50, exactly 1.1^2 - 1 = .21; r* = 4 / (26 * 5). Layer 1 has lambda = 1 and
    # g = 1, layers 2 and 3 g = K / 2 = 1, J = 1 throughout: Theta = 6, equal shares; MSELoss: eta < n_L / Theta.
    "relu_critical": MLPEnsemble([4, 50, 50, 2], "relu", C_W=2.0),
    "tanh_chaotic_and_deep": MLPEnsemble([10, *[5] * 5, 1], "tanh", C_b=0.05, C_W=3.0),
    "gelu_ordered": MLPEnsemble([10, 64, 64, 64, 3], "gelu", C_W=1.2, lambda_W=[10, 64, 64, 64]),
    "sigmoid_without_criticality": MLPEnsemble([4, 20, 2], "sigmoid"),
    "linear_regression": MLPEnsemble([4, 2], "linear"),
}


def compare(name: str, text: str, ending: str = "md") -> None:
    path = GOLDEN / f"diagnosis_{name}.{ending}"
    if os.environ.get("EFT_UPDATE_GOLDEN"):
        path.write_text(text + "\n")
    assert path.read_text() == text + "\n"


@pytest.mark.parametrize("name", DERIVED)
def test_text_of_an_ensemble(name):
    diagnosis = eft.diagnose(DERIVED[name])
    compare(name, diagnosis.details)
    compare(name, str(diagnosis), "txt")


def test_text_of_a_measured_network():
    """Its numbers depend on the random generator and on rounding: they are blanked."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
    )
    diagnosis = eft.diagnose(model, torch.randn(5, 1, 8, 8), num_networks=8)
    compare("measured_cnn", blanked(diagnosis.details))
    compare("measured_cnn", blanked(" ".join(str(diagnosis).split())), "txt")


def test_text_of_an_architecture():
    """Its numbers depend on the weights drawn and on rounding: they are blanked."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 8, 3), nn.GELU(), nn.Conv1d(8, 8, 3), nn.GroupNorm(1, 8), nn.GELU(), nn.Flatten(), nn.Linear(32, 2)
    )
    diagnosis = eft.diagnose(model, torch.randn(5, 1, 8))
    compare("architecture_cnn", blanked(diagnosis.details))
    compare("architecture_cnn", blanked(" ".join(str(diagnosis).split())), "txt")


def blanked(text: str) -> str:
    return re.sub(r"(?<![\w/])[+-]?\d[\d,.]*(e[+-]\d+)?\b", "#", text)
