"""dNTK and ddNTK of the running network, along the gradient that trains it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.part import History, Instrument, Measurement, Reading, Start
from torch_eft.live.parts.theta import LARGEST, copied, memory, too_many
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.taylor.displacement import relative_dntk
from torch_eft.results.tags import tag


@dataclass
class _Pending:
    step: int
    theta: dict[str, Tensor]
    gradient: dict[str, Tensor]
    lambdas: dict[str, float]


class DNTKPart(Instrument):
    """Sizes of dNTK and ddNTK relative to the NTK, contracted with lambda times the loss's gradient.

    The gradient that belongs to a visited theta is only known with the next step: both are copied, the numbers follow
    at the next visit and are logged at the step they belong to. Along the real displacement ``IntervalPart`` has them.

    Args:
        output_fn: Turns what the network returns into (N, C).
        order: 1: dNTK; 2: ddNTK as well.
        largest: Trainable parameters up to which two copies are kept.
    """

    name = "dntk"
    cost = "full"
    looks_back = True

    def __init__(self, output_fn: OutputFn | None = None, order: int = 2, largest: int = LARGEST // 2) -> None:
        if order not in (1, 2):
            raise ValueError(f"order: {order} given; 1 is dNTK, 2 is dNTK and ddNTK")
        self.output_fn, self.order, self.largest = output_fn, order, largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._refusal: str | None = None
        self._network: nn.Module | None = None
        self._visited: tuple[int, dict[str, float]] | None = None
        self._pending: _Pending | None = None
        self._validity = ""

    def begin(self, start: Start) -> Reading:
        """See whether copies of the parameters can be kept."""
        self._refusal = too_many(start.network, self.largest)
        self._network, self._visited, self._pending = start.network, None, None
        if self._refusal is not None:
            return Reading(pages={"dntk": f"No dNTK for this run: {self._refusal}."})
        return Reading(pages={"dntk": f"dNTK along the training gradient takes {memory(start.network, 2)}."})

    def on_gradient(self, step: int, optimizer: Optimizer) -> Reading:
        """Copy what belongs to the theta that was just visited."""
        if self._visited is None or self._visited[0] != step or self._network is None:
            return Reading()
        gradient = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self._network.named_parameters()
            if p.requires_grad
        }
        self._pending = _Pending(step, copied(self._network), gradient, self._visited[1])
        self._visited = None
        return Reading()

    def observe(self, visit: Measurement) -> Reading:
        """The numbers of the last visited theta."""
        if self._refusal is not None:
            return Reading()
        pending, self._pending = self._pending, None
        self._visited = None if visit.last else (visit.step, dict(visit.lambdas))
        if pending is None:
            return Reading()
        found = relative_dntk(
            visit.network,
            visit.probe,
            pending.gradient,
            theta=pending.theta,
            lambdas=pending.lambdas,
            derivatives=self.order,
            output_fn=visit.output_fn,
            trace=visit.snapshot.ntk is not None and visit.snapshot.ntk.ndim == 2,
        )
        if found is None:
            return Reading()
        values = {tag("dntk_along_gradient"): found.dntk, tag("dntk_along_gradient", "order_0"): 0.0}
        if found.ddntk is not None:
            values |= {tag("ddntk_along_gradient"): found.ddntk, tag("ddntk_along_gradient", "order_0"): 0.0}
        late: History = {pending.step: values}
        report = Reading(late=late)
        if found.validity.reason != self._validity:
            self._validity = found.validity.reason
            report.pages["dntk"] = (
                f"dNTK and ddNTK along the training gradient: {self._validity}. It takes {memory(visit.network, 2)}."
            )
        return report
