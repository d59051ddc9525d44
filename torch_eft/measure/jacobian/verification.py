"""Checks at first use, against ordinary backward passes, that the structured Jacobian is the network's own.

For a random u, u . J of every parameter, put together from the recorded factors, must be the gradient of u . z that
one backward pass through the untouched network gives; along a direction v, u . J_1 must be the gradient of
(gradient . v), and 2 u . J_2 that of (second gradient . v). Sizes are compared, |lambda^(1/2) u . J| parameter by
parameter, which for the whole is u . H . u.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.forward.reverse_mode import gradients_along
from torch_eft.measure.jacobian.gram import Factor
from torch_eft.measure.jacobian.plan import sample_count


def mismatches(
    network: IsolatedModel,
    inputs: Any,
    factors: Sequence[Factor],
    trainable: Sequence[str],
    direction: Mapping[str, Tensor] | None = None,
    order: int = 0,
) -> dict[str, str]:
    """Return ``{parameter: both sizes}`` for those whose factors are not what backward passes give.

    The tolerance is half the digits of the dtype, of the parameter's own size, plus a thousand roundings of the
    largest one's (a gradient that vanishes identically is rounding).
    """
    if not trainable or network.params[trainable[0]].device.type == "meta":  # nothing to compare, or no values
        return {}
    channels = factors[0].size[0]
    u = _signs(channels, sample_count(inputs), network.params[trainable[0]])
    expected = _by_backward(network, inputs, u, trainable, direction, order)
    parts: dict[str, list[Tensor]] = {}
    for factor in factors:
        for name, value in factor.vjp(u, order).items():
            parts.setdefault(name, []).append(value)
    sizes = torch.stack([expected[name].norm() for name in trainable])
    norms = torch.stack(
        [
            torch.stack([part.norm() for part in parts[name]]).norm() if name in parts else sizes.new_zeros(())
            for name in trainable
        ]
    )
    eps = torch.finfo(sizes.dtype).eps
    allowed = eps**0.5 * sizes + 1e3 * eps * sizes.max()
    wrong = (~((norms - sizes).abs() <= allowed)).tolist()  # the one host sync
    return {
        name: f"{float(norms[index]):.6g} by its factors, {float(sizes[index]):.6g} by backward"
        for index, name in enumerate(trainable)
        if wrong[index]
    }


def _signs(channels: int, samples: int, like: Tensor) -> Tensor:
    """Draw random signs without touching the global random state."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    signs = torch.randint(0, 2, (channels, samples), generator=generator, device="cpu") * 2 - 1
    return signs.to(like.device, like.dtype)


def _by_backward(
    network: IsolatedModel,
    inputs: Any,
    u: Tensor,
    trainable: Sequence[str],
    direction: Mapping[str, Tensor] | None,
    order: int,
) -> dict[str, Tensor]:
    """Compute u . J_order by reverse mode of reverse mode; above order 0 with fused operations written out."""
    leaves = {name: network.params[name].detach().requires_grad_() for name in trainable}
    along = [] if direction is None else [direction[name] for name in trainable]
    # A checkpoint runs its part of the forward again, and must find it written out as before.
    with Decomposed() if order else nullcontext():
        value = (network({**network.params, **leaves}, inputs) * u.T).sum()
        gradient = gradients_along(value, list(leaves.values()), along, order)[order]
    return {name: g.detach() for name, g in zip(trainable, gradient, strict=True)}
