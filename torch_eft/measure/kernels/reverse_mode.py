"""The NTK of networks and its differentials: H, dH, ddI and ddII, by repeated reverse-mode differentiation.

With z_{i;a} output i on sample a and every sum over parameters weighted by lambda (PDLT 8.0, 11.1, chapter infinity),

    H_{ij;ab}         = sum (d_mu z_{i;a}) (d_mu z_{j;b})
    dH_{ijk;abc}      = sum (d_mu d_nu z_{i;a}) (d_mu z_{j;b}) (d_nu z_{k;c})
    ddI_{ijkl;abcd}   = sum (d_mu d_nu d_rho z_{i;a}) (d_mu z_{j;b}) (d_nu z_{k;c}) (d_rho z_{l;d})
    ddII_{ijkl;abcd}  = sum (d_mu d_nu z_{i;a}) (d_mu d_rho z_{j;b}) (d_nu z_{k;c}) (d_rho z_{l;d}).

They are derivatives along the fixed directions v_{jb} = lambda grad z_{j;b}. All orders are reverse over reverse, with
fused normalizations written out: forward over forward is silently wrong for layer norm and other operations whose
forward rule cannot be differentiated, and reverse mode is, too, for fused layer norm at third order.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.measure.forward.checks import check_twice_differentiable
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.reverse_mode import pull_back

NAMES = ("H", "dH", "ddI", "ddII")
"""The tensors that ``differentials`` computes, in ascending order of cost."""


@dataclass(frozen=True)
class Differentials:
    """The NTK and its differentials for S networks, N samples, C outputs; None for those not asked for.

    Args:
        z: (S, N, C), the outputs.
        H: (S, N, N, C, C), ``[s, a, b, i, j] = H_{ij;ab}``.
        dH: (S, N, N, N, C, C, C), ``[s, a, b, c, i, j, k] = dH_{ijk;abc}``.
        ddI: (S, N, N, N, N, C, C, C, C), ``[s, a, b, c, d, i, j, k, l] = ddI_{ijkl;abcd}``.
        ddII: Likewise.
    """

    z: Tensor
    H: Tensor | None = None
    dH: Tensor | None = None
    ddI: Tensor | None = None
    ddII: Tensor | None = None


def differentials(
    f: Callable[[dict[str, Tensor]], Tensor],
    params: Mapping[str, Tensor],
    lambdas: Mapping[str, float | Tensor],
    names: Collection[str] = NAMES,
) -> Differentials:
    """Compute H, dH, ddI and ddII of a stack of networks.

    The networks are differentiated together: as network s depends on slice s of the parameters only, the gradient of
    the sum over networks is every network's own gradient. torch raises a ``RuntimeError`` where an operation has no
    derivative of the order that is needed. With M = N C, dH and ddII take M^2 backward passes through
    the gradient and M^2 copies of the parameters, ddI about M^3 / 4 passes through the second derivative.

    Args:
        f: Takes parameters stacked as in ``params`` to outputs (S, N, C), network s from slice s.
        params: ``{name: (S, ...)}``.
        lambdas: The learning-rate tensor, ``{name: number, or tensor broadcastable to the parameter}``; a parameter
            that is not named, or has the number 0, is held constant.
        names: Which of ``NAMES``.

    Returns:
        The differentials, in the dtype of the outputs.
    """
    trainable = [name for name in params if not _is_zero(lambdas.get(name, 0.0))]
    leaves = [params[name].detach().requires_grad_() for name in trainable]
    with torch.enable_grad(), Decomposed():
        z = f({**params, **dict(zip(trainable, leaves, strict=True))})
    if not set(names) & set(NAMES):
        return Differentials(z.detach())
    flat = z.flatten(1)
    scales = [_flat_scale(lambdas[name], leaf) for name, leaf in zip(trainable, leaves, strict=True)]
    scale = torch.cat(scales) if scales else flat.new_zeros(0)
    J = torch.stack([_flatten(_gradient(flat[:, x], leaves, keep=False), flat) for x in range(flat.shape[1])], 1)
    v = J * scale
    tensors = {"H": J @ v.mT} if "H" in names else {}
    if set(names) & {"dH", "ddI", "ddII"}:
        check_twice_differentiable(z)
        tensors |= _higher(flat, leaves, v, scale, names)
    return Differentials(z.detach(), **{name: _by_index(value, z.shape) for name, value in tensors.items()})


def _higher(
    flat: Tensor, leaves: Sequence[Tensor], v: Tensor, scale: Tensor, names: Collection[str]
) -> dict[str, Tensor]:
    """Compute dH (S, M, M, M), ddI and ddII (S, M, M, M, M) along the directions v (S, M, P)."""
    count, outputs, _ = v.shape
    directions = [_unflatten(v[:, y], leaves) for y in range(outputs)]
    ddI = v.new_zeros(count, *[outputs] * 4) if "ddI" in names else None
    dH, curvatures = [], []
    for x in range(outputs):
        gradient = _gradient(flat[:, x], leaves, keep=True)
        products = [pull_back(gradient, direction, leaves, keep=ddI is not None) for direction in directions]
        if ddI is not None:
            # A third derivative is symmetric in its three directions, two of which lie in the same half.
            for start, stop in ((0, outputs // 2), (outputs // 2, outputs)):
                for y in range(start, stop):
                    for z in range(start, y + 1):
                        third = pull_back(products[y], directions[z], leaves, keep=False)
                        row = (v @ _flatten(third, flat)[:, :, None])[:, :, 0]
                        for first, second in ((y, z), (z, y)):
                            ddI[:, x, first, second] = row
                            ddI[:, x, first, :, second] = row
                            ddI[:, x, :, first, second] = row
        curvature = torch.stack([_flatten(product, flat) for product in products], 1)
        dH.append(curvature @ v.mT)
        if "ddII" in names:
            curvatures.append(curvature)
    tensors = {} if ddI is None else {"ddI": ddI}
    if "dH" in names:
        tensors["dH"] = torch.stack(dH, 1)
    if "ddII" in names:
        rows = torch.stack(curvatures, 1).flatten(1, 2)  # rows (x, z), (y, w)
        tensors["ddII"] = ((rows * scale) @ rows.mT).unflatten(2, (outputs, outputs)).unflatten(1, (outputs, outputs))
        tensors["ddII"] = tensors["ddII"].transpose(2, 3)
    return tensors


def _gradient(values: Tensor, leaves: Sequence[Tensor], keep: bool) -> Sequence[Tensor]:
    """Return the gradient of every network's value (S,); ``keep`` makes it differentiable."""
    return pull_back([values], [torch.ones_like(values)], leaves, keep)


def _flatten(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Join one (S, ...) per parameter to (S, P)."""
    return torch.cat([part.detach().reshape(len(part), -1) for part in parts], 1) if parts else like.detach()[:, :0]


def _unflatten(flat: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    sizes = [leaf[0].numel() for leaf in leaves]
    return [part.reshape(leaf.shape) for part, leaf in zip(flat.split(sizes, 1), leaves, strict=True)]


def _is_zero(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _flat_scale(value: float | Tensor, leaf: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape[1:]).flatten()


def _by_index(value: Tensor, shape: torch.Size) -> Tensor:
    """Return (S, M, M, ...) with M = (a, i) as (S, N, N, ..., C, C, ...)."""
    order = value.ndim - 1
    value = value.reshape(shape[0], *shape[1:] * order)
    return value.permute(0, *range(1, 2 * order, 2), *range(2, 2 * order + 1, 2))
