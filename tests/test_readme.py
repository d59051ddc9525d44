"""Every Python block of the README and of the tour runs as pasted, in order, with only what the text says is there."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "examples/README.md")
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S) for page in PAGES}


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
    assert [len(blocks) for blocks in BLOCKS.values()] == [2, 5]


@pytest.mark.parametrize(("page", "number"), [(page, number) for page in PAGES for number in range(len(BLOCKS[page]))])
def test_a_block_runs_as_pasted(page, number, names, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(BLOCKS[page][number], f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    text = (ROOT / page).read_text("utf-8")
    places = [place for place in re.findall(r"\]\(([^)]+)\)", text) if "://" not in place]
    assert places and all(((ROOT / page).parent / place).exists() for place in places), places


def test_the_readme_is_a_screen_and_a_half():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 90
