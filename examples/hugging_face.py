"""A tiny GPT-2, made from a configuration and trained by transformers.Trainer, with one line attached.

It learns to continue counting in a made-up alphabet; nothing is downloaded. Run:

    pip install "torch-eft[hf]"
    python examples/hugging_face.py && tensorboard --logdir hugging_face_run
"""

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from torch_eft.callbacks.hugging_face import EFTCallback

LETTERS, LENGTH = 32, 12


class Counting(Dataset):
    """Sequences a, a + s, a + 2 s, ... modulo the size of the alphabet."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + (1 + index % 3) * torch.arange(LENGTH)) % LETTERS
        return {"input_ids": tokens, "labels": tokens}


def main(steps: int = 60, output_dir: str = "hugging_face_run", **arguments: object) -> EFTCallback:
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=LETTERS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, n_inner=64)
    )
    callback = EFTCallback(probe="first_batch:8")  # the one line
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            report_to="none",
            **{"save_strategy": "no", "use_cpu": not torch.cuda.is_available(), **arguments},
        ),
        train_dataset=Counting(),
        callbacks=[callback],
    )
    trainer.train()
    return callback


if __name__ == "__main__":
    callback = main()
    print(callback.history)
    for step, scalars in callback.history.items():
        if "eft/ntk_drift/measured" in scalars:
            print(f"step {step:4}: the NTK has changed by {scalars['eft/ntk_drift/measured']:.3f}")
