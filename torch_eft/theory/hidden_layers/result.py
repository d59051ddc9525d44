"""What is forecast of one hidden layer in training, to order 1/n."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HiddenLayerForecast:
    """Hidden layer l on N_p probe points at T+1 times, means over initializations.

    Args:
        layer: l.
        width: n_l.
        kernel_order0: (N_p, N_p), <s_a s_b> at infinite width (K for preactivations).
        kernel_mean: (N_p, N_p), at initialization, with its correction 1/n_{l-1}.
        kernel_drift: (T+1, N_p, N_p), mean of g(t) - g(0); of order 1/n_l.
        kernel_terms: (T+1, N_p, N_p), the sum of the magnitudes of its three terms: they may nearly cancel.
        movement: (T+1, N_p, N_p), mean of (1/n_l) sum_j df_ja df_jb, f the activations (or preactivations): of order
            1/n_l too, so that single neurons move by 1/sqrt(n_l).
        ntk_mean: (N_p, N_p), of the layer's NTK (mean of its diagonal over neurons), at initialization.
        ntk_drift: (T+1, N_p, N_p), of order 1/n_{l-1}; None where it was not asked for or has no expansion.
        error: ``{name: standard error}`` of the entries of what was sampled (rms).
    """

    layer: int
    width: int
    kernel_order0: Tensor
    kernel_mean: Tensor
    kernel_drift: Tensor
    kernel_terms: Tensor
    movement: Tensor
    ntk_mean: Tensor
    ntk_drift: Tensor | None
    error: dict[str, float]

    @property
    def relative_drift(self) -> float:
        """The largest ||kernel_drift|| / ||kernel_mean|| over the times."""
        return float(self.kernel_drift.flatten(1).norm(dim=1).max() / self.kernel_mean.norm())

    @property
    def relative_movement(self) -> float:
        """The largest rms movement of a neuron over the times, relative to its rms value."""
        return float(self._moved().max().sqrt())

    @property
    def uncertainty(self) -> float:
        """The largest, over the times, of the squared relative movement times ||kernel_terms|| / ||kernel_drift||."""
        drift, terms = (value.flatten(1).norm(dim=1) for value in (self.kernel_drift, self.kernel_terms))
        return float((self._moved() * torch.where(drift > 0, terms / torch.where(drift > 0, drift, 1.0), 1.0)).max())

    def _moved(self) -> Tensor:
        """Mean squared movement over mean square, at every time."""
        return self.movement.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0.0) / self.kernel_mean.trace()
