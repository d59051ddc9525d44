"""Compares kernels with each other, with the targets and with their own trace."""

import math

import torch
from torch import Tensor


def linear_cka(K: Tensor, reference: Tensor, *, debiased: bool = False) -> Tensor:
    """Compute the linear centered kernel alignment of two kernels (Kornblith et al. 2019), in [0, 1].

    <K_c, L_c> / (||K_c|| ||L_c||) with K_c = C K C, C = 1 - (1/N) 1 1^T. NaN for one sample, or for a
    representation that is the same for all samples, to rounding.

    With fewer samples than features it is biased towards 1: even independent representations are alike. ``debiased``
    puts U-statistics, HSIC_1 of Song et al. 2012 (eq. 4), in place of the three products, as Nguyen et al. 2021 do:
    0 in the mean for independent representations, at most 1, NaN below four samples.

    Args:
        K: (N, N).
        reference: (N, N), of the same samples.
        debiased: Take U-statistics.

    Returns:
        A 0-d tensor.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> K = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> round(float(measure.linear_cka(K, 5 * K)), 4)  # the scale drops out
        1.0
    """
    first, second = centered(K), centered(reference)
    if debiased:
        first, second = _u_centered(K), _u_centered(reference)
    value = (first * second).sum() / (first.norm() * second.norm())
    return torch.where(is_constant(K) | is_constant(reference), math.nan, value)


def centered(K: Tensor) -> Tensor:
    """Center a kernel, C K C with C = 1 - (1/N) 1 1^T: that of the features less their means over the samples.

    Args:
        K: (N, N).

    Returns:
        (N, N).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.centered(torch.ones(2, 2) + torch.eye(2))
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    return K - K.mean(0, keepdim=True) - K.mean(1, keepdim=True) + K.mean()


def _u_centered(K: Tensor) -> Tensor:
    """(N, N), whose scalar products are N (N - 3) HSIC_1 (Szekely and Rizzo 2014, section 3); NaN for N < 4."""
    count = len(K)
    if count < 4:
        return torch.full_like(K, math.nan)
    K = K - torch.diag(K.diagonal())
    rows = K.sum(0, keepdim=True) / (count - 2)
    K = K - rows - rows.T + K.sum() / ((count - 1) * (count - 2))
    return K - torch.diag(K.diagonal())


def is_constant(K: Tensor) -> Tensor:
    """True where only rounding is left after centering; a 0-d tensor."""
    return centered(K).norm() <= 32 * torch.finfo(K.dtype).eps * K.norm()


def effective_rank(K: Tensor, *, entropy: bool = False) -> Tensor:
    """Compute the number of directions of a kernel, from 1 to N, NaN for K = 0.

    With p its eigenvalues divided by their sum, the participation ratio 1 / sum p^2 = (tr K)^2 / tr K^2 (Gao and
    Ganguli 2015), which needs no eigenvalues, or exp(- sum p log p) (Roy and Vetterli 2007), which small ones weigh
    more in. Both are n for n equal eigenvalues.

    Args:
        K: (N, N), symmetric, positive semidefinite; ``centered(K)`` leaves out the mean over the samples, which
            dominates the kernels of positive activations.
        entropy: Take the second.

    Returns:
        A 0-d tensor.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> float(measure.effective_rank(torch.eye(5))), float(measure.effective_rank(torch.ones(5, 5)))
        (5.0, 1.0)
    """
    if not entropy:
        return K.trace().square() / K.square().sum()
    p = torch.linalg.eigvalsh(K).clamp_min(0)
    return torch.special.entr(p / p.sum()).sum().exp()


def target_alignment(K: Tensor, targets: Tensor) -> Tensor:
    """Compute the centered alignment of a kernel with y y^T (Cristianini et al. 2001; centered: Cortes et al. 2012).

    NaN for one sample, targets that are all equal, or a representation that is the same for all samples.

    Args:
        K: (N, N).
        targets: y, (N, C) or (N,), or class numbers (N,), taken as one-hot.

    Returns:
        A 0-d tensor.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> classes = torch.tensor([0, 0, 1, 1])
        >>> K = (classes[:, None] == classes).float()
        >>> round(float(measure.target_alignment(K, classes)), 4)
        1.0
    """
    kernel = target_kernel(targets, len(K))
    assert kernel is not None
    return linear_cka(K, kernel.to(K))


def target_kernel(targets: Tensor | None, samples: int) -> Tensor | None:
    """Compute the kernel y y^T of (N, C) targets or (N,) class labels, one-hot.

    Args:
        targets: y, or None.
        samples: N.

    Returns:
        (N, N); None without targets.

    Raises:
        ValueError: If the targets are not N.
    """
    if targets is None:
        return None
    if targets.ndim not in (1, 2) or len(targets) != samples:
        raise ValueError(
            f"targets: {tuple(targets.shape)} given for {samples} samples; give ({samples}, C), or ({samples},)"
        )
    if targets.ndim == 1 and not targets.is_floating_point():
        # Scalar products of one-hot vectors, whatever the number of classes.
        return (targets[:, None] == targets).to(torch.get_default_dtype())
    y = targets.reshape(samples, -1)
    y = y if y.is_floating_point() else y.to(torch.get_default_dtype())
    return y @ y.T
