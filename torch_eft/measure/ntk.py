"""The empirical neural tangent kernel of one network, and how far it has moved.

``H_{ij;ab} = sum_mu lambda_mu (dz_{i;a} / dtheta_mu) (dz_{j;b} / dtheta_mu)`` (PDLT 8.0), i, j outputs,
a, b samples. Jacobians by ``torch.func``; the Gram matrix is summed over parameters and,
within a memory budget, over blocks of samples.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.utils._pytree import tree_map_only

from torch_eft.measure.isolation import IsolatedModel, isolated
from torch_eft.measure.output import checked_output
from torch_eft.measure.probe import OutputFn, Probe, as_probe

DEFAULT_MEMORY = 2**30
"""Bytes that the Jacobians of one pair of sample blocks may take."""


def ntk(
    model: nn.Module,
    x: Any,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Tensor:
    """The NTK of ``model`` on ``x``, in evaluation mode.

    Args:
        model: Any module. Frozen parameters do not contribute; tied ones count once.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        lambdas: The learning-rate tensor: one number, or ``{parameter name: lambda}`` for every
            trainable parameter; None means 1.
        trace: Average over outputs, (1/C) sum_i H_{ii;ab}.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed for Jacobians; less means more recomputation.

    Returns:
        ``[a, b, i, j] = H_{ij;ab}``, (N, N, C, C), or (N, N) with ``trace``; in the dtype of the
        parameters (at least float32), on their device.

    Raises:
        ValueError: If the forward rejects ``x``, the output is not (N, C), ``lambdas`` does not name
            the trainable parameters or is negative, there are none, the Jacobian of one sample does not fit into
            ``memory``, or the kernel is not finite.
    """
    with isolated(model, output_fn) as network:
        return isolated_ntk(network, as_probe(x), lambdas, trace, memory)


def isolated_ntk(
    network: IsolatedModel,
    probe: Probe,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    memory: int = DEFAULT_MEMORY,
) -> Tensor:
    """As ``ntk``, for a network that is already isolated."""
    scales = _scales(network, lambdas)
    with torch.no_grad():
        outputs = checked_output(network, probe)
    count, channels = outputs.shape
    inputs = network.place(probe)
    refusal = too_large(network.shadow, channels, memory)
    if refusal is not None:
        raise ValueError(refusal)
    per_sample = channels * sum(network.params[name].numel() * outputs.element_size() for name in scales)
    block = max(1, min(count, memory // max(1, 2 * per_sample)))
    starts = range(0, count, block)
    shape = (count, count) if trace else (count, count, channels, channels)
    H = outputs.new_zeros(shape)
    for i, first in enumerate(starts):
        rows, values = _jacobian(network, _slice(inputs, first, block), scales)
        _check_independence(values, outputs[first : first + block])
        for second in starts[i:]:
            columns = rows if second == first else _jacobian(network, _slice(inputs, second, block), scales)[0]
            part = _gram(rows, columns, trace)
            H[first : first + block, second : second + block] = part
            mirror = part.T if trace else part.permute(1, 0, 3, 2)  # H_{ji;ba} = H_{ij;ab}
            H[second : second + block, first : first + block] = mirror
    if not bool(torch.isfinite(H).all()):
        raise ValueError("model: the NTK is not finite; parameters or outputs contain NaN or infinite values")
    return H


def too_large(model: nn.Module, outputs: int, memory: int = DEFAULT_MEMORY) -> str | None:
    """Why the NTK of ``model`` with ``outputs`` = C does not fit into ``memory`` bytes, or None if it does."""
    sizes = [(p.numel(), max(4, p.element_size())) for p in model.parameters() if p.requires_grad]
    parameters = sum(count for count, _ in sizes)
    needed = outputs * sum(count * size for count, size in sizes)
    if needed <= memory:
        return None
    return (
        f"model: the Jacobian of one sample, {outputs} outputs by {parameters} parameters, takes "
        f"{needed / 2**30:.1f} GiB, memory allows {memory / 2**30:.1f} GiB; choose fewer outputs with output_fn"
    )


def _scales(network: IsolatedModel, lambdas: Mapping[str, float] | float | None) -> dict[str, float]:
    """sqrt(lambda) of every trainable parameter with lambda > 0."""
    names = set(network.params)
    if not names:
        raise ValueError("model: it has no trainable parameter, so its NTK is empty; set requires_grad on some")
    if isinstance(lambdas, Mapping):
        if set(lambdas) != names:
            wrong = sorted(set(lambdas) ^ names)
            raise ValueError(
                f"lambdas: {wrong[0]!r} is {'missing' if wrong[0] in names else 'no trainable parameter'}; "
                "name every trainable parameter once"
            )
        values = {name: float(value) for name, value in lambdas.items()}
    else:
        values = dict.fromkeys(network.params, 1.0 if lambdas is None else float(lambdas))
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"lambdas: {value:g} given for {name!r}; it must be finite and >= 0")
    return {name: math.sqrt(value) for name, value in values.items() if value > 0}


def _slice(inputs: Any, start: int, length: int) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[start : start + length], inputs)


def _jacobian(network: IsolatedModel, inputs: Any, scales: dict[str, float]) -> tuple[list[Tensor], Tensor]:
    """sqrt(lambda) dz/dtheta a parameter, each (n, C, size), and the outputs sample by sample."""
    moving = {name: network.params[name] for name in scales}
    still = {name: value for name, value in network.params.items() if name not in scales}

    def one_sample(params: dict[str, Tensor], sample: Any) -> tuple[Tensor, Tensor]:
        value = network({**params, **still}, tree_map_only(Tensor, lambda tensor: tensor[None], sample))[0]
        return value, value

    try:
        jacobian, values = vmap(jacrev(one_sample, has_aux=True), in_dims=(None, 0))(moving, inputs)
    except (RuntimeError, NotImplementedError):  # an op without a batching rule: one output at a time
        jacobian, values = _looped_jacobian(network, inputs, moving, still)
    return [jacobian[name].flatten(2) * scale for name, scale in scales.items()], values.detach()


def _looped_jacobian(
    network: IsolatedModel, inputs: Any, moving: dict[str, Tensor], still: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in moving.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in leaves}
    values = []
    count = next(len(leaf) for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    for index in range(count):
        value = network({**leaves, **still}, _slice(inputs, index, 1))[0]
        values.append(value.detach())
        for channel in value:
            gradients = torch.autograd.grad(
                channel, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for name, gradient in zip(leaves, gradients, strict=True):
                rows[name].append(gradient)
    shape = (count, values[0].numel())
    return {name: torch.stack(row).unflatten(0, shape) for name, row in rows.items()}, torch.stack(values)


def _check_independence(alone: Tensor, together: Tensor) -> None:
    tolerance = 1e3 * torch.finfo(together.dtype).eps * together.abs().max().clamp_min(1e-30)
    if not bool(((alone - together).abs() <= tolerance).all()) and bool(torch.isfinite(together).all()):
        raise ValueError(
            "model: a sample's output depends on the other samples of the batch or on chance; "
            "the NTK needs the forward to be a function of each sample (in evaluation mode)"
        )


def _gram(rows: list[Tensor], columns: list[Tensor], trace: bool) -> Tensor:
    pattern, share = ("aip,bip->ab", 1 / rows[0].shape[1]) if trace else ("aip,bjp->abij", 1.0)
    parts = [torch.einsum(pattern, row, column) for row, column in zip(rows, columns, strict=True)]
    return torch.stack(parts).sum(0) * share


def ntk_trace(H: Tensor) -> Tensor:
    """Mean of the diagonal, (1 / N C) sum_{a,i} H_{ii;aa}; a 0-d tensor."""
    return as_matrix(H).diagonal().mean()


def relative_change(H: Tensor, reference: Tensor) -> Tensor:
    """Relative Frobenius change ||H - H_0|| / ||H_0||; a 0-d tensor. For any two tensors of one shape."""
    return (H - reference).norm() / reference.norm()


def kernel_distance(H: Tensor, reference: Tensor) -> Tensor:
    """1 - cos of the angle between two kernels, <H, H_0> / (||H|| ||H_0||) (Fort et al. 2020); a 0-d tensor."""
    # In terms of the unit vectors' difference: 1 - cos itself would drown in rounding near 0.
    difference = H / H.norm() - reference / reference.norm()
    return difference.square().sum() / 2


def top_eigenvalue(H: Tensor) -> Tensor:
    """The largest eigenvalue of the kernel as an (N C, N C) matrix; a 0-d tensor."""
    return torch.linalg.eigvalsh(as_matrix(H))[-1]


def as_matrix(H: Tensor) -> Tensor:
    """(N, N, C, C) as the symmetric matrix (N C, N C), rows (a, i); (N, N) unchanged."""
    if H.ndim == 2:
        return H
    count, _, channels, _ = H.shape
    return H.permute(0, 2, 1, 3).reshape(count * channels, count * channels)


def as_trace(H: Tensor) -> Tensor:
    """(1/C) sum_i H_{ii;ab}, (N, N)."""
    return H if H.ndim == 2 else H.diagonal(dim1=2, dim2=3).mean(-1)
