"""The two-layer linear network f = u.v / sqrt(n) on one input: its differentials and its training in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor


class LinearDifferentials(NamedTuple):
    """H, dH, ddI and ddII of f = u.v / sqrt(n), each of the shape of f."""

    H: Tensor
    dH: Tensor
    ddI: Tensor
    ddII: Tensor


def two_layer_linear_differentials(f: Tensor, lam: Tensor, width: int) -> LinearDifferentials:
    """The differentials of f = u.v / sqrt(n) on the input x = 1, with the learning-rate tensor 1 for u and v.

    f has second derivatives d_{u_j} d_{v_j} f = 1/sqrt(n) only, so H = lam = (|u|^2 + |v|^2) / n, dH = 2f / n, ddI = 0,
    ddII = lam / n. It is the MLP 1-n-1 with C_W = lambda_W = 1 and no biases, W^(1) = u, W^(2) = v / sqrt(n).

    Args:
        f: Outputs, any shape.
        lam: NTKs, the same shape.
        width: n.

    Returns:
        H, dH, ddI, ddII.
    """
    return LinearDifferentials(lam, 2 * f / width, torch.zeros_like(f), lam / width)


def two_layer_linear_map(
    f: Tensor, lam: Tensor, learning_rate: float, width: int, steps: int, target: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradient descent on (1/2) (f - y)^2 for f = u.v / sqrt(n), exactly, in the two variables it closes in.

    With e = f - y, ``f' = f - eta lam e + eta^2 f e^2 / n``, ``lam' = lam + (eta e / n) (eta lam e - 4 f)``: for y = 0
    the catapult map of Lewkowycz et al. 2020 (f converges for eta lam < 2, mostly also up to about 4, then to a
    smaller lam). Both follow from the expansion in eta, which ends: f at eta^2 dH, lam at eta^2 ddII.

    Args:
        f: Outputs at the start, any shape.
        lam: NTKs at the start, (|u|^2 + |v|^2) / n, the same shape; 2 |f| / sqrt(n) <= lam.
        learning_rate: eta > 0.
        width: n.
        steps: T >= 0.
        target: y.

    Returns:
        f and lam, each (T + 1, ...), entry 0 the start.
    """
    outputs, ntks = [f], [lam]
    for _ in range(steps):
        H, dH, _, ddII = two_layer_linear_differentials(f, lam, width)
        step = learning_rate * (f - target)
        f, lam = f - step * H + step**2 * dH / 2, lam - 2 * step * dH + step**2 * ddII
        outputs.append(f)
        ntks.append(lam)
    return torch.stack(outputs), torch.stack(ntks)
