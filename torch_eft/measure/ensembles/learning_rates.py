"""Reads the learning-rate tensor lambda off a network's optimizers."""

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

    Example:
        >>> from torch_eft import measure
        >>> measure.LearningRates(0.1, {"weight": 1.0, "bias": 0.0})
        LearningRates(learning_rate=0.1, lambdas={'weight': 1.0, 'bias': 0.0})
    """

    learning_rate: float
    lambdas: dict[str, float]


def read_learning_rates(model: nn.Module, optimizers: Sequence[Optimizer]) -> LearningRates:
    """Read eta and lambda of every trainable parameter of ``model`` off its optimizers.

    Args:
        model: Any module.
        optimizers: Those that train it.

    Returns:
        eta and lambda.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_eft import measure
        >>> model = nn.Linear(2, 1)
        >>> groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
        >>> measure.read_learning_rates(model, [torch.optim.SGD(groups)]).lambdas
        {'weight': 1.0, 'bias': 2.0}
    """
    rates: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rates |= {id(parameter): float(group["lr"]) for parameter in group["params"]}
    named = {name: rates.get(id(p), 0.0) for name, p in model.named_parameters() if p.requires_grad}
    first = next((rate for rate in rates.values() if rate > 0), 0.0)
    if first == 0.0:
        return LearningRates(0.0, dict.fromkeys(named, 1.0))
    return LearningRates(first, {name: rate / first for name, rate in named.items()})
