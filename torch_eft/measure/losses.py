"""Which loss does a training step minimize? Squared error, cross-entropy, or one that is told: by its numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe
from torch_eft.measure.training_loss import (
    LOSS_TOLERANCE,
    UnrecognizedLossError,
    check_gradients,
    recognize_squared_error,
)

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of a training step as a function of outputs (N, C) and targets.

    Args:
        kind: ``"mse"``, ``"cross_entropy"`` or ``"given"``.
        name: In words.
        targets: As the loss takes them: (N, C), or (N,) classes; for a function that was told, as they came.
        factor: The loss is ``factor`` times the sum (1/2) sum (z - y)^2, or the sum of cross-entropies; 1 if told.
        function: The loss itself, of outputs and targets of any number of samples: means stay means.
    """

    kind: str
    name: str
    targets: Tensor
    factor: float
    function: LossFunction


def recognize_loss(
    model: nn.Module,
    x: Any,
    y: Any,
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    output_fn: OutputFn | None = None,
    told: LossFunction | None = None,
) -> TrainingLoss:
    """Recognize the loss of a training step from its value and its gradient on one batch.

    Args:
        model: The network, before the step.
        x: The batch's inputs.
        y: The batch's targets, as for ``recognize_squared_error``, or class numbers or probabilities.
        loss: The loss of the step, 0-d.
        gradients: ``{parameter name: gradient}`` of the step.
        output_fn: Turns what the model returns into (N, C).
        told: The loss as a function of outputs (N, C) and ``y``, if it is known: it is checked all the same.

    Raises:
        UnrecognizedLossError: If value or gradient differ from all of them.
    """
    if told is not None:
        _verify(model, x, y, loss, gradients, output_fn, told, "the loss that was given")
        return TrainingLoss("given", "the loss that was given", y, 1.0, told)
    try:
        found = recognize_squared_error(model, x, y, loss, gradients, output_fn)
    except UnrecognizedLossError as error:
        reason = error
    else:
        return TrainingLoss("mse", found.name, found.targets, 2 * found.c, _squared_error(found.c, found.targets))
    for reduction, words in (("mean", "mean over samples (torch's CrossEntropyLoss)"), ("sum", "sum over samples")):
        function = _cross_entropy(reduction)
        try:
            _verify(model, x, y, loss, gradients, output_fn, function, "the cross-entropy")
        except UnrecognizedLossError:
            continue
        factor = 1 / len(y) if reduction == "mean" else 1.0
        return TrainingLoss("cross_entropy", f"cross-entropy, {words}", y, factor, function)
    raise UnrecognizedLossError(f"neither squared error ({reason}) nor cross-entropy; give loss= if it is another one")


def _verify(
    model: nn.Module,
    x: Any,
    y: Any,
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    output_fn: OutputFn | None,
    function: LossFunction,
    name: str,
) -> None:
    probe = Probe(x)
    with isolated(model, output_fn) as network:
        leaves = {key: value.clone().requires_grad_() for key, value in network.params.items()}
        with torch.no_grad():
            checked_output(network, probe)
        z = network(leaves, network.place(probe))
        try:
            value = function(z, y)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UnrecognizedLossError(f"{name} cannot be had of these targets: {error}") from None
        own, given = float(value.detach()), float(loss)
        if not abs(own - given) <= LOSS_TOLERANCE * abs(own):
            raise UnrecognizedLossError(f"the step's loss is {given:.6g}, {name} on the batch {own:.6g}")
        check_gradients(leaves, value, gradients, name)


def _cross_entropy(reduction: str) -> LossFunction:
    def function(z: Tensor, y: Tensor) -> Tensor:
        targets = y.to(z.dtype) if y.is_floating_point() else y.long()
        return F.cross_entropy(z, targets.to(z.device), reduction=reduction)

    return function


def _squared_error(c: float, targets: Tensor) -> LossFunction:
    """With the mean's share of a batch kept: 1/(N C), 1/N and 1/(2 N) .. go with the batch's own N."""
    N, C = targets.shape
    mean = min((1 / (N * C), 1 / (2 * N), 1 / N, 1 / (2 * N * C)), key=lambda value: abs(value - c))
    per_sample = c * N if abs(mean - c) <= LOSS_TOLERANCE * c and N > 1 else None

    def function(z: Tensor, y: Tensor) -> Tensor:
        if y.shape != z.shape:
            y = F.one_hot(y.long(), z.shape[1]) if not y.is_floating_point() else y[:, None]
        total = (z - y.to(z)).square().sum()
        return total * (c if per_sample is None else per_sample / len(z))

    return function
