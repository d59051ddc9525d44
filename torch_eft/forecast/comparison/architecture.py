"""The forecast of an architecture at infinite width against one network in full-batch training on squared error.

The quantities are those of ``comparison.ensemble`` at order 0: outputs with their spread over seeds, the NTK and its
drift, which infinite width does not have. Neither the spread of the NTK nor order 1/n is drawn beside a training.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_eft.forecast.comparison.compared import Compared
from torch_eft.forecast.comparison.ensemble import compare_outputs, unit_direction
from torch_eft.forecast.comparison.work import Allowance
from torch_eft.measure.kernels.metrics import ntk_trace
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.architecture.closed import check_closed_form
from torch_eft.theory.architecture.kernels import architecture_kernels, kernels_work
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.training.infinite_width import InfiniteWidthPath, architecture_validity, checked_targets

KERNELS = "K and Theta at infinite width"

_EXTENSION = 8
"""Of the horizon up to which momentum is summed step by step."""


class ArchitectureComparison:
    """The forecast of convolutions, skips and norms at infinite width, and one network beside it.

    Args:
        architecture: As it was read at theta_0; None where ``earlier`` has its kernels.
        x_train: Training inputs, (N, ...).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, ...).
        training: The training, full batch on the squared error.
        allowance: Work that the kernels may take.
        earlier: The ``state`` of the same forecast, to restore it.

    Raises:
        ValueError: If the kernels have no closed form or take more work than is allowed, shapes do not fit, or the
            learning rate is beyond the stability bound.
    """

    description = "order 0 (infinite width), as no order 1/n of convolutions, skips and norms is drawn"
    level = "ensemble, order 0"

    def __init__(
        self,
        architecture: Architecture | None,
        x_train: Tensor,
        y_train: Tensor,
        x_probe: Tensor,
        training: Training,
        *,
        allowance: Allowance,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        if earlier is not None:
            self.validity = Validity(earlier["flag"], earlier["reason"])
            self._K, self._Theta = (earlier[name].to(x_train.device, torch.float64) for name in ("K", "Theta"))
            horizon = int(earlier["horizon"])
        else:
            assert architecture is not None
            checked_targets(y_train, len(x_train), architecture.output)
            check_closed_form(architecture)
            points = len(x_train) + len(x_probe)
            allowance.plan({KERNELS: kernels_work(architecture, points)})
            if not allowance.covers(KERNELS):
                raise ValueError(f"{KERNELS} of {points} points take {allowance.refusal(KERNELS)}")
            x = torch.cat([x_probe.to(x_train), x_train])
            with allowance.working(KERNELS):
                self._K, self._Theta = architecture_kernels(architecture, x)
                self.validity = architecture_validity(architecture, x)
            horizon = int(training.steps)
        self._training = replace(training.summed(y_train.numel()), steps=horizon)
        self._y = y_train.to(self._K)
        self.frozen = self._path()
        self.frozen.check_stable(self._training)
        self.direction = unit_direction(self.frozen)

    def _path(self) -> InfiniteWidthPath:
        return InfiniteWidthPath(self._K, self._Theta, self._y, self._training)

    def state(self) -> dict[str, Any]:
        """Return what costs time to compute; plain types and tensors."""
        return {
            "horizon": int(self._training.steps),
            "K": self._K.cpu(),
            "Theta": self._Theta.cpu(),
            "flag": self.validity.flag,
            "reason": self.validity.reason,
        }

    def expansion_parameter(self, step: int) -> None:
        """There is no order 1."""

    def layers(self, step: int, kernels: list[Tensor], kernels_0: list[Tensor]) -> list[tuple[float, float]]:
        """Drifts of hidden kernels are not predicted."""
        return []

    def compare(
        self,
        step: int,
        output: Tensor,
        ntk: Tensor,
        ntk_0: Tensor,
        kernels: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> dict[str, Compared]:
        """Compare theory and measurement, as ``EnsembleComparison.compare`` does at order 0."""
        if self._training.momentum and step > self._training.steps:
            self._training = replace(self._training, steps=max(step, _EXTENSION * int(self._training.steps)))
            self.frozen = self._path()
        Theta = self.frozen.Theta.diagonal()[: self.frozen.probes]
        drift = float((ntk - ntk_0).norm() / ntk_0.norm())
        return compare_outputs(self.frozen, self.direction, step, output) | {
            "ntk_drift": Compared(drift, 0.0),
            "ntk_trace": Compared(float(ntk_trace(ntk)), float(Theta.mean())),
        }
