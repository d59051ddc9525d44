"""Where the forecast of one network holds, judged by what it holds itself; and the settings in which there is none.

The gauge g is the size of the first correction relative to order 0, the largest of max |z1| / max |z0 - z(0)| on
training and on probe points and of max |H1| / |H0|. Were the orders a geometric series, g^2 / (1 - g) of order 0 would
be missing: 5 % for g = 0.2, and there is no series for g >= 1. The expansion is in e times dNTK and ddNTK over lambda:
small eigenvalues (near-duplicate inputs) or large targets spoil it long before the width does.
"""

import torch
from torch import Tensor

from torch_eft.theory.dynamics import Descent, Loss
from torch_eft.theory.hierarchy import FirstOrder
from torch_eft.trajectory import Validity

CAUTION, INVALID = 0.2, 1.0
_NULL = 1e-12
"""Eigenvalues below this share of the largest are rounding."""


def check_conflicts(loss: Loss, z: Tensor, H: Tensor, train: Tensor) -> None:
    """Refuse squared errors that no motion of this network can reduce.

    Args:
        loss: The loss.
        z: (N, C), on all points.
        H: (M, B).
        train: (B,).

    Raises:
        ValueError: If part of the error lies in null modes of the training NTK.
    """
    if not loss.is_squared_error:
        return
    values, vectors = torch.linalg.eigh(H[train])
    error = z.flatten()[train] - loss.targets.flatten()
    null = vectors[:, values <= _NULL * values[-1]]
    stuck = float((null.T @ error).norm())
    if stuck > 1e-6 * float(error.norm()):
        raise ValueError(
            f"x_train: {null.shape[1]} of {len(train)} eigenvalues of the NTK on the training points vanish (smallest "
            f"{float(values[0]):.2g}, largest {float(values[-1]):.3g}) and {stuck / float(error.norm()):.2g} of the "
            "error lies there: duplicate points with conflicting targets, outputs that no parameter moves, or more "
            "training outputs than parameters; remove those points"
        )


def sharpness(loss: Loss, z: Tensor, H: Tensor, batch: Tensor | None) -> float:
    """The largest eigenvalue of the loss's Hessian in parameter space, of its part J^T (d^2 Loss/dz^2) J.

    Args:
        loss: The loss.
        z: (N, C), on the training points.
        H: (B, B).
        batch: Samples, or None for all.
    """
    if loss.is_squared_error and batch is None:
        return float(torch.linalg.eigvalsh(H)[-1]) * loss.scale(z.numel())
    units = torch.eye(z.numel(), dtype=z.dtype, device=z.device).unflatten(1, z.shape)
    curvature = torch.stack([loss.change_of_error(z, unit, batch).flatten() for unit in units], 1)
    values, vectors = torch.linalg.eigh(H)
    root = vectors * values.clamp_min(0.0).sqrt()
    return float(torch.linalg.eigvalsh(root.T @ curvature @ root)[-1])


def check_stability(loss: Loss, z: Tensor, H: Tensor, train: Tensor, optimizer: Descent) -> None:
    """Refuse learning rates beyond the linear stability bound of the start.

    Raises:
        ValueError: With the bound.
    """
    if optimizer.steps == 0:
        return
    rows = z.flatten()[train].unflatten(0, (-1, z.shape[1]))
    batches = [None] if optimizer.batches is None else list({tuple(b.tolist()): b for b in optimizer.batches}.values())
    largest = max(sharpness(loss, rows, H[train], batch) for batch in batches)
    rate = max(optimizer.learning_rates)
    if rate * largest >= optimizer.largest_stable:
        kind = "Nesterov's momentum" if optimizer.nesterov else "momentum"
        name = f"with {kind} {optimizer.momentum:g}" if optimizer.momentum else "2 / lambda_max"
        raise ValueError(
            f"learning_rate: {rate:g} given, beyond the linear stability bound "
            f"{optimizer.largest_stable / largest:.4g} ({name}; the loss's Hessian at the start has eigenvalues up to "
            f"{largest:.4g}); give a smaller one"
        )


def validity_of(
    loss: Loss, zs: Tensor, first: FirstOrder | None, H: Tensor, H_probe: Tensor, train: Tensor
) -> tuple[Validity, float]:
    """The validity and the gauge g.

    Args:
        loss: The loss.
        zs: (T+1, M), outputs at order 0.
        first: The first order, or None at order 0.
        H: (M, B).
        H_probe: (K, K).
        train: (B,).
    """
    if first is None:
        remark = (
            "the NTK taken as frozen, with nothing to tell how far; order=1 gives the first correction and its size"
        )
        return Validity("caution", f"order 0: {remark}"), float("nan")
    values = torch.linalg.eigvalsh(H[train])
    error = loss.error(zs[0][train].unflatten(0, (len(loss.targets), -1)))
    error = error / loss.scale(error.numel()) if loss.is_squared_error else error * len(loss.targets)
    probe = torch.ones(zs.shape[1], dtype=torch.bool, device=zs.device)
    probe[train] = False
    outputs = max(_relative(first.z[:, part], zs[:, part] - zs[0, part]) for part in (train, probe.nonzero()[:, 0]))
    ntk = float(first.H.flatten(1).norm(dim=1).max() / H_probe.norm().clamp_min(torch.finfo(zs.dtype).tiny))
    gauge = max(outputs, ntk)
    smallest, condition = float(values[0]), float(values[-1] / values[0].clamp_min(1e-300))
    e2 = float(error.square().sum())
    ratio = e2 / smallest if smallest > 0 else float("inf")
    decided = "|z1| / |z0 - z(0)|" if outputs >= ntk else "|H1| / |H0|"
    sizes = (
        f"|z1| / |z0 - z(0)| = {outputs:.3g}, |H1| / |H0| = {ntk:.3g} (|e|^2 / lambda_min = {ratio:.3g}, lambda_max / "
        f"lambda_min = {condition:.3g})"
    )
    remedy = (
        "near-duplicate training points make lambda_min small: remove them, or stop earlier; else widen the layers"
        if condition > 1e3
        else "make the layers wider, the targets smaller or the training shorter"
    )
    if not gauge < INVALID:  # also NaN
        return Validity("invalid", f"order 1 is no small correction, {decided} decides: {sizes}; {remedy}"), gauge
    missing = f"about {100 * gauge**2 / (1 - gauge):.2g} % are missing where order 0 is 100 %"
    if gauge >= CAUTION:
        return Validity(
            "caution", f"order 1 is a rough correction, {decided} decides: {sizes}; {missing}; {remedy}"
        ), gauge
    return Validity("valid", f"order 1 is a small correction: {sizes}; {missing}"), gauge


def kinked_validity(text: str) -> Validity:
    """Of a network with kinks."""
    return Validity(
        "invalid",
        f"{text}. Order 1 lacks them: read order 0, or train a smooth network (tanh, GELU, softplus)",
    )


def _relative(change: Tensor, moved: Tensor) -> float:
    largest, size = moved.norm(dim=1).max(), change.norm(dim=1).max()
    if float(size) == 0:
        return 0.0
    return float(size / largest) if float(largest) > 0 else float("inf")
