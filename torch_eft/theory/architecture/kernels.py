"""K and Theta of an architecture between many samples: pairs go block by block, so that memory stays bounded."""

import math

import torch
from torch import Tensor

from torch_eft.theory.architecture.closed import ClosedKernels, Samples, check_closed_form
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.architecture.statistics import prepare

_ALIVE = 6
"""Blocks a node that are alive at once: kernels forward and backward, and what makes them."""

_ENTRIES = 2**23
"""Entries a node of the pairs that go together: more is not faster."""

_PER_ENTRY = 1e-7
"""Seconds of one core for an entry of a block at a node (measured, 8 x 8 and 16 x 16 positions)."""


def architecture_kernels(architecture: Architecture, x: Tensor, *, memory: int = 2**30) -> tuple[Tensor, Tensor]:
    """Kernel and NTK of one output at infinite width, between all inputs.

    Args:
        architecture: As ``read_architecture`` returns it, or built of nodes.
        x: Inputs, (N, ...).
        memory: Bytes allowed for the blocks that are worked on at once; a single pair of samples takes what it takes.

    Returns:
        K and Theta, (N, N), float64.

    Raises:
        ValueError: If the inputs do not fit, or the architecture has no closed form.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> layers = torch.nn.Conv1d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 2)
        >>> x = torch.eye(8)[:5, None]
        >>> architecture = theory.read_architecture(torch.nn.Sequential(*layers), x)
        >>> K, Theta = theory.architecture_kernels(architecture, x)
        >>> Theta.shape
        torch.Size([5, 5])
    """
    data = prepare(architecture, x)
    check_closed_form(architecture)
    size = _ALIVE * 8 * sum(math.prod(sizes) ** 2 for sizes in architecture.positions)
    largest = max(math.prod(sizes) ** 2 for sizes in architecture.positions)
    step = max(1, min(memory // size, _ENTRIES // largest))
    number = len(x)
    with torch.no_grad():
        variances = _variances(architecture, data, number, step)
        rows, columns = torch.triu_indices(number, number, device=next(iter(data.values())).device)
        K = next(iter(data.values())).new_zeros(number, number)
        Theta = torch.zeros_like(K)
        for a, b in zip(rows.split(step), columns.split(step), strict=True):
            kernels = ClosedKernels(architecture, data, Samples(a, b, None), variances)
            for matrix, values in ((K, kernels.output_kernel), (Theta, kernels.ntk())):
                matrix[a, b] = values
                matrix[b, a] = values
    return K, Theta


def _variances(architecture: Architecture, data: dict[int, Tensor], number: int, step: int) -> dict[int, Tensor]:
    """Of all nodes that activations and norms read, (N, P), from every sample by itself."""
    found: list[dict[int, Tensor]] = []
    for start in range(0, number, step):
        some = {index: x[start : start + step] for index, x in data.items()}
        alone = torch.arange(len(next(iter(some.values()))), device="cpu")
        found.append(ClosedKernels(architecture, some, Samples(alone, alone, alone)).variances)
    return {index: torch.cat([each[index] for each in found]) for index in found[0]}


def kernels_work(architecture: Architecture, number: int) -> float:
    """Count the work of ``architecture_kernels``.

    Args:
        architecture: The architecture.
        number: Samples N.

    Returns:
        Seconds of one core.
    """
    entries = sum(math.prod(sizes) ** 2 for sizes in architecture.positions)
    return number * (number + 1) / 2 * entries * _PER_ENTRY
