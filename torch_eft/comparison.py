"""The join of the two wings: what the theory says of a network on a probe, beside what is measured of it.

Order 0 (infinite width) of the theory. Quantities, all on the fixed probe:

* ``ntk_trace``: mean diagonal of the NTK, (1/N C) sum H_{ii;aa}. Theory: the mean diagonal of Theta. Its
  sigma is the finite-width spread at initialisation, from sampled networks (at infinite width it is 0).
* ``ntk_drift``: ||H - H_0|| / ||H_0||. Theory at order 0: exactly 0.
* ``output_projection``: the outputs along the direction in which the theory moves them first,
  sum_{a,i} c_{i;a} z_{i;a}, c = Theta_PA y normalised to 1. Gaussian, so mean and sigma say everything.
* ``output_chi_squared``: the mean over probe and outputs of (z - mean)^2 / variance. Theory: 1, with the
  sigma of a Gaussian with the predicted correlations, sqrt(2 tr(R^2) / C) / N.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.measure.metrics import ntk_trace, relative_change
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.prediction import InfiniteWidthTraining
from torch_eft.theory.sampling import ntk_trace_spread
from torch_eft.trajectory import Validity


@dataclass(frozen=True)
class Compared:
    """One quantity at one step: measured, and predicted with one standard deviation over initialisations."""

    measured: float
    theory: float
    sigma: float | None


class InfiniteWidthComparison:
    """Order 0 against one network in full-batch training on squared error.

    Args:
        ensemble: The ensemble that the network is a draw of.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        learning_rate: Of PDLT's loss (1/2) sum (z - y)^2, multiplying the ensemble's learning-rate tensor.
        ntk_samples: Networks to sample for the spread of the NTK.

    Raises:
        ValueError: If shapes do not fit, or the learning rate is beyond the stability bound.
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        x_train: Tensor,
        y_train: Tensor,
        x_probe: Tensor,
        learning_rate: float,
        ntk_samples: int = 64,
    ) -> None:
        self.training = InfiniteWidthTraining(ensemble, x_train, y_train, x_probe, learning_rate, reduction="sum")
        self._ntk_trace = float(self.training.Theta_probe.diagonal().mean())
        self._ntk_trace_sigma = ntk_trace_spread(ensemble, x_probe, ntk_samples)
        direction = self.training.first_direction()
        self._direction = direction / direction.norm()

    @property
    def validity(self) -> Validity:
        """Where order 0 holds for this ensemble and these inputs."""
        return self.training.validity

    def compare(self, step: int, output: Tensor, ntk: Tensor, ntk_0: Tensor) -> dict[str, Compared]:
        """Theory beside measurement.

        Args:
            step: Optimizer steps taken since theta_0.
            output: Measured outputs on the probe, (N_p, n_L).
            ntk: Measured NTK on the probe, (N_p, N_p, n_L, n_L), with the ensemble's lambda.
            ntk_0: The same at theta_0.

        Returns:
            ``{quantity: Compared}``, sorted by quantity.
        """
        mean, covariance = self.training.output(torch.tensor([float(step)], device=self._direction.device))
        mean, covariance = mean[0], covariance[0]
        z = output.to(mean)
        count, channels = z.shape
        deviation = covariance.diagonal().sqrt()
        correlation = covariance / torch.outer(deviation, deviation)
        projected_variance = torch.einsum("ai,ab,bi->", self._direction, covariance, self._direction)
        return {
            "ntk_drift": Compared(float(relative_change(ntk, ntk_0)), 0.0, None),
            "ntk_trace": Compared(float(ntk_trace(ntk)), self._ntk_trace, self._ntk_trace_sigma),
            "output_chi_squared": Compared(
                float(((z - mean) / deviation[:, None]).square().mean()),
                1.0,
                float((2 * correlation.square().sum() / channels).sqrt() / count),
            ),
            "output_projection": Compared(
                float((self._direction * z).sum()),
                float((self._direction * mean).sum()),
                float(projected_variance.sqrt()),
            ),
        }
