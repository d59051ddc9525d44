"""Numbers that say how large a kernel is and how far it has moved."""

import torch
from torch import Tensor


def ntk_trace(H: Tensor) -> Tensor:
    """Mean of the diagonal, (1 / N C) sum_{a,i} H_{ii;aa}; a 0-d tensor."""
    return as_matrix(H).diagonal().mean()


def relative_change(H: Tensor, reference: Tensor) -> Tensor:
    """Relative Frobenius change ||H - H_0|| / ||H_0||; a 0-d tensor. For any two tensors of one shape."""
    return (H - reference).norm() / reference.norm()


def kernel_distance(H: Tensor, reference: Tensor) -> Tensor:
    """1 - cos of the angle between two kernels, <H, H_0> / (||H|| ||H_0||) (Fort et al. 2020); a 0-d tensor."""
    # In terms of the unit vectors' difference: 1 - cos itself would drown in rounding near 0.
    difference = H / H.norm() - reference / reference.norm()
    return difference.square().sum() / 2


def top_eigenvalue(H: Tensor) -> Tensor:
    """The largest eigenvalue of the kernel as an (N C, N C) matrix; a 0-d tensor."""
    return torch.linalg.eigvalsh(as_matrix(H))[-1]


def as_matrix(H: Tensor) -> Tensor:
    """(N, N, C, C) as the symmetric matrix (N C, N C), rows (a, i); (N, N) unchanged."""
    if H.ndim == 2:
        return H
    count, _, channels, _ = H.shape
    return H.permute(0, 2, 1, 3).reshape(count * channels, count * channels)


def as_trace(H: Tensor) -> Tensor:
    """(1/C) sum_i H_{ii;ab}, (N, N)."""
    return H if H.ndim == 2 else H.diagonal(dim1=2, dim2=3).mean(-1)
