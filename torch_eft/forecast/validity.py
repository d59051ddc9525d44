"""Where the forecast of one network holds, judged by what it holds itself; and the settings in which there is none.

The gauge g is the largest of three sizes of order 1 relative to order 0: the correction of outputs, max |z1| /
max |z0 - z(0)| on training and on probe points; that of the probe's NTK, max |H1| / |H0|; and that of the training
points' NTK along the path, in units of the NTK itself (``whitened``), where small eigenvalues count as much as large
ones. The next order is of relative size g^2, up to a factor of a few: 4 % at g = 0.2; g >= 1 is no series.
The expansion is in e times dNTK and ddNTK over lambda: small eigenvalues (near-duplicate inputs) or large targets spoil
it long before the width does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.trajectory import Validity
from torch_eft.theory.hierarchy.evolution import FirstOrder
from torch_eft.theory.training.optimizer import Descent, Loss

CAUTION, INVALID = 0.2, 1.0
_ILL_CONDITIONED = 1e3
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


@dataclass(frozen=True)
class Gauge:
    """Sizes of order 1 relative to order 0, each the largest up to a time, (T+1,).

    Args:
        outputs: On training or probe points.
        ntk: Of the probe's NTK.
        whitened: Of the training points' NTK along the path.
    """

    outputs: Tensor
    ntk: Tensor
    whitened: Tensor

    @property
    def g(self) -> Tensor:
        """The largest of the three, (T+1,)."""
        return torch.stack([self.outputs, self.ntk, self.whitened]).amax(0)


def gauge_of(zs: Tensor, first: FirstOrder, H_probe: Tensor, train: Tensor) -> Gauge:
    """The gauge of a forecast.

    Args:
        zs: (T+1, M), outputs at order 0.
        first: The first order.
        H_probe: (K, K).
        train: (B,).
    """
    probe = torch.ones(zs.shape[1], dtype=torch.bool, device=zs.device)
    probe[train] = False
    moved = zs - zs[0]
    outputs = torch.stack([_relative(first.z[:, part], moved[:, part]) for part in (train, probe.nonzero()[:, 0])])
    ntk = first.H.flatten(1).norm(dim=1) / H_probe.norm().clamp_min(torch.finfo(zs.dtype).tiny)
    return Gauge(outputs.amax(0).cummax(0)[0], ntk.cummax(0)[0], first.whitened.cummax(0)[0])


def validity_of(loss: Loss, z: Tensor, gauge: Gauge | None, H: Tensor, train: Tensor) -> Validity:
    """The verdict.

    Args:
        loss: The loss.
        z: (N, C), outputs at the start on all points.
        gauge: Of the forecast, or None at order 0.
        H: (M, B).
        train: (B,).
    """
    if gauge is None:
        remark = (
            "the NTK taken as frozen, with nothing to tell how far; order=1 gives the first correction and its size"
        )
        return Validity("caution", f"order 0: {remark}")
    values = torch.linalg.eigvalsh(H[train])
    error = loss.error(z.flatten()[train].unflatten(0, (-1, z.shape[1])))
    if loss.is_squared_error:
        error = error / loss.scale(error.numel())
    elif loss.reduction == "mean":
        error = error * len(error)
    smallest, largest = max(float(values[0]), 0.0), float(values[-1])
    ratio = float(error.square().sum()) / smallest if smallest > 0 else float("inf")
    condition = largest / smallest if smallest > 0 else float("inf")
    sizes = {
        "|z1| / |z0 - z(0)|": float(gauge.outputs[-1]),
        "|H1| / |H0|": float(gauge.ntk[-1]),
        "H1 / H along the path": float(gauge.whitened[-1]),
    }
    decisive, g = max(sizes.items(), key=lambda item: item[1])
    told = ", ".join(f"{name} = {value:.3g}" for name, value in sizes.items())
    told += f" (|e|^2 / lambda_min = {ratio:.3g}, lambda_max / lambda_min = {condition:.3g})"
    remedy = (
        "near-duplicate training points make lambda_min small: remove them, or stop earlier; else widen the layers"
        if condition > _ILL_CONDITIONED
        else "make the layers wider, the targets smaller or the training shorter"
    )
    if not max(sizes.values()) < INVALID or not all(value == value for value in sizes.values()):
        return Validity("invalid", f"order 1 is no small correction, {decisive} decides: {told}; {remedy}")
    missing = f"the next order is about {100 * g**2:.2g} % of order 0, within a factor of a few"
    if g >= CAUTION:
        return Validity("caution", f"order 1 is a rough correction, {decisive} decides: {told}; {missing}; {remedy}")
    return Validity("valid", f"order 1 is a small correction: {told}; {missing}")


def kinked_validity(text: str) -> Validity:
    """Of a network with kinks."""
    return Validity(
        "invalid",
        f"{text}. Order 1 lacks them: read order 0, or train a smooth network (tanh, GELU, softplus)",
    )


def _relative(change: Tensor, moved: Tensor) -> Tensor:
    """|change(t)| / max |moved|, (T,), 0 where neither is."""
    largest, sizes = moved.norm(dim=1).max(), change.norm(dim=1)
    return torch.where(sizes == 0, 0.0, sizes / largest)
