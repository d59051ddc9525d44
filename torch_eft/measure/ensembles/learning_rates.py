"""The learning-rate tensor lambda that an optimizer gives to a network's parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class LearningRates:
    """Per-parameter learning rates, split as eta * lambda.

    Args:
        learning_rate: eta, the learning rate of the first parameter group (0 if all are 0).
        lambdas: ``{name: lambda}``, the parameter's learning rate / eta; 0 for a trainable
            parameter in no optimizer; 1 for all if eta is 0 (e.g. at the start of a warm-up).
    """

    learning_rate: float
    lambdas: dict[str, float]


def read_learning_rates(model: nn.Module, optimizers: Sequence[Optimizer]) -> LearningRates:
    """Read eta and lambda of every trainable parameter of ``model`` off its optimizers."""
    rates: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rates |= {id(parameter): float(group["lr"]) for parameter in group["params"]}
    named = {name: rates.get(id(p), 0.0) for name, p in model.named_parameters() if p.requires_grad}
    first = next((rate for rate in rates.values() if rate > 0), 0.0)
    if first == 0.0:
        return LearningRates(0.0, dict.fromkeys(named, 1.0))
    return LearningRates(first, {name: rate / first for name, rate in named.items()})
