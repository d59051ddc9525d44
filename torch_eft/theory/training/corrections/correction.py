"""Corrections of order 1/n, and the one place where a Trajectory is assembled from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Trajectory, Validity
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.initialization.neuron.remarks import counted_laws

CORRECTIONS = ("mean", "covariance", "ntk")
"""Names of the observables that order 1/n corrects."""

_SIZES = {"mean": "|z1| / |z0|", "covariance": "|Cov1| / |Cov0|", "ntk": "|H1| / |Theta|"}


@dataclass(frozen=True, repr=False)
class Correction:
    """One observable's correction of order 1/n beside what it corrects.

    Args:
        value: (T, ...), 1/n included; of the NTK its drift.
        error: Standard error of its entries (rms), 0 where nothing is sampled.
        infinite_width: What it corrects, of the same shape.
        initial: Correction at initialization that comes in addition; Theta1 / n for the NTK.
    """

    value: Tensor
    error: float
    infinite_width: Tensor
    initial: Tensor | float = 0.0

    @property
    def whole(self) -> Tensor:
        """The correction with the part at initialization, (T, ...)."""
        return self.value + self.initial

    def size(self, at: Tensor | None = None) -> float:
        """Return the largest ratio over time of the norms of the correction and of what it corrects.

        Args:
            at: (T,), the times that count; None is all. Times at which there is nothing to correct never count.
        """
        given = self.infinite_width.flatten(1).norm(dim=1) > 0
        counted = given if at is None else given & at
        return relative_size(self.whole[counted], self.infinite_width[counted]) if bool(counted.any()) else 0.0

    @property
    def relative_error(self) -> float:
        """The standard error relative to the largest correction over time."""
        largest = float(self.value.flatten(1).norm(dim=1).max())
        return self.error * self.value[0].numel() ** 0.5 / largest if largest > 0 else 0.0

    __repr__ = short_repr


def sizes(corrections: Mapping[str, Correction], steps: Tensor) -> dict[str, float]:
    """``{"|z1| / |z0|": largest ratio over time, ..}``; the mean output vanishes at step 0 in both orders."""
    return {
        _SIZES[name]: correction.size(steps > 0 if name == "mean" else None) for name, correction in corrections.items()
    }


def corrected(
    infinite_width: Trajectory,
    corrections: Mapping[str, Correction],
    probe: Tensor | slice,
    train: slice,
    provenance: str,
    validity: Validity,
) -> Trajectory:
    """Return the trajectory at order 1/n.

    Args:
        infinite_width: The trajectory at infinite width; what has no correction stays as it is there.
        corrections: ``"mean"`` over all points, ``"covariance"`` and ``"ntk"`` over the probe points.
        probe: Index of the probe points among all points.
        train: That of the training points.
        provenance: See ``provenance``.
        validity: Where order 1/n holds.
    """
    changes: dict[str, Tensor] = {}
    if (mean := corrections.get("mean")) is not None:
        whole = mean.infinite_width + mean.value
        changes["output_mean"], changes["train_output_mean"] = whole[:, probe], whole[:, train]
        changes["output_truncation"] = truncation(mean.value[:, probe], mean.infinite_width[:, probe])
    if (covariance := corrections.get("covariance")) is not None:
        changes["output_covariance"] = covariance.infinite_width + covariance.value
    if (ntk := corrections.get("ntk")) is not None:
        changes["ntk_mean"], changes["ntk_change"] = ntk.infinite_width + ntk.whole, ntk.value
        changes["ntk_truncation"] = truncation(ntk.whole, ntk.infinite_width)
    return replace(infinite_width, **changes, provenance=provenance, validity=validity)


def provenance(
    ensemble: MLPEnsemble | Architecture,
    training: Training,
    corrections: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the description of how a trajectory was computed.

    Args:
        ensemble: The ensemble, or an architecture at infinite width.
        training: The training.
        corrections: Names of what is at order 1/n; none at infinite width.
        notes: Further remarks, such as standard errors.
    """
    order = "order 0 (infinite width)"
    if isinstance(ensemble, Architecture):
        return "; ".join([f"{order}, {ensemble}, {training.describe()}", *notes])
    if corrections:
        left = ", ".join(name for name in CORRECTIONS if name not in corrections)
        order = f"order 1/n, n = {ensemble.widths[-2]}" + (f" ({left} at order 0)" if left else "")
    laws = counted_laws(ensemble, bool(corrections))
    if "covariance" in corrections and EXCESS_KURTOSIS[ensemble.bias_law[-1]] and ensemble.C_b[-1]:
        laws += ("the covariance takes z(0) as Gaussian in its terms of order 1/n, whatever the outputs' bias",)
    return "; ".join([f"{order}, {ensemble}, {training.describe()}", *laws, *notes])


def relative_size(correction: Tensor, infinite_width: Tensor) -> float:
    """The largest ratio over time of the norms of a correction and of what it corrects, (T, ..) each."""
    return float(_ratios(correction, infinite_width, lambda first, corrected: first / corrected).max())


def truncation(correction: Tensor, infinite_width: Tensor) -> Tensor:
    """Estimates the next order: |1/n term|^2 / |0th term|, rms over entries at each time, shaped like the first."""
    size = _ratios(correction, infinite_width, lambda first, corrected: first.square() / corrected)
    size = size / correction[0].numel() ** 0.5
    return size.reshape(-1, *[1] * (correction.ndim - 1)).expand(correction.shape)


def with_outputs(mean: Tensor, off: Tensor) -> Tensor:
    """delta_ij mean_xy + off^ij_xy, (T, x, y, n_L, n_L)."""
    return mean[..., None, None] * torch.eye(off.shape[-1], dtype=mean.dtype, device=mean.device) + off


def _ratios(correction: Tensor, infinite_width: Tensor, ratio: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    first, corrected = correction.flatten(1).norm(dim=1), infinite_width.flatten(1).norm(dim=1)
    value = ratio(first, corrected)
    return torch.where(first == 0, torch.zeros_like(value), value)
