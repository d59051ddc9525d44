"""What the loop has shown of the step that it is about to take, for networks that take the same one."""

from typing import Any

from torch import Tensor, nn

from torch_eft.live.instrument import TrainingStart
from torch_eft.live.instruments.common import too_many
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.network.network import Network
from torch_eft.measure.taylor.trained_step import (
    Batches,
    TrainedStep,
    recognize_step,
    reduced_precision,
)
from torch_eft.measure.training_loss import UnrecognizedLossError
from torch_eft.results.training import LossFunction


class ComingStep:
    """Batches, several where gradients are accumulated, and the first one's loss.

    Attributes:
        batches: As the loop showed them.
        count: Batches shown; they are kept only where that was asked for.
        shown: Whether any was ever shown.
        reduced: Whether the step's gradients were seen to be computed in 16 bits.
    """

    def __init__(self) -> None:
        self.shown = False
        self.clear()

    def clear(self) -> None:
        """The step is taken."""
        self.batches: list[Any] = []
        self.count = 0
        self.reduced = False
        self._loss: Tensor | None = None

    def see(self, batch: Any, model: nn.Module | None) -> None:
        """A batch is shown.

        Args:
            batch: The batch, whose forward comes.
            model: The network, if the batch is to be kept; its gradients are those of the batches before.
        """
        self.shown = True
        self.count += 1
        if model is None:
            return
        if self.count == 2:  # later ones are sums
            self.reduced = reduced_precision(model)
        self.batches.append(batch)

    def see_loss(self, loss: Tensor) -> None:
        """The loss of the latest batch."""
        if len(self.batches) == 1 and self._loss is None:
            self._loss = loss

    def pairs(self) -> Batches:
        """Return (inputs, targets) of every batch.

        Raises:
            ValueError: If there are none, or they are something else.
        """
        if not self.batches:
            raise ValueError("no batch was shown before a step")
        for batch in self.batches:
            if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
                raise ValueError("the batch is not a pair (inputs, targets)")
        return [(batch[0], batch[1]) for batch in self.batches]

    def recognized(
        self,
        model: nn.Module,
        output_fn: OutputFn | None,
        loss_function: LossFunction | None = None,
        known: TrainedStep | None = None,
    ) -> TrainedStep:
        """Recognize the step's loss from the gradients that are there; see ``recognize_step``."""
        if self._loss is None:
            raise UnrecognizedLossError("the loop does not show its loss")
        if self.count == 1:
            self.reduced = reduced_precision(model)
        return recognize_step(
            model,
            self.pairs(),
            self._loss,
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            output_fn=output_fn,
            loss_function=loss_function,
            known=known,
            reduced=self.reduced,
        )


def not_followed(start: TrainingStart, largest: int) -> str | None:
    """Return why networks cannot be trained beside this one, as far as the loop shows when it begins, or None.

    Args:
        start: The training.
        largest: Trainable parameters up to which copies are kept.
    """
    if start.obstacle is not None and not start.obstacle.minibatches:
        return start.obstacle.reason
    if len(start.optimizers) != 1:
        return f"{len(start.optimizers)} optimizers"
    return too_many(start.model, largest)


def output_fn_of(network: Network) -> OutputFn | None:
    """What turns the module's output into (N, C), of a network that may have been given isolated."""
    own = network.model.output_fn if isinstance(network.model, IsolatedModel) else None
    return network.output_fn if own is None else own
