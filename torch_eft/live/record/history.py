"""The measurements of a run, as an observer keeps them and as a file gives them back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_eft.results.presentation.files import load_result, save_result
from torch_eft.results.presentation.html import table_html
from torch_eft.results.presentation.tables import data_frame
from torch_eft.results.quantities import HEADLINES, QUANTITIES
from torch_eft.results.tags import logged_tags, tag
from torch_eft.tensorboard.figures import comparison_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class RunHistory(dict[int, dict[str, float]]):
    """``{optimizer step: {tag: value}}``: a dict that draws, tabulates and keeps itself.

    Tags are those of ``torch_eft.tensorboard.tag``.

    Example:
        >>> from torch_eft.live import RunHistory
        >>> from torch_eft.tensorboard import tag
        >>> history = RunHistory({step: {tag("ntk_drift"): 0.01 * step} for step in (0, 10, 100)})
        >>> history
        RunHistory: 3 steps, 0 .. 100, of ntk_drift
        >>> len(history.plot("ntk_drift").axes)
        1
    """

    def __repr__(self) -> str:
        if not self:
            return "RunHistory: no measurement"
        return f"RunHistory: {len(self)} steps, {min(self)} .. {max(self)}, of {', '.join(self.quantities)}"

    def _repr_html_(self) -> str:
        last = self[max(self)] if self else {}
        rows = {name: f"{last[tag(name)]:.4g}" for name in self.quantities if tag(name) in last}
        return table_html(f"RunHistory, {len(self)} steps" + (f", values at step {max(self)}" if self else ""), rows)

    @property
    def quantities(self) -> list[str]:
        """The quantities that were measured, in the order in which they are drawn."""
        logged = logged_tags(self)
        return [name for name in QUANTITIES if tag(name) in logged]

    def plot(self, *quantities: str, title: str = "") -> "Figure":
        """Draw what was measured over what was predicted, one panel per quantity.

        Args:
            *quantities: Names out of ``torch_eft.tensorboard.QUANTITIES``; none: NTK drift, dNTK and representation
                change, as far as they were measured, else all.
            title: Title of the figure.

        Returns:
            The figure: a notebook shows it, ``.savefig("picture.png")`` keeps it.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If a quantity is not registered, or nothing was measured.
        """
        if not self.quantities:
            raise ValueError("history: nothing was measured yet; train first")
        found = [next((name for name in names if name in self.quantities), None) for names in HEADLINES]
        shown = [name for name in found if name is not None] or self.quantities
        for name in quantities:
            if name in QUANTITIES and name not in self.quantities:
                raise ValueError(f"history: {name!r} was not measured; it has {', '.join(self.quantities)}")
        return comparison_figure(self, list(quantities) or shown, title)

    def to_pandas(self) -> "DataFrame":
        """Return a table with a row for every step and a column for every tag; NaN where nothing was measured.

        Raises:
            ImportError: If pandas is missing.
        """
        steps, tags = sorted(self), sorted(logged_tags(self))
        return data_frame({name: [self[step].get(name, math.nan) for step in steps] for name in tags}, {"step": steps})

    def save(self, path: str | Path) -> None:
        """Keep it in a file, bit by bit: NumPy's npz and JSON, without pickle.

        Args:
            path: The file, e.g. ``run.npz``; its directory is made, and an earlier file replaced.
        """
        tags = sorted(logged_tags(self))
        values = [[scalars.get(name, math.nan) for name in tags] for scalars in self.values()]
        known = [[name in scalars for name in tags] for scalars in self.values()]
        shape = len(self), len(tags)
        table = _Table(
            torch.tensor(list(self), dtype=torch.int64),
            tuple(tags),
            torch.tensor(values, dtype=torch.float64).reshape(shape),
            torch.tensor(known, dtype=torch.bool).reshape(shape),
        )
        save_result(table, path, name=RunHistory.__name__)

    @classmethod
    def load(cls, path: str | Path) -> "RunHistory":
        """Read what ``save`` wrote.

        Args:
            path: The file.

        Returns:
            The history.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is none of ours, is damaged, holds another kind of result, or is of a later version.
        """
        table = load_result(_Table, path, name=cls.__name__)
        shape = len(table.steps), len(table.tags)
        if table.steps.ndim != 1 or not table.values.shape == table.known.shape == shape:
            raise ValueError(f"{path}: damaged (its table is not {shape[0]} steps by {shape[1]} tags); make it anew")
        rows = zip(table.steps.tolist(), table.values.tolist(), table.known.tolist(), strict=True)
        return cls({step: _scalars(table.tags, values, known) for step, values, known in rows})


@dataclass(frozen=True)
class _Table:
    """A history in a file: (S,) steps, K tags, (S, K) values, and where there is one."""

    steps: Tensor
    tags: tuple[str, ...]
    values: Tensor
    known: Tensor


def _scalars(tags: Sequence[str], values: Sequence[float], known: Sequence[bool]) -> dict[str, float]:
    return {name: value for name, value, there in zip(tags, values, known, strict=True) if there}
