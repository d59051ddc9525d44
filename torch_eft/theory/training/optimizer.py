"""The loss and the optimizer as the expansion about the start sees them: e = dLoss/dz, updates linear in gradients.

Any loss enters training through e and, to first order in a change dz of the outputs, through de = (d^2 Loss/dz^2) dz.
``torch.optim.SGD`` is linear in the gradients it has received: when a gradient is expanded in fixed vectors of
parameter space, the coefficients of the parameters follow the same rule.
"""

import torch
from torch import Tensor
from torch.nn import functional

from torch_eft.results.choices import check_choice
from torch_eft.results.training import LossFunction, Reduction, Training

_UNITS = 16
"""Directions of the loss's Hessian at once: under vmap each takes megabytes."""


class Loss:
    """A loss on the training points, whole or on a minibatch of them.

    Args:
        loss: ``"mse"``, ``"cross_entropy"``, or a differentiable function of outputs (m, C) and targets to a number.
        targets: (N, C), or (N,) classes for the cross-entropy; for a function, anything with N entries.
        reduction: For the named losses: ``"mean"`` is torch's, ``"sum"`` is (1/2) sum (z - y)^2 (PDLT) and the sum of
            cross-entropies.

    Raises:
        ValueError: If the loss or the reduction has another name.
    """

    def __init__(self, loss: str | LossFunction, targets: Tensor, reduction: Reduction = "mean") -> None:
        check_choice("reduction", reduction, ("sum", "mean"))
        if not callable(loss):
            check_choice("loss", loss, ("mse", "cross_entropy"), "a function of (outputs, targets)")
        self.loss, self.targets, self.reduction = loss, targets, reduction

    @property
    def is_squared_error(self) -> bool:
        """True if e is linear in z."""
        return self.loss == "mse"

    def scale(self, count: int) -> float:
        """The factor k of e = k (z - y) for the squared error on ``count`` numbers."""
        return 1.0 if self.reduction == "sum" else 2.0 / count

    def error(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """Returns e = dLoss/dz of outputs (N, C), 0 outside the batch."""
        if self.is_squared_error and batch is None:
            return self.scale(z.numel()) * (z - self.targets)
        batch = None if batch is None else batch.to(z.device)
        rows, targets = self._of_batch(z, batch)
        return self._whole(torch.func.grad(self._value)(rows, targets), z, batch)

    def change_of_error(self, z: Tensor, dz: Tensor, batch: Tensor | None = None) -> Tensor:
        """The derivative of ``error`` along dz (N, C)."""
        if self.is_squared_error and batch is None:
            return self.scale(z.numel()) * dz
        batch = None if batch is None else batch.to(z.device)
        rows, targets = self._of_batch(z, batch)
        along = dz if batch is None else dz[batch]
        changed = torch.func.jvp(lambda rows: torch.func.grad(self._value)(rows, targets), (rows,), (along,))[1]
        return self._whole(changed, z, batch)

    def _of_batch(self, z: Tensor, batch: Tensor | None) -> tuple[Tensor, Tensor]:
        return (z, self.targets) if batch is None else (z[batch], self.targets[batch])

    @staticmethod
    def _whole(rows: Tensor, z: Tensor, batch: Tensor | None) -> Tensor:
        return rows if batch is None else torch.zeros_like(z).index_add(0, batch, rows)

    def _value(self, z: Tensor, targets: Tensor) -> Tensor:
        if callable(self.loss):
            return self.loss(z, targets)
        if self.loss == "mse":
            return self.scale(z.numel()) / 2 * (z - targets).square().sum()
        return functional.cross_entropy(z, targets, reduction=self.reduction)


def checked_targets(y: Tensor, loss: str | LossFunction, count: int, outputs: int) -> Tensor:
    """Check that targets fit a loss.

    Args:
        y: The targets.
        loss: As for ``Loss``.
        count: Number N of training samples.
        outputs: Number C of outputs.

    Returns:
        Classes as they came, other targets of a named loss in float64, those of a function as they came.

    Raises:
        ValueError: If they do not fit.
    """
    if not isinstance(y, Tensor):
        raise ValueError(f"y_train: {type(y).__name__} given; give a tensor")
    if y.is_floating_point() and not bool(torch.isfinite(y).all()):
        raise ValueError("y_train: contains NaN or infinite values; targets must be finite")
    classes = loss == "cross_entropy" and not y.is_floating_point()
    if classes and tuple(y.shape) == (count,) and 0 <= int(y.min()) <= int(y.max()) < outputs:
        return y
    if len(y) != count or classes or (isinstance(loss, str) and tuple(y.shape) != (count, outputs)):
        also = ""
        if loss == "cross_entropy":
            also = f", or ({count},) whole numbers, classes 0 .. {outputs - 1}"
        elif y.ndim == 1 and loss == "mse":
            also = "; for class indices use loss='cross_entropy', or one-hot targets"
        given = f"shape {tuple(y.shape)}" + ("" if y.is_floating_point() else f" {str(y.dtype).removeprefix('torch.')}")
        if classes and y.ndim == 1 and y.numel():
            given += f" from {int(y.min())} to {int(y.max())}"
        raise ValueError(f"y_train: {given} given; x_train and the outputs ask for ({count}, {outputs}){also}")
    return y.double() if isinstance(loss, str) or y.is_floating_point() else y


def loss_of(training: Training, y: Tensor, count: int, outputs: int) -> Loss:
    """Return the loss of a training on checked targets; classes as probabilities.

    Args:
        training: The training.
        y: The targets.
        count: Number N of training samples.
        outputs: Number C of outputs.

    Raises:
        ValueError: If the targets do not fit.
    """
    y = checked_targets(y, training.loss, count, outputs)
    if training.loss == "cross_entropy" and not y.is_floating_point():
        y = functional.one_hot(y.long(), outputs).double()  # gathering by class index is slower under vmap
    return Loss(training.loss, y, training.reduction)


def sharpness(loss: Loss, z: Tensor, H: Tensor, batch: Tensor | None = None) -> float:
    """Return the largest eigenvalue of the loss's Hessian in parameter space, of its part J^T (d^2 Loss/dz^2) J.

    Args:
        loss: The loss.
        z: Training outputs, (N, C).
        H: Their NTK, (N C, N C), or (N, N) if it is the same for all outputs and vanishes between them.
        batch: Samples, or None for all.
    """
    if loss.is_squared_error and batch is None:
        return float(torch.linalg.eigvalsh(H)[-1]) * loss.scale(z.numel())
    units = torch.eye(z.numel(), dtype=z.dtype, device=z.device).unflatten(1, z.shape)
    changes = torch.func.vmap(lambda unit: loss.change_of_error(z, unit, batch), chunk_size=_UNITS)(units)
    values, vectors = torch.linalg.eigh(H)
    root = vectors * values.clamp_min(0.0).sqrt()
    if len(H) == len(z):  # at one output both shapes are one
        root = torch.kron(root.contiguous(), torch.eye(z.shape[1], dtype=H.dtype, device=H.device))
    return float(torch.linalg.eigvalsh(root.T @ changes.flatten(1) @ root)[-1])


class SGDState:
    """Coefficients under one optimizer, each with its momentum, starting at 0.

    Args:
        training: The optimizer.
        values: The coefficients at the start (zeros), of any shapes.
    """

    def __init__(self, training: Training, *values: Tensor) -> None:
        self._training = training
        self.values = list(values)
        self._velocities: list[Tensor] | None = None
        self._step = 0

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._step

    def update(self, *gradients: Tensor) -> None:
        """Take one step of ``torch.optim.SGD`` with these gradients."""
        training = self._training
        m, rate = training.momentum, training.rate(self._step)
        if m == 0:
            self._velocities = list(gradients)
        elif self._velocities is None:
            self._velocities = [gradient.clone() for gradient in gradients]
        else:
            undamped = 1 - training.dampening
            self._velocities = [m * old + undamped * new for old, new in zip(self._velocities, gradients, strict=True)]
        for index, gradient in enumerate(gradients):
            velocity = self._velocities[index]
            direction = gradient + m * velocity if training.nesterov else velocity
            self.values[index] = self.values[index] - rate * direction
        self._step += 1
