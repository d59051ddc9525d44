"""The callback for transformers.Trainer, and the three lines for accelerate, on a tiny GPT-2 from a configuration."""

import copy

import pytest
import torch
from torch.utils.data import Dataset

from torch_eft import load_run, measure
from torch_eft.callbacks.hugging_face import EFTCallback, some_logits
from torch_eft.live import Observer
from torch_eft.tensorboard import tag

transformers = pytest.importorskip("transformers", reason="transformers is optional: pip install 'torch-eft[hf]'")
accelerate = pytest.importorskip("accelerate", reason="accelerate is optional: pip install 'torch-eft[hf]'")

LETTERS, LENGTH = 24, 6
SIZES = {"vocab_size": LETTERS, "n_positions": LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 16}


class Counting(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = (index + torch.arange(LENGTH)) % LETTERS
        return {"input_ids": tokens, "labels": tokens}


TOKENS = torch.stack([Counting()[index]["input_ids"] for index in range(4)])


def model():
    transformers.set_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))


def train(folder, callbacks, steps=4, resume=None, network=None, **options):
    """Train; returns the parameters and the random number that would come next."""
    network = model() if network is None else network
    arguments = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, **options}
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, seed=0, **arguments
    )
    trainer = transformers.Trainer(network, arguments, train_dataset=Counting(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.detach().clone() for name, value in network.named_parameters()}, torch.rand(3)


def callback(probe="first_batch:4", **options):
    chosen = {} if "instruments" in options else {"preset": "light"}
    return EFTCallback(probe, **{"every": 1, "budget": None, "on_error": "raise", **chosen, **options})


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["plain", "bf16"])
def test_training_ends_in_the_same_bits_and_is_measured_in_single_precision(options, tmp_path):
    bare, after_bare = train(tmp_path / "bare", [], **options)
    monitor = callback()
    watched, after_watched = train(tmp_path / "watched", [monitor], **options)
    assert all(torch.equal(bare[name], watched[name]) for name in bare) and torch.equal(after_bare, after_watched)
    assert list(monitor.history) == [0, 1, 2, 3, 4] and not monitor.skipped
    H = measure.ntk(model(), {"input_ids": TOKENS}, output_fn=some_logits, trace=True)
    assert monitor.history[0][tag("ntk_trace")] == pytest.approx(float(H.diagonal().mean()), rel=1e-5)
    assert monitor.history[4][tag("ntk_drift")] > 0.01
    run = load_run(tmp_path / "watched")
    assert run.history == monitor.history and run.path == tmp_path / "watched" / "eft" / "eft.jsonl"


def test_a_tokenizers_batch_is_a_probe_without_its_labels(tmp_path):
    batch = transformers.BatchEncoding({"input_ids": TOKENS, "labels": TOKENS})
    monitor, first = callback(batch, every="epoch", instruments=["ntk"]), callback(instruments=["ntk"])
    train(tmp_path / "batch", [monitor])
    train(tmp_path / "first", [first])
    assert list(monitor.history) == [0, 4]
    assert monitor.history[4][tag("ntk_drift")] == first.history[4][tag("ntk_drift")]


def test_a_resumed_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole, stopped, resumed = (callback(instruments=["ntk", "representation"]) for _ in range(3))
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path / "whole", [whole], **saving)
    train(tmp_path / "parts", [stopped], **saving)
    train(tmp_path / "parts", [resumed], resume=str(tmp_path / "parts" / "checkpoint-2"), **saving)
    assert list(resumed.history) == [0, 1, 2, 3, 4]
    ours = {step: {k: v for k, v in known.items() if "overhead" not in k} for step, known in resumed.history.items()}
    theirs = {step: {k: v for k, v in known.items() if "overhead" not in k} for step, known in whole.history.items()}
    assert ours == theirs


def test_what_cannot_be_measured_leaves_the_training_alone(tmp_path):
    monitor = EFTCallback(torch.ones(4, LENGTH), preset="light")  # no indices
    with pytest.warns(UserWarning, match=r"measures nothing of this training, which goes on .*x\.long\(\)"):
        train(tmp_path, [monitor], steps=1)
    assert not monitor.history and len(monitor.skipped) == 1


def test_three_lines_under_accelerate_in_mixed_precision():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    network = model()
    twin = copy.deepcopy(network)
    network, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-2))
    observer = Observer(
        accelerator.unwrap_model(network),
        TOKENS,
        optimizer,
        every=1,
        budget=None,
        preset="light",
        output_fn=some_logits,
        on_error="raise",
    )
    observer.begin()
    for step in (1, 2):
        accelerator.backward(network(input_ids=TOKENS, labels=TOKENS).loss)
        optimizer.step()
        optimizer.zero_grad()
        observer.measure(step)
    observer.finish()
    H = measure.ntk(twin, TOKENS, output_fn=some_logits, trace=True)
    assert observer.history[0][tag("ntk_trace")] == pytest.approx(float(H.diagonal().mean()), rel=1e-5)
    assert observer.history[2][tag("ntk_drift")] > 0.01
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
