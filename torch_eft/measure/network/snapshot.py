"""Snapshots: outputs, NTK and hidden kernels of a network at one moment, on one isolated copy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.representations.hidden_kernels import hidden_kernels
from torch_eft.results.presentation.repr import short_repr


@dataclass(frozen=True)
class Plan:
    """The contents of a snapshot, besides the outputs.

    Args:
        ntk: The NTK.
        ntk_trace: Its average over outputs only, (N, N).
        hidden: The kernels of hidden layers.
        layers: Their names; None picks them as ``hidden_kernels`` does.
        outputs: Random directions of the outputs for the NTK, see ``ntk``.

    Example:
        >>> from torch_eft import measure
        >>> measure.Plan(ntk=True).hidden
        False
    """

    ntk: bool = False
    ntk_trace: bool = False
    hidden: bool = False
    layers: Sequence[str] | None = None
    outputs: str | None = None


@dataclass(frozen=True, repr=False)
class Snapshot:
    """A network on its probe at one moment.

    Args:
        output: (N, C).
        ntk: (N, N, C, C), (N, N, K, K) on K random directions of the outputs, or (N, N); None if not asked for.
        hidden: ``{layer: (N, N)}``; empty if not asked for.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.Snapshot(torch.zeros(3, 2), None, {"1": torch.eye(3)})
        Snapshot(
          output: (3, 2) float32
          hidden: {1: (3, 3) float32}
        )
    """

    output: Tensor
    ntk: Tensor | None
    hidden: dict[str, Tensor]

    __repr__ = short_repr


def take_snapshot(
    model: Model,
    x: Any,
    plan: Plan,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Snapshot:
    """Measure ``model`` on ``x`` as ``plan`` says, leaving no trace in it; errors as ``ntk``.

    Args:
        model: Any module.
        x: See ``ntk``.
        plan: What to measure.
        lambdas: See ``ntk``.
        output_fn: See ``ntk``.
        memory: Bytes allowed for the NTK, see ``ntk``.

    Returns:
        The outputs and what the plan asks for.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> snapshot = measure.take_snapshot(torch.nn.Linear(3, 2), torch.eye(3), measure.Plan(ntk=True))
        >>> snapshot.output.shape, snapshot.ntk.shape, snapshot.hidden
        (torch.Size([3, 2]), torch.Size([3, 3, 2, 2]), {})
    """
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        with torch.no_grad():
            output = checked_output(network, probe)
        options: dict[str, Any] = {"trace": plan.ntk_trace, "memory": memory, "outputs": plan.outputs}
        return Snapshot(
            output,
            ntk(network, probe, lambdas=lambdas, **options) if plan.ntk else None,
            hidden_kernels(network, probe, layers=plan.layers) if plan.hidden else {},
        )
