"""Where the expansion in 1/n holds: epsilon, the name of the regime, and the validity of order 0 and order 1.

A network's last hidden layer sets the variance G of its output given everything before; epsilon = Var(G) / E[G]^2
over initializations controls the expansion. To order 1/n, epsilon = V / (n_{L-1} K^2) at the output, with V the
four-point vertex for one input (PDLT 4.3, single-input form):

    V^(l+1) = C_W^2 { <s^4> - <s^2>^2 - 2 zeta <s^2>^2 + (n_l / n_{l-1}) (d<s^2>/dK)^2 V^(l) },
    V^(1) = -2 zeta (C_W x.x / n_0)^2,

where zeta is 0 for independent weights and n_in / max(n_in, n_out) for orthogonal ones of the new layer (Weingarten, to
leading order); it does not count in the output's own layer, as G is given. Biases that are not Gaussian, and the first
layer's weights, enter through < . > (``preactivations``); the fourth moment of other weights does not.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.signal_propagation.preactivations import (
    first_preactivations,
    haar_share,
    input_moments,
    next_preactivations,
)

_QUANTILES = 64
"""Inputs, by size, over which epsilon is averaged where biases are not Gaussian."""

EDGE, TOO_DEEP = 0.2, 1.0
"""The regimes' borders in max(r, epsilon): where corrections become large, and where the expansion is useless."""


def output_fluctuation(ensemble: MLPEnsemble, x: Tensor | None = None) -> float:
    """The fluctuation epsilon = V / (n_{L-1} K^2) at the output, to order 1/n, the mean over the inputs.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0); without them, one input with |x|^2 = n_0.

    Returns:
        epsilon >= 0; 0 without a hidden layer.

    Example:
        >>> from torch_eft.theory import MLPEnsemble, output_fluctuation
        >>> round(output_fluctuation(MLPEnsemble([3, 100, 100, 1], "relu", C_W=2.0)), 12)  # 5 (L - 1) / n
        0.1
    """
    size, quartic = input_moments(ensemble, x)
    if not EXCESS_KURTOSIS[ensemble.weight_law[0]]:
        size = quartic = size.unique()  # only sizes count
    if not ensemble.gaussian and len(size) > _QUANTILES:  # every input takes the nodes of the biases
        middle = (torch.arange(_QUANTILES, device=size.device) * 2 + 1) * len(size) // (2 * _QUANTILES)
        order = size.argsort()[middle]
        size, quartic = size[order], quartic[order]
    z = first_preactivations(ensemble, size, quartic)
    V = -2 * haar_share(ensemble, 1) * (ensemble.C_W[0] * size) ** 2
    for layer in range(2, ensemble.depth + 1):
        n_l, n_before = ensemble.widths[layer - 1], ensemble.widths[layer - 2]
        source = z.fourth_power() - z.variance.square()
        if layer < ensemble.depth:  # of the last layer the variance given its inputs counts, whatever its own weights
            source = source - 2 * haar_share(ensemble, layer) * z.variance.square()
        V = ensemble.C_W[layer - 1] ** 2 * (source + n_l / n_before * z.response().square() * V)
        z = next_preactivations(ensemble, z, layer)
    if ensemble.depth == 1:
        return 0.0
    K = z.K
    epsilon = torch.where(K > 0, V / (ensemble.widths[-2] * K.square().clamp_min(torch.finfo(K.dtype).tiny)), 0.0)
    return float(epsilon.mean())


def regime(r: float, epsilon: float) -> str:
    """Name the regime of a network by the larger of r and epsilon.

    Off criticality one of them alone misleads: in the ordered phase biases keep epsilon small at any depth.
    The cut-offs 0.01, 0.2 and 1 are our tolerances: first-order errors in epsilon of 0.5, 9 and 42 %.

    Args:
        r: The aspect ratio L / n.
        epsilon: The fluctuation of the output, see ``output_fluctuation``.

    Returns:
        A short description.

    Example:
        >>> from torch_eft.theory import regime
        >>> regime(0.1, 0.05)
        '0 < r << 1: effectively deep, finite-width corrections small and predictable'
    """
    size = max(r, epsilon)
    if size < 0.01:
        return "r -> 0: at initialization practically infinitely wide"
    if size < EDGE:
        return "0 < r << 1: effectively deep, finite-width corrections small and predictable"
    if size < TOO_DEEP:
        return "edge: finite-width corrections large, order 1/n is rough"
    if epsilon >= TOO_DEEP:
        return "too deep for 1/n: networks of different seeds differ by order one"
    return "too deep for 1/n: r >~ 1, corrections in training are of order one"


def infinite_width_validity(ensemble: MLPEnsemble, x: Tensor | None = None) -> Validity:
    """Judge the infinite-width theory (order 0) for this ensemble by the larger of r and epsilon.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0); without them, one input with |x|^2 = n_0.

    Returns:
        A ``Validity`` whose numbers are ``aspect_ratio`` and ``epsilon``.

    Example:
        >>> from torch_eft.theory import MLPEnsemble, infinite_width_validity
        >>> infinite_width_validity(MLPEnsemble([10, 1000, 1], "relu", C_W=2.0)).flag
        'valid'
    """
    r, epsilon = ensemble.aspect_ratio, output_fluctuation(ensemble, x)
    size = f"r = L/n = {r:.3g}, epsilon = Var G/E[G]^2 = {epsilon:.3g}; {regime(r, epsilon)}"
    if max(r, epsilon) >= TOO_DEEP:
        reason = f"infinite width does not describe this network: {size}. Use fewer or wider layers"
        return Validity("invalid", reason, {"aspect_ratio": r, "epsilon": epsilon})
    remark = (
        "In training the NTK and the representations of a real network move by order r, more for larger targets; "
        "order 0 has neither: read it against the measured NTK drift"
    )
    flag: Literal["valid", "caution"] = "valid" if max(r, epsilon) < EDGE else "caution"
    return Validity(flag, f"infinite width (order 0): {size}. {remark}", {"aspect_ratio": r, "epsilon": epsilon})


def first_order_validity(ensemble: MLPEnsemble, x: Tensor | None = None) -> Validity:
    """Judge order 1/n for this ensemble by the larger of r and epsilon.

    Relative to the terms that it keeps, it neglects 1 - epsilon / (e^epsilon - 1) where G is lognormal, as in
    scale-invariant networks (PDLT 3.2), and terms of that order elsewhere.

    Args:
        ensemble: The ensemble.
        x: Inputs, (N, n_0); without them, one input with |x|^2 = n_0.

    Returns:
        A ``Validity`` whose numbers are ``aspect_ratio``, ``epsilon`` and ``relative_neglected``.

    Example:
        >>> from torch_eft.theory import MLPEnsemble, first_order_validity
        >>> validity = first_order_validity(MLPEnsemble([10, 50, 50, 1], "relu", C_W=2.0))
        >>> validity.flag, validity.numbers["aspect_ratio"], round(validity.numbers["epsilon"], 3)
        ('caution', 0.06, 0.2)
    """
    r, epsilon = ensemble.aspect_ratio, output_fluctuation(ensemble, x)
    neglected = 1 - epsilon / math.expm1(epsilon) if 0 < epsilon < 700 else float(epsilon > 0)
    numbers = {"aspect_ratio": r, "epsilon": epsilon, "relative_neglected": neglected}
    size = f"r = L/n = {r:.3g}, epsilon = Var G/E[G]^2 = {epsilon:.3g}; {regime(r, epsilon)}"
    if max(r, epsilon) >= TOO_DEEP:
        reason = f"order 1/n does not describe this network: {size}. Use fewer or wider layers"
        return Validity("invalid", reason, numbers)
    flag: Literal["valid", "caution"] = "valid" if max(r, epsilon) < EDGE else "caution"
    reason = f"{size}. Neglected terms are about {100 * neglected:.2g} % of those of order 1/n"
    return Validity(flag, reason, numbers)
