"""Training at finite width from the tensors of one network at its start: NTK -> dNTK -> ddNTK (PDLT, chapter infinity).

In parameter space weighted by lambda, with J_b = grad z_b, the gradient of any loss is e_b grad z_b(theta). Expanded
about the start, it stays in the span of J_b, u_bc = d2z_b J_c, d3z_b[J_c, J_d] and d2z_b u_cd, so that
theta(t) - theta(0) has coefficients p_b, q_bc, r_bcd, s_bcd there, whose gradients are

    e_b,    e_b p_c,    e_b p_c p_d / 2,    e_b q_cd        (an optimizer linear in gradients acts on each alone)

and with dH_abc = J_b.u_ac, ddI_abcd = d3z_a[J_b, J_c, J_d], ddII_abcd = u_ac.u_bd, X_abcd = u_ab.u_cd = ddII_acbd,

    z_a(t)  = z_a + H_ab p_b + Y_a,
    Y_a     = dH_bac q_bc + dH_abc p_b p_c / 2
              + ddI_bcda r_bcd + X_bacd s_bcd + X_abcd p_b q_cd + ddI_abcd p_b p_c p_d / 6
    H_ab(t) = H_ab + dH_abc p_c + dH_bac p_c + (X_abcd + X_bacd) q_cd + (ddI_abcd + ddI_bacd + 2 ddII_abcd) p_c p_d / 2.

Perturbatively: order 0 is Y = 0 (e.g. Lee et al. 2019). With a counting parameter in front of dH, ddI and ddII, the
first derivative z1, H1 at 0 takes p, q, r, s of order 0 in Y and in H(t), and feeds z1 back through the loss's Hessian
at order 0: z1_a = H_ab p1_b + Y_a, p1 driven by (d^2 Loss) z1. This linear equation cannot blow up where order 0 does
not. Fed into themselves, the truncated equations may: H loses positivity, and with it stability. dH (of random sign)
and ddI, ddII (of non-zero mean) both change the outputs by O(1/n): one without the other is no order.

What is left of this in the mean over networks, vertex by vertex, is on the page ``derivation``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.progress.work import worked
from torch_eft.results.training import Training, as_training
from torch_eft.theory.hierarchy.contractions import (
    DEFAULT_MEMORY,
    PathTensors,
    check_memory,
    ntk_change,
    path_tensors,
    whitened_change,
    with_joint_indices,
)
from torch_eft.theory.training.optimizer import Loss, SGDState


@dataclass(frozen=True)
class FrozenPath:
    """Order 0: training with the NTK frozen at its value at the start.

    Args:
        z: (T+1, M), all outputs on all points, index (sample, output).
        p: (T+1, B), the coefficients of the training outputs' gradients.
        e: (T, B), dLoss/dz at each step.
    """

    z: Tensor
    p: Tensor
    e: Tensor


@dataclass(frozen=True)
class FirstOrder:
    """The first derivative with respect to the counting parameter.

    Args:
        z: (T+1, M), z1.
        H: (T+1, K, K), H1.
        whitened: (T+1,), the change of the training points' NTK along the path, in units of the NTK itself:
            |G D.p| / max |D.p| with G_kl = b_k.H1.b_l in a basis with b_k.H.b_l = delta_kl; otherwise meaningless.
    """

    z: Tensor
    H: Tensor
    whitened: Tensor


@dataclass(frozen=True, repr=False)
class Hierarchy:
    """A training forecast from one network's tensors, order by order: its outputs are z0 + z1, its NTK H0 + H1.

    Args:
        z0: (T+1, N, C), outputs with the NTK frozen.
        z1: (T+1, N, C), their first correction, from dH, ddI and ddII.
        H0: (N, N, C, C), the NTK at the start.
        H1: (T+1, N, N, C, C), its change at first order.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> tensors = [one.expand((1,) * k) for k in (2, 4, 6, 8, 8)]
        >>> theory.train_hierarchy(*tensors, [0], 0 * one, learning_rate=0.1, steps=3)
        Hierarchy(
          z0: (4, 1, 1) float64
          z1: (4, 1, 1) float64
          H0: (1, 1, 1, 1) float64
          H1: (4, 1, 1, 1, 1) float64
        )
    """

    z0: Tensor
    z1: Tensor
    H0: Tensor
    H1: Tensor

    def __repr__(self) -> str:
        return short_repr(self)


def train_hierarchy(
    z: Tensor,
    H: Tensor,
    dH: Tensor,
    ddI: Tensor,
    ddII: Tensor,
    train: Sequence[int] | Tensor,
    y_train: Tensor,
    training: Training | None = None,
    *,
    memory: int = DEFAULT_MEMORY,
    **keywords: Any,
) -> Hierarchy:
    """Integrate orders 0 and 1 of gradient descent from whole tensors of one network, or any of the same symmetries.

    Args:
        z: (N, C), outputs at the start on all points.
        H: (N, N, C, C), as returned by ``measure.ntk``.
        dH: (N, N, N, C, C, C), as returned by ``measure.dntk``.
        ddI: (N, N, N, N, C, C, C, C), as returned by ``measure.ddntk``.
        ddII: Likewise.
        train: The B samples trained on, among the N; the others are only observed.
        y_train: Their targets, (B, C), or (B,) classes for the cross-entropy.
        training: The training; None builds it from the keywords.
        memory: Bytes allowed.
        **keywords: Fields of a ``torch_eft.Training``: ``learning_rate``, ``steps``, ``loss``, ``momentum``, ...

    Returns:
        Outputs and NTK on all points at steps 0, 1, .. T.

    Raises:
        ValueError: If shapes do not fit, the training is gradient flow, or the tensors do not fit into ``memory``.

    Example:
        A network with a frozen NTK, dH = ddI = ddII = 0, learns exponentially:

        >>> import torch
        >>> from torch_eft import theory
        >>> z, H, *rest = (torch.zeros((1,) * k, dtype=torch.float64) for k in (2, 4, 6, 8, 8))
        >>> found = theory.train_hierarchy(
        ...     z, H + 1, *rest, [0], z + 1, learning_rate=0.5, steps=3, reduction="sum"
        ... )
        >>> found.z0.flatten().tolist()
        [0.0, 0.5, 0.75, 0.875]
    """
    training = as_training(training, **keywords)
    if training.flows or training.steps == math.inf:
        given = "dynamics: 'gradient_flow'" if training.flows else "steps: inf"
        raise ValueError(f"{given} given; whole tensors are integrated step by step, over a finite number of steps")
    N, C = z.shape
    for name, value, legs in (("H", H, 2), ("dH", dH, 3), ("ddI", ddI, 4), ("ddII", ddII, 4)):
        if tuple(value.shape) != (N,) * legs + (C,) * legs:
            raise ValueError(f"{name}: {tuple(value.shape)} given; z asks for {(N,) * legs + (C,) * legs}")
    samples = torch.as_tensor(train, dtype=torch.long, device=z.device)
    if len(samples) != len(y_train):
        raise ValueError(f"train: {len(samples)} samples given for {len(y_train)} targets")
    training.check_batches(len(samples))
    loss = Loss(training.loss, y_train, training.reduction)
    indices = (samples[:, None] * C + torch.arange(C, device=z.device)).flatten()
    M, B = N * C, len(indices)
    check_memory(M, z.element_size() * 4 * (M**2 * B**2 + int(training.steps) * M**2), memory)
    columns = with_joint_indices(H)[:, indices]
    dH, ddI, ddII = (with_joint_indices(value) for value in (dH, ddI, ddII))
    tensors = path_tensors(dH, ddI, ddII, indices, torch.arange(M, device=z.device))
    path = frozen_path(z, columns, indices, loss, training)
    first = first_order(path, columns, indices, tensors, loss, training, C)
    z0, z1 = (value.unflatten(1, (N, C)) for value in (path.z, first.z))
    return Hierarchy(z0, z1, H, first.H.unflatten(2, (N, C)).unflatten(1, (N, C)).permute(0, 1, 3, 2, 4))


def frozen_path(z: Tensor, H: Tensor, train: Tensor, loss: Loss, training: Training) -> FrozenPath:
    """Integrate order 0 step by step.

    Args:
        z: (N, C), the outputs at the start, on all points.
        H: (M, B), the NTK between all outputs and those on training points, index (sample, output).
        train: (B,), the training indices among M.
        loss: The loss on the training points.
        training: Gradient descent.

    Returns:
        Outputs, coefficients and errors at all steps.
    """
    start, outputs, steps = z.flatten(), z.shape[1], int(training.steps)
    coefficients = SGDState(training, start.new_zeros(len(train)))
    zs, ps, es = [], [], []
    for step in range(steps + 1):
        ps.append(coefficients.values[0])
        zs.append(start + H @ ps[-1])
        if step < steps:
            es.append(loss.error(zs[-1][train].unflatten(0, (-1, outputs)), training.batch(step)).flatten())
            coefficients.update(es[-1])
            worked(H.numel())
    return FrozenPath(torch.stack(zs), torch.stack(ps), torch.stack(es) if es else start.new_zeros(0, len(train)))


def first_order(
    path: FrozenPath, H: Tensor, train: Tensor, tensors: PathTensors, loss: Loss, training: Training, outputs: int
) -> FirstOrder:
    """Integrate z1 and H1 along a frozen path; arguments as for ``frozen_path``, ``outputs`` is C."""
    p, e = path.p @ tensors.dual.T, path.e @ tensors.dual.T
    r = p.shape[1]
    zero = p.new_zeros
    coefficients = SGDState(training, zero(len(train)), zero(r, r), zero(r, r, r), zero(r, r, r))
    parts = (
        tensors.dH_first,
        tensors.dH_second / 2,
        tensors.ddI_first,
        tensors.X_first,
        tensors.X_second,
        tensors.ddI_second / 6,
    )
    couplings = torch.cat([part.flatten(1) for part in parts], 1)
    zs, qs = [], []
    for step in range(len(p)):
        p1, q_t, r_t, s_t = coefficients.values
        p_t = p[step]
        pp = torch.outer(p_t, p_t)
        terms = (q_t, pp, r_t, s_t, p_t[:, None, None] * q_t, p_t[:, None, None] * pp)
        z1 = H @ p1 + couplings @ torch.cat([term.flatten() for term in terms])
        zs.append(z1)
        qs.append(q_t)
        if step < len(e):
            shape = (-1, outputs)
            z0, dz = path.z[step][train].unflatten(0, shape), z1[train].unflatten(0, shape)
            e_t = e[step][:, None, None]
            e1 = loss.change_of_error(z0, dz, training.batch(step)).flatten()
            coefficients.update(e1, torch.outer(e[step], p_t), e_t * pp / 2, e_t * q_t)
            worked(couplings.numel())
    q = torch.stack(qs)
    return FirstOrder(torch.stack(zs), ntk_change(tensors, p, q), whitened_change(tensors, train, p, q))
