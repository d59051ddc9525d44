"""The change of the preconditioned kernel H_P = J lambda P J^T, split into that by P and that by J.

    H_P' - H_P = [J (P' - P) J^T + J' (P' - P) J'^T] / 2  +  [(J' P J'^T - J P J^T) + (J' P' J'^T - J P' J^T)] / 2

exactly, the same for both ends: the first bracket is 0 where P stays as it is, the second where J does. The drift of
the NTK itself is that of H = J lambda J^T, without P.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import IsolatedModel, Model, Parameters, isolated
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.kernels.preconditioner import Preconditioner
from torch_eft.measure.kernels.random_outputs import inner_product, ntk_drift
from torch_eft.results.presentation.repr import short_repr


@dataclass(frozen=True, repr=False)
class PreconditionedDrift:
    """The change of H_P and its two parts.

    Args:
        reference: H_P at the start, (N, N, C, C), or (N, N).
        by_preconditioner: The part of the change by P.
        by_jacobian: The part by J.
        outputs: The random directions of the outputs that they are on, see ``ntk``.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> one = torch.ones(1, 1)
        >>> drift = measure.PreconditionedDrift(2 * one, by_preconditioner=0.5 * one, by_jacobian=-one)
        >>> drift.drift, drift.shares
        (0.25, {'preconditioner': -1.0, 'jacobian': 2.0})
    """

    reference: Tensor
    by_preconditioner: Tensor
    by_jacobian: Tensor
    outputs: str | None = None

    __repr__ = short_repr

    @property
    def change(self) -> Tensor:
        """H_P at the end minus that at the start."""
        return self.by_preconditioner + self.by_jacobian

    @property
    def drift(self) -> float:
        """||change|| / ||H_P at the start||."""
        return float(ntk_drift(self.reference + self.change, self.reference, self.outputs))

    @property
    def shares(self) -> dict[str, float]:
        """The shares of P and J in the change, <part, change> / ||change||^2: they add up to 1."""
        parts = {"preconditioner": self.by_preconditioner, "jacobian": self.by_jacobian}
        products = [inner_product(part, self.change, self.outputs) for part in (*parts.values(), self.change)]
        values = torch.stack(products[:-1]) / products[-1]
        return dict(zip(parts, values.tolist(), strict=True))


def preconditioned_drift(
    model: Model,
    x: Any,
    theta_0: Parameters,
    theta: Parameters,
    preconditioner_0: Preconditioner,
    preconditioner: Preconditioner,
    *,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
    outputs: str | None = None,
) -> PreconditionedDrift:
    """Measure how far H_P has moved, and by what; four kernels.

    Args:
        model: Any module; its own parameters are not used.
        x: See ``ntk``.
        theta_0: Every trainable parameter at the start, ``{name: tensor}`` or a module that holds them.
        theta: Every trainable parameter at the end, likewise.
        preconditioner_0: lambda P at the start, of ``preconditioner``; after the first step at the earliest.
        preconditioner: lambda P at the end.
        trace: Average over outputs.
        output_fn: See ``ntk``.
        memory: See ``ntk``.
        outputs: See ``ntk``.

    Returns:
        The change, in two parts.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(2, 1, bias=False)  # J is constant
        >>> P_0, P = {"weight": 1.0}, {"weight": torch.tensor([[3.0, 1.0]])}
        >>> found = measure.preconditioned_drift(model, torch.eye(2), model, model, P_0, P, trace=True)
        >>> found.change.tolist(), found.shares["preconditioner"]
        ([[2.0, 0.0], [0.0, 0.0]], 1.0)
    """
    probe = as_probe(x)
    options: dict[str, Any] = {"trace": trace, "memory": memory, "outputs": outputs}
    with isolated(model, output_fn) as network:
        first, last = network.at(theta_0, "theta_0", every=True), network.at(theta, "theta", every=True)
        return drift_between(first, last, probe, preconditioner_0, preconditioner, **options)


def drift_between(
    first: IsolatedModel,
    last: IsolatedModel,
    probe: Probe,
    preconditioner_0: Preconditioner,
    preconditioner: Preconditioner,
    *,
    outputs: str | None = None,
    **options: Any,
) -> PreconditionedDrift:
    """Measure how far H_P has moved between two networks, and by what.

    Args:
        first: The network at the start.
        last: The network at the end.
        probe: The inputs.
        preconditioner_0: lambda P at the start.
        preconditioner: lambda P at the end.
        outputs: See ``ntk``.
        **options: ``trace`` and ``memory`` of ``ntk``.

    Returns:
        The change, in two parts.
    """
    (H, H_later), (H_moved, H_end) = (
        [ntk(at, probe, lambdas=P, outputs=outputs, **options) for P in (preconditioner_0, preconditioner)]
        for at in (first, last)
    )
    by_P = ((H_later - H) + (H_end - H_moved)) / 2
    by_J = ((H_moved - H) + (H_end - H_later)) / 2
    return PreconditionedDrift(H, by_P, by_J, outputs)
