"""The network's output on the probe, and the checks that make a network measurable."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.isolation.operations import RefusedForwardError
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe


def output(model: Model, x: Any, *, output_fn: OutputFn | None = None) -> Tensor:
    """Compute the network's output on ``x`` in evaluation mode.

    Raises ``ValueError`` if the forward rejects ``x`` or changes it in place, or what it returns is not (N, C).

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        (N, C).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
        >>> measure.output(model, torch.eye(3)).shape  # without dropout
        torch.Size([3, 2])
    """
    probe = as_probe(x)
    with isolated(model, output_fn) as network, torch.no_grad():
        return checked_output(network, probe)


def checked_output(network: IsolatedModel, probe: Probe, params: dict[str, Tensor] | None = None) -> Tensor:
    """Compute the output of an isolated network.

    Args:
        network: The network.
        probe: N samples.
        params: Parameters in the place of its own.

    Returns:
        (N, C).

    Raises:
        ValueError: As ``output``.
        RefusedForwardError: If the forward does what cannot be measured.
    """
    inputs = tree_map_only(Tensor, torch.clone, network.place(probe))
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    versions = [tensor._version for tensor in tensors]
    try:
        result = network(network.params if params is None else params, inputs)
    except RefusedForwardError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"probe: {probe.description} given, which the forward of {type(network.shadow).__name__} (or output_fn) "
            f"rejects: {reason}. Give inputs as the forward takes them, or name the submodule to measure"
        ) from error
    if [tensor._version for tensor in tensors] != versions:
        raise ValueError(
            f"model: the forward of {type(network.shadow).__name__} changes its inputs in place, and would change the "
            "probe from one measurement to the next; let it work on a copy, x = x.clone(), or without inplace=True"
        )
    if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != probe.size or result.shape[1] == 0:
        given = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"output_fn: the output for {probe.size} samples is {given}, not a tensor ({probe.size}, C) with C >= 1; "
            f"{_remedy(result, probe.size)}"
        )
    if not result.is_floating_point():
        kind = str(result.dtype).removeprefix("torch.")
        remedy = "lambda z: torch.view_as_real(z).flatten(1)" if result.is_complex() else "that returns the logits"
        raise ValueError(
            f"output_fn: the output is {kind}, and the measurements are for real outputs; give an output_fn {remedy}"
        )
    return result


def _remedy(result: Any, samples: int) -> str:
    if isinstance(result, dict) and result:
        return f"pick one, for example output_fn=lambda out: out[{next(iter(result))!r}]"
    if isinstance(result, tuple | list) and result:
        return "pick one, for example output_fn=lambda out: out[0]"
    if not isinstance(result, Tensor):
        return "give an output_fn that turns it into one"
    if 0 in result.shape:
        return "there is no output (C = 0) to measure; is the last layer's width 0, or a selection empty?"
    if result.ndim == 0:
        return "the forward returns one number, perhaps the loss; give the submodule, or an output_fn, with the outputs"
    if len(result) != samples:
        return "its first axis is not the samples; give an output_fn that brings them to the front"
    if result.ndim == 1:
        return "give output_fn=lambda z: z[:, None]"
    return (
        "it has more than one axis besides the samples; give output_fn=lambda z: z.flatten(1) for all of it, or take "
        "one position, for example output_fn=lambda z: z[:, -1]"
    )
