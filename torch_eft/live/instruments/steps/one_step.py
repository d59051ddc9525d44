"""What the step after a measurement is made of, in the outputs: fresh gradient, momentum and decay."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.instrument import Instrument, Measurement, Reading, TrainingStart
from torch_eft.live.instruments.common import LARGEST, copied, current, memory, reason_of, too_many
from torch_eft.measure.kernels.optimizers import plain_optimizer
from torch_eft.measure.kernels.preconditioner import OptimizerStep, optimizer_step
from torch_eft.measure.kernels.steps.output_step import OutputStep, output_step
from torch_eft.results.tags import layer_tag, tag

_COPIES = 6  # theta, the gradient, Adam's state, and the parts of the step
_TOLERANCE = 1e-2  # of the step, beside rounding


@dataclass
class _Coming:
    """A step that is about to be taken: the optimizer as it is before it."""

    step: int
    theta: dict[str, Tensor]
    gradients: dict[str, Tensor]
    optimizer: Optimizer


@dataclass
class _Taken:
    step: int
    theta: dict[str, Tensor]
    parts: OptimizerStep


class OneStepInstrument(Instrument):
    """Shares of fresh gradient, momentum and decay in the change of the outputs by the step after a measurement.

    The parts of the step are those of the optimizer's own rule, and the change of the outputs that they predict is
    linear in them. The numbers follow at the next measurement, logged at the step that they belong to.

    Args:
        largest: Trainable parameters up to which the copies are kept.
    """

    name = "one_step"
    cost = "full"
    looks_back = True

    def __init__(self, *, largest: int = LARGEST // _COPIES) -> None:
        self.largest = largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._refusal: str | None = None
        self._network: nn.Module | None = None
        self._measured: int | None = None
        self._coming: _Coming | None = None
        self._taken: _Taken | None = None

    def begin(self, start: TrainingStart) -> Reading:
        """Decide whether copies can be kept."""
        self.forget()
        self._network = start.model
        self._refusal = too_many(start.model, self.largest)
        if self._refusal is None and len(start.optimizers) != 1:
            self._refusal = f"{len(start.optimizers)} optimizers"
        return Reading(pages={"one_step": self._text()})

    def idle(self) -> bool:
        """Return whether it has ended."""
        return self._refusal is not None

    def listens(self) -> bool:
        """Return whether the step after a measurement is still to come."""
        return self._measured is not None or self._coming is not None

    def before_step(self, step: int, optimizer: Optimizer) -> Reading:
        """Keep theta, the gradient and the optimizer's state of the theta that was just measured."""
        self._coming = None
        if self._measured != step or self._network is None:
            return Reading()
        gradients = {
            name: p.grad.detach().clone() for name, p in self._network.named_parameters() if p.grad is not None
        }
        self._coming = _Coming(step, copied(self._network), gradients, _frozen(optimizer))
        self._measured = None
        return Reading()

    def after_step(self, step: int, network: nn.Module) -> Reading:
        """Take the step apart, if it is the one that was taken: a scaled or clipped gradient is known only now."""
        coming, self._coming = self._coming, None
        if coming is None or step != coming.step + 1:
            return Reading()
        assert self._network is not None
        given = _gradients(self._network)
        moved = {name: value - coming.theta[name] for name, value in current(self._network).items()}
        try:
            for gradients in (given, coming.gradients):
                if gradients:
                    parts = optimizer_step(self._network, coming.optimizer, gradients, theta=coming.theta)
                    if _is_taken(parts, moved, coming.theta):
                        self._taken = _Taken(coming.step, coming.theta, parts)
                        return Reading()
        except ValueError as error:
            return self._ended(reason_of(error))
        return self._ended(
            f"the step after step {coming.step} is not the one that {type(plain_optimizer(coming.optimizer)).__name__} "
            "takes with these gradients (a step of infinite ones is left out; a hook may change it)",
            for_good=False,
        )

    def observe(self, measurement: Measurement) -> Reading:
        """The numbers of the step after the measurement before."""
        if self._refusal is not None:
            return Reading()
        taken, self._taken = self._taken, None
        self._measured = None if measurement.last else measurement.step
        if taken is None:
            return Reading()
        there = measurement.network.at(taken.theta)
        found = output_step(there.current, there.probe, taken.parts, output_fn=there.output_fn)
        return Reading(late={taken.step: _scalars(found)})

    def _ended(self, reason: str, for_good: bool = True) -> Reading:
        if for_good:
            self._refusal = reason
            return Reading(pages={"one_step": self._text()})
        return Reading(pages={"one_step": f"{self._text()} Left out: {reason}."})

    def _text(self) -> str:
        if self._refusal is not None:
            return f"No step of this run is taken apart: {self._refusal}."
        assert self._network is not None
        return (
            "The step after each measurement, taken apart: the change of the outputs that the gradient of that step, "
            "earlier gradients (momentum) and weight decay predict, to first order in the step; the shares add up to "
            f"1. It takes up to {memory(self._network, _COPIES)}."
        )


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach() for name, p in network.named_parameters() if p.requires_grad and p.grad is not None}


def _frozen(optimizer: Optimizer) -> Optimizer:
    """The optimizer with its state and options as they are now, which is only read."""
    own = plain_optimizer(optimizer)
    frozen: Optimizer = object.__new__(type(own))
    frozen.__dict__.update(own.__dict__)
    frozen.state = {  # type: ignore[assignment]
        parameter: {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        for parameter, state in own.state.items()
    }
    frozen.param_groups = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        for group in own.param_groups
    ]
    return frozen


def _is_taken(parts: OptimizerStep, moved: dict[str, Tensor], theta: dict[str, Tensor]) -> bool:
    """Whether the parameters have moved by this step; one wait for the device."""
    total = parts.total
    names = [name for name in moved if name in total]
    if not names:
        return False
    sums = [
        torch.stack([part.float().square().sum() for part in (total[name] - moved[name], total[name], theta[name])])
        for name in names
    ]
    off, size, rounding = torch.stack(sums).sum(0).sqrt().tolist()
    eps = max(torch.finfo(value.dtype).eps for value in theta.values())
    return bool(size > 0 and off <= _TOLERANCE * size + 4 * eps * rounding)


def _scalars(found: OutputStep) -> dict[str, float]:
    count = found.change.numel() ** 0.5
    scalars = {
        tag("step_output"): float(found.change.norm()) / count,
        tag("step_output", "order_1"): float(found.predicted.norm()) / count,
        tag("step_output_error"): found.error,
    }
    return scalars | {layer_tag("step_shares", part): share for part, share in found.shares.items()}
