"""The forecast of hidden layers in training, to order 1/n."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_eft.results.presentation.result import Result
from torch_eft.results.trajectory import Validity

Representation = Literal["activations", "preactivations"]
"""The functions f of a hidden layer whose kernel and movement are forecast."""


@dataclass(frozen=True, repr=False)
class HiddenLayerForecast(Result):
    """Hidden layer l on N_p probe points at T+1 times, means over initializations.

    Args:
        layer: l.
        width: n_l.
        kernel_infinite_width: (N_p, N_p), <s_a s_b> at infinite width (K for preactivations).
        kernel_mean: (N_p, N_p), at initialization, with its correction 1/n_{l-1}.
        kernel_change: (T+1, N_p, N_p), mean of g(t) - g(0); of order 1/n_l.
        kernel_terms: (T+1, N_p, N_p), the sum of the magnitudes of its three terms: they may nearly cancel.
        movement: (T+1, N_p, N_p), mean of (1/n_l) sum_j df_ja df_jb, f the activations (or preactivations): of order
            1/n_l too, so that single neurons move by 1/sqrt(n_l).
        ntk_mean: (N_p, N_p), the layer's NTK (mean of its diagonal over neurons) at initialization.
        ntk_change: (T+1, N_p, N_p), of order 1/n_{l-1}; None if ``ntk=False`` or if it has no expansion.
        error: ``{name: standard error}`` of the entries of what was sampled (rms).

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
        >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
        >>> layer = theory.predict_representation(ensemble, x, y, x, learning_rate=0.1, steps=4, ntk=False).layers[0]
        >>> layer.width, layer.kernel_infinite_width.shape, layer.kernel_change.shape
        (64, torch.Size([2, 2]), torch.Size([5, 2, 2]))
    """

    layer: int
    width: int
    kernel_infinite_width: Tensor
    kernel_mean: Tensor
    kernel_change: Tensor
    kernel_terms: Tensor
    movement: Tensor
    ntk_mean: Tensor
    ntk_change: Tensor | None
    error: dict[str, float]

    @property
    def relative_drift(self) -> float:
        """The largest ||kernel_change|| / ||kernel_mean|| over the times."""
        return float(self.kernel_change.flatten(1).norm(dim=1).max() / self.kernel_mean.norm())

    @property
    def relative_movement(self) -> float:
        """The largest rms movement of a neuron over the times, relative to its rms value."""
        return float(self._squared_movement().max().sqrt())

    @property
    def uncertainty(self) -> float:
        """The largest, over the times, of the squared relative movement times ||kernel_terms|| / ||kernel_change||."""
        drift, terms = (value.flatten(1).norm(dim=1) for value in (self.kernel_change, self.kernel_terms))
        ratio = torch.where(drift > 0, terms / torch.where(drift > 0, drift, 1.0), 1.0)
        return float((self._squared_movement() * ratio).max())

    def _squared_movement(self) -> Tensor:
        """Mean squared movement over mean square, at each time."""
        return self.movement.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0.0) / self.kernel_mean.trace()


@dataclass(frozen=True, repr=False)
class RepresentationForecast(Result):
    """The predicted change of all hidden layers.

    Args:
        steps: (T+1,) optimizer steps; for gradient flow, flow time / learning rate.
        layers: One ``HiddenLayerForecast`` per hidden layer.
        observable: ``"activations"`` or ``"preactivations"``.
        provenance: Which theory, for which ensemble.
        validity: Where it holds.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
        >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
        >>> forecast = theory.predict_representation(ensemble, x, y, x, learning_rate=0.1, steps=4, ntk=False)
        >>> forecast.steps.tolist(), [layer.width for layer in forecast.layers], forecast.observable
        ([0.0, 1.0, 2.0, 3.0, 4.0], [64, 64], 'activations')
    """

    steps: Tensor
    layers: tuple[HiddenLayerForecast, ...]
    observable: Representation
    provenance: str
    validity: Validity
