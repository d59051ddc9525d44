"""The NTK of many outputs on a few random directions of them: what it costs does not grow with the outputs.

With directions r_k of C independent signs over sqrt(C), K of them, the projected kernel

    H_{kl;ab} = r_k^T H_{ab} r_l

is that of the network r_k . z: K cotangents, so that neither the Jacobian nor the kernel of all outputs is formed. Over
directions, E H_{kk;ab} = (1/C) sum_i H_{ii;ab}, and E H_{kl;ab}^2 = (1/C^2) sum_{ij} H_{ij;ab}^2 for k != l (for k = l
it is more). Traces are therefore averages over k, and squared norms averages over pairs k != l, without bias; their
standard errors are those of the jackknife over k. Directions that are orthogonal to each other (classes, Hadamard rows)
would miss the part with i = j in the norms.

The directions are the same at all times: a change of the kernel is a difference of like with like.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy
import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.kernels.metrics import relative_change

_NAME = re.compile(r"probes:([1-9][0-9]*)")
_SEED = 8  # PDLT 8.0; torch's random state is not touched
FEWEST = 3
"""Directions that an error bar takes: two of them without the third are one pair."""


@dataclass(frozen=True)
class RandomOutputs:
    """Fixed random directions of the outputs.

    Args:
        count: K.

    Example:
        >>> import torch
        >>> from torch_eft.measure.kernels.random_outputs import RandomOutputs
        >>> RandomOutputs(16)(torch.ones(4, 1000)).shape
        torch.Size([4, 16])
    """

    count: int

    def __call__(self, z: Tensor) -> Tensor:
        """Return r_k . z_a, (N, K), of outputs (N, C); anything else as it is, for others to refuse."""
        if not isinstance(z, Tensor) or z.ndim != 2 or not z.is_floating_point():
            return z
        return z @ _directions(self.count, z.shape[1], z.dtype, z.device).mT

    def directions(self, outputs: int) -> Tensor:
        """Return the directions themselves, (K, C)."""
        return _directions(self.count, outputs, torch.get_default_dtype(), torch.device("cpu"))


@functools.lru_cache(maxsize=16)
def _directions(count: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    signs = numpy.random.default_rng(_SEED).integers(0, 2, (count, outputs), dtype=numpy.int8)
    with torch.inference_mode(False):  # kept for later calls, that may record gradients
        return torch.from_numpy(2 * signs - 1).to(device, dtype) / outputs**0.5


def random_outputs(outputs: str | None) -> RandomOutputs | None:
    """Read ``"probes:K"``.

    Args:
        outputs: ``"probes:16"``, say; None: all outputs.

    Returns:
        The directions; None for all outputs.

    Raises:
        ValueError: If it is something else, or K < 3.
    """
    if outputs is None:
        return None
    match = _NAME.fullmatch(outputs) if isinstance(outputs, str) else None
    if match is None:
        raise ValueError(
            f"outputs: {outputs!r} given; give 'probes:16' for 16 random directions of the outputs, or None for all"
        )
    if int(match[1]) < FEWEST:
        raise ValueError(f"outputs: {outputs!r} given; an error bar takes {FEWEST} directions at least, better 16")
    return RandomOutputs(int(match[1]))


def projected(network: IsolatedModel, outputs: str | None) -> IsolatedModel:
    """Return the network whose outputs are the projections on ``outputs``, see ``random_outputs``."""
    directions = random_outputs(outputs)
    return network if directions is None else replace(network, output_fn=projection(network.output_fn, directions))


def projection(output_fn: OutputFn | None, directions: RandomOutputs) -> OutputFn:
    """Return ``output_fn`` with the directions after it: the same one when asked again, as plans are kept by it."""
    try:
        return _projection(output_fn, directions)
    except TypeError:  # not hashable
        return _composed(output_fn, directions)


def _composed(output_fn: OutputFn | None, directions: RandomOutputs) -> OutputFn:
    if output_fn is None:
        return directions
    return lambda output: directions(output_fn(output))


_projection: Callable[[Any, RandomOutputs], OutputFn] = functools.lru_cache(maxsize=16)(_composed)


@dataclass(frozen=True)
class Estimated:
    """A number that was estimated from random directions.

    Args:
        value: The estimate.
        error: Its standard error.
        directions: K.

    Example:
        >>> from torch_eft import measure
        >>> low, high = measure.Estimated(1.0, 0.1, directions=16).interval(0.95)
        >>> round(low, 2), round(high, 2)
        (0.76, 1.32)
    """

    value: float
    error: float
    directions: int

    def interval(self, level: float = 0.68) -> tuple[float, float]:
        """Return the interval that contains the truth with a probability ``level``, of a positive number.

        Squares over directions are skewed where few combinations of outputs dominate: the interval is symmetric in the
        logarithm, and Student's law is taken with a quarter of the K - 1 degrees of freedom (with which it covers the
        truth for kernels of trained networks, at 10 and 100 outputs).

        Args:
            level: Between 0 and 1.
        """
        if self.value <= 0:
            return self.value - self.error, self.value + self.error
        z, freedom = NormalDist().inv_cdf((1 + level) / 2), (self.directions - 1) / 4
        quantile = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        factor = math.exp(min(quantile * self.error / self.value, 700.0))
        return self.value / factor, self.value * factor


@dataclass(frozen=True)
class RandomOutputEstimates:
    """What a projected kernel says of the kernel of all outputs.

    Args:
        ntk_trace: (1 / N C) sum_{a,i} H_{ii;aa}.
        norm: ||H||_F / C.
        relative_change: ||H - H_0||_F / ||H_0||_F; None without H_0.
        kernel_distance: 1 - <H, H_0> / (||H|| ||H_0||), likewise.

    Example:
        >>> from torch_eft import measure
        >>> number = measure.Estimated(2.0, 0.1, directions=16)
        >>> measure.RandomOutputEstimates(ntk_trace=number, norm=number).relative_change is None
        True
    """

    ntk_trace: Estimated
    norm: Estimated
    relative_change: Estimated | None = None
    kernel_distance: Estimated | None = None


def estimates(H: Tensor, reference: Tensor | None = None) -> RandomOutputEstimates:
    """Estimate size and change of the kernel of all outputs from projected ones; waits for the device once.

    Args:
        H: (N, N, K, K), of ``ntk(..., outputs="probes:16")``.
        reference: H_0, on the same directions.

    Returns:
        The estimates with their standard errors.

    Raises:
        ValueError: If these are no such kernels.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net, x = torch.nn.Linear(3, 100), torch.eye(3)  # H_{ij;ab} = delta_ij (x_a . x_b + 1)
        >>> H = measure.ntk(net, x, outputs="probes:16")
        >>> found = measure.random_output_estimates(H, 0.5 * H)
        >>> round(found.ntk_trace.value, 3), round(found.relative_change.value, 3)
        (2.0, 1.0)
    """
    K = H.shape[-1]
    if H.ndim != 4 or H.shape[2] != K or K < FEWEST or (reference is not None and reference.shape != H.shape):
        other = "" if reference is None else f" and {tuple(reference.shape)}"
        raise ValueError(
            f"H: {tuple(H.shape)}{other} given; give kernels (N, N, K, K) with K >= {FEWEST}, of "
            "ntk(..., outputs='probes:16')"
        )
    diagonals = H.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).mean(0)
    found = [torch.stack([diagonals.mean(), diagonals.std() / K**0.5]), _with_error(_squares(H, H).sqrt())]
    if reference is not None:
        H_0 = reference.to(H)
        H_0_squares = _squares(H_0, H_0)
        found.append(_with_error((_squares(H - H_0, H - H_0) / H_0_squares).sqrt()))
        u = H / found[1][0]
        w = u - H_0 / H_0_squares[0].sqrt()
        a, b, c = _squares(u, u), _squares(u, w), _squares(w, w)
        X = a * (a - 2 * b + c)  # 1 - cos itself would drown in rounding near 0
        found.append(_with_error((a * c - b.square()) / (X.sqrt() * (X.sqrt() + a - b))))
    return RandomOutputEstimates(*(Estimated(value, error, K) for value, error in torch.stack(found).tolist()))


def ntk_drift(H: Tensor, reference: Tensor, outputs: str | None) -> Tensor:
    """Return ||H - H_0||_F / ||H_0||_F of all outputs, estimated where the kernels are on random directions of them.

    Args:
        H: A kernel.
        reference: H_0, of the same shape.
        outputs: The ``outputs`` with which they were measured.
    """
    if outputs is None or H.ndim == 2:
        return relative_change(H, reference)
    return kernel_norm(H - reference, outputs) / kernel_norm(reference, outputs)


def kernel_norm(A: Tensor, outputs: str | None) -> Tensor:
    """Return ||A||_F of all outputs, estimated over C where it is on random directions of them.

    Args:
        A: A kernel.
        outputs: The ``outputs`` with which it was measured.
    """
    return inner_product(A, A, outputs).sqrt()


def inner_product(A: Tensor, B: Tensor, outputs: str | None) -> Tensor:
    """Return <A, B> of two kernels of all outputs, estimated over C^2 where they are on random directions of them.

    Args:
        A: A kernel.
        B: Another one, of the same shape.
        outputs: The ``outputs`` with which they were measured.
    """
    return (A * B).sum() if outputs is None or A.ndim == 2 else _squares(A, B)[0]


def _squares(A: Tensor, B: Tensor) -> Tensor:
    """<A, B> / C^2 by pairs k != l: of all directions, and without each of them; (1 + K)."""
    products = (A * B).sum((0, 1))
    products = products - products.diagonal().diag()
    K, whole = len(products), products.sum()
    without = whole - products.sum(0) - products.sum(1)
    return torch.cat([whole[None] / (K * (K - 1)), without / ((K - 1) * (K - 2))])


def _with_error(values: Tensor) -> Tensor:
    """The first value, and the standard error by the jackknife over the others."""
    without = values[1:]
    error = ((len(without) - 1) * without.var(correction=0)).sqrt()
    return torch.stack([values[0], error])
