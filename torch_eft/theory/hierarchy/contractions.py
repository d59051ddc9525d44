"""Contractions of a network's dNTK and ddNTK with the directions in which training moves it.

Parameters at order 0 move by J^T p(t), in a space with the inner product p.H.p. The r leading principal directions b_k
of this path, orthonormal in it, hold all of it but a share that falls fast with r: exponentials exp(-l t) with rates
between l_min and l_max are well approximated by about log(l_max / l_min) of them, however many points there are. With
D_k = H b_k, p = sum_k b_k (D_k . p); e, which moves p, lies in the same space.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_MEMORY = 2**30
"""Bytes allowed for a network's tensors and their contractions."""


@dataclass(frozen=True)
class Basis:
    """Directions whose span contains a path, but for a small share of it.

    Args:
        basis: b, (r, B).
        dual: D, (r, B).
        left_out: Share of the path (root of the sum over steps of squared distances from the start) outside the span.
    """

    basis: Tensor
    dual: Tensor
    left_out: float


def path_basis(p: Tensor, H: Tensor, tolerance: float, modes: int | None = None) -> Basis:
    """Compute the principal directions of a path of order 0.

    Args:
        p: (T+1, B).
        H: (B, B), the training NTK.
        tolerance: Directions with less than this share of the largest are left out.
        modes: Largest number of directions.

    Returns:
        The directions, the longest first.
    """
    values, vectors = torch.linalg.eigh(H)
    root = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    left, sizes, _ = torch.linalg.svd(p @ root, full_matrices=False)
    total = sizes.norm()
    kept = int((sizes > tolerance * sizes.max()).sum()) if float(total) > 0 else 0
    kept = kept if modes is None else min(kept, modes)
    basis = (left[:, :kept].T @ p) / sizes[:kept, None]
    left_out = float(sizes[kept:].norm() / total) if float(total) > 0 else 0.0
    return Basis(basis, basis @ H, left_out)


@dataclass(frozen=True)
class PathTensors:
    """The contractions of dH, ddI and ddII that enter Y and H(t), with training indices in r directions of a basis.

    With rows b_k of ``basis`` and D_k of ``dual``, p is sum_k b_k (D_k . p) on the path. Below, b, c and d are such
    directions, a is any of M outputs, and (x, y) any two of K.

    Args:
        basis: (r, B).
        dual: (r, B).
        dH_first: (M, r, r), ``[a, b, c] = dH_bac``.
        dH_second: (M, r, r), ``dH_abc``.
        ddI_first: (M, r, r, r), ``ddI_bcda``.
        ddI_second: (M, r, r, r), ``ddI_abcd``.
        X_first: (M, r, r, r), ``X_bacd``.
        X_second: (M, r, r, r), ``X_abcd``.
        ntk_p: (K, K, r), ``[x, y, c] = dH_xyc + dH_yxc``.
        ntk_q: (K, K, r, r), ``X_xycd + X_yxcd``.
        ntk_pp: (K, K, r, r), ``(ddI_xycd + ddI_yxcd) / 2 + ddII_xycd``, symmetric part in c and d.
    """

    basis: Tensor
    dual: Tensor
    dH_first: Tensor
    dH_second: Tensor
    ddI_first: Tensor
    ddI_second: Tensor
    X_first: Tensor
    X_second: Tensor
    ntk_p: Tensor
    ntk_q: Tensor
    ntk_pp: Tensor


def with_joint_indices(value: Tensor) -> Tensor:
    """Reshape (N, N, .., C, C, ..) to (N C, N C, ..), with one index for each pair (sample, output)."""
    order = value.ndim // 2
    axes = [axis for pair in zip(range(order), range(order, 2 * order), strict=True) for axis in pair]
    return value.permute(axes).reshape([value.shape[0] * value.shape[-1]] * order)


def path_tensors(
    dH: Tensor,
    ddI: Tensor,
    ddII: Tensor,
    train: Tensor,
    ntk: Tensor,
    basis: Tensor | None = None,
    dual: Tensor | None = None,
) -> PathTensors:
    """Contract whole tensors.

    Args:
        dH: (M, M, M), index (sample, output).
        ddI: (M, M, M, M).
        ddII: (M, M, M, M).
        train: (B,), the training indices among M.
        ntk: (K,), the indices between which H(t) is computed.
        basis: (r, B); None is the identity.
        dual: (r, B); None is the basis, for orthonormal rows.

    Returns:
        The contractions, exact on paths within the basis.
    """
    b = torch.eye(len(train), dtype=dH.dtype, device=dH.device) if basis is None else basis
    X = ddII.transpose(1, 2)
    dH_c = dH[:, :, train] @ b.T
    ddI_cd, X_cd, ddII_cd = (
        torch.einsum("abCD,cC,dD->abcd", value[:, :, train][:, :, :, train], b, b) for value in (ddI, X, ddII)
    )

    def first(value: Tensor) -> Tensor:
        return torch.einsum("Ba...,bB->ab...", value[train], b)

    def second(value: Tensor) -> Tensor:
        return torch.einsum("aB...,bB->ab...", value[:, train], b)

    def symmetric(value: Tensor) -> Tensor:
        part = value[ntk][:, ntk]
        return part + part.transpose(0, 1)

    squares = symmetric(ddI_cd) / 2 + ddII_cd[ntk][:, ntk]
    return PathTensors(
        basis=b,
        dual=b if dual is None else dual,
        dH_first=first(dH_c),
        dH_second=second(dH_c),
        ddI_first=first(ddI_cd),
        ddI_second=second(ddI_cd),
        X_first=first(X_cd),
        X_second=second(X_cd),
        ntk_p=symmetric(dH_c),
        ntk_q=symmetric(X_cd),
        ntk_pp=(squares + squares.transpose(2, 3)) / 2,
    )


def ntk_change(tensors: PathTensors, p: Tensor, q: Tensor) -> Tensor:
    """Compute H1 (T, K, K) from p (T, r) and q (T, r, r)."""
    return (
        torch.einsum("xyc,tc->txy", tensors.ntk_p, p)
        + torch.einsum("xycd,tcd->txy", tensors.ntk_q, q)
        + torch.einsum("xycd,tc,td->txy", tensors.ntk_pp, p, p)
    )


def whitened_change(tensors: PathTensors, train: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Compute |G p| / max |p|, (T,), from p (T, r) and q (T, r, r), with G_kl = b_k.H1.b_l."""
    dH, ddI, X = (
        torch.einsum("kB,B...->k...", tensors.basis, value[train])
        for value in (tensors.dH_second, tensors.ddI_second, tensors.X_second)
    )
    both = dH + dH.transpose(0, 1), X + X.transpose(0, 1)
    squares = (ddI + ddI.transpose(0, 1)) / 2 + X.transpose(1, 2)
    moved = (
        torch.einsum("klc,tc,tl->tk", both[0], p, p)
        + torch.einsum("klcd,tcd,tl->tk", both[1], q, p)
        + torch.einsum("klcd,tc,td,tl->tk", squares, p, p, p)
    ).norm(dim=1)
    largest = p.norm(dim=1).max() if p.numel() else p.new_zeros(())
    return moved / largest if float(largest) > 0 else torch.zeros_like(moved)


def check_memory(outputs: int, needed: int, memory: int) -> None:
    """Raise unless the tensors fit into memory.

    Args:
        outputs: M, for the message.
        needed: Bytes that they take.
        memory: Bytes allowed.

    Raises:
        ValueError: If they do not fit, with both numbers.
    """
    if needed > memory:
        raise ValueError(
            f"memory: {needed / 2**30:.2f} GiB needed for the differentials of {outputs} outputs (points times outputs "
            f"of the network), {memory / 2**30:.2f} GiB allowed; allow more, or take fewer points, outputs or modes"
        )
