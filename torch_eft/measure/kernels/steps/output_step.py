"""The change of the outputs by one step of an optimizer, part by part: fresh gradient, momentum, decay.

With the parts of the step (``preconditioner.py``),

    dz = J (fresh + momentum + decay) + O(|dtheta|^2),      J fresh = -eta c H_P[:, B] e_B

for a batch B with the gradient e_B of its loss in the outputs, H_P = J lambda P J^T. It holds at every step, for every
optimizer whose step is known; -eta H e, or -eta H_P e without the momentum, does not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.kernels.preconditioner import OptimizerStep
from torch_eft.measure.kernels.products import NTKOperator
from torch_eft.results.presentation.repr import short_repr


@dataclass(frozen=True, repr=False)
class OutputStep:
    """The change of the outputs by one step.

    Args:
        change: z after the step minus z before it, (N, C).
        fresh: J times the part of the step by this step's gradient, likewise.
        momentum: By gradients of earlier steps.
        decay: By weight decay.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> one = torch.ones(1, 1)
        >>> step = measure.OutputStep(change=1.1 * one, fresh=0.7 * one, momentum=0.5 * one, decay=-0.2 * one)
        >>> {name: round(share, 2) for name, share in step.shares.items()}, round(step.error, 2)
        ({'fresh': 0.7, 'momentum': 0.5, 'decay': -0.2}, 0.09)
    """

    change: Tensor
    fresh: Tensor
    momentum: Tensor
    decay: Tensor

    __repr__ = short_repr

    @property
    def predicted(self) -> Tensor:
        """The sum of the parts, (N, C)."""
        return self.fresh + self.momentum + self.decay

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the parts in the predicted change, <part, sum> / ||sum||^2: they add up to 1."""
        whole = self.predicted
        parts = {"fresh": self.fresh, "momentum": self.momentum, "decay": self.decay}
        values = torch.stack([(part * whole).sum() for part in parts.values()]) / whole.square().sum()
        return dict(zip(parts, values.tolist(), strict=True))

    @property
    def error(self) -> float:
        """||change - sum of the parts|| / ||change||: what linearizing leaves out; it falls as the step."""
        return float((self.change - self.predicted).norm() / self.change.norm())


def output_step(model: Model, x: Any, step: OptimizerStep, *, output_fn: OutputFn | None = None) -> OutputStep:
    """Measure what a step does to the outputs, without taking it.

    Args:
        model: The network before the step, any module; evaluated in evaluation mode.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        step: Its parts, of ``optimizer_step``.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        The change and its parts.

    Raises:
        ValueError: If the network cannot be measured, or the step is of another one.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> step = measure.optimizer_step(model, optimizer, {"weight": torch.ones(1, 2)})
        >>> measure.output_step(model, torch.eye(2), step).fresh.flatten().tolist()
        [-0.5, -0.5]
    """
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        operator = NTKOperator(network, probe)

        def pushed(part: dict[str, Tensor]) -> Tensor:
            if not any(bool(value.any()) for value in part.values()):
                return torch.zeros_like(operator.outputs)
            own = {
                name: part[name].to(p) if name in part else torch.zeros_like(p) for name, p in network.params.items()
            }
            return operator.jvp(own).detach()

        total = step.total
        moved = network.at({name: p + total[name].to(p) for name, p in network.params.items() if name in total})
        with torch.no_grad():
            change = checked_output(moved, probe) - operator.outputs
        return OutputStep(change.detach(), pushed(step.fresh), pushed(step.momentum), pushed(step.decay))
