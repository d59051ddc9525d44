"""The short text of results."""

from dataclasses import dataclass
from typing import Any

import torch

from torch_eft.results.presentation.repr import short_repr


@dataclass
class Result:
    kernel: torch.Tensor
    note: str
    missing: Any = None


def test_fields_that_are_none_are_left_out_and_texts_that_end_so_are_not():
    text = short_repr(Result(torch.zeros(2, 3), "reason: None"))
    assert text == "Result(\n  kernel: (2, 3) float32\n  note: reason: None\n)"
