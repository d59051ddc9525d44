"""The probe: a few fixed inputs on which everything is measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, Dataset

from torch_eft.measure.forward.structure import all_finite

OutputFn: TypeAlias = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Probe:
    """Fixed inputs, checked.

    Args:
        inputs: A tensor or an array (N, ...), a tuple or list of positional arguments, or a dict (any mapping) of
            keyword arguments of the model's forward; every tensor in it has the N samples first, other values are the
            same for all samples. On the CPU, or where the model is.

    Raises:
        ValueError: If there is no tensor, no sample, the numbers of samples or the devices differ, or an input is
            complex or not finite.
        TypeError: If something other than a tensor, array, tuple, list or dict is given.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> probe = measure.Probe({"tokens": torch.zeros(4, 7, dtype=torch.long), "mask": torch.ones(4, 7)})
        >>> probe.size, probe.description
        (4, '(4, 7) int64, (4, 7) float32')
    """

    inputs: Any

    def __post_init__(self) -> None:
        if isinstance(self.inputs, Mapping) and not isinstance(self.inputs, dict):  # what a tokenizer returns, say
            object.__setattr__(self, "inputs", dict(self.inputs))
        if not isinstance(self.inputs, Tensor | tuple | list | dict | numpy.ndarray):
            raise TypeError(f"probe: {type(self.inputs).__name__} given; {_instead_of(self.inputs)}")
        object.__setattr__(self, "inputs", tree_map_only(numpy.ndarray, _tensor, self.inputs))
        tensors = [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        if not tensors or any(tensor.ndim == 0 for tensor in tensors):
            raise ValueError(
                "probe: needs at least one tensor, and every tensor needs the samples as its first axis; make one of "
                "numbers by torch.tensor(...), of texts by their tokenizer"
            )
        sizes = sorted({len(tensor) for tensor in tensors})
        if len(sizes) > 1:
            raise ValueError(f"probe: tensors of {sizes} samples given; all must have the same number")
        if sizes[0] == 0:
            raise ValueError("probe: 0 samples given; give at least one")
        if any(tensor.is_complex() for tensor in tensors):
            raise ValueError("probe: complex inputs given; the measurements are for real numbers")
        if len({tensor.device for tensor in tensors}) > 1:
            places = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
            raise ValueError(f"probe: its tensors are on {places}; bring all to one device, or to the CPU")
        if not all_finite(*tensors):
            raise ValueError("probe: contains NaN or infinite values; inputs must be finite")
        if any(tensor.is_inference() for tensor in tensors):  # no graph can hold them
            with torch.inference_mode(False):
                object.__setattr__(self, "inputs", tree_map_only(Tensor, torch.clone, self.inputs))

    @property
    def size(self) -> int:
        """N, the number of samples."""
        return next(len(leaf) for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor))

    def first(self, count: int) -> "Probe":
        """Return the probe of the first samples, up to ``count``."""
        return self if self.size <= count else self.part(slice(count))

    def part(self, samples: slice) -> "Probe":
        """Return the probe of some of the samples."""
        return Probe(tree_map_only(Tensor, lambda x: x[samples], self.inputs))

    @property
    def description(self) -> str:
        """Shape and dtype, for messages."""
        tensors = [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)


def _instead_of(given: Any) -> str:
    if isinstance(given, nn.Module):
        return "that is a network; give inputs of it, such as x[:16]"
    if isinstance(given, DataLoader | Dataset):
        return (
            "give 'first_batch:16' to a monitor for the first 16 samples, or a batch's inputs, as the forward has them"
        )
    return "give a tensor (N, ...), a tuple of arguments or a dict of keyword arguments for the model's forward"


def _tensor(array: Any) -> Tensor:
    try:
        return torch.tensor(array)
    except TypeError as error:
        raise TypeError(f"probe: an array of {array.dtype} given; give numbers") from error


def as_probe(x: Any) -> Probe:
    """Return ``x`` itself if it is a probe, else the probe with these inputs."""
    return x if isinstance(x, Probe) else Probe(x)


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments and the keyword arguments of the forward."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}
