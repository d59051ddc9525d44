"""What a Trainer's data set tells before training: its first samples as the network is fed them, and full batches."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from torch_eft.live.config.probes import first_samples
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import Probe

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""Through which a batch goes before each training step, in this order."""


def first_inputs(trainer: Trainer, module: LightningModule, count: int) -> Probe:
    """Read the first samples of the training data set; no loader, random state or hook's own state is touched.

    Args:
        trainer: The Trainer, training.
        module: Its module.
        count: How many samples.

    Returns:
        The inputs, after the batch-transfer hooks.

    Raises:
        ValueError: If there is no data set that can be read by index, or its batches are not pairs or tensors.
    """
    loader = trainer.train_dataloader
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if dataset is None or collate is None:
        raise ValueError(
            f"probe: 'first_batch:{count}' needs one training DataLoader, not {type(loader).__name__}; give the inputs "
            "as a tensor or a .pt file"
        )
    owners = [each for each in (trainer.datamodule, module) if each is not None]  # type: ignore[attr-defined]
    hooks = [getattr(owner, name) for owner in owners for name in HOOKS]
    return first_samples(dataset, count, collate, lambda batch: _fed(trainer, module, batch), hooks)


def _fed(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """The batch as ``training_step`` gets it: the module's hooks run on a copy of it."""
    batch = trainer.precision_plugin.convert_input(batch)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    own = {name: data if data is not None and is_overridden(name, data) else module for name in HOOKS}
    if not any(owner is data or is_overridden(name, module) for name, owner in own.items()):
        return batch  # nothing but a move to the device
    with isolated(module) as network:
        copied: Any = network.shadow
        for there, here in zip(module.modules(), copied.modules(), strict=True):
            here.training = there.training
        copied.trainer = trainer
        for name, owner in own.items():
            device = (trainer.strategy.root_device,) if name == "transfer_batch_to_device" else ()
            hook = getattr(copied if owner is module else data, name)
            batch = hook(batch, *device, 0)
    return batch


def full_batch(trainer: Trainer, module: LightningModule) -> bool:
    """Return whether every step is sure to take the same batch, all of the data: tensors, in one batch, as they are.

    What another data set returns may be random; two batches show whether it is.

    Args:
        trainer: The Trainer, training.
        module: Its module.

    Returns:
        Whether it is sure.
    """
    loader = trainer.train_dataloader
    if trainer.num_training_batches != 1 or type(loader) is not DataLoader or loader.collate_fn is not default_collate:
        return False
    owners = [each for each in (trainer.datamodule, module) if each is not None]  # type: ignore[attr-defined]
    if any(is_overridden(name, owner) for owner in owners for name in HOOKS):
        return False
    data: Any = loader.dataset
    sampler: Any = loader.sampler
    size = loader.batch_size
    source = data
    while type(source) is Subset:
        source = source.dataset
    whole = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    return type(source) is TensorDataset and whole and size is not None and len(sampler) == len(data) <= size
