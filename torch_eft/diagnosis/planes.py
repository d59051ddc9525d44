"""Where a network stands among its neighbors: the phase plane (C_b, C_W) and the depth-width plane, as numbers.

In the phase plane, the growth of squared gradients over the depth, J = prod chi_perp (PDLT 5.1), on a grid. The line
where chi_perp = 1 at the kernel's fixed point, which parts order from chaos, has a closed form with K as parameter:
C_W = 1 / <s'^2>_K, C_b = K - C_W <s^2>_K.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.aspect_ratio import AspectRatio
from torch_eft.theory.gaussian.activations import Activation
from torch_eft.theory.gaussian.laws import Law
from torch_eft.theory.signal_propagation.critical_point import CriticalPoint
from torch_eft.theory.signal_propagation.preactivations import first_preactivations, next_preactivations
from torch_eft.theory.signal_propagation.susceptibility import mean_power, power_mean, slope_squared

T = TypeVar("T")

_CELLS = 41
_LARGEST_K = 1e2
"""Beyond it smooth activations are as good as their asymptotes, and the color has saturated."""


@dataclass(frozen=True)
class PhasePlane:
    """Gradients over the depth, for every C_b and C_W.

    Args:
        C_b: (columns,).
        C_W: (rows,).
        log_growth: (rows, columns), log10 of E|dz/dz^(1)|^2 over this depth.
        line: (points, 2), (C_b, C_W) where chi_perp = 1 at the kernel's fixed point.
        critical: The critical point, or None.
        network: (C_b, C_W) of this network, the mean over its layers but the first.
        depth: L.
        title: Of the network.
    """

    C_b: Tensor
    C_W: Tensor
    log_growth: Tensor
    line: Tensor
    critical: CriticalPoint | None
    network: tuple[float, float]
    depth: int
    title: str


@dataclass(frozen=True)
class DepthWidthPlane:
    """The size of epsilon for every depth and width, at the initialization of this network.

    Args:
        depths: 2, 3, ...
        size: n epsilon at those depths: divided by the width it is the number that separates the regimes.
        depth: L of this network.
        width: n of this network.
        r: Its L / n.
        epsilon: Its epsilon.
    """

    depths: tuple[int, ...]
    size: tuple[float, ...]
    depth: int
    width: float
    r: float
    epsilon: float


def phase_plane(ensemble: MLPEnsemble, ratio: AspectRatio, mean_square: float = 1.0) -> PhasePlane:
    """Return the phase plane around an ensemble.

    Args:
        ensemble: The ensemble; needs a hidden layer.
        ratio: Its aspect ratio.
        mean_square: |x|^2 / n_0 of the inputs.

    Raises:
        ValueError: Without a hidden layer.
    """
    if not ensemble.hidden_widths:
        raise ValueError("ensemble: without a hidden layer there is no depth to draw; give at least three widths")
    layers = ensemble.depth - 1
    at = (sum(ensemble.C_b[1:]) / layers, sum(ensemble.C_W[1:]) / layers)
    point = ratio.critical
    center = at[1] if point is None or point.C_W is None else point.C_W
    offset = 0.0 if point is None or point.C_b is None else point.C_b
    C_b = torch.linspace(0.0, 1.3 * max(at[0], offset, 0.25), _CELLS, dtype=torch.float64, device="cpu")
    low, high = 0.7 * min(at[1], 0.6 * center), 1.15 * max(at[1], 2.0 * center)
    C_W = torch.linspace(low, high, _CELLS, dtype=torch.float64, device="cpu")
    growth = _log_growth(ensemble.activation, C_b[None, :], C_W[:, None], ensemble.depth, mean_square)
    line = _line(ensemble.activation, float(C_b[-1]))
    return PhasePlane(C_b, C_W, growth, line, point, at, ensemble.depth, short_name(ensemble))


def depth_width_plane(ensemble: MLPEnsemble, ratio: AspectRatio, mean_square: float = 1.0) -> DepthWidthPlane:
    """Return the depth-width plane: hidden layers of equal width, C_b and C_W of this network's last layer.

    Args:
        ensemble: The ensemble; needs a hidden layer.
        ratio: Its aspect ratio.
        mean_square: |x|^2 / n_0 of the inputs.

    Raises:
        ValueError: Without a hidden layer.
    """
    if ratio.width is None:
        raise ValueError("ensemble: without a hidden layer there is no width to draw; give at least three widths")
    depths = range(2, min(256, max(64, 4 * ensemble.depth)) + 1)
    tower = _like_the_last_layer(ensemble, depths[-1])
    size = torch.tensor([mean_square], dtype=torch.float64, device="cpu")
    z = first_preactivations(tower, size, size**2 / ensemble.widths[0])
    V, found = torch.zeros_like(size), []
    for depth in depths:
        if not 0 < float(z.K) < 1e100:
            break
        V = tower.C_W[-1] ** 2 * (z.fourth_power() - z.variance**2 + z.response() ** 2 * V)
        z = next_preactivations(tower, z, depth)
        found.append(float(V / z.K**2))
    used = tuple(depths)[: len(found)]
    return DepthWidthPlane(used, tuple(found), ensemble.depth, ratio.width, ratio.r, ratio.epsilon)


def _like_the_last_layer(ensemble: MLPEnsemble, depth: int) -> MLPEnsemble:
    """Layers of one width with the first and the last initialization of an ensemble; orthogonal weights as Gaussian."""

    def repeated(values: Sequence[T]) -> list[T]:
        return [values[0], *[values[-1]] * (depth - 1)]

    weight_law: list[Law] = ["gaussian" if law == "orthogonal" else law for law in repeated(ensemble.weight_law)]
    return MLPEnsemble(
        [ensemble.widths[0], *[1] * depth],
        ensemble.activation,
        C_b=repeated(ensemble.C_b),
        C_W=repeated(ensemble.C_W),
        weight_law=weight_law,
        bias_law=repeated(ensemble.bias_law),
    )


def short_name(ensemble: MLPEnsemble) -> str:
    """Its name, with runs of equal widths counted.

    Args:
        ensemble: The ensemble.

    Returns:
        Such as ``MLP 8-(30) x 5-2, tanh``.
    """
    runs = [(n, len(list(same))) for n, same in groupby(ensemble.widths)]
    widths = "-".join(str(n) if count == 1 else f"({n}) x {count}" for n, count in runs)
    return f"MLP {widths}, {ensemble.activation.name}"


def _log_growth(s: Activation, C_b: Tensor, C_W: Tensor, depth: int, mean_square: float) -> Tensor:
    K = C_b + C_W * mean_square
    total = torch.zeros_like(K)
    for _ in range(depth - 1):
        at = K if s.slopes is not None else K.clamp_max(_LARGEST_K)
        total = total + (C_W * slope_squared(s, at)).log10()
        K = (C_b + C_W * power_mean(s, at, 2)).clamp_max(1e300)
    return total


def _line(s: Activation, largest_C_b: float) -> Tensor:
    if s.slopes is not None:
        critical = 1 / mean_power(s.slopes, 2) if any(s.slopes) else math.nan
        return torch.tensor([[0.0, critical], [largest_C_b, critical]], dtype=torch.float64, device="cpu")
    K = torch.logspace(-6, 2, 161, dtype=torch.float64, device="cpu")
    C_W = 1 / slope_squared(s, K)
    C_b = K - C_W * power_mean(s, K, 2)
    # K_star = 0 belongs to it: rounding must not cut the line off there.
    kept = C_b >= -1e-9
    return torch.stack([C_b.clamp_min(0.0), C_W], 1)[kept]
