"""Evaluates a network without a trace in its training, and independently of the training's settings.

Guarded: parameters and buffers (a shadow module; parameters shared and only read, buffers cloned), train/eval
flags and attributes set in ``forward`` (they are set on the shadow), gradients (nothing calls ``backward``), the random
state of torch, CUDA, NumPy and Python, torch's default dtype, and the surrounding autocast, grad and inference modes.

Set meanwhile: attention in elementary operations, as its fused kernels lack derivatives; float32 products in
full float32, as TF32 and bfloat16 round at 1e-3, the size of the changes that are measured; compiled modules run as
they are written.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.isolation.operations import GivenTensors, NoWrites
from torch_eft.measure.forward.isolation.process import (
    differentiable,
    elementary_operations,
    own_forwards,
    process_state,
)
from torch_eft.measure.forward.isolation.shadow import Copies, runs_in_place_of
from torch_eft.measure.forward.isolation.state import PythonState
from torch_eft.measure.forward.probe import OutputFn, Probe, as_call
from torch_eft.measure.forward.structure import check_structure
from torch_eft.results.choices import nearest


class Place(NamedTuple):
    """Where a module keeps a parameter or a buffer of its own."""

    tensors: dict[str, Any]
    key: str
    own: Tensor
    name: str

    def put(self, tensor: Tensor) -> None:
        """Put a tensor there; no check for parameters is made."""
        self.tensors[self.key] = tensor


_roundings: "WeakKeyDictionary[nn.Module, float]" = WeakKeyDictionary()


@dataclass
class Isolation:
    """What the same network at several parameters shares.

    Args:
        buffers: Names of its buffers.
        places: Where the copied module keeps its parameters and buffers.
        copies: How it was copied.
        plain: It consists of modules of torch.nn alone: nothing needs to be watched.
        own: The module's own trainable parameters, as ``IsolatedModel.params`` has them.
        origin: The module itself.
        rounding: The coarsest eps of a dtype in which the module itself computes, as far as was ever seen; its copy
            computes in one precision throughout.
        state: What forwards can change in the copy and around it; every one starts from it.
        without_gradient: Ids of given parameters that forwards have used while they had gradients off.
        open: Whether the ``with`` that isolated it has not ended yet.
        modes: ``training`` of every module of the copy, for once; None: all evaluate.
    """

    buffers: frozenset[str]
    places: list[Place]
    copies: Copies
    plain: bool
    own: dict[str, Tensor]
    origin: nn.Module
    rounding: float
    state: PythonState
    without_gradient: set[int] = field(default_factory=set)
    open: bool = True
    modes: tuple[bool, ...] | None = None
    _buffers: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ``RuntimeError`` after the end: the parameters go on changing, and nothing is guarded any more."""
        if not self.open:
            raise RuntimeError(
                "model: this isolated network was used after the end of the `with` that isolated it, while its "
                "parameters may have changed and its buffers have not; measure inside `with`, or give the module"
            )

    def put_back(self) -> None:
        """Put the copied module's own parameters back into it."""
        for place in self.places:
            place.put(place.own)

    def close(self) -> None:
        """End the isolation."""
        self.open = False
        self.state.restore()
        self.put_back()

    def start(self, buffers: Iterable[Tensor]) -> None:
        """Put back what an earlier forward has changed: its outputs depend on parameters and inputs alone."""
        if self.plain:
            return
        self.state.restore()
        self._set_modes()
        for value in buffers:
            kept = self._buffers.get(id(value))
            if kept is None or value._version != kept[1]:
                with torch.no_grad():
                    before = value.clone() if kept is None else value.copy_(kept[2])
                self._buffers[id(value)] = value, value._version, before if kept is None else kept[2]

    def updated(self, constants: Mapping[str, Tensor]) -> list[str]:
        """Names of the buffers that the last forward has written to, in networks not of torch.nn's modules alone."""
        kept = {name: self._buffers.get(id(constants[name])) for name in self.buffers}
        return [name for name, of in kept.items() if of is not None and constants[name]._version != of[1]]

    @contextmanager
    def training_as(self, modes: Sequence[bool]) -> Iterator[None]:
        """Run forwards in other modes than that of evaluation, ``training`` of every module in their order."""
        self.modes = tuple(modes)
        self._set_modes()
        try:
            yield
        finally:
            self.modes = None
            for module in self.copies.module.modules():
                module.training = False

    def _set_modes(self) -> None:
        if self.modes is not None:
            for module, mode in zip(self.copies.module.modules(), self.modes, strict=True):
                module.training = mode

    @contextmanager
    def watched(self, tensors: Mapping[str, Tensor], inputs: Any) -> Iterator[None]:
        """Watch the operations of a forward with the given parameters and buffers."""
        if self.plain:
            yield
            return
        given = {key: tensors[name] for key, name in self.copies.live.items()}
        given |= {key: tensors[name].detach() for key, name in self.copies.aliases.items()}
        precision = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.get_default_dtype())
        watch = GivenTensors(given, self.copies.refused, precision, inputs, self.note, self.without_gradient)
        with watch, NoWrites(self.copies.shared) if self.copies.shared else nullcontext():
            yield

    def note(self, dtype: torch.dtype) -> None:
        """Note a dtype in which the module itself computes."""
        self.rounding = _roundings[self.origin] = max(self.rounding, torch.finfo(dtype).eps)


@dataclass(frozen=True)
class IsolatedModel:
    """A network as a pure function of its trainable parameters, in evaluation mode.

    Args:
        module: The copy that is called, with the parameters of the last call in it; see ``shadow``.
        params: Trainable parameters by name, detached; half precision is widened to float32.
        constants: Frozen parameters and buffers by name.
        output_fn: Turns the module's output into (N, C), or None if it already is.
        origin: The module itself, to remember findings by; never called.
        isolation: Shared with the same network at other parameters; calls are refused when it has ended.
    """

    module: nn.Module
    params: dict[str, Tensor]
    constants: dict[str, Tensor]
    output_fn: OutputFn | None
    origin: nn.Module
    isolation: Isolation

    def __call__(self, params: dict[str, Tensor], inputs: Any) -> Tensor:
        """The output (N, C) on a batch ``inputs`` (a tensor, a tuple of arguments or a dict of keyword arguments)."""
        self.isolation.check()
        args, kwargs = as_call(inputs)
        tensors = {**self.params, **params, **self.constants}
        self.isolation.start(tensors[name] for name in self.isolation.buffers)
        for place in self.isolation.places:  # they stay until the next call: a backward pass may run a part again
            place.put(tensors[place.name])
        with self.isolation.watched(tensors, inputs):
            output = self.module(*args, **kwargs)
            return output if self.output_fn is None else self.output_fn(output)

    @property
    def at_own_parameters(self) -> bool:
        """Whether the values of all trainable parameters are those of the module itself, which may be widened."""
        return all(self.params[name] is value for name, value in self.isolation.own.items())

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Run forwards in the modes in which the module itself is now, instead of in evaluation mode."""
        modes = {name: part.training for name, part in self.origin.named_modules()}
        names = [name for name, _ in self.module.named_modules()]
        with self.isolation.training_as([modes.get(name, self.origin.training) for name in names]):
            yield

    @property
    def shadow(self) -> nn.Module:
        """The module, safe to call, with its own parameters; its parameters and buffers are copies."""
        self.isolation.put_back()
        return self.module

    def place(self, probe: Probe) -> Any:
        """Bring the probe's inputs to the device of the parameters, floating tensors to their dtype.

        A probe on the CPU goes to wherever the model is. Between other devices nothing is moved silently: a
        ``ValueError`` names them.

        Args:
            probe: The probe.

        Returns:
            The inputs.
        """
        self.isolation.check()
        tensors = [*self.params.values(), *self.constants.values()]
        reference = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
        if reference is None:
            return probe.inputs

        def move(tensor: Tensor) -> Tensor:
            if tensor.device.type != "cpu" and tensor.device != reference.device:
                raise ValueError(
                    f"probe: a tensor is on {tensor.device}, the model on {reference.device}; move one of them, for "
                    f"example x.to({str(reference.device)!r}), or keep the probe on the CPU"
                )
            return tensor.to(reference.device, reference.dtype if tensor.is_floating_point() else None)

        return tree_map_only(Tensor, move, probe.inputs)

    def complete(self, values: "Parameters", argument: str, *, every: bool = False) -> dict[str, Tensor]:
        """Bring tensors to the dtype and device of the parameters, whose own value is taken where one is left out.

        Args:
            values: ``{name of a trainable parameter: tensor}``, or a module with parameters of these names.
            argument: Name of the argument, for messages.
            every: Refuse values that leave a parameter out.

        Returns:
            A tensor for every trainable parameter.

        Raises:
            ValueError: If a name is not that of a trainable parameter, a shape differs, or one is missing.
        """
        check_parameters(**{argument: values})
        if isinstance(values, nn.Module):  # its frozen parameters may be trainable here, and the other way round
            values, every = {name: p for name, p in values.named_parameters() if name in self.params}, True
        for name, value in values.items():
            if name not in self.params:
                hint = nearest(name, self.params)
                raise ValueError(
                    f"{argument}: {name!r} is not a trainable parameter of the model{hint}; give those of "
                    "named_parameters()"
                )
            if value.shape != self.params[name].shape:
                own = tuple(self.params[name].shape)
                raise ValueError(f"{argument}: {name!r} has shape {tuple(value.shape)}, the parameter {own}")
        missing = [name for name in self.params if name not in values]
        if every and missing:
            raise ValueError(f"{argument}: {missing[0]!r} is missing; name every trainable parameter")
        return {name: values[name].detach().to(own) if name in values else own for name, own in self.params.items()}

    def at(self, theta: "Parameters", argument: str = "theta", *, every: bool = False) -> "IsolatedModel":
        """Return the same network at other parameters; arguments and errors as ``complete``."""
        params = self.complete(theta, argument, every=every)
        if not self.isolation.plain:  # its forward may write to them
            params = {name: value if value is self.params[name] else value.clone() for name, value in params.items()}
        return replace(self, params=params)

    def bound(self, output_fn: OutputFn | None, dtype: torch.dtype | None = None) -> "IsolatedModel":
        """Return the same network with another output function or dtype, where they are given."""
        own = self.output_fn if output_fn is None else output_fn
        if dtype is None:
            return self if own is self.output_fn else replace(self, output_fn=own)
        params, constants = (
            {name: _readable(value, dtype) for name, value in tensors.items()}
            for tensors in (self.params, self.constants)
        )
        return replace(self, params=params, constants=constants, output_fn=own)


Model: TypeAlias = nn.Module | IsolatedModel
"""A module, or one that is already isolated: what functions of ``measure`` take."""

Parameters: TypeAlias = Mapping[str, Tensor] | nn.Module
"""Values of trainable parameters: ``{name: tensor}``, or a module that holds them."""


def check_parameters(**arguments: Any) -> None:
    """Refuse arguments that are not ``Parameters``, before anything else is looked at.

    Args:
        **arguments: By name, as the user writes them.

    Raises:
        ValueError: If one is something else, such as the inputs in the place of theta.
    """
    for argument, values in arguments.items():
        if isinstance(values, nn.Module):
            continue
        given = f"a {type(values).__name__}"
        if isinstance(values, Mapping):
            wrong = [name for name, value in values.items() if not isinstance(value, Tensor)]
            if not wrong:
                continue
            given = f"{type(values[wrong[0]]).__name__} for {wrong[0]!r}"
        elif isinstance(values, Tensor):
            given = f"a tensor {tuple(values.shape)}"
        raise ValueError(
            f"{argument}: {given} given; give {{name: tensor}} of the trainable parameters, or a module that holds "
            "them, after the inputs: (model, x, theta_0, theta)"
        )


@contextmanager
def isolated(
    model: Model, output_fn: OutputFn | None = None, dtype: torch.dtype | None = None
) -> Iterator[IsolatedModel]:
    """Evaluate ``model`` without leaving a trace in it or in the process.

    Raises ``ValueError`` if the module has no parameters of its own, real and on one device (a lazy module that has not
    seen a batch yet, FSDP); nothing waits for the device.

    Args:
        model: Any module; a ``LightningModule``, a compiled or a wrapped one included. One that is already isolated is
            not copied again; every forward starts from the same buffers and attributes.
        output_fn: Turns the module's output into (N, C).
        dtype: Of all floating parameters and buffers, and so of the probe; None keeps theirs, but widens half
            precision to float32.

    Yields:
        The network as a pure function.

    Raises:
        TypeError: If it is not a module, or ``output_fn`` no function.
        RuntimeError: If it is already isolated, and the ``with`` that isolated it has ended.
    """
    if isinstance(model, IsolatedModel):
        model.isolation.check()
        own = replace(model, constants=dict(model.constants))
        with process_state(own.params.values()), differentiable():
            try:
                yield own.bound(output_fn, dtype)
            finally:
                own.isolation.put_back()
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} given; give the module first, then its inputs: (model, x, ...)")
    if output_fn is not None and not callable(output_fn):
        raise TypeError(
            f"output_fn: {output_fn!r} given; give a function of what the forward returns, such as "
            "lambda out: out['logits']"
        )
    check_structure(model)
    with process_state(model.parameters()), differentiable(), elementary_operations(), own_forwards():
        network = _shadow_of(model, output_fn, dtype)
        try:
            yield network
        finally:
            network.isolation.close()


def _shadow_of(model: nn.Module, output_fn: OutputFn | None, dtype: torch.dtype | None) -> IsolatedModel:
    plain = output_fn is None and all(_is_plain(module) for module in model.modules())
    copies = Copies(model, share_parameters=plain)
    floating = {p.dtype for p in copies.parameters.values() if p.is_floating_point()}
    if dtype is None and len(floating) > 1:
        dtype = functools.reduce(torch.promote_types, floating, torch.float32)
    readable = {name: _readable(tensor, dtype) for name, tensor in copies.parameters.items()}
    params = {name: value for name, value in readable.items() if copies.parameters[name].requires_grad}
    constants = {name: value for name, value in readable.items() if name not in params}
    buffers = {name: _readable(buffer, dtype) for name, buffer in copies.buffers.items()}
    places = [
        Place(tensors, key, tensor, copies.live[id(tensor)])
        for module in copies.module.modules()
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is not None
    ]
    rounding = max((torch.finfo(kind).eps for kind in floating), default=0.0)
    rounding = max(rounding, _roundings.get(model, 0.0))
    state = PythonState([module for module in copies.module.modules() if not _is_plain(module)], inside=True)
    isolation = Isolation(frozenset(buffers), places, copies, plain, params, model, rounding, state)
    return IsolatedModel(copies.module, params, constants | buffers, output_fn, model, isolation)


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a module of torch.nn as torch made it, whose forward reads its own tensors and writes to none."""
    own = vars(module)
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
        and own.get("max_norm") is None
        and runs_in_place_of(module) is None
    )


def _readable(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is None:
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
