"""dNTK and ddNTK of the running network, along the gradient that trains it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.instrument import Contraction, History, Instrument, Measurement, Reading, TrainingStart
from torch_eft.live.instruments.common import LARGEST, copied, memory, too_many
from torch_eft.results.tags import tag


@dataclass
class _Pending:
    step: int
    theta: dict[str, Tensor]
    gradient: dict[str, Tensor]
    lambdas: dict[str, float]


class DNTKInstrument(Instrument):
    """Sizes of dNTK and ddNTK relative to the NTK, contracted with lambda times the loss's gradient.

    The gradient that belongs to a measured theta is only known at the next step: both are copied, and the numbers
    follow at the next measurement, logged at the step they belong to. ``IntervalInstrument`` has them along the real
    displacement.

    Args:
        derivatives: 1: dNTK; 2: ddNTK as well.
        largest: Trainable parameters up to which two copies are kept.

    Raises:
        ValueError: If ``derivatives`` is not 1 or 2.
    """

    name = "dntk"
    cost = "full"
    looks_back = True

    def __init__(self, *, derivatives: int = 2, largest: int = LARGEST // 2) -> None:
        if derivatives not in (1, 2):
            raise ValueError(f"derivatives: {derivatives} given; 1 is dNTK, 2 is dNTK and ddNTK")
        self.derivatives, self.largest = derivatives, largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._refusal: str | None = None
        self._network: nn.Module | None = None
        self._measured: tuple[int, dict[str, float]] | None = None
        self._pending: _Pending | None = None
        self._validity = ""

    def begin(self, start: TrainingStart) -> Reading:
        """Decide whether copies of the parameters can be kept."""
        self._refusal = too_many(start.model, self.largest)
        if start.obstacle is not None and start.obstacle.rates:
            self._refusal = start.obstacle.reason
        self._network, self._measured, self._pending = start.model, None, None
        if self._refusal is not None:
            return Reading(pages={"dntk": f"No dNTK for this run: {self._refusal}."})
        return Reading(pages={"dntk": f"dNTK along the training gradient takes {memory(start.model, 2)}."})

    def before_step(self, step: int, optimizer: Optimizer) -> Reading:
        """Copy parameters and gradient of the theta that was just measured."""
        if self._measured is None or self._measured[0] != step or self._network is None:
            return Reading()
        gradient = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self._network.named_parameters()
            if p.requires_grad
        }
        self._pending = _Pending(step, copied(self._network), gradient, self._measured[1])
        self._measured = None
        return Reading()

    def observe(self, measurement: Measurement) -> Reading:
        """The numbers of the theta measured before."""
        if self._refusal is not None:
            return Reading()
        pending, self._pending = self._pending, None
        self._measured = None if measurement.last else (measurement.step, dict(measurement.lambdas))
        if pending is None or not _finite(pending.gradient):
            return Reading()
        network = measurement.network.on(measurement.network.probe, lambdas=pending.lambdas)
        sizes = network.relative_dntk(
            pending.gradient,
            theta=pending.theta,
            derivatives=self.derivatives,
            trace=measurement.snapshot.ntk is not None and measurement.snapshot.ntk.ndim == 2,
        )
        if sizes is None:
            return Reading()
        values = {tag("dntk_along_gradient"): sizes.dntk, tag("dntk_along_gradient", "order_0"): 0.0}
        if sizes.ddntk is not None:
            values |= {tag("ddntk_along_gradient"): sizes.ddntk, tag("ddntk_along_gradient", "order_0"): 0.0}
        late: History = {} if sizes.validity.flag == "invalid" else {pending.step: values}
        if late:
            measurement.contractions.append(Contraction(pending.step, None, sizes.dntk, sizes.ddntk, pending.step))
        reading = Reading(late=late)
        if sizes.validity.reason != self._validity:
            self._validity = sizes.validity.reason
            reading.pages["dntk"] = (
                f"dNTK and ddNTK along the training gradient: {sizes.validity.reason}. It takes "
                f"{memory(measurement.model, 2)}."
            )
        return reading


def _finite(gradient: dict[str, Tensor]) -> bool:
    """Whether a step was taken along it: a GradScaler leaves out those of infinite gradients."""
    return bool(torch.stack([value.isfinite().all() for value in gradient.values()]).all())
