"""Reads the learning-rate tensor lambda off a network's optimizers."""

import math
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

    Raises:
        ValueError: If the optimizers hold none of its trainable parameters (it is an average or a copy of the network
            that they train), or two of them hold one and do not agree on the ratios of all rates.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_eft import measure
        >>> model = nn.Linear(2, 1)
        >>> groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
        >>> measure.read_learning_rates(model, [torch.optim.SGD(groups)]).lambdas
        {'weight': 1.0, 'bias': 2.0}
    """
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    rates: dict[int, float] = {}
    held: list[dict[int, float]] = []
    for optimizer in optimizers:
        own = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        ours = {key: rate for key, rate in own.items() if key in trained}
        twice = next((trained[key] for key in ours if key in rates), None)
        if twice is not None and not all(_proportional(ours, other) for other in held):
            raise ValueError(
                f"optimizer: two of them train {twice!r}, at other ratios of the learning rates, so that its lambda is "
                "not one number; give only the optimizer whose rates are meant"
            )
        held += [ours] if ours else []
        rates |= own if twice is None else {}  # in the order of the optimizers: the first positive rate is eta
    if trained and rates and not trained.keys() & rates.keys():
        raise ValueError(
            f"optimizer: it holds none of the parameters of this {type(model).__name__}, which is an average or a copy "
            "of the network that it trains; give that network, or no optimizer, for which lambda = 1"
        )
    named = {name: rates.get(key, 0.0) for key, name in trained.items()}
    first = next((rate for rate in rates.values() if rate > 0), 0.0)
    if first == 0.0:
        return LearningRates(0.0, dict.fromkeys(named, 1.0))
    return LearningRates(first, {name: rate / first for name, rate in named.items()})


def _proportional(rates: dict[int, float], other: dict[int, float]) -> bool:
    first = next(iter(rates))
    return rates.keys() == other.keys() and all(
        math.isclose(rate * other[first], rates[first] * other[key], rel_tol=1e-9) for key, rate in rates.items()
    )
