"""What kind of training step is this? Squared error, full batch: recognized by its numbers.

A training step can hide anything. Its loss value and its gradient on the first batch cannot:
they are compared with those of ``c sum (z - y)^2`` for the usual constants c.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe

LOSS_TOLERANCE = 1e-4
"""Relative agreement asked of the loss value and the gradient; float32 sums agree to 1e-6."""


@dataclass(frozen=True)
class SquaredError:
    """The loss L = c sum_{a,i} (z_{i;a} - y_{i;a})^2.

    Args:
        c: Its constant.
        name: In words, e.g. ``"mean over samples and outputs (torch's MSELoss)"``.
        targets: y, (N, C).
    """

    c: float
    name: str
    targets: Tensor

    @property
    def rate_factor(self) -> float:
        """What multiplies the learning rate to get PDLT's (1/2) sum (z - y)^2."""
        return 2 * self.c


class UnrecognizedLossError(ValueError):
    """The training step is not gradient descent on squared error; the message says how this was seen."""


def recognize_squared_error(
    model: nn.Module,
    x: Any,
    y: Any,
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    output_fn: OutputFn | None = None,
) -> SquaredError:
    """Recognize the loss of a training step from its value and its gradient on one batch.

    Args:
        model: The network, before the step.
        x: The batch's inputs.
        y: The batch's targets: (N, C), (N,) for C = 1, or class numbers (N,), taken as one-hot.
        loss: The loss of the step, 0-d.
        gradients: ``{parameter name: gradient}`` of the step.
        output_fn: Turns what the model returns into (N, C).

    Raises:
        UnrecognizedLossError: If value or gradient differ from those of squared error on (x, y).
    """
    probe = Probe(x)
    with isolated(model, output_fn) as network:
        leaves = {name: value.clone().requires_grad_() for name, value in network.params.items()}
        with torch.no_grad():
            checked_output(network, probe)
        z = network(leaves, network.place(probe))
        targets = _as_targets(y, z)
        total = (z - targets).square().sum()
        found = _matching_constant(total.detach(), loss.detach().to(total), *z.shape)
        check_gradients(leaves, found[0] * total, gradients, "squared error")
    return SquaredError(found[0], found[1], targets.detach())


def check_gradients(leaves: Mapping[str, Tensor], value: Tensor, gradients: Mapping[str, Tensor], name: str) -> None:
    """Compare the gradients of a step with those of a loss.

    Args:
        leaves: ``{parameter name: leaf}`` that the value was computed from.
        value: The loss, 0-d.
        gradients: Of the step.
        name: Of the loss, in words.

    Raises:
        UnrecognizedLossError: If they differ.
    """
    own = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    mine = dict(zip(leaves, own, strict=True))
    missing = [key for key in mine if key not in gradients and bool(mine[key].any())]
    if missing:
        raise UnrecognizedLossError(f"the step has no gradient for {missing[0]!r}")
    differences = [(gradients[key].to(g) - g).norm() for key, g in mine.items() if key in gradients]
    relative = float(torch.stack(differences).norm() / torch.stack([g.norm() for g in mine.values()]).norm())
    if not relative <= LOSS_TOLERANCE:
        raise UnrecognizedLossError(
            f"the step's gradient differs from that of {name} on the batch by {relative:.2g} (dropout, batch "
            "statistics, augmentation, another loss term or reduced precision)"
        )


def _as_targets(y: Any, z: Tensor) -> Tensor:
    if isinstance(y, Tensor):
        if y.shape == z.shape:
            return y.to(z)
        if y.shape == z.shape[:1]:
            if y.is_floating_point() and z.shape[1] == 1:
                return y[:, None].to(z)
            if not y.is_floating_point() and y.min() >= 0 and y.max() < z.shape[1]:
                return F.one_hot(y.long(), z.shape[1]).to(z)
    given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
    raise UnrecognizedLossError(f"targets {given} cannot be laid beside outputs of shape {tuple(z.shape)}")


def _matching_constant(total: Tensor, loss: Tensor, count: int, channels: int) -> tuple[float, str]:
    constants = [
        (1 / (count * channels), "mean over samples and outputs (torch's MSELoss)"),
        (1 / 2, "half the sum (PDLT)"),
        (1.0, "sum over samples and outputs"),
        (1 / (2 * count), "half the sum over outputs, mean over samples"),
        (1 / count, "sum over outputs, mean over samples"),
        (1 / (2 * count * channels), "half the mean over samples and outputs"),
    ]
    value = float(loss)
    for c, name in constants:
        if abs(value - c * float(total)) <= LOSS_TOLERANCE * c * float(total):
            return c, name
    raise UnrecognizedLossError(
        f"the step's loss, {value:.6g}, is no usual multiple of the squared error on the batch, {float(total):.6g}"
    )


def batch_fingerprint(x: Tensor, y: Tensor) -> Tensor:
    """Three numbers that do not depend on the order of the samples, but on which samples there are."""

    def project(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(len(tensor), -1).double()
        return flat @ torch.cos(torch.arange(1, flat.shape[1] + 1, dtype=torch.float64, device=flat.device))

    first, second = project(x), project(y)
    return torch.stack([first.square().mean(), second.square().mean(), (first * second).mean()])


def same_batch(fingerprint: Tensor, reference: Tensor) -> Tensor:
    """Whether two fingerprints are those of the same set of samples, up to the rounding of reordered sums; 0-d."""
    return ((fingerprint - reference).abs() <= 1e-9 * reference[:2].max()).all()
