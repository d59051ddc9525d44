"""Checks of a module that neither run it nor read its values; and checks that values are numbers."""

import torch
from torch import Tensor, nn

_SHARDED = ("DTensor", "ShardedTensor")


def check_structure(module: nn.Module) -> None:
    """Refuse modules without parameters of their own, real and in one place; no values are read.

    Raises:
        ValueError: For sharded, lazy and complex parameters, and for several devices; the message names one.
    """
    sharded = (
        "is sharded over processes (FSDP, DTensor); give the same module built plainly (unsharded_model=...), "
        "or gather the parameters into it yourself on every rank (torch_eft.measure.network.sharded.full_copy, "
        "FSDP.summon_full_params) and measure that"
    )
    for name, part in module.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(part).__mro__):
            raise ValueError(f"model: {place(name, part)} {sharded}")
    devices: dict[torch.device, str] = {}
    for name, parameter in module.named_parameters():
        kinds = [kind.__name__ for tensor in (parameter, parameter.data) for kind in type(tensor).__mro__]
        if any(kind in _SHARDED for kind in kinds):
            raise ValueError(f"model: the parameter {name!r} {sharded}")
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"model: the parameter {name!r} is not initialized yet (a lazy module); run a batch through it first"
            )
        if parameter.is_complex() and parameter.requires_grad:
            raise ValueError(
                f"model: the parameter {name!r} is complex; store real and imaginary part, torch.view_as_real, as a "
                "real parameter, and torch.view_as_complex in the forward"
            )
        devices.setdefault(parameter.device, name)
    if len(devices) > 1:
        (first, one), (second, other) = list(devices.items())[:2]
        raise ValueError(
            f"model: the parameter {one!r} is on {first}, {other!r} on {second}; bring all to one device, "
            "model.to(device), or measure a copy that is on one"
        )


def has_no_shapes(module: nn.Module) -> bool:
    """True if a lazy module in it has not seen a batch yet."""
    return any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in module.parameters())


def all_finite(*tensors: Tensor) -> bool:
    """True if every number is finite, waiting for the device once; True on "meta", where there are none."""
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    finite = [tensor.isfinite().all() for tensor in floating if has_values(tensor)]
    return bool(torch.stack(finite).all()) if finite else True


def has_values(tensor: Tensor) -> bool:
    """True if the tensor holds numbers: on the device "meta" there are none."""
    return tensor.device.type != "meta"


def place(name: str, module: nn.Module) -> str:
    """The name and class of a submodule, for messages."""
    return f"{name!r} ({type(module).__name__})" if name else type(module).__name__
