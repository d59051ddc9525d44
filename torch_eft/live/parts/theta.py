"""Copies of parameters that a part keeps, on their device."""

from torch import Tensor, nn

LARGEST = 50_000_000
"""Trainable parameters up to which a part keeps copies of them."""


def copied(network: nn.Module) -> dict[str, Tensor]:
    """``{name: value}`` of the trainable parameters, now."""
    return {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}


def current(network: nn.Module) -> dict[str, Tensor]:
    """The same without copying."""
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def memory(network: nn.Module, copies: int) -> str:
    """What copies take, in words."""
    values = [p for p in network.parameters() if p.requires_grad]
    size = copies * sum(p.numel() * p.element_size() for p in values) / 2**20
    of = "a copy" if copies == 1 else f"{copies} copies"
    return f"{of} of the trainable parameters, {size:.3g} MiB on {values[0].device if values else 'no device'}"


def too_many(network: nn.Module, largest: int = LARGEST) -> str | None:
    """Why no copies are kept, in words; None if they are."""
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    if count > largest:
        return f"{count / 1e6:.3g} million parameters; copies of them are kept for up to {largest / 1e6:.3g} million"
    return None
