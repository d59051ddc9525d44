"""Every Python block of the README runs as pasted, in order, with only what the text says is there."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def names():
    """Names that a reader has: a network with data, what it was before, and Lightning."""
    import lightning.pytorch as pl

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2)).double()
    x, x_probe = torch.randn(4, 6).double(), torch.randn(2, 6).double()
    theta_0 = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {
        "L": pl,
        "model": model,
        "x": x,
        "y": torch.randn(4, 2).double(),
        "x_probe": x_probe,
        "theta_0": theta_0,
        "theta": {name: value + 0.01 * torch.randn_like(value) for name, value in theta_0.items()},
    }


def test_there_are_blocks():
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs_as_pasted(number, names, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), names)
