"""The validity of one network's forecast, judged by its own corrections; and the settings that it refuses.

The expansion parameter g is the largest of three sizes of order 1 relative to order 0: the correction of outputs,
max |z1| / max |z0 - z(0)| on training and on probe points; that of the probe's NTK, max |H1| / |H0|; and that of the
training points' NTK along the path, in units of the NTK itself (``whitened``), where small eigenvalues count as much as
large ones. The next order is of relative size g^2, up to a factor of a few: 4 % at g = 0.2; at g >= 1 the series does
not converge.
The expansion is in e times dNTK and ddNTK over lambda: small eigenvalues (near-duplicate inputs) or large targets spoil
it long before the width does.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.forecast.start import StartingDerivatives
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.hierarchy.evolution import FirstOrder
from torch_eft.theory.training.optimizer import sharpness

CAUTION, INVALID = 0.2, 1.0
_ILL_CONDITIONED = 1e3
_NULL = 1e-12
"""Eigenvalues below this share of the largest are rounding."""


def check_conflicts(start: StartingDerivatives) -> None:
    """Raise if no motion of the network can reduce part of the squared error.

    Args:
        start: The network at theta_0.

    Raises:
        ValueError: If part of the error lies in null modes of the training NTK.
    """
    if not start.loss.is_squared_error:
        return
    values, vectors = torch.linalg.eigh(start.H[start.train])
    error = start.train_outputs.flatten() - start.loss.targets.flatten()
    null = vectors[:, values <= _NULL * values[-1]]
    stuck = float((null.T @ error).norm())
    if stuck > 1e-6 * float(error.norm()):
        raise ValueError(
            f"x_train: {null.shape[1]} of {start.B} eigenvalues of the NTK on the training points vanish (smallest "
            f"{float(values[0]):.2g}, largest {float(values[-1]):.3g}) and {stuck / float(error.norm()):.2g} of the "
            "error lies there: duplicate points with conflicting targets, outputs that no parameter moves, or more "
            "training outputs than parameters; remove those points"
        )


def check_stability(start: StartingDerivatives, training: Training) -> None:
    """Raise if a learning rate is beyond the linear stability bound at the start.

    Args:
        start: The network at theta_0.
        training: The training.
    """
    if not training.flows:
        H = start.H[start.train]
        batches = training.different_batches()
        largest = max((sharpness(start.loss, start.train_outputs, H, batch) for batch in batches), default=0.0)
        training.check_stable(largest, "at the start")


@dataclass(frozen=True)
class ExpansionParameter:
    """Sizes of order 1 relative to order 0, each the largest up to a time, (T+1,).

    Args:
        outputs: Correction of the outputs on training or probe points.
        ntk: Correction of the probe's NTK.
        whitened: Correction of the training points' NTK along the path.
    """

    outputs: Tensor
    ntk: Tensor
    whitened: Tensor

    @property
    def largest(self) -> Tensor:
        """g, the largest of the three, (T+1,)."""
        return torch.stack([self.outputs, self.ntk, self.whitened]).amax(0)


def expansion_parameter(z0: Tensor, first: FirstOrder, start: StartingDerivatives) -> ExpansionParameter:
    """Compute the expansion parameter of a forecast.

    Args:
        z0: (T+1, M), outputs at order 0.
        first: The first order.
        start: The network at theta_0.

    Returns:
        Its three sizes.
    """
    K, moved = start.K, z0 - z0[0]
    parts = slice(K, None), slice(K)
    outputs = torch.stack([_relative(first.z[:, part], moved[:, part]) for part in parts])
    H_probe = start.whole_H[:K, :K]
    ntk = first.H.flatten(1).norm(dim=1) / H_probe.norm().clamp_min(torch.finfo(z0.dtype).tiny)
    return ExpansionParameter(outputs.amax(0).cummax(0)[0], ntk.cummax(0)[0], first.whitened.cummax(0)[0])


def validity_at_order_0() -> Validity:
    """Judge a forecast with the NTK frozen."""
    return Validity(
        "caution",
        "order 0: the NTK is taken as frozen, and nothing shows how far that holds; order=1 gives the first correction "
        "and its size",
    )


def validity_with_kinks(text: str) -> Validity:
    """Judge a forecast at order 1 of a network with kinks, described by ``text``."""
    advice = "order 1 lacks them: read order 0, or train a smooth network (tanh, GELU, softplus)"
    return Validity("invalid", [text, advice])


def validity_at_order_1(start: StartingDerivatives, parameter: ExpansionParameter) -> Validity:
    """Judge a forecast at order 1 by its expansion parameter at the last step.

    Args:
        start: The network at theta_0.
        parameter: The expansion parameter.

    Returns:
        The verdict.
    """
    loss, values = start.loss, torch.linalg.eigvalsh(start.H[start.train])
    error = loss.error(start.train_outputs)
    if loss.is_squared_error:
        error = error / loss.scale(error.numel())
    elif loss.reduction == "mean":
        error = error * len(error)
    smallest, largest = max(float(values[0]), 0.0), float(values[-1])
    ratio = float(error.square().sum()) / smallest if smallest > 0 else math.inf
    condition = largest / smallest if smallest > 0 else math.inf
    sizes = {
        "|z1| / |z0 - z(0)|": float(parameter.outputs[-1]),
        "|H1| / |H0|": float(parameter.ntk[-1]),
        "H1 / H along the path": float(parameter.whitened[-1]),
    }
    numbers = sizes | {"|e|^2 / lambda_min": ratio, "lambda_max / lambda_min": condition}
    decisive, g = max(sizes.items(), key=lambda item: item[1])
    ordered = ", ".join(f"{name} = {value:.3g}" for name, value in numbers.items())
    missing = f"the next order is about {100 * g**2:.2g} % of order 0, within a factor of a few"
    remedy = (
        "near-duplicate training points make lambda_min small: remove them, or stop earlier; else widen the layers"
        if condition > _ILL_CONDITIONED
        else "make the layers wider, the targets smaller or the training shorter"
    )
    if not g < INVALID or any(math.isnan(size) for size in sizes.values()):
        return Validity(
            "invalid", [f"order 1 is not a small correction, {decisive} decides: {ordered}", remedy], numbers
        )
    if g >= CAUTION:
        reasons = [f"order 1 is a rough correction, {decisive} decides: {ordered}", missing, remedy]
        return Validity("caution", reasons, numbers)
    return Validity("valid", [f"order 1 is a small correction: {ordered}", missing], numbers)


def _relative(change: Tensor, moved: Tensor) -> Tensor:
    """Return |change(t)| / max |moved|, (T,), and 0 where both vanish."""
    largest, sizes = moved.norm(dim=1).max(), change.norm(dim=1)
    return torch.where(sizes == 0, 0.0, sizes / largest)
