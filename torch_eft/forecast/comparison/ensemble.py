"""The ensemble's forecast against one network in full-batch training on squared error, on a fixed probe.

Infinite width is order 0; order 1 adds the corrections of order 1/n. The compared quantities, with E the mean over
initializations, are:

* ``output_projection``: sum_{a,i} c_{i;a} z_{i;a}, c = Theta_PA y normalized to 1, the direction in which the mean
  output first moves. Order 1 corrects mean and variance. At order 0 the output is Gaussian, so mean and sigma are all.
* ``output_chi_squared``: the mean over probe and outputs of (z - E z)^2 / Var z, both of infinite width. Order 0: 1,
  with sigma = sqrt(2 tr(R^2) / C) / N, R the correlations. Order 1: 1 + the mean of the variances' correction / Var z
  (that of the mean enters squared).
* ``ntk_trace``: (1/N C) sum H_{ii;aa}. Order 0: the mean diagonal of Theta; order 1: with that of Theta1 / n and of the
  drift D(t) = E H(t) - E H(0). Sigma: its finite-width spread at initialization, from sampled networks.
* ``ntk_mean_drift``: <H - H_0, D> / (|D| |Theta|), kernels averaged over outputs. Order 0: 0; order 1: |D| / |Theta|.
  Order 1 does not predict the norm |H - H_0| of one network: most of it is dNTK of random sign, of variance O(1/n^2).
* ``representation_mean_drift``: the same of hidden kernels, mean over layers.
* ``ntk_drift``: |H - H_0| / |H_0|, at order 0: 0; no order 1.

Spreads over initializations of the drifts are not predicted: for one network expect them to be as large as the
drift itself.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_eft.forecast.comparison.compared import Compared, component
from torch_eft.forecast.comparison.finite_width import Corrections, FiniteWidth, Problem, finite_width
from torch_eft.forecast.comparison.work import Allowance
from torch_eft.measure.kernels.metrics import as_trace, ntk_trace
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.sampling import ntk_trace_spread
from torch_eft.theory.training.infinite_width import FrozenTraining, InfiniteWidthPath

FIRST_HORIZON = 1000
"""Steps to forecast at first where the length of the training is unknown."""

_EXTENSION = 8
_SUMMED_AT_FIRST, _SUMMED_AT_MOST = 4000, 20000
"""Steps with momentum: its sums over time are made step by step, 3000 per second at order 1."""


class EnsembleComparison:
    """The forecast of an ensemble, and one network beside it.

    Args:
        ensemble: The ensemble from which the network is drawn.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        training: The training, full batch on the squared error; steps beyond its number extend the forecast.
        num_networks: Networks sampled for the spread of the NTK.
        order: 0, or 1 with the corrections of order 1/n that ``allowance`` covers.
        allowance: Work that they may take, with what else shares it; None: 10 s of one core.
        earlier: The ``state`` of the same forecast, to restore it instead of computing it anew.

    Raises:
        ValueError: If shapes do not fit, or the learning rate is beyond the stability bound.
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        x_train: Tensor,
        y_train: Tensor,
        x_probe: Tensor,
        training: Training,
        *,
        num_networks: int = 64,
        order: int = 1,
        allowance: Allowance | None = None,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        if order not in (0, 1):
            raise ValueError(f"order: {order} given; give 0 (infinite width) or 1 (with corrections of order 1/n)")
        self._problem = Problem(ensemble, x_train, y_train, x_probe, training.summed(y_train.numel()))
        self._horizon = int(training.steps if earlier is None else earlier["horizon"])
        if training.momentum and earlier is None:
            self._horizon = min(self._horizon, _SUMMED_AT_FIRST)
        self.frozen = self._frozen()
        self._problem = replace(
            self._problem, x_train=self.frozen.x_train, y_train=self.frozen.y_train, x_probe=self.frozen.x_probe
        )
        self._ntk_trace_sigma = (
            ntk_trace_spread(ensemble, x_probe, num_networks=num_networks)
            if earlier is None
            else float(earlier["ntk_trace_sigma"])
        )
        self.direction = unit_direction(self.frozen)
        self._allowance = Allowance(10.0) if allowance is None else allowance
        self.finite: FiniteWidth | None = None
        if earlier is not None:
            stored = earlier["finite"]
            self.finite = None if stored is None else FiniteWidth.from_state(stored, self.direction.device)
        elif order == 1:
            self._extend(self._horizon)

    def state(self) -> dict[str, Any]:
        """Return what costs time to compute; plain types and tensors."""
        return {
            "horizon": self._horizon,
            "ntk_trace_sigma": self._ntk_trace_sigma,
            "finite": None if self.finite is None else self.finite.state(),
        }

    def _frozen(self) -> FrozenTraining:
        """Order 0: in closed form at any step; with momentum, summed up to the horizon."""
        problem = self._problem
        training = replace(problem.training, steps=self._horizon)
        return FrozenTraining(problem.ensemble, problem.x_train, problem.y_train, problem.x_probe, training)

    @property
    def validity(self) -> Validity:
        """Where the highest order that was computed holds."""
        computed = None if self.finite is None else self.finite.validity
        return self.frozen.validity if computed is None else computed

    @property
    def level(self) -> str:
        """Level and order of the theory."""
        corrected = self.finite is not None and self.finite.corrections.any
        return f"ensemble, order {int(corrected)}"

    @property
    def description(self) -> str:
        """Which quantity is at which order, and why."""
        return "order 0 (infinite width)" if self.finite is None else "; ".join(self.finite.notes)

    def expansion_parameter(self, step: int) -> float | None:
        """Return the largest size of terms of order 1/n over those of order 0, up to a step; None without order 1."""
        parameter = self._at(step).expansion_parameter
        return None if parameter is None else float(parameter)

    def compare(
        self,
        step: int,
        output: Tensor,
        ntk: Tensor,
        ntk_0: Tensor,
        kernels: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> dict[str, Compared]:
        """Compare theory and measurement.

        Args:
            step: Optimizer steps taken since theta_0.
            output: Measured outputs on the probe, (N_p, n_L).
            ntk: Measured NTK on the probe, (N_p, N_p, n_L, n_L) or (N_p, N_p), with the ensemble's lambda.
            ntk_0: The same at theta_0.
            kernels: Hidden kernels of activations now and at theta_0, layer by layer, if they were measured.

        Returns:
            ``{quantity: Compared}``.
        """
        if self._problem.training.momentum and step > self._horizon:
            self._horizon = max(step, _EXTENSION * self._horizon)
            self.frozen = self._frozen()
        first = self._at(step)
        compared = compare_outputs(self.frozen, self.direction, step, output, first) | self._ntks(ntk, ntk_0, first)
        layers = [] if kernels is None else self.layers(step, *kernels)
        if layers:
            measured, predicted = (sum(drifts) / len(layers) for drifts in zip(*layers, strict=True))
            compared["representation_mean_drift"] = Compared(measured, 0.0, predicted)
        return compared

    def layers(self, step: int, kernels: list[Tensor], kernels_0: list[Tensor]) -> list[tuple[float, float]]:
        """Compare the drift of all hidden kernels, along the prediction and relative to infinite width.

        Args:
            step: Optimizer steps taken since theta_0.
            kernels: Measured hidden kernels, layer by layer.
            kernels_0: The same at theta_0.

        Returns:
            Measured and predicted drift per layer; empty without a prediction.
        """
        drifts = self._at(step).kernels
        if self.finite is None or self.finite.kernels_infinite_width is None or drifts is None:
            return []
        if len(drifts) != len(kernels):
            return []
        rows = zip(kernels, kernels_0, drifts, self.finite.kernels_infinite_width, strict=True)
        return [
            (float(component((K - K_0).to(D), D) / whole.norm()), float(D.norm() / whole.norm()))
            for K, K_0, D, whole in rows
        ]

    def _ntks(self, ntk: Tensor, ntk_0: Tensor, first: Corrections) -> dict[str, Compared]:
        probes = self.frozen.probes
        Theta = self.frozen.Theta[:probes, :probes]
        H, H_0 = as_trace(ntk).to(Theta), as_trace(ntk_0).to(Theta)
        trace, measured = Theta.diagonal().mean(), float((ntk - ntk_0).norm() / ntk_0.norm())
        compared = {"ntk_drift": Compared(measured, 0.0)}
        at_order_1 = truncation = None
        if first.ntk is not None and self.finite is not None and self.finite.initial_ntk is not None:
            D = first.ntk
            correction = float((self.finite.initial_ntk + D).diagonal().mean())
            at_order_1 = float(trace) + correction
            truncation = abs(correction) * float(first.expansion_parameter or 0.0)
            compared["ntk_mean_drift"] = Compared(
                float(component(H - H_0, D) / Theta.norm()), 0.0, float(D.norm() / Theta.norm())
            )
        compared["ntk_trace"] = Compared(
            float(ntk_trace(ntk)), float(trace), at_order_1, self._ntk_trace_sigma, truncation
        )
        return compared

    def _at(self, step: int) -> Corrections:
        if self.finite is None:
            return Corrections()
        if step > self.finite.steps[-1]:
            if not self.finite.corrections.any:
                return Corrections()
            longer = _EXTENSION * self.finite.steps[-1]
            self._extend(max(step, min(longer, _SUMMED_AT_MOST) if self._problem.training.momentum else longer))
        return self.finite.at(step)

    def _extend(self, steps: int) -> None:
        if self._problem.training.momentum and steps > _SUMMED_AT_MOST:
            self.finite = FiniteWidth([steps], notes=[f"with momentum order 1/n ends at step {_SUMMED_AT_MOST}"])
            return
        self.finite = finite_width(self._problem, steps, self.direction, self._allowance)


def unit_direction(frozen: InfiniteWidthPath) -> Tensor:
    """Theta_PA y normalized to 1, (N_p, n_L)."""
    direction = frozen.first_direction()
    return direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)


def compare_outputs(
    frozen: InfiniteWidthPath, c: Tensor, step: int, output: Tensor, first: Corrections | None = None
) -> dict[str, Compared]:
    """Compare outputs at a step, ``output_projection`` and ``output_chi_squared``.

    Args:
        frozen: Infinite width.
        c: ``unit_direction`` of it.
        step: Optimizer steps taken since theta_0.
        output: Measured outputs on the probe, (N_p, n_L).
        first: Corrections of order 1/n.

    Returns:
        ``{quantity: Compared}``.
    """
    first = Corrections() if first is None else first
    mean, covariance = frozen.output(torch.tensor([float(step)], device=c.device))
    mean, covariance = mean[0], covariance[0]
    z = output.to(mean)
    count, channels = z.shape
    variance = covariance.diagonal().clamp_min(torch.finfo(covariance.dtype).tiny)
    deviation = variance.sqrt()
    correlation = covariance / torch.outer(deviation, deviation)
    spread = torch.einsum("ai,ab,bi->", c, covariance, c)
    chi_squared = projection = truncation = None
    if first.mean is not None:
        shift = (c * first.mean).sum()
        projection = float((c * mean).sum() + shift)
        truncation = abs(float(shift)) * float(first.expansion_parameter or 0.0) + _rounding(mean)
    if first.projected_variance is not None and first.variances is not None:
        if float(spread + first.projected_variance) > 0:
            spread = spread + first.projected_variance
        chi_squared = 1 + float((first.variances / variance[:, None]).mean())
    return {
        "output_projection": Compared(
            float((c * z).sum()), float((c * mean).sum()), projection, float(spread.sqrt()), truncation
        ),
        "output_chi_squared": Compared(
            float(((z - mean) / deviation[:, None]).square().mean()),
            1.0,
            chi_squared,
            float((2 * correlation.square().sum() / channels).sqrt() / count),
        ),
    }


def _rounding(value: Tensor) -> float:
    """Return the rounding error of float32 outputs."""
    return 1e-6 * float(value.norm()) / math.sqrt(value.numel())
