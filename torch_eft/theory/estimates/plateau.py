"""How long full-batch gradient descent stays on the plateau where a network only learns the mean of its targets.

Far in the ordered phase the NTK is nearly the same number for all pairs of inputs: the constant function is learned
fast, and limits the learning rate; what tells inputs apart is learned slowly. With C = 1 - 11^T / N,

    kappa = lambda_max(Theta) / lambda_max(C Theta C),

and at a learning rate of a quarter of the largest stable one half of the loss around the mean is gone after about

    c sqrt(kappa) (32 / n)^{1/3} steps,    c = 2.4 (ReLU and its like), 1.6 (smooth).

The square root is that of the escape of deep networks from a saddle (heuristic); c and the power of the width were
fitted to trainings of ReLU, GELU and tanh networks (depth 6 .. 14, width 8 .. 256, 50 .. 500 steps, squared error,
isotropic inputs), within a factor of 2, and were tried on few others. Below kappa = 15 the task decides instead. Adam
has no such plateau at these depths.

Without a training set: kappa = n_0 / (1 + sqrt(n_0 / N))^2 T(0) / T'(0) for N isotropic inputs, T(rho) the NTK of two
inputs with x.x' = rho n_0; N = 4 n_0 is taken. It was within a factor of 1.4 of the data's for isotropic inputs.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import infinite_width

LARGEST = 1e8
"""Beyond it kappa is not resolved: the NTK's differences drown in rounding."""

_STEP = 1e-2
"""Of rho in the difference quotient for T'; its error is of relative order 1e-4."""

_INPUTS = 64
"""Inputs of which kappa is taken at most."""


def plateau_ratio(ensemble: MLPEnsemble, x: Tensor | None = None) -> float | None:
    """kappa, the NTK's largest eigenvalue over that on functions of mean zero, at infinite width.

    Args:
        ensemble: The ensemble with its learning-rate tensor.
        x: Training inputs, (N, n_0), of which the first 64 count; None, a single one or equal ones take isotropic
            inputs.

    Returns:
        1 .. 1e8, at most; None where nothing trains, or the activation has no expectations of two inputs.

    Example:
        >>> from torch_eft import theory
        >>> deep = theory.MLPEnsemble([16, *[64] * 9, 1], "relu", C_b=0.005, C_W=1 / 3, lambda_W=[16, *[64] * 9])
        >>> theory.estimates.plateau.plateau_ratio(deep) > 1e4
        True
    """
    try:
        if x is not None and len(x) > 1 and not bool((x == x[0]).all()):
            return _of_data(ensemble, x[:_INPUTS].to(torch.float64))
        return _isotropic(ensemble)
    except ValueError:  # kinks elsewhere than at 0, or too sharp an activation: no expectation of two inputs
        return None


def plateau_steps(kappa: float, ensemble: MLPEnsemble | None = None) -> float:
    """Steps of full-batch gradient descent to half of the loss, at a quarter of the largest stable learning rate.

    Args:
        kappa: ``plateau_ratio``, or that of a measured kernel.
        ensemble: The ensemble; None takes an activation between the two kinds, and n = 32.

    Returns:
        The number of steps; an order of magnitude where it is below what the task itself takes.
    """
    if ensemble is None or not ensemble.hidden_widths:
        return 2.0 * math.sqrt(kappa)
    n = len(ensemble.hidden_widths) / sum(1 / n for n in ensemble.hidden_widths)
    return (1.6 if ensemble.activation.slopes is None else 2.4) * math.sqrt(kappa) * (32 / n) ** (1 / 3)


def _of_data(ensemble: MLPEnsemble, x: Tensor) -> float | None:
    return kernel_plateau(infinite_width(ensemble, x)[1][-1])


def kernel_plateau(Theta: Tensor) -> float | None:
    """Kappa of a kernel.

    Args:
        Theta: (N, N), of one output, or its mean over outputs.

    Returns:
        1 .. 1e8, at most; None for one input, and where nothing trains.
    """
    if len(Theta) < 2:
        return None
    # The mean is projected out of Theta less its mean, so that a small rest is not lost.
    rest = Theta - Theta.mean()
    centered = rest - rest.mean(0) - rest.mean(1)[:, None] + rest.mean()
    largest = float(torch.linalg.eigvalsh(Theta)[-1])
    return _ratio(largest, float(torch.linalg.eigvalsh(centered)[-1]))


def _isotropic(ensemble: MLPEnsemble) -> float | None:
    n_0 = ensemble.widths[0]
    plane = replace(ensemble, widths=(2, *ensemble.widths[1:]))  # two inputs span a plane; kernels know rho only
    angles = torch.tensor([0.0, *(math.acos(rho) for rho in (0.0, _STEP, -_STEP))], dtype=torch.float64, device="cpu")
    x = math.sqrt(2.0) * torch.stack([angles.cos(), angles.sin()], 1)
    apart, more, less = infinite_width(plane, x)[1][-1][0, 1:].tolist()
    slope = (more - less) / (2 * _STEP)
    return _ratio(n_0 / (1 + 0.5) ** 2 * apart, slope)


def _ratio(largest: float, centered: float) -> float | None:
    if not (math.isfinite(largest) and math.isfinite(centered)) or (largest <= 0 and centered <= 0):
        return None
    return min(max(largest / centered, 1.0), LARGEST) if centered > 0 else LARGEST
