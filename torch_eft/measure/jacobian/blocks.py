"""Blocks of samples: how many fit into memory, and Gram matrices J_m lambda J_n^T added up block by block."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from torch_eft.measure.jacobian.gram import Factor, Orders, mirror


@dataclass(frozen=True)
class Estimate:
    """The memory that a measurement will take, in bytes.

    Args:
        sample: Factors and graph of one sample.
        kernels: The results.
        block: Samples in a block; all of them if they fit.
        blocks: Number of blocks; of b blocks, b (b + 1) / 2 pairs are computed.
        total: The peak, without the network itself.

    Example:
        >>> from torch_eft import measure
        >>> print(measure.Estimate(sample=2**20, kernels=2**20, block=8, blocks=1, total=9 * 2**20))
        9 MiB (1 MiB for the kernels, 1 MiB per sample, 1 block of 8 samples)
    """

    sample: int
    kernels: int
    block: int
    blocks: int
    total: int

    def __str__(self) -> str:
        """Return one line with sizes in GiB or MiB."""
        return (
            f"{readable(self.total)} ({readable(self.kernels)} for the kernels, {readable(self.sample)} per sample, "
            f"{self.blocks} block{'s' if self.blocks > 1 else ''} of {self.block} samples)"
        )


def readable(count: float) -> str:
    """Return bytes as text in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.2g} MiB"


class GramBlocks:
    """Sums that are zero at first.

    Args:
        like: A tensor of the dtype and on the device of the results.
        shape: (C, N, C, N') of every matrix; C = 1 for averages over outputs.
        pairs: Orders (m, n) of rows and columns.
        lambdas: By parameter.
        labels: ``{parameter: name of its part of the result}``.
        symmetric: Rows and columns are the same samples; a block is then added with its mirror image.

    Attributes:
        parts: ``{part: {(m, n): (C, N, C, N')}}``.
    """

    def __init__(
        self,
        like: Tensor,
        shape: tuple[int, int, int, int],
        pairs: Collection[Orders],
        lambdas: Mapping[str, float],
        labels: Mapping[str, str],
        symmetric: bool,
    ) -> None:
        names = sorted(set(labels.values())) or [""]
        self.parts = {name: {pair: like.new_zeros(shape) for pair in pairs} for name in names}
        self._like, self._shape = like, shape
        self._pairs, self._symmetric = list(pairs), symmetric
        self._lambdas, self._labels = lambdas, labels

    def add(self, rows: slice, columns: slice, first: Sequence[Factor], second: Sequence[Factor]) -> None:
        """Add one block, and with it the block that is its mirror image.

        Args:
            rows: Samples of the rows.
            columns: Samples of the columns.
            first: Factors of the rows.
            second: Those of the columns, of the same parameters.
        """
        same = self._symmetric and rows == columns
        one_sided = same or not self._symmetric
        mirrored = [] if one_sided else [(n, m) for m, n in self._pairs]
        C = self._shape[0]
        shape = (C, rows.stop - rows.start, C, columns.stop - columns.start)
        if shape == self._shape:  # the only block: no copy
            blocks = self.parts
        else:
            pairs = dict.fromkeys([*self._pairs, *mirrored])
            blocks = {name: {pair: self._like.new_zeros(shape) for pair in pairs} for name in self.parts}
        for a, b in zip(first, second, strict=True):
            for row, column in zip(a.split(self._labels), b.split(self._labels), strict=True):
                row.add_gram(blocks[self._labels[row.weight]], column, self._lambdas, same)
        for name, matrices in blocks.items():
            result = self.parts[name]
            for (m, n), value in matrices.items():
                if same and m == n:
                    mirror(value)
                if matrices is result:
                    continue
                if (m, n) in result:
                    result[m, n][:, rows, :, columns] = value
                if not one_sided and (n, m) in result:
                    result[n, m][:, columns, :, rows] = value.permute(2, 3, 0, 1)

    def finished(self, averaged_over: int | None) -> dict[str, dict[Orders, Tensor]]:
        """Return ``{part: {(m, n): (N, N', C, C)}}``.

        Args:
            averaged_over: Number of outputs for averages, (N, N'); None for whole matrices.
        """
        return {
            name: {
                pair: value.permute(1, 3, 0, 2) if averaged_over is None else value[0, :, 0] / averaged_over
                for pair, value in matrices.items()
            }
            for name, matrices in self.parts.items()
        }


def summed_over_outputs(factors: Iterable[Factor]) -> list[Factor]:
    """Return factors of one output whose Gram matrices add up to the sum over i = j."""
    return [part for factor in factors for part in factor.summed_over_outputs()]
