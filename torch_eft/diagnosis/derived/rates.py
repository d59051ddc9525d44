"""The largest stable learning rate in the unit of the optimizer and the loss in use."""

from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer

from torch_eft.diagnosis.findings import Finding

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Step:
    """What a training steps with.

    Args:
        name: Class of the optimizer.
        learning_rate: Of its first parameter group; None if it is not known.
        momentum: m.
        nesterov: Whether momentum is Nesterov's.
        reduction: Of the squared error: ``"mean"`` over samples and outputs, or ``"sum"``, as ``nn.MSELoss`` has them.
    """

    name: str = "SGD"
    learning_rate: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    reduction: Reduction = "mean"

    @property
    def descends(self) -> bool:
        """True for gradient descent, with or without momentum."""
        return self.name == "SGD"

    @property
    def factor(self) -> float:
        """By which momentum raises the bound: 1 + m, or (1 + m) / (1 + 2 m) for Nesterov's."""
        return (1 + self.momentum) / (1 + 2 * self.momentum if self.nesterov else 1.0)


def read_step(optimizer: Optimizer | None, reduction: Reduction) -> Step:
    """Read the learning rate and the momentum off an optimizer.

    Args:
        optimizer: The optimizer; None is plain SGD of an unknown learning rate.
        reduction: Of the squared error.

    Returns:
        The step.
    """
    if optimizer is None:
        return Step(reduction=reduction)
    group = optimizer.param_groups[0]
    momentum, nesterov = float(group.get("momentum", 0.0)), bool(group.get("nesterov", False))
    return Step(type(optimizer).__name__, float(group["lr"]), momentum, nesterov, reduction)


def in_units(bound: float, step: Step, numbers: int) -> float:
    """The largest stable learning rate of an optimizer.

    Args:
        bound: That of gradient descent on the mean over samples and outputs.
        step: The optimizer and the loss.
        numbers: N n_L, samples times outputs.

    Returns:
        The rate.
    """
    return bound * step.factor / (numbers if step.reduction == "sum" else 1)


def stability(bound: float | None, step: Step, inputs: int | None) -> str:
    """Say what the largest stable learning rate is of.

    Args:
        bound: In the unit of ``step``; None where nothing trains.
        step: The optimizer and the loss.
        inputs: N, the training set; None for any number.

    Returns:
        A sentence; empty where nothing trains.
    """
    if bound is None:
        return ""
    if not step.descends:
        return f"{step.name} has no such bound; the rates are those of torch.optim.SGD on nn.MSELoss(), full batch"
    momentum = f", {'Nesterov ' * step.nesterov}momentum {step.momentum:g}" if step.momentum else ""
    loss = "nn.MSELoss()" if step.reduction == "mean" else 'nn.MSELoss(reduction="sum")'
    of = f"of torch.optim.SGD{momentum} on {loss}, full batch"
    if inputs is None:
        of += (
            ", any number of inputs with |x|^2 = n_0"
            if step.reduction == "mean"
            else ", one input with |x|^2 = n_0: divide by N"
        )
    else:
        of += f", these {inputs} inputs" if inputs > 1 else ", this input"
    if step.learning_rate is None:
        return of
    return f"{of}; lr = {step.learning_rate:g} is {step.learning_rate / bound:.2g} of it"


def learning_rate_finding(bound: float | None, step: Step) -> Finding | None:
    """Return the warning that a learning rate beyond the bound calls for.

    Args:
        bound: In the unit of ``step``; None where nothing trains.
        step: The optimizer and the loss.

    Returns:
        The warning, or None.
    """
    if bound is None or step.learning_rate is None or not step.descends or step.learning_rate <= bound:
        return None
    options = f", momentum={step.momentum:g}" * bool(step.momentum) + ", nesterov=True" * step.nesterov
    return Finding(
        "learning rate",
        f"lr = {step.learning_rate:g} is {step.learning_rate / bound:.3g} times the largest stable one, {bound:.3g} "
        "(linearized network; a finite one may survive twice that)",
        f"lr at or below {bound / 2:.2g}",
        f"torch.optim.SGD(model.parameters(), lr={bound / 2:.2g}{options})",
    )
