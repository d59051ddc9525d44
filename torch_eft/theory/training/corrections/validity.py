"""Where order 1/n holds in the training of an ensemble, judged by how far neurons move and by its own size."""

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import InfiniteWidthLayers
from torch_eft.theory.signal_propagation.regimes import first_order_validity
from torch_eft.theory.training.infinite_width import FrozenChain, FrozenModes, InfiniteWidthPath

CAUTION, INVALID = 0.2, 1.0
"""Tolerances chosen here for terms of order 1/n over those of order 0."""

NEGLECTED, HALF = 15.0, 0.5
"""Measured: see ``training_validity``."""


def neuron_movement(
    ensemble: MLPEnsemble, layers: InfiniteWidthLayers, path: InfiniteWidthPath, steps: Tensor
) -> Tensor:
    """The squared relative movement of the last hidden layer's preactivations in training, to leading order.

    The mean over points and neurons of (z(t) - z(0))^2, over that of z(0)^2. Neuron j moves at x by
    sum_c Theta_xc (W^T p)_jc s'_jc, with p = - Phi e at infinite width, Theta the NTK of that layer at infinite width:
    what its fluctuations add, of relative order r, is left out (``representation_drift`` has it).

    Args:
        ensemble: The ensemble.
        layers: K and Theta at layers 1 .. L and two-label moments at 1 .. L-1, over all points.
        path: The path at infinite width.
        steps: (T,).

    Returns:
        u(t), (T,), of order 1/n; 0 without a hidden layer.
    """
    _, phi = path.single(steps)
    return neuron_movement_by(ensemble, layers, path, phi[:, :, None] * path.error_gram * phi[:, None, :])


def neuron_movement_by(
    ensemble: MLPEnsemble, layers: InfiniteWidthLayers, modes: FrozenModes, squares: Tensor
) -> Tensor:
    """The same for E sum_k p_k p_k^T in the modes of the frozen NTK, (T, modes, modes)."""
    if ensemble.depth == 1:
        return torch.zeros_like(squares[:, 0, 0])
    K, Theta, pairs, train = layers[0][-2], layers[1][-2], layers[2][-1], modes.train
    weights = modes.U @ squares @ modes.U.T * pairs.explicit((1,), (1,))[train][:, train]
    seen = Theta[:, train]
    return ensemble.C_W[-1] / ensemble.widths[-2] * (seen @ weights * seen).sum((1, 2)) / K.trace()


def chain_movement(path: FrozenChain, steps: Tensor) -> Tensor:
    """The squared relative movement of the last hidden layer's preactivations in a chain, as ``neuron_movement``.

    A preactivation at a label moves by sum_v Theta_yv (W^T p)_v s'_v over the labels v of the training inputs, and two
    entries of W^T p have the covariance C_W / n Av^T[p p^T].

    Args:
        path: The path at infinite width.
        steps: (T,).

    Returns:
        u(t), (T,).
    """
    chain = path.chain
    if chain.depth == 1:
        return torch.zeros(len(steps), dtype=path.K.dtype, device=path.K.device)
    _, phi = path.single(steps)
    squares = path.U @ (phi[:, :, None] * path.error_gram * phi[:, None, :]) @ path.U.T
    K, Theta, slopes = path.layers[0][-2], path.layers[1][-2], path.layers[2][-1].explicit((1,), (1,))
    whole = squares.new_zeros(len(steps), chain.samples, chain.samples)
    whole[:, path.probes :, path.probes :] = squares
    carried = chain.layers[-1].average_adjoint(whole[..., None, None])  # (T, N, N, P, P)
    weights = carried.movedim(-2, -3).flatten(-4, -3).flatten(-2, -1) * slopes
    return chain.ensemble.C_W[-1] / chain.ensemble.widths[-2] * ((Theta @ weights) * Theta).sum((1, 2)) / K.trace()


def training_validity(
    ensemble: MLPEnsemble,
    x: Tensor,
    path: FrozenModes,
    sizes: Mapping[str, float],
    moved: float,
    error: Tensor | None = None,
    start: Validity | None = None,
) -> Validity:
    """Return where order 1/n holds, by how far neurons move (u its square), by r and epsilon and by its own size.

    What is neglected, in the mean output, its covariance and the NTK drift, was measured on grids of ensembles trained
    by gradient descent (tanh, GELU; 1 to 3 hidden layers of 4 to 64 neurons; targets of 0.3, 1 and 3; training inputs
    0.1 and 0.3 of their length apart or unrelated; t = 5, 25, 125): at most 15 u + r of the largest term of order 1/n
    up to then, beside three standard errors, where r, epsilon and the terms themselves are below 0.2. With ten outputs
    and 64 training images it was a fifth of that. The forecast is called valid up to a half, where it is closer than
    infinite width, and invalid from 1.

    Args:
        ensemble: The ensemble.
        x: All inputs, (N_all, n_0).
        path: The modes of the frozen NTK.
        sizes: ``{"|z1| / |z0|": largest ratio over time, ..}``.
        moved: The largest u over time, see ``neuron_movement``.
        error: E |e|^2 at initialization for the squared error, in the modes that move.
        start: Where order 1/n holds at initialization; None asks r and epsilon of the ensemble.
    """
    start = first_order_validity(ensemble, x) if start is None else start
    name = max(sizes, key=lambda key: sizes[key])
    largest_term, n = sizes[name], ensemble.widths[-2]
    smallest, largest = float(path.eigenvalues[0]), float(path.eigenvalues[-1])
    neglected = NEGLECTED * moved + ensemble.aspect_ratio
    terms = ", ".join(f"{key} = {value:.3g}" for key, value in sizes.items())
    detail = (
        f"neurons of the last hidden layer move by {100 * moved**0.5:.2g} % of their size: what is neglected is up to "
        f"about {100 * min(neglected, 9.99):.2g} % of the terms of order 1/n; these over those of order 0: {terms}; "
    )
    numbers = {
        **start.numbers,
        **sizes,
        "neuron movement": moved**0.5,
        "neglected": neglected,
        "condition": largest / smallest,
    }
    if error is None:
        detail += f"condition {largest / smallest:.3g}"
    else:
        numbers["|e|^2 / (n lambda_min)"] = float(error) / smallest / n
        detail += f"|e|^2 / (n lambda_min) = {float(error) / smallest / n:.3g} (condition {largest / smallest:.3g})"
    advice = "Wider layers, smaller targets, fewer near-duplicate inputs or shorter training make it smaller"
    if neglected >= 1 or largest_term >= INVALID:
        too_large = f"{name} = {largest_term:.3g} is not small"
        decisive = too_large if largest_term >= INVALID else "what is neglected is not smaller"
        return Validity("invalid", (f"order 1/n: {decisive}", f"{detail}. {advice}", *start.reasons), numbers)
    if start.flag == "invalid":
        return Validity("invalid", (*start.reasons, detail), numbers)
    cautious = start.flag == "caution" or neglected >= HALF or largest_term >= CAUTION
    training = f"in training, {detail}" + f". {advice}" * cautious
    decides = cautious and start.flag == "valid"  # what decides is said first
    reasons = (training, *start.reasons) if decides else (*start.reasons, training)
    return Validity("caution" if cautious else "valid", reasons, numbers)
