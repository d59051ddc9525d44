"""Blocks of samples: how many fit into memory, and Gram matrices J_m lambda J_n^T added up block by block."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.jacobian.factors import jacobian_factors
from torch_eft.measure.jacobian.gram import DenseFactor, Factor, Orders, TiedFactor, mirror
from torch_eft.measure.jacobian.gram.products import product
from torch_eft.measure.jacobian.plan import JacobianPlan, sample_count, slice_of

Result = TypeVar("Result")


@dataclass(frozen=True)
class Estimate:
    """The memory that a measurement will take, in bytes.

    Args:
        sample: Factors and graph of one sample.
        kernels: The results.
        block: Samples in a block; all of them if they fit.
        blocks: Number of blocks; of b blocks, b (b + 1) / 2 pairs are computed.
        total: The peak, without the network itself.
        seconds: How long it will take, on this machine as it is; None where that was not asked for.

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
    seconds: float | None = None

    def __str__(self) -> str:
        """Return one line with sizes in GiB or MiB."""
        seconds = "" if self.seconds is None else f" in {self.seconds:.2g} s"
        return (
            f"{readable(self.total)}{seconds} ({readable(self.kernels)} for the kernels, {readable(self.sample)} per "
            f"sample, {self.blocks} block{'s' if self.blocks > 1 else ''} of {self.block} samples)"
        )


def readable(count: float) -> str:
    """Return bytes as text in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.2g} MiB"


def seconds_of(
    network: IsolatedModel, inputs: Any, trainable: Sequence[str], plan: JacobianPlan, estimate: Estimate
) -> float:
    """Estimate how long J lambda J^T takes: passes timed on one sample and one output, products by the machine's rate.

    Args:
        network: The network.
        inputs: All samples, where the network is.
        trainable: Names of the parameters.
        plan: How their Jacobians are computed.
        estimate: The memory, and with it the blocks.

    Returns:
        Seconds, without what is done once for a network: finding out how its parameters are used.
    """
    C, N = plan.outputs, sample_count(inputs)
    own, block = network.output_fn, min(N, estimate.block)
    single = replace(network, output_fn=lambda z: (z if own is None else own(z))[:, :1])
    device = network.params[trainable[0]].device
    before, both, factors = _passes(network, single, slice_of(inputs, 0, 1), trainable, plan, device)
    if both < 3 * _SHORT:  # the first passes of a process take longer
        before, both, factors = _passes(network, single, slice_of(inputs, 0, 1), trainable, plan, device)
    passes, samples = before + C * max(both - before, 0.0), 1
    if both < _SHORT and block > 1:  # a sample is not what the rest is a multiple of
        samples = block
        before, both, _ = _passes(network, single, slice_of(inputs, 0, block), trainable, plan, device)
        passes = before + C * max(both - before, 0.0)
        if passes < _SHORT:  # outputs go through together
            some = slice_of(inputs, 0, block)
            passes = min(_timed(lambda: jacobian_factors(network, some, trainable, plan), device)[1] for _ in range(2))
    square = torch.ones(_SQUARE, _SQUARE, dtype=factors[0].tensors[-1].dtype, device=device)
    spent = min(_timed(lambda: product(square, square), device)[1] for _ in range(2))
    products = sum(_multiplications(factor, C, N) for factor in factors) * spent / _SQUARE**3
    taken = block * estimate.blocks * (estimate.blocks + 1) / 2
    return passes * taken / samples + products + 2 * both * N / samples  # at last the checks


_SQUARE = 512
_SHORT = 0.1  # seconds


def _passes(
    network: IsolatedModel,
    single: IsolatedModel,
    inputs: Any,
    trainable: Sequence[str],
    plan: JacobianPlan,
    device: Any,
) -> tuple[float, float, list[Factor]]:
    """The time of a forward, that of it with the pass of one output back, and the factors of that."""

    def forward() -> Tensor:
        with torch.no_grad():
            return network(network.params, inputs)

    _, before = _timed(forward, device)
    factors, both = _timed(lambda: jacobian_factors(single, inputs, trainable, replace(plan, outputs=1)), device)
    return before, both, factors


def _timed(compute: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def _multiplications(factor: Factor, outputs: int, samples: int) -> float:
    """Of the Gram matrix of ``outputs`` and ``samples``, from the factor of one output and one sample."""
    if isinstance(factor, DenseFactor):
        return 0.5 * (outputs * samples) ** 2 * factor.tensors[0].shape[2]
    if isinstance(factor, TiedFactor):
        return sum(_multiplications(part, outputs, samples) for part in (factor.matrix, factor.table))
    g, inputs = factor.gradients[0][0], factor.inputs[0]
    assert inputs is not None
    many = replace(
        factor,
        inputs=(inputs.expand(samples, *inputs.shape[1:]),),
        gradients=((g.expand(samples, *g.shape[1:]),) * outputs,),
    )
    return many.multiplications()


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
