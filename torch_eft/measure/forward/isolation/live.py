"""Runs the live module itself, untouched, as a reference for what is measured on its copy."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.isolation.hooks import KINDS, taking_part
from torch_eft.measure.forward.isolation.network import IsolatedModel
from torch_eft.measure.forward.isolation.operations import LiveWriteError, NoWrites
from torch_eft.measure.forward.isolation.shadow import runs_in_place_of, stand_ins
from torch_eft.measure.forward.isolation.state import PythonState
from torch_eft.measure.forward.probe import as_call


@contextmanager
def live(network: IsolatedModel) -> Iterator[Callable[[Any], Tensor]]:
    """Run the module of the training itself, in evaluation mode, and leave it as it was. Inside ``isolated`` only.

    Nothing of the copy is used: the forward, its closures and the live parameters are those that train. Gradients with
    respect to them are taken by ``torch.autograd.grad`` inside this context, which stays until the backward pass is
    over.

    Guarded: train/eval flags of every submodule; buffers, replaced by copies of the given network's; parameters
    and other tensors of the module (an operation that would write to one is stopped before it does; the version
    counters are compared afterwards); attributes, and what the code of the forward reaches in closures, global names
    and classes (``PythonState``); hooks of gradients and forward hooks that only look (``only_looks``), which do not
    run; autocast and the random states, by the surrounding ``isolated``.

    Args:
        network: Isolated, ``at_own_parameters``.

    Yields:
        The output (N, C) as a function of inputs that are where the network is. Its graph ends in the parameters
        ``dict(network.origin.named_parameters())``.

    Raises:
        LiveWriteError: If the forward writes to a parameter or another tensor of the module in place.
    """
    network.isolation.check()
    module = network.origin
    modules = list(module.modules())
    state = PythonState(modules, inside=True)
    modes = [(part, part.training) for part in modules]
    tensors = _tensors_of(module)
    versions = [(name, tensor, tensor._version, tensor.data) for name, tensor in tensors.items()]
    with ExitStack() as stack:
        stack.callback(_put_back, state, modes, versions)
        buffers: dict[int, tuple[Tensor, int, Tensor]] = {}  # one that two names share stays one
        network.isolation.start(network.constants[name] for name in network.isolation.buffers)
        for place, part in module.named_modules():
            part.training = False
            if isinstance(part, torch.jit.ScriptModule):  # takes no hooks, and holds its buffers in C++
                continue
            vars(part).update(stand_ins(part))
            for kind in KINDS:
                vars(part)[kind] = taking_part(part, kind)
            for kind in ("_backward_hooks", "_backward_pre_hooks"):
                vars(part)[kind] = type(vars(part)[kind])()
            for name, buffer in part._buffers.items():  # counted or averaged in every forward: written to, not refused
                if buffer is not None:
                    given = network.constants.get(f"{place}.{name}".removeprefix("."), buffer)
                    if id(buffer) not in buffers:
                        own = given.to(buffer.dtype, copy=True)
                        buffers[id(buffer)] = own, own._version, given
                    part._buffers[name] = buffers[id(buffer)][0]
        for parameter in module.parameters():
            if parameter._backward_hooks:
                stack.callback(setattr, parameter, "_backward_hooks", parameter._backward_hooks)
                parameter._backward_hooks = None
        if not network.isolation.plain:  # modules of torch.nn alone write to nothing
            stack.enter_context(NoWrites(tensors))

        module = runs_in_place_of(module) or module
        reference = next((p for p in module.parameters() if p.is_floating_point()), None)

        def run(inputs: Any) -> Tensor:
            for own, version, given in buffers.values():  # every forward starts from the same
                if own._version != version:
                    with torch.no_grad():
                        own.copy_(given)
            if reference is not None:  # the copy's half precision is widened, the module's own is not
                inputs = tree_map_only(Tensor, lambda x: x.to(reference.dtype) if x.is_floating_point() else x, inputs)
            args, kwargs = as_call(inputs)
            output = module(*args, **kwargs)
            return output if network.output_fn is None else network.output_fn(output)

        yield run
    for name, tensor, version, _ in versions:
        if tensor._version != version:
            raise LiveWriteError(name)


def _put_back(state: PythonState, modes: Any, versions: Any) -> None:
    state.restore()
    for part, mode in modes:
        part.training = mode
    for _, tensor, _, data in versions:
        if tensor.data_ptr() != data.data_ptr():  # ``tensor.data = ...`` in the forward
            tensor.data = data


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensors in attributes, by name."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for place, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                tensors[f"{place}.{name}".removeprefix(".")] = value
    return {
        name: tensor for name, tensor in tensors.items() if tensor.layout == torch.strided and not tensor.is_inference()
    }
