"""Probes from files and from data sets."""

import random

import numpy
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from torch_eft.live.config.probes import first_count, first_samples, probe_from


def test_a_file_holds_a_probe(tmp_path):
    x = torch.randn(4, 3)
    torch.save(x, tmp_path / "x.pt")
    torch.save({"a": x}, tmp_path / "d.pt")
    assert torch.equal(probe_from(str(tmp_path / "x.pt")).inputs, x)
    assert probe_from(tmp_path / "d.pt").size == 4


def test_unusable_files_are_told_in_a_sentence(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")  # would run code when loaded
    (tmp_path / "text.pt").write_text("hello")
    torch.save([], tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"nowhere.pt' cannot be read \(No such file or directory\); give a file of"):
        probe_from("nowhere.pt")
    for name in ("module.pt", "text.pt"):
        with pytest.raises(ValueError, match=rf"{name}' is not a file of tensors"):
            probe_from(tmp_path / name)
    with pytest.raises(ValueError, match=r"needs at least one tensor.* \(read from .*empty.pt"):
        probe_from(tmp_path / "empty.pt")


def test_first_batch_waits_for_the_data_set():
    assert probe_from("first_batch:16") is None
    assert first_count("first_batch:16") == 16
    for other in ("first_batch:0", "first_batch", "x.pt", 3, torch.ones(2, 2)):
        assert first_count(other) is None


class RandomlyAugmented(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.randn(3) + random.random() + numpy.random.rand(), y


def test_the_first_samples_leave_the_random_state_alone():
    dataset = RandomlyAugmented(torch.zeros(10, 3), torch.zeros(10))
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    assert first_samples(dataset, 4, default_collate).size == 4
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == numpy.random.get_state()[1]).all()


class Augmenting(Dataset):
    """Draws from a generator of its own, counts, and caches."""

    def __init__(self):
        self.numpy, self.torch = numpy.random.default_rng(0), torch.Generator().manual_seed(0)
        self.calls, self.cache, self.file = 0, {}, None

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.calls += 1
        self.file = self.file or object()
        self.cache[index] = torch.full((3,), float(index)) + self.numpy.random() + torch.rand(1, generator=self.torch)
        return self.cache[index]


def test_a_data_sets_own_state_is_left_alone():
    dataset, other = Augmenting(), Augmenting()
    nested = ConcatDataset([Subset(dataset, [3, 1]), Subset(dataset, [2])])
    probe = first_samples(nested, 3, default_collate)
    assert probe.size == 3
    assert (dataset.calls, dataset.cache, dataset.file) == (0, {}, None)
    assert torch.equal(dataset[5], other[5])


def test_the_first_samples_are_the_first():
    x = torch.randn(5, 3)
    assert torch.equal(first_samples(TensorDataset(x, torch.zeros(5)), 3, default_collate).inputs, x[:3])
    assert torch.equal(first_samples(list(x), 9, default_collate).inputs, x)


def test_data_sets_without_indices_or_pairs_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.ones(3)

    with pytest.raises(ValueError, match="needs a data set that is read by index, not Stream"):
        first_samples(Stream(), 4, default_collate)
    with pytest.raises(ValueError, match="they are dict here"):
        first_samples([{"image": torch.ones(3)}] * 4, 4, default_collate)


def test_a_probe_is_kept_as_it_was_given():
    x, tokens = torch.randn(4, 3, requires_grad=True), torch.arange(4)
    before = x.detach().clone()
    for given in (x, {"a": x, "b": [tokens, 3, None]}, probe_from((x,))):
        kept = probe_from(given)
        with torch.no_grad():
            x.mul_(2)
            tokens.add_(1)
        value = kept.inputs["a"] if isinstance(kept.inputs, dict) else kept.inputs
        value = value[0] if isinstance(value, tuple) else value
        assert torch.equal(value, before) and not value.requires_grad
        with torch.no_grad():
            x.div_(2)
            tokens.sub_(1)
    assert kept.size == 4


def test_a_probe_of_inference_mode_becomes_an_ordinary_one():
    with torch.inference_mode():
        x = torch.ones(3, 2)
        kept = probe_from(x).inputs
    assert x.is_inference() and not kept.is_inference()
    assert torch.equal(kept, torch.ones(3, 2))


def test_the_first_samples_are_those_that_the_network_is_fed():
    x = torch.randn(5, 3)
    probe = first_samples(list(x), 3, default_collate, lambda batch: (batch * 2 + torch.randn(1), None))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(probe.inputs, x[:3] * 2 + torch.randn(1, generator=generator))
