"""Evaluation that leaves a training untouched.

What is guarded: parameters and buffers (a shadow module; parameters shared and only read,
buffers cloned), train/eval flags and attributes set in ``forward`` (they are set on the
shadow), gradients (nothing calls ``backward``), the random state of torch, CUDA, NumPy and
Python, and the surrounding autocast, grad and inference modes.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from torch_eft.measure.probe import OutputFn, Probe


@dataclass(frozen=True)
class IsolatedModel:
    """A network as a pure function of its trainable parameters, in evaluation mode.

    Args:
        shadow: The module, safe to call; its buffers are copies.
        params: Trainable parameters by name, detached; half precision is widened to float32.
        constants: Frozen parameters and buffers by name.
        output_fn: Turns the module's output into (N, C), or None if it already is.
    """

    shadow: nn.Module
    params: dict[str, Tensor]
    constants: dict[str, Tensor]
    output_fn: OutputFn | None

    def __call__(self, params: dict[str, Tensor], inputs: Any) -> Tensor:
        """The output (N, C) on a batch ``inputs`` (a tensor, a tuple of arguments or a dict of keyword arguments)."""
        args, kwargs = (), {}
        if isinstance(inputs, dict):
            kwargs = inputs
        else:
            args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        output = functional_call(self.shadow, {**params, **self.constants}, args, kwargs)
        return output if self.output_fn is None else self.output_fn(output)

    def place(self, probe: Probe) -> Any:
        """The probe's inputs on the device of the parameters, floating tensors in their dtype."""
        reference = next(iter([*self.params.values(), *self.constants.values()]), None)
        if reference is None:
            return probe.inputs

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(reference.device, reference.dtype if tensor.is_floating_point() else None)

        return tree_map_only(Tensor, move, probe.inputs)


@contextmanager
def isolated(model: nn.Module, output_fn: OutputFn | None = None) -> Iterator[IsolatedModel]:
    """Evaluate ``model`` without leaving a trace in it or in the process.

    Args:
        model: Any module; a ``LightningModule``, a compiled or a wrapped one included.
        output_fn: Turns the module's output into (N, C).

    Yields:
        The network as a pure function.

    Raises:
        ValueError: If a lazy module has not seen a batch yet.
    """
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield _shadow_of(model, output_fn)
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


def _shadow_of(model: nn.Module, output_fn: OutputFn | None) -> IsolatedModel:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"model: the parameter {name!r} is not initialised yet (a lazy module); run a batch through it first"
            )
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        # A forward may have cached an activation: deepcopy refuses non-leaf tensors.
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()
    shadow = copy.deepcopy(model, memo).eval()
    for module in shadow.modules():
        # Else a compiled LightningModule's copy would go on calling the original.
        module._compiled_call_impl = None
    params = {name: _readable(p) for name, p in shadow.named_parameters() if p.requires_grad}
    constants = {name: _readable(p) for name, p in shadow.named_parameters() if not p.requires_grad}
    constants |= {name: _readable(buffer) for name, buffer in shadow.named_buffers()}
    return IsolatedModel(shadow, params, constants, output_fn)


def _readable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
