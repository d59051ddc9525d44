"""Checks that a training takes the steps that are forecast, whoever may change gradients or weights besides.

A loop can clip gradients, change them in hooks, decay weights or project them after the step, now or later, and shows
none of it. Its parameters do: from one step to the next they must move by the SGD step of the gradient, and the
gradient must be that of the loss on the batch. Results stay on their device until they are asked for.

A step that the optimizer does not take is none: without gradients, or left out by a ``GradScaler`` for its infinite
ones. No parameter is written to then, which their version counters show without a wait for the device. Those do not
count what fused optimizers write: unless they have been seen to count, every step is taken, and compared.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.measure.kernels.optimizers import plain_optimizer

TOLERANCE = 1e-4
"""Share of a step, or of a gradient, by which they may differ; float32 agrees to 1e-6."""

SURE, RARELY = 16, 8
"""The first 16 steps are compared, those after a measurement, and by chance one of 8 others."""


class StepCheck:
    """Compares the steps taken with gradient descent (momentum, dampening and Nesterov's as the optimizer has them).

    Args:
        network: The network that is trained.
        gradient: The gradient of the loss on a batch at the current parameters.
        loss: Its name.
        skipped: Steps that were counted before and not taken.

    Attributes:
        skipped: Steps that were counted and not taken.
        begun: Steps that were counted when one was last about to be taken.
    """

    def __init__(
        self,
        network: nn.Module,
        gradient: Callable[[Any, Tensor], Mapping[str, Tensor]],
        loss: str,
        skipped: int = 0,
    ) -> None:
        self._network, self._gradient, self._loss = network, gradient, loss
        self.skipped = skipped
        self.begun = 0
        self._versions: int | None = None  # then
        self._counts = False  # whether versions count what the optimizer writes
        self._nothing = False  # whether there were no gradients
        self._expected: dict[str, Tensor] = {}
        self._length: Tensor | None = None
        self._rounding: Tensor | None = None
        self._first: Tensor | None = None
        self._gradients: tuple[Tensor, Tensor] | None = None  # differences and sizes, if the step is taken
        self._off: list[Tensor | None] = [None, None]
        self._checked = 0
        self._chance = random.Random(0)  # else a change at every tenth step might always fall between

    def before_step(self, step: int, optimizer: Optimizer, batch: tuple[Any, Tensor] | None, measured: bool) -> None:
        """Compare the last step, now that all that follows it is done, and note what the coming one should do.

        Args:
            step: Steps counted so far.
            optimizer: The optimizer, gradients in ``.grad``.
            batch: The batch of the coming step, where it was shown.
            measured: Whether a measurement was made since the last step.
        """
        self.look(step)
        self._expected, self._gradients = {}, None
        self.begun, self._versions = step, versions(self._network)
        named = {name: p for name, p in self._network.named_parameters() if p.requires_grad}
        given = [p.grad for p in named.values() if p.grad is not None]
        self._nothing = not given
        if not given:
            return
        self._checked += 1
        if not (measured or self._checked <= SURE or self._chance.random() < 1 / RARELY):
            return
        if self._first is None:
            self._first = _norm(given)
        elif measured and batch is not None:
            own = self._gradient(*batch)
            differences = [own[name] - (0 if p.grad is None else p.grad) for name, p in named.items() if name in own]
            # Near the minimum both are rounding.
            self._gradients = _norm(differences), _norm(list(own.values())) + self._first
        steps = _sgd_steps(optimizer)
        moves = {name: steps.get(id(p), torch.zeros_like(p)) for name, p in named.items()}
        self._expected = {name: p.detach() - moves[name] for name, p in named.items()}
        self._length = _norm(list(moves.values()))
        self._rounding = _norm([p.detach().float() * torch.finfo(p.dtype).eps for p in named.values()])

    def look(self, step: int) -> None:
        """Compare the current parameters with those that the last step should have given.

        Args:
            step: Steps counted so far.
        """
        idle = versions(self._network) == self._versions
        self._counts |= self._versions is not None and not idle
        if idle and (self._counts or self._nothing or step == self.begun):
            self.skipped += step - self.begun
            self.begun = step
            return
        if self._gradients is not None:
            difference, size = self._gradients
            self._note(1, difference, TOLERANCE * size, size)
            self._gradients = None
        now = {name: p.detach() for name, p in self._network.named_parameters() if name in self._expected}
        if now and self._length is not None and self._rounding is not None:
            error = _norm([value - self._expected[name] for name, value in now.items()])
            self._note(0, error, TOLERANCE * self._length + 4 * self._rounding, self._length)

    def _note(self, which: int, error: Tensor, allowed: Tensor, size: Tensor) -> None:
        fits = (error <= allowed) & error.isfinite()
        share = torch.where(fits, torch.zeros_like(error), (error / size).nan_to_num(1.0, posinf=1.0))
        known = self._off[which]
        self._off[which] = share if known is None else torch.maximum(known, share)

    def reason(self) -> str | None:
        """Return a sentence if a step or a gradient differed from the forecast's, else None; waits for the device."""
        moved, gradient = (0.0 if off is None else float(off) for off in self._off)
        if moved > 0:
            return (
                f"the parameters do not move by -learning_rate times the gradient, but end {moved:.2g} of such a step "
                "away (gradients clipped or changed after the backward pass, a decay, or weights written elsewhere)"
            )
        if gradient > 0:
            return (
                f"the gradient is not that of {self._loss} on the batch any more, but off by {gradient:.2g} of it (a "
                "hook that changes gradients, noise, or another term of the loss)"
            )
        return None


def versions(network: nn.Module) -> int:
    """A number that grows whenever an optimizer, unless it is fused, writes to a parameter; waits for nothing."""
    return sum(p._version for p in network.parameters() if p.requires_grad)


def without_gradients(network: nn.Module) -> bool:
    """Return whether the coming step will not be taken: no gradients, or some that are infinite or NaN; waits."""
    given = [p.grad for p in network.parameters() if p.requires_grad and p.grad is not None]
    return not given or not bool(torch.stack([grad.isfinite().all() for grad in given]).all())


def _sgd_steps(optimizer: Optimizer) -> dict[int, Tensor]:
    """``{id(parameter): lr * direction}`` of ``torch.optim.SGD``, from the gradients and momenta before the step."""
    inner = plain_optimizer(optimizer)
    steps = {}
    for group in inner.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            direction = p.grad.detach()
            if group["weight_decay"]:
                direction = direction + group["weight_decay"] * p.detach()
            if momentum := group["momentum"]:
                velocity = inner.state[p].get("momentum_buffer") if p in inner.state else None
                kept = direction if velocity is None else momentum * velocity + (1 - group["dampening"]) * direction
                direction = direction + momentum * kept if group["nesterov"] else kept
            steps[id(p)] = float(group["lr"]) * direction
    return steps


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.detach().float().norm() for t in tensors]).norm()
