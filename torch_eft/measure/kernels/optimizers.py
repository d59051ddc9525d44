"""The optimizer inside the wrapper that a trainer puts around it."""

from typing import Any

from torch.optim import Optimizer

_TRAINERS = ("lightning", "pytorch_lightning", "lightning_fabric", "accelerate")


def plain_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer that a wrapper of Lightning or accelerate takes steps with; any other one as it is.

    One that has another in it, such as Lookahead, takes steps of its own, and is none of these wrappers.

    Args:
        optimizer: An optimizer, or such a wrapper.

    Returns:
        The optimizer.

    Raises:
        TypeError: If it is none.

    Example:
        >>> import torch
        >>> from torch_eft.measure.kernels.optimizers import plain_optimizer
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        >>> plain_optimizer(optimizer) is optimizer
        True
    """
    packages = {base.__module__.partition(".")[0] for base in type(optimizer).__mro__}
    inner = getattr(optimizer, "optimizer", None) if packages.intersection(_TRAINERS) else None
    found = optimizer if inner is None else inner
    if isinstance(found, type):
        raise TypeError(f"optimizer: the class {found.__name__} given; give the training's own optimizer")
    if not isinstance(getattr(found, "param_groups", None), list):
        raise TypeError(f"optimizer: {type(found).__name__} given; give a torch.optim.Optimizer")
    return found
