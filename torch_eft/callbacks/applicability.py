"""Is this training one full batch a step on one device? What the Trainer can tell, in words."""

from lightning.pytorch import LightningModule, Trainer


def outside_the_theory(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why the loop is not plain full-batch training on one device, or None if it is."""
    if not pl_module.automatic_optimization:
        return "manual optimization: the steps taken are not known"
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes share the batch; the theory is compared on one"
    if trainer.accumulate_grad_batches != 1:
        return f"gradient accumulation over {trainer.accumulate_grad_batches} batches"
    if trainer.gradient_clip_val:
        return f"gradient clipping at {trainer.gradient_clip_val}"
    if trainer.num_training_batches != 1:
        return f"mini-batches ({trainer.num_training_batches} an epoch): order 0 covers full-batch training"
    return None
