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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.theory.hierarchy.contractions import (
    DEFAULT_MEMORY,
    PathTensors,
    check_memory,
    combined,
    ntk_change,
    path_tensors,
    whitened_change,
)
from torch_eft.theory.training.optimizer import Descent, Loss, SGDState


@dataclass(frozen=True)
class FrozenPath:
    """Order 0: training with the NTK as it is at the start.

    Args:
        z: (T+1, M), all outputs on all points, index (sample, output).
        p: (T+1, B), the coefficients of the training outputs' gradients.
        e: (T, B), dLoss/dz at every step.
    """

    z: Tensor
    p: Tensor
    e: Tensor


@dataclass(frozen=True)
class FirstOrder:
    """The first derivative in the counting parameter.

    Args:
        z: (T+1, M), z1.
        H: (T+1, K, K), H1.
        whitened: (T+1,), the change of the NTK of the training points, along the path, in units of the NTK itself:
            |G D.p| / max |D.p| with G_kl = b_k.H1.b_l in a basis with b_k.H.b_l = delta_kl; otherwise meaningless.
    """

    z: Tensor
    H: Tensor
    whitened: Tensor


@dataclass(frozen=True)
class Hierarchy:
    """A training forecast by one network's tensors, order by order; its outputs are z0 + z1, its NTK H0 + H1.

    Args:
        z0: (T+1, N, C), with the NTK frozen.
        z1: (T+1, N, C), the first correction by dH, ddI and ddII.
        H0: (N, N, C, C), the NTK at the start.
        H1: (T+1, N, N, C, C), its change at first order.
    """

    z0: Tensor
    z1: Tensor
    H0: Tensor
    H1: Tensor


def train_hierarchy(
    z: Tensor,
    H: Tensor,
    dH: Tensor,
    ddI: Tensor,
    ddII: Tensor,
    train: Sequence[int] | Tensor,
    loss: Loss,
    descent: Descent,
    memory: int = DEFAULT_MEMORY,
) -> Hierarchy:
    """Orders 0 and 1 of training, from whole tensors of one network (or any others of their symmetries).

    Args:
        z: (N, C), outputs at the start on all points.
        H: (N, N, C, C), as ``measure.ntk`` gives it.
        dH: (N, N, N, C, C, C), as ``measure.dntk``.
        ddI: (N, N, N, N, C, C, C, C), as ``measure.ddntk``.
        ddII: Likewise.
        train: The samples trained on, in the order of the loss's targets; the others are only looked at.
        loss: The loss.
        descent: The optimizer.
        memory: Bytes allowed.

    Raises:
        ValueError: If shapes do not fit, or the tensors do not fit into ``memory``.
    """
    N, C = z.shape
    for name, value, order in (("H", H, 2), ("dH", dH, 3), ("ddI", ddI, 4), ("ddII", ddII, 4)):
        if tuple(value.shape) != (N,) * order + (C,) * order:
            raise ValueError(f"{name}: {tuple(value.shape)} given; z asks for {(N,) * order + (C,) * order}")
    samples = torch.as_tensor(train, dtype=torch.long, device=z.device)
    if len(samples) != len(loss.targets):
        raise ValueError(f"train: {len(samples)} samples given for {len(loss.targets)} targets")
    indices = (samples[:, None] * C + torch.arange(C, device=z.device)).flatten()
    M, B = N * C, len(indices)
    check_memory(M, z.element_size() * 4 * (M**2 * B**2 + descent.steps * M**2), memory)
    columns = combined(H)[:, indices]
    tensors = path_tensors(combined(dH), combined(ddI), combined(ddII), indices, torch.arange(M, device=z.device))
    path = frozen_path(z, columns, indices, loss, descent)
    first = first_order(path, columns, indices, tensors, loss, descent, C)
    z0, z1 = (value.unflatten(1, (N, C)) for value in (path.z, first.z))
    return Hierarchy(z0, z1, H, first.H.unflatten(2, (N, C)).unflatten(1, (N, C)).permute(0, 1, 3, 2, 4))


def frozen_path(z: Tensor, H: Tensor, train: Tensor, loss: Loss, descent: Descent) -> FrozenPath:
    """Order 0, step by step.

    Args:
        z: (N, C), the outputs at the start, on all points.
        H: (M, B), the NTK between all outputs and those on training points, index (sample, output).
        train: (B,), the training indices among M.
        loss: The loss on the training points.
        descent: The optimizer.
    """
    start, outputs = z.flatten(), z.shape[1]
    coefficients = SGDState(descent, start.new_zeros(len(train)))
    zs, ps, es = [], [], []
    for step in range(descent.steps + 1):
        ps.append(coefficients.values[0])
        zs.append(start + H @ ps[-1])
        if step < descent.steps:
            es.append(loss.error(zs[-1][train].unflatten(0, (-1, outputs)), descent.batch(step)).flatten())
            coefficients.update(es[-1])
    return FrozenPath(torch.stack(zs), torch.stack(ps), torch.stack(es) if es else start.new_zeros(0, len(train)))


def first_order(
    path: FrozenPath, H: Tensor, train: Tensor, tensors: PathTensors, loss: Loss, descent: Descent, outputs: int
) -> FirstOrder:
    """z1 and H1 along a frozen path; arguments as ``frozen_path`` takes them, ``outputs`` is C."""
    p, e = path.p @ tensors.dual.T, path.e @ tensors.dual.T
    r = p.shape[1]
    zero = p.new_zeros
    coefficients = SGDState(descent, zero(len(train)), zero(r, r), zero(r, r, r), zero(r, r, r))
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
    for step in range(descent.steps + 1):
        p1, q_t, r_t, s_t = coefficients.values
        p_t = p[step]
        pp = torch.outer(p_t, p_t)
        terms = (q_t, pp, r_t, s_t, p_t[:, None, None] * q_t, p_t[:, None, None] * pp)
        z1 = H @ p1 + couplings @ torch.cat([term.flatten() for term in terms])
        zs.append(z1)
        qs.append(q_t)
        if step < descent.steps:
            shape = (-1, outputs)
            z0, dz = path.z[step][train].unflatten(0, shape), z1[train].unflatten(0, shape)
            e_t = e[step][:, None, None]
            e1 = loss.change_of_error(z0, dz, descent.batch(step)).flatten()
            coefficients.update(e1, torch.outer(e[step], p_t), e_t * pp / 2, e_t * q_t)
    q = torch.stack(qs)
    return FirstOrder(torch.stack(zs), ntk_change(tensors, p, q), whitened_change(tensors, train, p, q))
