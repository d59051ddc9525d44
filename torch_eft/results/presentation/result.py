"""What every result can do: show itself in a line or a cell, and be kept in a file."""

from pathlib import Path
from typing import TypeVar

import torch

from torch_eft.results.presentation.files import load_result, save_result
from torch_eft.results.presentation.html import result_html
from torch_eft.results.presentation.repr import field_texts, short_repr

Kind = TypeVar("Kind", bound="Result")


class Result:
    """Base of frozen dataclasses that hold results; they are declared with ``repr=False``."""

    def __repr__(self) -> str:
        return short_repr(self)

    def _repr_html_(self) -> str:
        return result_html(self, field_texts(self))

    def save(self, path: str | Path) -> None:
        """Keep it in a file, bit by bit: NumPy's npz and JSON, without pickle.

        Args:
            path: The file, e.g. ``forecast.npz``; its directory is made, and an earlier file replaced.
        """
        save_result(self, path)

    @classmethod
    def load(cls: type[Kind], path: str | Path, device: torch.device | str = "cpu") -> Kind:
        """Read what ``save`` wrote.

        Args:
            path: The file.
            device: Where the tensors go.

        Returns:
            The result.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is none of ours, is damaged, holds another kind of result, or is of a later version.
        """
        return load_result(cls, path, device)
