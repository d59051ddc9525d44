"""The tab's colors keep apart for color-blind readers and stand out from the ground."""

import itertools
import re

import numpy as np
import pytest

from torch_eft.tensorboard.plugin import STATIC

# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB.
SEEN_BY = {
    "all": np.eye(3),
    "protanopes": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopes": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopes": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color):
    value = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    x, y, z = np.cbrt(XYZ @ np.clip(rgb, 0, 1) / (XYZ @ np.ones(3)))  # dark tones aside, CIE L*a*b*
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(a, b):
    lighter, darker = sorted((float(XYZ[1] @ linear(c)) for c in (a, b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def palette(name):
    block = re.search(rf"const {name} = {{(.*?)}};", (STATIC / "charts" / "theme.js").read_text("utf-8"), re.S)[1]
    single = dict(re.findall(r'(\w+): "(#\w{6})"', block))
    return single, re.findall(r"#\w{6}", re.search(r"runs: \[(.*?)\]", block)[1])


@pytest.mark.parametrize("reader", SEEN_BY)
@pytest.mark.parametrize("name", ["LIGHT", "DARK"])
def test_lines_that_meet_in_one_chart_differ(name, reader):
    """CIE76 distance above 10; 2.3 is just noticeable."""
    single, runs = palette(name)
    for group in (runs[:5], [single[series] for series in ("measured", "order0", "order1", "expanded")]):
        tones = [lab(SEEN_BY[reader] @ linear(color)) for color in group]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(tones, 2)) > 10


@pytest.mark.parametrize("name", ["LIGHT", "DARK"])
def test_lines_and_letters_stand_out(name):
    """WCAG 2.1: 3 for graphics, 4.5 for text."""
    single, runs = palette(name)
    for color in (
        *runs[:5],
        single["measured"],
        single["order0"],
        single["order1"],
        single["expanded"],
        single["event"],
    ):
        assert contrast(color, single["ground"]) >= 3, color
    for letters in ("ink", "soft"):
        assert contrast(single[letters], single["ground"]) >= 4.5
