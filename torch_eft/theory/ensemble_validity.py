"""Where order 1/n holds in the training of an ensemble, judged by its own size and by how far the parameters move."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.order_zero_path import OrderZeroPath
from torch_eft.theory.validity import first_order_validity
from torch_eft.trajectory import Validity

CAUTION, INVALID = 0.2, 1.0


def training_validity(
    ensemble: MLPEnsemble, x: Tensor, path: OrderZeroPath, sizes: Mapping[str, float], moved: float
) -> Validity:
    """Where order 1/n holds, judged by its own size.

    Args:
        ensemble: The ensemble.
        x: All inputs, (N_all, n_0).
        path: The order-0 path.
        sizes: ``{"|z1| / |z0|": largest ratio over time, ..}``.
        moved: The largest |theta(t) - theta(0)|^2 / n over time.
    """
    start = first_order_validity(ensemble, x)
    name = max(sizes, key=lambda key: sizes[key])
    gauge, n = sizes[name], ensemble.widths[-2]
    smallest, largest = float(path.eigenvalues[0]), float(path.eigenvalues[-1])
    error = float(path.error_gram.trace())
    told = ", ".join(f"{key} = {value:.3g}" for key, value in sizes.items())
    ratio = f"|e|^2 / (n lambda_min) = {error / smallest / n:.3g} (condition {largest / smallest:.3g})"
    detail = f"terms of order 1/n over those of order 0: {told}; {ratio}, |theta - theta_0|^2 / n = {moved:.3g}"
    advice = "Wider layers, smaller targets, fewer near-duplicate inputs or shorter training make it smaller"
    if max(gauge, moved) >= INVALID:
        decided = f"{name} = {gauge:.3g}" if gauge >= moved else f"|theta - theta_0|^2 / n = {moved:.3g}"
        return Validity("invalid", f"order 1/n: {decided} is not small; {detail}. {advice}. {start.reason}")
    if start.flag == "invalid":
        return Validity("invalid", f"{start.reason}; {detail}")
    cautious = start.flag == "caution" or max(gauge, moved) >= CAUTION
    return Validity(
        "caution" if cautious else "valid", f"{start.reason}; in training, {detail}." + f" {advice}" * cautious
    )


def relative_size(correction: Tensor, order_0: Tensor) -> float:
    """The largest ratio over time of the norms of a correction and of what it corrects, (T, ..) each."""
    return float(_ratios(correction, order_0, lambda first, zeroth: first / zeroth).max())


def truncation(correction: Tensor, order_0: Tensor) -> Tensor:
    """What the next order may add: |1/n term|^2 / |0th term|, rms over entries at each time, shaped like the first."""
    size = _ratios(correction, order_0, lambda first, zeroth: first.square() / zeroth)
    size = size / correction[0].numel() ** 0.5
    return size.reshape(-1, *[1] * (correction.ndim - 1)).expand(correction.shape)


def _ratios(correction: Tensor, order_0: Tensor, ratio: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    first, zeroth = correction.flatten(1).norm(dim=1), order_0.flatten(1).norm(dim=1)
    value = ratio(first, zeroth)
    return torch.where(first == 0, torch.zeros_like(value), value)
