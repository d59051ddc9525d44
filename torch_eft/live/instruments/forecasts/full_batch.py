"""Checks that a training is full-batch gradient descent on one batch, before the first step and ever after."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from torch_eft.live.instrument import Event, TrainingStart
from torch_eft.measure.kernels.optimizers import plain_optimizer
from torch_eft.measure.training_loss import batch_fingerprint, same_batch

CAUTION, INVALID = 0.2, 1.0
"""Bounds on the expansion parameter."""

UNSHOWN = "the loop does not show its batches and losses before its steps, so that its loss is not known"

ENDED = "the training ended before a second batch could show that it is full-batch training"

SURE = 16
"""The first 16 later batches are all compared; after that every 16th."""


class FullBatch:
    """Batches, losses and learning rates, as far as a loop shows them; ``batch`` is that of the coming step.

    Where a step adds up the gradients of several batches, they are one: all of the data, part by part.

    Of later batches the first ``SURE`` and every ``SURE``-th after them are compared with the first, on their device
    (a comparison costs as much as a small network's step); the result is read only when a measurement asks for it.

    Args:
        start: The training's beginning.
    """

    def __init__(self, start: TrainingStart) -> None:
        self.start = start
        self._parts: list[tuple[Any, Tensor]] = []
        self._losses: list[Tensor] = []
        self._count = 1  # parts of a step
        self._reference: Tensor | None = None
        self._differs: Tensor | None = None
        self._no_pair = False
        self._later = 0
        self._rates: list[float] = []

    def refusal(self) -> str | None:
        """Return why there can be no forecast of this training, as far as its beginning shows; None if there may be."""
        if self.start.obstacle is not None:
            return self.start.obstacle.reason
        if len(self.start.optimizers) != 1:
            return f"{len(self.start.optimizers)} optimizers"
        return None

    @property
    def batch(self) -> tuple[Any, Tensor] | None:
        """Inputs and targets of the coming step, its parts joined; None where none was shown, or one is no pair."""
        if len(self._parts) < 2:
            return self._parts[0] if self._parts else None
        inputs, targets = zip(*self._parts, strict=True)
        return tree_map(lambda *leaves: torch.cat(leaves), *inputs), torch.cat(targets)

    @property
    def losses(self) -> list[Tensor]:
        """What the loss of the first step may be: of several parts their sum, or their mean; none where none is shown.

        The loop divides each by their number, or their sum.
        """
        if len(self._losses) < 2:
            return self._losses
        each = torch.stack(self._losses)
        return [each.sum(), each.mean()]

    def observe_batch(self, batch: Any) -> None:
        """Keep the first step's; compare the others with it."""
        pair = _is_pair(batch)
        if self._reference is not None and len(self._parts) >= self._count:
            self._parts = []  # of a step that was not announced
        self._parts = [*self._parts, (batch[0], batch[1])] if pair else []
        if self._reference is None:
            return
        if not pair:
            self._no_pair = True
            return
        if len(self._parts) < self._count:
            return
        self._later += 1
        if self._later > SURE and self._later % SURE:
            return
        assert self.batch is not None
        differs = ~same_batch(_fingerprint(*self.batch), self._reference)
        self._differs = differs if self._differs is None else self._differs | differs

    def observe_loss(self, loss: Tensor) -> None:
        """Keep those of the first step."""
        if self._reference is None:
            self._losses.append(loss)

    def begin(self, optimizer: Optimizer) -> None:
        """Remember batch and learning rates: once there is a forecast, they must stay."""
        if self.batch is not None:
            self._reference, self._count = _fingerprint(*self.batch), len(self._parts)
        self._rates = rates(optimizer)
        self.clear()

    def clear(self) -> None:
        """The step is taken."""
        self._parts, self._losses = [], []

    def end(self, step: int, optimizer: Optimizer, any_rate: bool = False) -> str | None:
        """Return why the forecast ends with the coming step, or None; without waiting for the device."""
        if self._no_pair:
            return "a later batch is not a pair (inputs, targets) of tensors"
        if not any_rate and rates(optimizer) != self._rates:
            return f"the learning rate changed at step {step}: the forecast is for a constant one"
        return None

    def unlike(self, kept: dict[str, Any], optimizer: Optimizer, any_rate: bool = False) -> str | None:
        """Return why a forecast that a checkpoint kept does not go on, or None.

        Args:
            kept: What ``state`` returned; anything else raises an exception of any kind.
            optimizer: The optimizer in force.
            any_rate: Whether the learning rates may be others.

        Returns:
            The reason, or None.
        """
        rates_then, rates_now = [float(rate) for rate in kept["rates"]], rates(optimizer)
        if rates_then != rates_now and not any_rate:
            return f"the learning rate is another after the resume: {rates_now}, it was {rates_then}"
        assert self.batch is not None
        now = _fingerprint(*self.batch)
        if not bool(same_batch(now, kept["fingerprint"].to(now))):
            return "the batch holds other samples after the resume than before: not those of the forecast"
        return None

    def state(self) -> dict[str, Any]:
        """Batch and learning rates of the forecast: plain types and tensors."""
        return {"rates": list(self._rates), "fingerprint": self._reference}

    def changed(self) -> str | None:
        """Return a sentence if a batch held other samples, or None; waits for the device."""
        if self._differs is not None and bool(self._differs):
            return "a later batch holds other samples than the first: not full-batch training"
        return None


def _is_pair(batch: Any) -> bool:
    """Return whether it is (inputs, targets): tensors in any structure, and a tensor with as many samples."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor) or not batch[1].ndim:
        return False
    leaves = tree_leaves(batch[0])
    return len(leaves) > 0 and all(
        isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(batch[1]) for leaf in leaves
    )


def _fingerprint(x: Any, y: Tensor) -> Tensor:
    """Fingerprint of the batch, all inputs side by side."""
    if not isinstance(x, Tensor):
        x = torch.cat([leaf.reshape(len(leaf), -1).double() for leaf in tree_leaves(x)], 1)
    return batch_fingerprint(x, y)


def rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of every parameter group, as in force for the coming step."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def sgd_options(optimizer: Optimizer, at_rest: bool = True, decay: bool = False) -> dict[str, Any] | str:
    """Momentum, Nesterov and dampening of ``torch.optim.SGD``; or why its steps are not linear in the gradients.

    Args:
        optimizer: The optimizer, or Lightning's wrapper of it.
        at_rest: Whether it has not taken a step yet: the forecast's momentum is zero there, and not after a resume.
        decay: Whether the forecast follows weight decay.

    Returns:
        The options, or the reason as a sentence.
    """
    inner = plain_optimizer(optimizer)
    if type(inner) is not torch.optim.SGD:
        return f"{type(inner).__name__}: forecasts are derived for gradient descent (torch.optim.SGD)"
    for option in ("maximize",) if decay else ("weight_decay", "maximize"):
        used = [group[option] for group in inner.param_groups if group[option]]
        if used:
            return f"SGD with {option}={used[0]}: forecasts are derived without"
    options = [{key: group[key] for key in ("momentum", "nesterov", "dampening")} for group in inner.param_groups]
    if any(other != options[0] for other in options):
        return "SGD with another momentum for some parameters: forecasts are derived for one"
    moving = any(
        inner.state[p].get("momentum_buffer") is not None
        for group in inner.param_groups
        for p in group["params"]
        if p in inner.state
    )
    if at_rest and moving:
        return "the optimizer carries momentum of earlier steps: forecasts start at rest"
    if not at_rest and not moving and options[0]["momentum"]:
        return "the optimizer lost its momentum with the resume: the forecast has it all along"
    return options[0]


class ValidityWatch:
    """Reports once when the expansion parameter, order 1 over order 0, passes 0.2, and once when it passes 1.

    Args:
        what: A phrase saying whose forecast it is.

    Attributes:
        level: 1 if the first bound has been passed, 2 if both.
    """

    def __init__(self, what: str) -> None:
        self.what, self.level = what, 0

    def events(self, step: int, expansion_parameter: float | None) -> list[Event]:
        """The event of this step, if a bound is passed."""
        size = expansion_parameter or 0.0
        level = 2 if size >= INVALID else 1 if size >= CAUTION else 0
        if level <= self.level:
            return []
        self.level = level
        meaning = (
            "order 1 is a rough correction from here on, what is neglected about the square of that"
            if level == 1
            else "order 1 is not a small correction any more, the forecast is not valid from here on"
        )
        bound = CAUTION if level == 1 else INVALID
        return [
            Event(
                step,
                "validity",
                f"{self.what}: terms of order 1 are {size:.3g} times those of order 0, above {bound:g}; {meaning}",
            )
        ]
