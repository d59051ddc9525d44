"""The probe, as tensors, from a file, or as the first samples of a data set."""

import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from torch_eft.measure.forward.isolation.state import PythonState
from torch_eft.measure.forward.probe import Probe, as_probe

ProbeLike: TypeAlias = str | Path | Tensor | tuple[Any, ...] | list[Any] | dict[str, Any] | Probe

_FIRST = re.compile(r"first_batch:([1-9][0-9]*)")


def probe_from(given: ProbeLike | None) -> Probe | None:
    """Read the probe.

    Returns:
        The probe; None for ``"first_batch:N"``, which needs a data set, and for None.

    Raises:
        ValueError: If the file cannot be read, or does not hold a probe.
    """
    if given is None or first_count(given) is not None:
        return None
    if not isinstance(given, str | Path):
        return copied_probe(given)
    hint = "give a file of torch.save with a tensor (N, ...) in it, or 'first_batch:16'"
    if re.match(r"first.?batch", str(given)):
        raise ValueError(f"probe: {str(given)!r} given; say of how many samples, 'first_batch:16'")
    try:
        stored = torch.load(given, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ValueError(f"probe: {str(given)!r} cannot be read ({error.strerror or error}); {hint}") from None
    except Exception as error:  # the unpickler's own errors are of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"probe: {str(given)!r} is not a file of tensors ({reason}); {hint}") from None
    try:
        return as_probe(stored)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{error} (read from {str(given)!r})") from None


def copied_probe(given: Any) -> Probe:
    """Return the probe with inputs of its own: those given may be overwritten in place later, as views of a data set.

    Tensors that were made in inference mode become ordinary ones.
    """
    with torch.inference_mode(False):
        return Probe(tree_map_only(Tensor, lambda x: x.detach().clone(), as_probe(given).inputs))


def same_probe(first: Probe | None, second: Probe | None) -> bool:
    """Return whether two probes hold the same inputs; those that wait for a data set are None."""
    if first is None or second is None:
        return first is second
    ours, theirs = tree_flatten(first.inputs), tree_flatten(second.inputs)
    return ours[1] == theirs[1] and all(
        torch.equal(a.cpu(), b.cpu()) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        for a, b in zip(ours[0], theirs[0], strict=True)
    )


def first_count(given: Any) -> int | None:
    """N of ``"first_batch:N"``; None for anything else."""
    match = _FIRST.fullmatch(given) if isinstance(given, str) else None
    return int(match[1]) if match else None


def first_samples(
    dataset: Any,
    count: int,
    collate: Callable[[list[Any]], Any],
    transfer: Callable[[Any], Any] = lambda batch: batch,
    reached: Iterable[Any] = (),
    inputs_of: Callable[[Any], Any] | None = None,
) -> Probe:
    """The inputs of the first samples of a data set, read by index, leaving its own and the random state as they are.

    Args:
        dataset: A map-style data set of (input, target) pairs, or of inputs.
        count: How many.
        collate: Makes a batch of a list of samples.
        transfer: Makes of the batch what the network is fed.
        reached: What else keeps a state of its own that this may change.
        inputs_of: Takes the inputs out of a batch; None: its first part, or all of it.

    Returns:
        The probe.

    Raises:
        ValueError: If the data set has no indices, or its batches are not pairs or tensors.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(
            f"probe: 'first_batch:{count}' needs a data set that is read by index, not {type(dataset).__name__}; give "
            "the inputs as a tensor or a .pt file"
        )
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    held = nn.Module()
    vars(held)["reached"] = [collate, *reached, *_readers(dataset)]
    own_state = PythonState([held], inside=True)
    try:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices):  # a transform may be random
            for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
                generator.manual_seed(0)
            batch = transfer(collate([dataset[index] for index in range(min(count, len(dataset)))]))
    finally:
        own_state.restore()
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
    if inputs_of is not None:
        return copied_probe(inputs_of(batch))
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"probe: 'first_batch:{count}' needs batches (inputs, targets) or tensors; they are "
            f"{type(batch).__name__} here: give the inputs as the forward takes them, as a tensor or a .pt file"
        )
    return copied_probe(inputs)


def _readers(dataset: Any) -> list[Any]:
    """The data set, those inside it, and their ways to read a sample."""
    inner = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())]
    return [
        dataset,
        dataset.__getitem__,
        *(each for one in inner if hasattr(one, "__getitem__") for each in _readers(one)),
    ]
