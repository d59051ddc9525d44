"""The network's output on the probe, and the checks that make a network measurable."""

from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.isolation import IsolatedModel, isolated
from torch_eft.measure.probe import OutputFn, Probe, as_probe


def output(model: nn.Module, x: Any, output_fn: OutputFn | None = None) -> Tensor:
    """The network's output on ``x`` in evaluation mode, (N, C).

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        output_fn: Turns what the model returns into (N, C).

    Raises:
        ValueError: If the forward rejects ``x``, or what it returns is not (N, C).
    """
    probe = as_probe(x)
    with isolated(model, output_fn) as network, torch.no_grad():
        return checked_output(network, probe)


def checked_output(network: IsolatedModel, probe: Probe) -> Tensor:
    """(N, C) for an isolated network.

    Raises:
        ValueError: As ``output``.
    """
    try:
        result = network(network.params, network.place(probe))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"probe: {probe.description} given, which the forward of {type(network.shadow).__name__} (or output_fn) "
            f"rejects: {reason}. Give inputs as the forward takes them, or name the submodule to measure"
        ) from error
    if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != probe.size or result.shape[1] == 0:
        given = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"output_fn: the output for {probe.size} samples is {given}, not a tensor ({probe.size}, C) with C >= 1; "
            "give an output_fn that turns it into one"
        )
    return result
