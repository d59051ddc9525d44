"""The ensemble's forecast against one network in full-batch training on squared error, on a fixed probe.

Infinite width is order 0; order 1 adds the corrections of order 1/n. Compared is what the theory predicts, with mean or
expectation E over initializations:

* ``output_projection``: sum_{a,i} c_{i;a} z_{i;a}, c = Theta_PA y normalized to 1, where the mean output first moves
  to. Order 1 corrects mean and variance. At order 0 the output is Gaussian, so mean and sigma say everything.
* ``output_chi_squared``: the mean over probe and outputs of (z - E z)^2 / Var z, both of infinite width. Order 0: 1,
  with sigma = sqrt(2 tr(R^2) / C) / N, R the correlations. Order 1: 1 + the mean of the variances' correction / Var z
  (that of the mean enters squared).
* ``ntk_trace``: (1/N C) sum H_{ii;aa}. Order 0: the mean diagonal of Theta; order 1: with that of Theta1 / n and of the
  drift D(t) = E H(t) - E H(0). Sigma: its finite-width spread at initialization, from sampled networks.
* ``ntk_mean_drift``: <H - H_0, D> / (|D| |Theta|), kernels averaged over outputs. Order 0: 0; order 1: |D| / |Theta|.
  The norm |H - H_0| of one network is not what order 1 predicts: most of it is dNTK of random sign, of variance
  O(1/n^2).
* ``representation_mean_drift``: the same of hidden kernels, mean over layers.
* ``ntk_drift``: |H - H_0| / |H_0|, at order 0: 0; no order 1.

Spreads over initializations of the drifts are not predicted: for one network expect them to be as large as the
drift itself.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torch_eft.forecast.comparison.compared import Compared, component
from torch_eft.forecast.comparison.finite_width import AtStep, FiniteWidth, Problem, finite_width
from torch_eft.measure.kernels.metrics import as_trace, ntk_trace
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.sampling import ntk_trace_spread
from torch_eft.theory.training.infinite_width import FrozenTraining

_FIRST_HORIZON = 1000
_EXTENSION = 8
_SUMMED_AT_FIRST, _SUMMED_AT_MOST = 4000, 20000
"""Steps with momentum: its sums over time are made step by step, 3000 a second at order 1."""


class EnsembleComparison:
    """The forecast of an ensemble, and one network beside it.

    Args:
        ensemble: The ensemble that the network is a draw of.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        learning_rate: Of PDLT's loss (1/2) sum (z - y)^2, multiplying the ensemble's learning-rate tensor.
        ntk_samples: Networks to sample for the spread of the NTK.
        order: 0, or 1 with what can be had of order 1/n within ``seconds``.
        steps: Optimizer steps to come, if known; further ones extend the forecast.
        seconds: Allowed for order 1/n, in all.
        momentum: Of ``torch.optim.SGD``.
        nesterov: Likewise.
        dampening: Likewise.
        earlier: What ``state`` returned of the same forecast: it is that one, not computed anew.

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
        order: int = 1,
        steps: int | None = None,
        seconds: float = 3.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        dampening: float = 0.0,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        if order not in (0, 1):
            raise ValueError(f"order: {order} given; give 0 (infinite width) or 1 (with corrections of order 1/n)")
        self._options: dict[str, Any] = (
            {"momentum": momentum, "nesterov": nesterov, "dampening": dampening} if momentum else {}
        )
        self._given = (ensemble, x_train, y_train, x_probe, learning_rate)
        self._horizon = min(steps or _FIRST_HORIZON, _SUMMED_AT_FIRST) if self._options else steps or _FIRST_HORIZON
        if earlier is not None:
            self._horizon = int(earlier["horizon"])
        self.training = self._order_0()
        self._ntk_trace_sigma = (
            ntk_trace_spread(ensemble, x_probe, num_networks=ntk_samples)
            if earlier is None
            else float(earlier["ntk_trace_sigma"])
        )
        direction = self.training.first_direction()
        self.direction = direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
        training = self.training
        self._problem = Problem(
            ensemble, training.x_train, training.y_train, training.x_probe, learning_rate, self._options
        )
        self.order, self._seconds = order, seconds
        self.finite: FiniteWidth | None = None
        if earlier is not None:
            stored = earlier["finite"]
            self.finite = None if stored is None else FiniteWidth.from_state(stored, self.direction.device)
        elif order == 1:
            self._extend(self._horizon)

    def state(self) -> dict[str, Any]:
        """What cannot be computed anew at no cost, or would not come out the same within its time; plain types."""
        return {
            "horizon": self._horizon,
            "ntk_trace_sigma": self._ntk_trace_sigma,
            "finite": None if self.finite is None else self.finite.state(),
        }

    def _order_0(self) -> FrozenTraining:
        """In closed form at any step; with momentum, summed up to the horizon."""
        ensemble, x_train, y_train, x_probe, learning_rate = self._given
        training = Training(
            learning_rate=learning_rate,
            steps=self._horizon if self._options else math.inf,
            reduction="sum",
            **self._options,
        )
        return FrozenTraining(ensemble, x_train, y_train, x_probe, training)

    @property
    def validity(self) -> Validity:
        """Where the highest order that was computed holds."""
        computed = None if self.finite is None else self.finite.validity
        return self.training.validity if computed is None else computed

    @property
    def level(self) -> str:
        """In words."""
        return "ensemble, order 1" if self.finite is not None and self.finite.values else "ensemble, order 0"

    @property
    def words(self) -> str:
        """What is at which order, and why."""
        if self.finite is None:
            return "order 0 (infinite width)"
        return "; ".join(self.finite.words)

    def gauge(self, step: int) -> float | None:
        """The largest size of terms of order 1/n over those of order 0, up to a step; None without order 1."""
        return self._at(step).gauge

    def compare(
        self,
        step: int,
        output: Tensor,
        ntk: Tensor,
        ntk_0: Tensor,
        kernels: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> dict[str, Compared]:
        """Theory beside measurement.

        Args:
            step: Optimizer steps taken since theta_0.
            output: Measured outputs on the probe, (N_p, n_L).
            ntk: Measured NTK on the probe, (N_p, N_p, n_L, n_L) or (N_p, N_p), with the ensemble's lambda.
            ntk_0: The same at theta_0.
            kernels: Hidden kernels of activations now and at theta_0, layer by layer, if they were measured.

        Returns:
            ``{quantity: Compared}``.
        """
        if self._options and step > self._horizon:
            self._horizon = max(step, _EXTENSION * self._horizon)
            self.training = self._order_0()
        first = self._at(step)
        found = self._outputs(step, output, first) | self._ntks(ntk, ntk_0, first)
        if kernels is not None and first.kernels and len(kernels[0]) == len(first.kernels):
            found["representation_mean_drift"] = self._kernels(*kernels, first)
        return found

    def layers(self, step: int, kernels: list[Tensor], kernels_0: list[Tensor]) -> list[tuple[float, float]]:
        """Measured and predicted drift of every hidden kernel, along the prediction and relative to infinite width."""
        first = self._at(step)
        if self.finite is None or len(first.kernels) != len(kernels):
            return []
        rows = zip(kernels, kernels_0, first.kernels, self.finite.kernels_0, strict=True)
        return [
            (float(component((K - K_0).to(D), D) / whole.norm()), float(D.norm() / whole.norm()))
            for K, K_0, D, whole in rows
        ]

    def _outputs(self, step: int, output: Tensor, first: AtStep) -> dict[str, Compared]:
        mean, covariance = self.training.output(torch.tensor([float(step)], device=self.direction.device))
        mean, covariance = mean[0], covariance[0]
        z = output.to(mean)
        count, channels = z.shape
        variance = covariance.diagonal().clamp_min(torch.finfo(covariance.dtype).tiny)
        deviation = variance.sqrt()
        correlation = covariance / torch.outer(deviation, deviation)
        c = self.direction
        spread = torch.einsum("ai,ab,bi->", c, covariance, c)
        chi_squared = projection = truncation = None
        if first.mean is not None:
            shift = (c * first.mean).sum()
            projection = float((c * mean).sum() + shift)
            truncation = abs(float(shift)) * (first.gauge or 0.0) + _rounding(mean)
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

    def _ntks(self, ntk: Tensor, ntk_0: Tensor, first: AtStep) -> dict[str, Compared]:
        probes = self.training.probes
        Theta = self.training.Theta[:probes, :probes]
        H, H_0 = as_trace(ntk).to(Theta), as_trace(ntk_0).to(Theta)
        trace, measured = Theta.diagonal().mean(), float((ntk - ntk_0).norm() / ntk_0.norm())
        found = {"ntk_drift": Compared(measured, 0.0)}
        at_order_1 = truncation = None
        if first.ntk is not None and self.finite is not None and self.finite.initial_ntk is not None:
            D = first.ntk
            correction = float((self.finite.initial_ntk + D).diagonal().mean())
            at_order_1 = float(trace) + correction
            truncation = abs(correction) * (first.gauge or 0.0)
            found["ntk_mean_drift"] = Compared(
                float(component(H - H_0, D) / Theta.norm()), 0.0, float(D.norm() / Theta.norm())
            )
        found["ntk_trace"] = Compared(
            float(ntk_trace(ntk)), float(trace), at_order_1, self._ntk_trace_sigma, truncation
        )
        return found

    def _kernels(self, kernels: list[Tensor], kernels_0: list[Tensor], first: AtStep) -> Compared:
        assert self.finite is not None
        rows = list(zip(kernels, kernels_0, first.kernels, self.finite.kernels_0, strict=True))
        measured = [float(component((K - K_0).to(D), D) / whole.norm()) for K, K_0, D, whole in rows]
        predicted = [float(D.norm() / whole.norm()) for _, _, D, whole in rows]
        return Compared(sum(measured) / len(rows), 0.0, sum(predicted) / len(rows))

    def _at(self, step: int) -> AtStep:
        if self.order == 0 or self.finite is None:
            return AtStep()
        if step > self.finite.steps[-1]:
            if not self.finite.values and not self.finite.kernels:
                return AtStep()
            longer = _EXTENSION * self.finite.steps[-1]
            self._extend(max(step, min(longer, _SUMMED_AT_MOST) if self._options else longer))
        return self.finite.at(step)

    def _extend(self, steps: int) -> None:
        if self._options and steps > _SUMMED_AT_MOST:
            self.finite = FiniteWidth([steps], words=[f"with momentum order 1/n ends at step {_SUMMED_AT_MOST}"])
            return
        self.finite = finite_width(self._problem, steps, self.direction, self._seconds)


def _rounding(value: Tensor) -> float:
    """What float32 outputs leave."""
    return 1e-6 * float(value.norm()) / math.sqrt(value.numel())
