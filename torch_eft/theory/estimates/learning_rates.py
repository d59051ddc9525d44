"""Learning rates: layer-wise ones that train all layers alike, and the largest stable step.

The NTK of one input is a sum over layers (PDLT 8.2 and 9.4, the recursion of Theta unrolled):
    Theta^(L) = sum_l [lambda_b^(l) + lambda_W^(l) g_{l-1}] J_l,    J_l = prod_{k=l}^{L-1} chi_perp(K^(k)),
with g_0 = x.x / n_0, g_{l-1} = <sigma^2>_{K^(l-1)}, chi_perp(K^(k)) = C_W^(k+1) <sigma'^2>_{K^(k)}: the contribution
of layer l's own parameters, carried to the output by squared gradients J_l.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from torch_eft.results.choices import check_choice
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import check_inputs
from torch_eft.theory.initialization.statistics import initial_statistics
from torch_eft.theory.signal_propagation.preactivations import (
    first_preactivations,
    input_moments,
    next_preactivations,
)


@dataclass(frozen=True)
class LayerGains:
    """Signals and squared gradients of an ensemble at infinite width, by layer (l = 1 .. L) and by input.

    Args:
        K: (L, N), the kernel's diagonal K^(l).
        g: (L, N), the mean squared signal g_{l-1} that enters layer l.
        J: (L, N), the mean squared gradient J_l of an output with respect to layer l's preactivations, summed over
            its neurons.
    """

    K: Tensor
    g: Tensor
    J: Tensor


@dataclass(frozen=True)
class LearningRateShares:
    """Layer-wise learning rates under which every layer contributes equally to the NTK.

    With an optimizer's overall learning rate eta, layer l's bias gets ``eta * lr_b[l-1]`` and its weight
    ``eta * lr_W[l-1]``, e.g. ``{"params": [layer.weight], "lr": eta * shares.lr_W[l - 1]}``.

    Args:
        lambda_b: Of the learning-rate tensor, one per layer.
        lambda_W: Likewise; the tensor of the weights is lambda_W / n_{l-1}.
        lr_b: Torch learning rates of the biases relative to eta: lambda_b.
        lr_W: Torch learning rates of the weights relative to eta: lambda_W / n_{l-1}.
        Theta: total_b + total_W, the NTK (mean over the inputs) they give.
        ensemble: The ensemble with these learning rates.

    Example:
        >>> from torch_eft import theory
        >>> shares = theory.equivalence_learning_rates(theory.MLPEnsemble([3, 8, 1], "linear"))
        >>> shares.lambda_W, shares.Theta
        ((0.5, 0.5), 2.0)
    """

    lambda_b: tuple[float, ...]
    lambda_W: tuple[float, ...]
    lr_b: tuple[float, ...]
    lr_W: tuple[float, ...]
    Theta: float
    ensemble: MLPEnsemble


def layer_gains(ensemble: MLPEnsemble, x: Tensor | None = None) -> LayerGains:
    """Signals forward and squared gradients backward at infinite width (PDLT 4.1, 9.4).

    Raises ``ValueError`` if ``x`` does not fit ``ensemble.widths[0]``, is empty or not finite; ``QuadratureError`` if
    the activation is not smooth enough for quadrature.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0); without them, one input with |x|^2 = n_0.

    Returns:
        The gains, float64.
    """
    if x is not None:
        x = check_inputs("x", x, ensemble)
    size, quartic = input_moments(ensemble, x)
    z = first_preactivations(ensemble, size, quartic)
    g, K, chi_perp = [size], [z.K], []
    for layer in range(2, ensemble.depth + 1):
        chi_perp.append(ensemble.C_W[layer - 1] * z.slope_power(2))
        g.append(z.variance)
        z = next_preactivations(ensemble, z, layer)
        K.append(z.K)
    J = [torch.ones_like(size)]
    for chi in reversed(chi_perp):
        J.insert(0, chi * J[0])
    return LayerGains(torch.stack(K), torch.stack(g), torch.stack(J))


def layer_shares(ensemble: MLPEnsemble, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Contributions of the biases and of the weights of every layer to the NTK, the mean over the inputs.

    Raises ``ValueError`` if ``x`` does not fit; ``QuadratureError`` if the activation is not smooth enough for
    quadrature.

    Args:
        ensemble: The ensemble with its learning-rate tensor.
        x: Inputs, (N, n_0); without them, one input with |x|^2 = n_0.

    Returns:
        lambda_b^(l) J_l and lambda_W^(l) g_{l-1} J_l, (L,) each; together they sum to the mean diagonal of Theta^(L).
    """
    gains = layer_gains(ensemble, x)
    return (
        gains.J.new_tensor(ensemble.lambda_b) * gains.J.mean(1),
        gains.J.new_tensor(ensemble.lambda_W) * (gains.g * gains.J).mean(1),
    )


def equivalence_learning_rates(
    ensemble: MLPEnsemble, x: Tensor | None = None, *, total_b: float = 1.0, total_W: float = 1.0
) -> LearningRateShares:
    """Layer-wise learning rates that let every layer contribute equally to the NTK (PDLT 9.4, equivalence principle).

    ``lambda_b^(l) = total_b / (L J_l)``, ``lambda_W^(l) = total_W / (L g_{l-1} J_l)``: exactly equal shares at any
    depth, where PDLT states how they scale: ~ 1/L in the scale-invariant class; lambda_b ~ 1/l and lambda_W constant
    at K* = 0 (tanh). The learning-rate tensor of ``ensemble`` itself plays no role.

    Raises ``QuadratureError`` if the activation is not smooth enough for quadrature.

    Args:
        ensemble: The ensemble; widths, activation, C_b and C_W count.
        x: Inputs, (N, n_0); without them, one input with |x|^2 = n_0. With several, shares are equal on the mean
            diagonal of Theta, J_l and g_{l-1} J_l being averaged over them; for one of them they differ.
        total_b: Sum of the biases' contributions, >= 0.
        total_W: Sum of the weights' contributions, >= 0.

    Returns:
        The learning rates. Theta^(L) of ``.ensemble``, the mean over the inputs, is total_b + total_W.

    Raises:
        ValueError: If a total is negative or not finite, if ``x`` does not fit, or if no signal or gradient reaches
            some layer (in float64).

    Example:
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([10, 20, 20, 1], "relu", C_W=2.0)
        >>> shares = theory.equivalence_learning_rates(ensemble, total_b=0.0, total_W=3.0)
        >>> [round(rate, 6) for rate in shares.lambda_W]
        [1.0, 1.0, 1.0]
    """
    for name, total in (("total_b", total_b), ("total_W", total_W)):
        if not (math.isfinite(total) and total >= 0):
            raise ValueError(f"{name}: {total:g} given; it must be finite and >= 0")
    gains = layer_gains(ensemble, x)
    lambda_b = _divided("gradient", total_b / ensemble.depth, gains.J.mean(1), ensemble)
    lambda_W = _divided("signal times gradient", total_W / ensemble.depth, (gains.g * gains.J).mean(1), ensemble)
    return LearningRateShares(
        lambda_b=lambda_b,
        lambda_W=lambda_W,
        lr_b=lambda_b,
        lr_W=tuple(value / n for value, n in zip(lambda_W, ensemble.widths[:-1], strict=True)),
        Theta=total_b + total_W,
        ensemble=replace(ensemble, lambda_b=lambda_b, lambda_W=lambda_W),
    )


def largest_learning_rate(
    source: MLPEnsemble | Tensor,
    x: Tensor | None = None,
    *,
    reduction: Literal["sum", "mean"] = "mean",
    outputs: int | None = None,
) -> float:
    """The learning rate below which full-batch gradient descent on squared error decreases the loss monotonically.

    2 over the largest eigenvalue of the loss's Hessian at infinite width (PDLT 10.1; Lee et al. 2019):
    ``2 / lambda_max(Theta)`` for L = (1/2) sum (z - y)^2, ``N n_L / lambda_max(Theta)`` for torch's ``MSELoss()``,
    the mean over N n_L entries without 1/2.

    Exact for the linearized model alone. For a network of finite width it bounds monotone decrease, not convergence:
    above it the loss may rise and then fall into a flatter place (a catapult; Lewkowycz et al. 2020, up to about
    twice the bound). It does not hold for momentum, Adam or minibatches.

    Raises ``QuadratureError`` if the activation is not smooth enough for quadrature.

    Args:
        source: The ensemble, whose Theta on ``x`` is taken; or a kernel: (N, N) of one output, or measured,
            (N n_L, N n_L) over all pairs of input and output, then with ``outputs=1``.
        x: The training inputs, (N, n_0), for an ensemble; without them, one input with |x|^2 = n_0. Under
            ``"mean"`` the bound of the largest single input is safe for any number of inputs, as
            lambda_max <= N max_a Theta_aa.
        reduction: ``"mean"``: torch's ``MSELoss``; ``"sum"``: (1/2) sum (z - y)^2.
        outputs: n_L for a kernel under ``"mean"``; not for an ensemble, which knows it.

    Returns:
        eta, multiplying the learning-rate tensor; infinite where Theta = 0.

    Raises:
        ValueError: If ``reduction`` is unknown, ``x`` does not fit or the kernel is not square and finite, or
            ``outputs`` is missing, or given with an ensemble.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> Theta = torch.diag(torch.tensor([4.0, 2.0]))
        >>> theory.largest_learning_rate(Theta, reduction="sum"), theory.largest_learning_rate(Theta, outputs=3)
        (0.5, 1.5)
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    if isinstance(source, MLPEnsemble):
        if outputs is not None:
            raise ValueError(f"outputs: {outputs} given with an ensemble of {source.widths[-1]}; leave it out")
        outputs = source.widths[-1]
        if x is None:
            Theta = torch.stack(layer_shares(source)).sum().reshape(1, 1)  # needs no expectation of two inputs
        else:
            Theta = initial_statistics(source, x, statistics=("K", "Theta"))[-1].Theta
    else:
        Theta = source.detach().to(torch.float64)
        if x is not None:
            raise ValueError("x: given together with a kernel; give inputs with an ensemble only")
        if Theta.ndim != 2 or Theta.shape[0] != Theta.shape[1] or len(Theta) == 0:
            raise ValueError(f"Theta: shape {tuple(Theta.shape)} given; give a square matrix, (N, N)")
        if reduction == "mean" and (outputs is None or outputs < 1):
            raise ValueError(f"outputs: {outputs} given; the mean needs n_L >= 1 (1 for an (N n_L, N n_L) kernel)")
    if not bool(torch.isfinite(Theta).all()):
        raise ValueError("Theta: contains NaN or infinite values, so there is no stable learning rate to give")
    largest = float(torch.linalg.eigvalsh(Theta)[-1])
    scale = 2.0 if reduction == "sum" else float(len(Theta) * (outputs or 1))
    return scale / largest if largest > 0 else math.inf


def _divided(what: str, share: float, gain: Tensor, ensemble: MLPEnsemble) -> tuple[float, ...]:
    values: Sequence[float] = gain.tolist()
    if share == 0:
        return (0.0,) * len(values)
    for layer, value in enumerate(values, 1):
        if not (0 < value < math.inf and math.isfinite(share / value)):
            raise ValueError(
                f"ensemble: the {what} at layer {layer} of {ensemble} is {value:g}, so that no learning rate gives it "
                "its share; initialize closer to criticality, use fewer layers or give inputs x != 0"
            )
    return tuple(share / value for value in values)
