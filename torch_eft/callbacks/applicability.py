"""Is this training what order 0 covers? What the Trainer and the optimizer can tell, in words."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer


def outside_the_theory(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why the training is not plain full-batch gradient descent on one device, or None if it is."""
    if not pl_module.automatic_optimization:
        return "manual optimization: the steps taken are not known"
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes share the batch; the theory is compared on one"
    if trainer.num_training_batches != 1:
        return f"mini-batches ({trainer.num_training_batches} an epoch): order 0 covers full-batch training"
    if trainer.accumulate_grad_batches != 1:
        return f"gradient accumulation over {trainer.accumulate_grad_batches} batches"
    if trainer.gradient_clip_val:
        return f"gradient clipping at {trainer.gradient_clip_val}"
    if len(trainer.optimizers) != 1:
        return f"{len(trainer.optimizers)} optimizers"
    return _unlike_gradient_descent(trainer.optimizers[0])


def _unlike_gradient_descent(optimizer: Optimizer) -> str | None:
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
