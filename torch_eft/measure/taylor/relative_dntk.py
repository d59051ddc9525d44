"""How large dNTK and ddNTK are relative to the NTK, along one direction, in units in which its length drops out.

Along v, outputs move by J v and the NTK by dH v + its transpose, then by ddI v v + its transpose + 2 ddII v v over 2.
Divided by ||H|| and by powers of the rms motion of the outputs, both say how much the NTK changes while the outputs of
the probe move by one unit: of order 1/n at width n, 0 at infinite width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY, checked_lambdas
from torch_eft.measure.kernels.dntk import isolated_ntk_derivatives
from torch_eft.measure.taylor.displacement import symmetrized
from torch_eft.measure.taylor.secant import _complete


@dataclass(frozen=True)
class RelativeDNTK:
    """Sizes along one direction.

    Args:
        dntk: (||dH v + transpose|| / ||H||) / (||J v|| / sqrt(N C)).
        ddntk: (||ddI v v + transpose + 2 ddII v v|| / (2 ||H||)) / (||J v||^2 / N C); None if not asked for.
        validity: In words.
    """

    dntk: float
    ddntk: float | None
    validity: str


def relative_dntk(
    model: nn.Module,
    params: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    x: Any,
    lambdas: Mapping[str, float] | float | None = None,
    order: int = 2,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> RelativeDNTK | None:
    """The sizes along v = lambda times a gradient.

    Args:
        model: Any module, in evaluation mode.
        params: theta, ``{name: tensor}``; the model's own where a name is left out.
        gradient: ``{name: tensor}`` for every trainable parameter, of any scale.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        lambdas: As ``ntk`` takes them.
        order: 1 (dNTK) or 2.
        trace: Average kernels over outputs.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed.

    Returns:
        The sizes, or None where the direction moves no output.

    Raises:
        ValueError: As ``ntk_derivatives``.
    """
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        at = replace(network, params=_complete(network, params, "params"))
        scales = checked_lambdas(at, lambdas)
        v = {name: g * scales.get(name, 0.0) for name, g in _complete(at, gradient, "gradient").items()}
        # The length drops out: a unit vector keeps the numbers away from overflow.
        size = torch.stack([value.norm() for value in v.values()]).norm()
        if not float(size) > 0:
            return None
        v = {name: value / size for name, value in v.items()}
        found = isolated_ntk_derivatives(at, probe, v, lambdas, order, trace, memory)
        inputs = at.place(probe)
        moved = _along(at, inputs, v)
        assert found.H is not None
        channels = checked_output(at, probe).numel()
        numbers = [moved.norm(), found.H.norm(), symmetrized(found.dH).norm()]
        if found.ddI is not None and found.ddII is not None:
            numbers.append((symmetrized(found.ddI) / 2 + found.ddII).norm())
        motion, H, first, *second = torch.stack(numbers).tolist()
    if not (motion > 0 and H > 0):
        return None
    rms = motion / channels**0.5
    return RelativeDNTK(first / H / rms, second[0] / H / rms**2 if second else None, found.validity)


def _along(network: Any, inputs: Any, v: Mapping[str, Tensor]) -> Tensor:
    """J v, (N, C), by two backward passes: the derivative of u . J v in u."""
    leaves = {name: network.params[name].detach().requires_grad_() for name in v}
    z = network({**network.params, **leaves}, inputs)
    u = torch.zeros_like(z).requires_grad_()
    pulled = torch.autograd.grad(
        z, list(leaves.values()), u, create_graph=True, allow_unused=True, materialize_grads=True
    )
    pairs = [(p, v[name]) for name, p in zip(leaves, pulled, strict=True) if p.requires_grad]
    if not pairs:
        return torch.zeros_like(z)
    rows, along = zip(*pairs, strict=True)
    return torch.autograd.grad(rows, u, along)[0].detach()
