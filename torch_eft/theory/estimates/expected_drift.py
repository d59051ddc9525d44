"""The expected movement of the NTK in training, before anything is trained: an order of magnitude, at order 1/n.

One input x with itself as the training set, gradient flow to zero loss L = (1/2) sum_i (z_i - y_i)^2. With the vertices
P .. U of that input, G = n_L K + |y|^2 = E sum_i (z_i - y_i)^2 at the start and phi = 1/Theta, psi = 1/(2 Theta^2),

    n E[tr H(inf) - tr H(0)] / n_L = -PQ phi + phi^2 (Cpp G + Cij K) + psi (Cqq G + 2 (S + U) K)
                                     + (phi^2 Cij + psi 2 (S + U)) |y|^2 / n_L,
    PQ = 2 (P + n_L Q + Q),    Cpp = R + S,    Cqq = 2 T,    Cij = 2 R + T + U,

where weights of the output layer that are not Gaussian add 2 E_dHz to PQ, E_ddI + E_ddII to Cij and E_ddII to S + U.

This is the one-mode case of ``corrections.ntk_change`` (from the GD hierarchy of PDLT chapter infinity). Linear in
|y|^2: the slope against the loss that the target adds is the drift per unit of loss decrease; the rest, at y = 0, is
the drift of unlearning the random initial output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.learning_rates import layer_gains, layer_shares
from torch_eft.theory.initialization.infinite_width import check_inputs
from torch_eft.theory.initialization.statistics import initial_statistics
from torch_eft.theory.signal_propagation.regimes import TOO_DEEP

DEEPEST = 32
"""Depth beyond which the vertices P .. U are not evaluated: it takes seconds, and r is then rarely small."""

_VERTICES = ("P", "Q", "R", "S", "T", "U", "E_dHz", "E_ddI", "E_ddII")

LARGEST = 1e6
"""Largest kernel for which they are evaluated: the number of quadrature points grows as its square root."""


@dataclass(frozen=True, repr=False)
class ExpectedDrift:
    """The expected relative change of the NTK's mean diagonal on a training input; an order of magnitude.

    Args:
        per_loss: d(relative drift) / d(loss), loss = (1/2) sum_i (z_i - y_i)^2 of one input, in inverse units of the
            loss; None where the activation's kinks leave no expansion in 1/n, or it was not computed.
        at_rest: Relative drift while the initial outputs are unlearned, y = 0; None likewise.
        unit_targets: Relative drift for targets with y_i^2 = 1 for each output; None likewise.
        motion: |theta(inf) - theta(0)|^2 / n in units of the learning-rate tensor, G / (n Theta), for those targets:
            the expansion's own small number.
        size: The order of magnitude of the relative drift for unit targets: that of ``unit_targets``; with a kink
            (L - 1) sqrt(motion), as about that part of a hidden layer's neurons crosses it (trained ReLU networks,
            L = 2 to 8, n = 50 to 128, n_L = 2: root mean square 0.4 to 0.7 times it); None where no estimate exists.
        validity: Its ``numbers`` are the motion, the drift and r.

    Example:
        >>> from torch_eft import theory
        >>> drift = theory.expected_drift(theory.MLPEnsemble([3, 100, 1], "relu", C_W=2.0))
        >>> drift.unit_targets is None, drift.validity.flag
        (True, 'caution')
    """

    per_loss: float | None
    at_rest: float | None
    unit_targets: float | None
    motion: float | None
    size: float | None
    validity: Validity

    def __repr__(self) -> str:
        return short_repr(self)


def expected_drift(ensemble: MLPEnsemble, x: Tensor | None = None) -> ExpectedDrift:
    """Estimate the order of magnitude of the NTK's drift over a training.

    Raises ``QuadratureError`` if the activation is not smooth enough for quadrature.

    Args:
        ensemble: The ensemble with its learning-rate tensor.
        x: One input, (1, n_0), or None for one with |x|^2 = n_0.

    Returns:
        The drift, at order 1/n in the mean over initializations.

    Raises:
        ValueError: If ``x`` is not one input.

    Example:
        >>> from torch_eft import theory
        >>> theory.expected_drift(theory.MLPEnsemble([3, 1], "tanh")).size  # linear in its parameters
        0.0
    """
    if x is None:
        x = torch.ones(1, ensemble.widths[0], dtype=torch.float64, device="cpu")
    x = check_inputs("x", x, ensemble)
    if len(x) != 1:
        raise ValueError(f"x: {len(x)} inputs given; the estimate is for one input, (1, {ensemble.widths[0]})")
    n, outputs = ensemble.widths[-2], ensemble.widths[-1]
    kernels, Theta = layer_gains(ensemble, x).K, float(torch.stack(layer_shares(ensemble, x)).sum())
    K = float(kernels[-1])
    if not Theta > 0:
        return ExpectedDrift(None, None, None, None, None, Validity("invalid", "no parameter has a learning rate"))
    if not ensemble.hidden_widths:
        return ExpectedDrift(
            0.0, 0.0, 0.0, 0.0, 0.0, Validity("valid", "linear in its parameters: the NTK is constant")
        )
    motion = outputs * (K + 1) / (n * Theta)
    if ensemble.activation.kinked:
        reason = (
            f"{ensemble.activation.name} has a kink: neurons that cross it leave no expansion in 1/n; the drift is of "
            "the order of (L - 1) |theta - theta_0| / sqrt(n)"
        )
        size = (ensemble.depth - 1) * motion**0.5
        return ExpectedDrift(None, None, None, motion, size, _validity(ensemble, motion, size, reason))
    if ensemble.depth > DEEPEST:
        reason = f"P .. U are not evaluated beyond {DEEPEST} layers"
        return ExpectedDrift(None, None, None, motion, None, _validity(ensemble, motion, None, reason))
    if float(kernels.max()) > LARGEST:
        reason = f"P .. U are not evaluated for kernels beyond {LARGEST:g}"
        return ExpectedDrift(None, None, None, motion, None, _validity(ensemble, motion, None, reason))
    try:
        last = initial_statistics(ensemble, x, statistics=_VERTICES, check_validity=False)[-1]
    except ValueError as error:  # an input that vanishes, or an integrand too sharp for the quadrature of P .. U
        return ExpectedDrift(None, None, None, motion, None, Validity("invalid", str(error)))
    values = [getattr(last, name) for name in _VERTICES]
    P, Q, R, S, T, U, E_1, E_2, E_3 = (float(value.flatten()[0]) for value in values)
    phi, psi = 1 / Theta, 1 / (2 * Theta**2)
    PQ, Cpp, Cqq = 2 * (P + outputs * Q + Q) + 2 * E_1, R + S, 2 * T
    Cij, SU = 2 * R + T + U + E_2 + E_3, S + U + E_3
    target = phi**2 * (Cpp + Cij / outputs) + psi * (Cqq + 2 * SU / outputs)
    start = -PQ * phi + phi**2 * (Cpp * outputs + Cij) * K + psi * (Cqq * outputs + 2 * SU) * K
    rest, unit = start / (n * Theta), (start + target * outputs) / (n * Theta)
    reason = "order 1/n, mean over initializations, one training input, gradient flow on squared error"
    validity = _validity(ensemble, motion, unit, reason)
    return ExpectedDrift(2 * target / (n * Theta), rest, unit, motion, abs(unit), validity)


def _validity(ensemble: MLPEnsemble, motion: float, drift: float | None, reason: str) -> Validity:
    numbers = {"motion": motion, "drift": abs(drift or 0.0), "aspect_ratio": ensemble.aspect_ratio}
    size = max(numbers.values())
    if size >= TOO_DEEP:
        reason = f"{reason}; but corrections are of order one ({size:.2g}): lazy training fails"
        return Validity("invalid", reason, numbers)
    return Validity("caution", f"{reason}; an order of magnitude: loss, data, batches and optimizer change it", numbers)
