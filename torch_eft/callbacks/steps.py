"""Optimizer steps: those that Lightning counts, and those that it does not."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class StepCounter:
    """``Trainer.global_step``, and one step for every batch after which parameters had moved without it.

    In manual optimization Lightning counts the steps of its own wrappers only: not those of raw optimizers, of
    optimizers inside others (SAM), or of ``-=`` by hand. Parameters that were written have another version, or another
    place in memory; writes to ``.data`` show in their values only, which are read as long as Lightning counts nothing
    at all (on CUDA that waits for the device).

    Attributes:
        uncounted: Steps that Lightning did not count.
    """

    def __init__(self) -> None:
        self.uncounted = 0

    def begin(self, trainer: "Trainer", network: nn.Module) -> int:
        """Start counting; returns the steps so far."""
        self._counted = self._first = trainer.global_step
        self._versions, self._values = _versions(network), _values(network)
        return self._counted + self.uncounted

    def steps(self, trainer: "Trainer", network: nn.Module) -> int:
        """Optimizer steps taken so far; to be asked at the end of every batch.

        Args:
            trainer: The Trainer.
            network: The network whose motion counts.

        Returns:
            The steps.
        """
        module = trainer.lightning_module
        if module is None or module.automatic_optimization:
            return trainer.global_step + self.uncounted
        versions, before = _versions(network), self._versions
        self._versions = versions
        if trainer.global_step != self._counted:
            self._counted = trainer.global_step
        elif versions != before:
            self.uncounted += 1
        elif self._counted == self._first:
            values, then = _values(network), self._values
            self._values = values
            self.uncounted += not torch.equal(values, then)
            return self._counted + self.uncounted
        if self._counted == self._first:
            self._values = _values(network)
        return self._counted + self.uncounted


def _versions(network: nn.Module) -> list[tuple[int, int]]:
    return [(p.data_ptr(), p._version) for p in network.parameters() if p.requires_grad]


def _values(network: nn.Module) -> torch.Tensor:
    """The norms of the parameters."""
    values = [p.detach() for p in network.parameters() if p.requires_grad]
    return torch.stack([value.float() for value in torch._foreach_norm(values)]) if values else torch.empty(0)
