"""Evaluates a network without a trace in its training, and independently of the training's settings.

Guarded: parameters and buffers (a shadow module; parameters shared and only read, buffers cloned), train/eval
flags and attributes set in ``forward`` (they are set on the shadow), gradients (nothing calls ``backward``), the random
state of torch, CUDA, NumPy and Python, torch's default dtype, and the surrounding autocast, grad and inference modes.

Set meanwhile: attention in elementary operations, as its fused kernels lack derivatives; float32 products in
full float32, as TF32 and bfloat16 round at 1e-3, the size of the changes that are measured; compiled modules run as
they are written.
"""

import copy
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.probe import OutputFn, Probe
from torch_eft.measure.forward.structure import check_structure
from torch_eft.results.choices import nearest


@dataclass
class Isolation:
    """What the same network at several parameters shares.

    Args:
        buffers: Names of its buffers.
        open: Whether the ``with`` that isolated it has not ended yet.
    """

    buffers: frozenset[str] = frozenset()
    open: bool = True

    def check(self) -> None:
        """Raise ``RuntimeError`` after the end: the parameters go on changing, and nothing is guarded any more."""
        if not self.open:
            raise RuntimeError(
                "model: this isolated network was used after the end of the `with` that isolated it, while its "
                "parameters may have changed and its buffers have not; measure inside `with`, or give the module"
            )


@dataclass(frozen=True)
class IsolatedModel:
    """A network as a pure function of its trainable parameters, in evaluation mode.

    Args:
        shadow: The module, safe to call; its buffers are copies.
        params: Trainable parameters by name, detached; half precision is widened to float32.
        constants: Frozen parameters and buffers by name.
        output_fn: Turns the module's output into (N, C), or None if it already is.
        origin: The module itself, to remember findings by; never called.
        isolation: Shared with the same network at other parameters; calls are refused when it has ended.
    """

    shadow: nn.Module
    params: dict[str, Tensor]
    constants: dict[str, Tensor]
    output_fn: OutputFn | None
    origin: nn.Module
    isolation: Isolation

    def __call__(self, params: dict[str, Tensor], inputs: Any) -> Tensor:
        """The output (N, C) on a batch ``inputs`` (a tensor, a tuple of arguments or a dict of keyword arguments)."""
        self.isolation.check()
        args, kwargs = (), {}
        if isinstance(inputs, dict):
            kwargs = inputs
        else:
            args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        output = functional_call(self.shadow, {**params, **self.constants}, args, kwargs)
        return output if self.output_fn is None else self.output_fn(output)

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
                raise ValueError(f"{argument}: {name!r} is not a trainable parameter of the model{hint}")
            if value.shape != self.params[name].shape:
                own = tuple(self.params[name].shape)
                raise ValueError(f"{argument}: {name!r} has shape {tuple(value.shape)}, the parameter {own}")
        missing = [name for name in self.params if name not in values]
        if every and missing:
            raise ValueError(f"{argument}: {missing[0]!r} is missing; name every trainable parameter")
        return {name: values[name].detach().to(own) if name in values else own for name, own in self.params.items()}

    def at(self, theta: "Parameters", argument: str = "theta", *, every: bool = False) -> "IsolatedModel":
        """Return the same network at other parameters; arguments and errors as ``complete``."""
        return replace(self, params=self.complete(theta, argument, every=every))

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
            not copied again, but it, too, is left as it was found: random state, buffers and attributes set in
            ``forward``, so that every measurement on it starts from the same state.
        output_fn: Turns the module's output into (N, C).
        dtype: Of all floating parameters and buffers, and so of the probe; None keeps theirs, but widens half
            precision to float32.

    Yields:
        The network as a pure function.

    Raises:
        TypeError: If it is not a module.
        RuntimeError: If it is already isolated, and the ``with`` that isolated it has ended.
    """
    if isinstance(model, IsolatedModel):
        model.isolation.check()
        own = replace(model, constants=dict(model.constants))
        with _process_state(own.params.values()), _differentiable(), _module_state(own):
            yield own.bound(output_fn, dtype)
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__} given; give the module first, then its inputs: (model, x, ...)")
    check_structure(model)
    with _process_state(model.parameters()), _differentiable(), _elementary_operations():
        network = _shadow_of(model, output_fn, dtype)
        try:
            yield network
        finally:
            network.isolation.open = False


@contextmanager
def _process_state(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the random state, that of the devices of these tensors included, and the default dtype."""
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    default_dtype = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
            yield
    finally:
        torch.set_default_dtype(default_dtype)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


@contextmanager
def _module_state(network: IsolatedModel) -> Iterator[None]:
    """Restore what a forward may change in an isolated network: buffers in place, and attributes that it sets."""
    attributes = [(vars(module), dict(vars(module))) for module in network.shadow.modules()]
    values = [value for name, value in network.constants.items() if name in network.isolation.buffers]
    buffers = [(value, value._version, value.clone()) for value in values]
    try:
        yield
    finally:
        for current, before in attributes:
            current.clear()
            current.update(before)
        with torch.no_grad():
            for value, version, copied in buffers:
                if value._version != version:
                    value.copy_(copied)


@contextmanager
def _differentiable() -> Iterator[None]:
    """Leave the surrounding grad, inference and autocast modes."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


@contextmanager
def _elementary_operations() -> Iterator[None]:
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    products = torch.get_float32_matmul_precision()
    cudnn: Any = torch.backends.cudnn  # typed by hand: both have attributes that torch's annotations lack
    mkldnn: Any = torch.backends.mkldnn
    operations = ((cudnn, "conv"), (cudnn, "rnn"), (mkldnn, "matmul"), (mkldnn, "conv"), (mkldnn, "rnn"))
    backends: list[Any] = [torch.backends.cuda.matmul, *(getattr(library, name, None) for library, name in operations)]
    # Where torch has no newer switches, the older ones are all there are.
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    precisions = [backend.fp32_precision for backend in backends]
    try:
        convolutions: bool | None = cudnn.allow_tf32
    except RuntimeError:  # only the newer switches were set
        convolutions = None
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # The older switches first: where only the newer ones are set, reading an older one is an error in torch.
        torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            cudnn.allow_tf32 = False
        for backend in backends:
            if backend.fp32_precision not in ("ieee", "none"):
                backend.fp32_precision = "ieee"
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and its import takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for backend, precision in zip(backends, precisions, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
        torch.backends.mha.set_fastpath_enabled(fast_attention)


def _shadow_of(model: nn.Module, output_fn: OutputFn | None, dtype: torch.dtype | None) -> IsolatedModel:
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        # A forward may have cached an activation: deepcopy refuses non-leaf tensors.
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()
    # Most modules are torch's own leaves, copied a hundred times faster by hand than by deepcopy.
    memo |= {id(module): copied for module in model.modules() if (copied := _copied_leaf(module)) is not None}
    known = dict(memo)
    try:
        shadow = copy.deepcopy(model, memo).eval()
    except (TypeError, RuntimeError):
        shadow = copy.deepcopy(model, known | _uncopyable(model, known)).eval()
    for module in shadow.modules():
        # Else a compiled LightningModule's copy would go on calling the original.
        module._compiled_call_impl = None
    params = {name: _readable(p, dtype) for name, p in shadow.named_parameters() if p.requires_grad}
    constants = {name: _readable(p, dtype) for name, p in shadow.named_parameters() if not p.requires_grad}
    buffers = {name: _readable(buffer, dtype) for name, buffer in shadow.named_buffers()}
    return IsolatedModel(shadow, params, constants | buffers, output_fn, model, Isolation(frozenset(buffers)))


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Attributes that cannot be copied (locks, open files, hashes ...): the shadow shares them."""
    shared = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules") or isinstance(value, Tensor | nn.Module):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except (TypeError, RuntimeError):
                shared[id(value)] = value
    return shared


_IMMUTABLE = (type(None), bool, int, float, str, torch.device, torch.dtype)


def _copied_leaf(module: nn.Module) -> nn.Module | None:
    """Copy a torch.nn module without children, hooks and attributes of unknown kinds as deepcopy does; else None."""
    if not type(module).__module__.startswith("torch.nn.modules.") or module._modules:
        return None
    state: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, _IMMUTABLE):
            state[name] = value
        elif isinstance(value, tuple | list) and all(isinstance(part, _IMMUTABLE) for part in value):
            state[name] = type(value)(value)
        elif isinstance(value, dict) and (not value or name in ("_parameters", "_buffers")):
            state[name] = value.copy()
        elif isinstance(value, set) and name == "_non_persistent_buffers_set":
            state[name] = set(value)
        else:
            return None
    buffers = state["_buffers"]
    for name, buffer in buffers.items():
        buffers[name] = None if buffer is None else buffer.detach().clone()
    copied = module.__new__(type(module))
    vars(copied).update(state)
    return copied


def _readable(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is None:
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
