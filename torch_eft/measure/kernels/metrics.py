"""Numbers for the size of a kernel and for how far it has moved."""

import torch
from torch import Tensor


def ntk_trace(H: Tensor) -> Tensor:
    """Return the mean of the diagonal, (1 / N C) sum_{a,i} H_{ii;aa}; a 0-d tensor.

    Args:
        H: (N, N, C, C), or (N, N).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> float(measure.ntk_trace(torch.diag(torch.tensor([1.0, 3.0]))))
        2.0
    """
    return as_matrix(H).diagonal().mean()


def relative_change(H: Tensor, reference: Tensor) -> Tensor:
    """Return the relative Frobenius change ||H - H_0|| / ||H_0||; a 0-d tensor.

    Args:
        H: A tensor of any shape.
        reference: H_0, of the same shape.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> float(measure.relative_change(1.5 * torch.eye(2), torch.eye(2)))
        0.5
    """
    return (H - reference).norm() / reference.norm()


def kernel_distance(H: Tensor, reference: Tensor) -> Tensor:
    """Return 1 - <H, H_0> / (||H|| ||H_0||), 1 - cos of the angle of two kernels (Fort et al. 2020); a 0-d tensor.

    Args:
        H: A kernel.
        reference: H_0, of the same shape.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> float(measure.kernel_distance(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))))
        1.0
    """
    # In terms of the unit vectors' difference: 1 - cos itself would drown in rounding near 0.
    difference = H / H.norm() - reference / reference.norm()
    return difference.square().sum() / 2


def top_eigenvalue(H: Tensor) -> Tensor:
    """Return the largest eigenvalue of the kernel as an (N C, N C) matrix; a 0-d tensor.

    Args:
        H: (N, N, C, C), or (N, N).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> round(float(measure.top_eigenvalue(torch.ones(2, 2))), 4)
        2.0
    """
    return torch.linalg.eigvalsh(as_matrix(H))[-1]


def as_matrix(H: Tensor) -> Tensor:
    """Return (N, N, C, C) as the symmetric matrix (N C, N C), rows (a, i); (N, N) unchanged.

    Args:
        H: A kernel.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.as_matrix(torch.zeros(3, 3, 2, 2)).shape
        torch.Size([6, 6])
    """
    if H.ndim == 2:
        return H
    count, _, channels, _ = H.shape
    return H.permute(0, 2, 1, 3).reshape(count * channels, count * channels)


def as_trace(H: Tensor) -> Tensor:
    """Return the average over outputs (1/C) sum_i H_{ii;ab}, (N, N); (N, N) unchanged.

    Args:
        H: A kernel.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.as_trace(torch.eye(2).expand(1, 1, 2, 2)).tolist()
        [[1.0]]
    """
    return H if H.ndim == 2 else H.diagonal(dim1=2, dim2=3).mean(-1)
