"""What of the callback for transformers.Trainer works, and says, without transformers."""

import pytest
import torch

from torch_eft.callbacks import hugging_face
from torch_eft.callbacks.hugging_face import MOST_OUTPUTS, EFTCallback, some_logits


def test_without_transformers_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr(hugging_face, "TrainerCallback", object)
    with pytest.raises(ImportError, match=r"EFTCallback needs transformers: pip install 'torch-eft\[hf\]'"):
        EFTCallback("first_batch:8")


def test_logits_are_taken_from_what_models_return():
    z = torch.arange(4 * 3 * 40.0).reshape(4, 3, 40)
    few = some_logits({"logits": z})
    assert few.shape == (4, MOST_OUTPUTS) and torch.equal(few[:, 8], z[:, -1, 20])
    assert torch.equal(some_logits({"logits": z[:, 0, :2]}), z[:, 0, :2])
    for returned in ((z,), {"last_hidden_state": z}):
        with pytest.raises(ValueError, match="without logits; give output_fn="):
            some_logits(returned)
