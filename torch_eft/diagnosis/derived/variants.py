"""The theory evaluated for twice the depth and for twice the width."""

import math
from dataclasses import dataclass

from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.aspect_ratio import AspectRatio, aspect_ratio
from torch_eft.theory.estimates.expected_drift import ExpectedDrift, expected_drift
from torch_eft.theory.estimates.learning_rates import largest_learning_rate, layer_gains
from torch_eft.theory.estimates.seed_spread import SeedSpread, seed_spread


@dataclass(frozen=True)
class Variant:
    """An ensemble's numbers in one column.

    Args:
        name: Which ensemble.
        network: Description of the ensemble.
        r: L / n.
        epsilon: Var G / E[G]^2 to order 1/n.
        epsilon_all_orders: Estimated beyond order 1/n (exact for two slopes without biases).
        output_spread: Relative standard deviation of the output's variance from seed to seed; beyond order 1/n where
            that is estimated.
        ntk_spread: Relative standard deviation of H_ii from seed to seed.
        kernel_growth: K^(L) / K^(1).
        gradient_growth: E|dz/dz^(1)|^2 of an output, squared gradients at layer 1 over those at layer L.
        drift: Order of magnitude of the NTK's relative drift for unit targets; None where nothing says it.
        largest_learning_rate: As in ``Diagnosis``; None where nothing trains.

    Example:
        >>> import torch_eft as eft
        >>> report = eft.diagnose(eft.theory.MLPEnsemble([10, 100, 100, 1], "relu", C_W=2.0))
        >>> [(variant.name, round(variant.r, 3)) for variant in report.variants]
        [('this network', 0.03), ('twice as deep', 0.05), ('twice as wide', 0.015)]
    """

    name: str
    network: str
    r: float
    epsilon: float
    epsilon_all_orders: float
    output_spread: float
    ntk_spread: float
    kernel_growth: float
    gradient_growth: float
    drift: float | None
    largest_learning_rate: float | None


def variant(
    name: str,
    ensemble: MLPEnsemble,
    x: Tensor | None,
    ratio: AspectRatio | None = None,
    spread: SeedSpread | None = None,
    drift: ExpectedDrift | None = None,
) -> Variant:
    """Return the numbers of one ensemble.

    Args:
        name: Head of its column.
        ensemble: The ensemble.
        x: Inputs, (N, n_0), or None.
        ratio: Its aspect ratio, if it is known already.
        spread: Likewise.
        drift: Likewise.
    """
    ratio = ratio or aspect_ratio(ensemble, x, doubled=False)
    spread = spread or seed_spread(ensemble, few(x))
    drift = drift or expected_drift(ensemble, None if x is None else x[:1])
    gains = layer_gains(ensemble, x)
    eta = largest_learning_rate(ensemble, x, reduction="mean")
    first = gains.K[0].mean()
    return Variant(
        name=name,
        network=str(ensemble),
        r=ratio.r,
        epsilon=ratio.epsilon,
        epsilon_all_orders=ratio.epsilon_all_orders,
        output_spread=spread.output_variance if spread.exact else math.sqrt(max(ratio.epsilon_all_orders, 0.0)),
        ntk_spread=spread.ntk,
        kernel_growth=float(gains.K[-1].mean() / first) if float(first) > 0 else 1.0,
        gradient_growth=float(gains.J[0].mean()),
        drift=drift.size,
        largest_learning_rate=eta if eta < float("inf") else None,
    )


def few(x: Tensor | None) -> Tensor | None:
    """The first four inputs: the spread depends on |x|^2 alone, and four tell."""
    return None if x is None else x[:4]
