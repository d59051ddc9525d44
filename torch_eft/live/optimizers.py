"""What an optimizer shows of itself: is it plain gradient descent, and at which rates?"""

import torch
from torch.optim import Optimizer


def unlike_gradient_descent(optimizer: Optimizer) -> str | None:
    """Why the optimizer is not plain gradient descent, or None if it is."""
    if type(optimizer) is not torch.optim.SGD:
        return f"{type(optimizer).__name__}: order 0 is derived for plain gradient descent (torch.optim.SGD)"
    for option in ("momentum", "weight_decay", "nesterov", "maximize"):
        used = [group[option] for group in optimizer.param_groups if group[option]]
        if used:
            return f"SGD with {option}={used[0]}: order 0 is derived without"
    return None


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of every parameter group, as in force for the coming step."""
    return [float(group["lr"]) for group in optimizer.param_groups]
