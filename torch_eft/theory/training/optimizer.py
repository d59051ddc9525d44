"""Losses and optimizers as the expansion about the start sees them: e = dLoss/dz, and updates linear in gradients.

Any loss enters training through e and, to first order in a change dz of the outputs, through de = (d^2 Loss/dz^2) dz.
``torch.optim.SGD`` is linear in the gradients that it was given: so are its coefficients when a gradient is expanded in
fixed vectors of parameter space. Adam, clipping and decay towards zero are not of this kind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Reduction = Literal["sum", "mean"]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Schedule = Sequence[float] | Callable[[int], float]


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
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: {reduction!r} given; give 'sum' or 'mean'")
        if not callable(loss) and loss not in ("mse", "cross_entropy"):
            raise ValueError(f"loss: {loss!r} given; give 'mse', 'cross_entropy' or a function of (outputs, targets)")
        self.loss, self.targets, self.reduction = loss, targets, reduction

    @property
    def is_squared_error(self) -> bool:
        """Whether e is linear in z."""
        return self.loss == "mse"

    def scale(self, count: int) -> float:
        """The factor k of e = k (z - y) for the squared error on ``count`` numbers."""
        return 1.0 if self.reduction == "sum" else 2.0 / count

    def error(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """E = dLoss/dz of outputs (N, C), 0 outside the batch."""
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


@dataclass(frozen=True)
class Descent:
    """Gradient descent as ``torch.optim.SGD`` does it, without decay.

    Args:
        learning_rates: eta at every step, (T,).
        momentum: m of the heavy ball.
        dampening: Of the gradient from the second step on.
        nesterov: Nesterov's momentum.
        batches: The samples of every step's minibatch, T index tensors; None is the full batch.
    """

    learning_rates: tuple[float, ...]
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    batches: tuple[Tensor, ...] | None = None

    @property
    def steps(self) -> int:
        """T."""
        return len(self.learning_rates)

    @property
    def is_plain(self) -> bool:
        """Whether this is full-batch gradient descent at one rate."""
        return self.momentum == 0 and self.batches is None and len(set(self.learning_rates)) <= 1

    @property
    def largest_stable(self) -> float:
        """The largest stable eta times an eigenvalue of the loss's Hessian: 2, 2 (1 + m), or less for Nesterov.

        From |roots| < 1 of x^2 - (1 + m - h) x + m, heavy ball, or x^2 - (1 + m) (1 - h) x + m (1 - h), Nesterov.
        """
        m = self.momentum
        return 2 * (1 + m) / (1 + 2 * m) if self.nesterov else 2 * (1 + m) / (1 - self.dampening)

    def batch(self, step: int) -> Tensor | None:
        """The samples of a step, or None for all."""
        return None if self.batches is None else self.batches[step]


class SGDState:
    """Coefficients under one optimizer, each with its momentum, starting at 0.

    Args:
        descent: The optimizer.
        values: What the coefficients start from (zeros): any shapes.
    """

    def __init__(self, descent: Descent, *values: Tensor) -> None:
        self.descent = descent
        self.values = list(values)
        self._velocities: list[Tensor] | None = None
        self._step = 0

    def update(self, *gradients: Tensor) -> None:
        """One step of ``torch.optim.SGD`` with these gradients."""
        m, rate = self.descent.momentum, self.descent.learning_rates[self._step]
        if m == 0:
            self._velocities = list(gradients)
        elif self._velocities is None:
            self._velocities = [gradient.clone() for gradient in gradients]
        else:
            undamped = 1 - self.descent.dampening
            self._velocities = [m * old + undamped * new for old, new in zip(self._velocities, gradients, strict=True)]
        for index, gradient in enumerate(gradients):
            velocity = self._velocities[index]
            direction = gradient + m * velocity if self.descent.nesterov else velocity
            self.values[index] = self.values[index] - rate * direction
        self._step += 1


def descent(
    learning_rate: float,
    steps: int,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    schedule: Schedule | None = None,
    batches: Sequence[Sequence[int] | Tensor] | None = None,
    samples: int | None = None,
) -> Descent:
    """A checked ``Descent``.

    Args:
        learning_rate: eta > 0.
        steps: T >= 0.
        momentum: In [0, 1).
        dampening: In [0, 1).
        nesterov: As in torch, with momentum and without dampening.
        schedule: The learning rate of every step, instead of ``learning_rate``: a sequence or a function of the step.
        batches: One set of sample indices a step; fewer than T are gone through again.
        samples: N, to check the batches against.

    Raises:
        ValueError: If a number is out of its range.
    """
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: {steps} given; give a whole number >= 0")
    if not 0 <= momentum < 1 or not 0 <= dampening < 1:
        raise ValueError(f"momentum: {momentum:g}, dampening: {dampening:g} given; both must lie in [0, 1)")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError("nesterov: needs momentum > 0 and dampening 0, as in torch.optim.SGD")
    if schedule is None:
        rates = [float(learning_rate)] * steps
        if not learning_rate > 0:
            raise ValueError(f"learning_rate: {learning_rate:g} given; it must be positive")
    else:
        rates = [float(schedule(step)) for step in range(steps)] if callable(schedule) else list(map(float, schedule))
    if len(rates) < steps:
        raise ValueError(f"schedule: {len(rates)} learning rates given for {steps} steps; give one a step")
    wrong = next((rate for rate in rates[:steps] if not 0 <= rate < float("inf")), None)
    if wrong is not None:
        raise ValueError(f"schedule: a learning rate of {wrong:g} given; all must be finite and >= 0")
    return Descent(tuple(rates[:steps]), momentum, dampening, nesterov, _checked_batches(batches, steps, samples))


def _checked_batches(
    batches: Sequence[Sequence[int] | Tensor] | None, steps: int, samples: int | None
) -> tuple[Tensor, ...] | None:
    if batches is None:
        return None
    if len(batches) == 0:
        raise ValueError("batches: none given; give at least one set of sample indices, or None for the full batch")
    found = [torch.as_tensor(batch, dtype=torch.long) for batch in batches]
    for batch in found:
        outside = samples is not None and batch.numel() > 0 and not 0 <= int(batch.min()) <= int(batch.max()) < samples
        if batch.ndim != 1 or batch.numel() == 0 or outside:
            raise ValueError(f"batches: {batch.tolist()} given; each is a list of sample indices, 0 .. N - 1")
    return tuple(found[step % len(found)] for step in range(steps))
