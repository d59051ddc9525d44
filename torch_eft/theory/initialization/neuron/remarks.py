"""Where laws of weights and biases that are not Gaussian are not counted, in words, or refused."""

import torch
from torch import Tensor

from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS

_NOT_SMALL = 0.1
"""Excess kurtosis of preactivations from which vertices that take it as 0 are wrong by more than some 4 %."""


def counted_laws(ensemble: MLPEnsemble, first_order: bool) -> tuple[str, ...]:
    """Sentences on how laws that are not Gaussian enter K and Theta, or the vertices too.

    Args:
        ensemble: The ensemble.
        first_order: Whether vertices are among the results.

    Returns:
        None for Gaussian weights and biases.
    """
    if ensemble.gaussian:
        return ()
    laws = ", ".join(sorted({*ensemble.weight_law, *ensemble.bias_law} - {"gaussian"}))
    activation, sentences = ensemble.activation, [f"weights or biases are {laws}, which is counted"]
    if activation.kinked and activation.slopes is None and (_odd_biases(ensemble) or _odd_first_layer(ensemble)):
        sentences[0] = (
            f"weights or biases are {laws}; {activation.name} has a kink, and the hidden biases and the first layer's "
            "weights are taken as Gaussian"
        )
    if not first_order:
        return tuple(sentences)
    if activation.kinked and activation.slopes is not None and (_odd_biases(ensemble) or _odd_first_layer(ensemble)):
        sentences.append(
            f"the vertices of {activation.name}, which has a kink, take the hidden biases and the first layer's "
            "weights as Gaussian: seed_spread counts them, one input at a time"
        )
    if "orthogonal" in ensemble.weight_law:
        sentences.append(
            "orthogonal weights change V, F and B; in the other vertices their terms are of order 1/n^2 by counting "
            "powers, which was not checked for P .. U"
        )
    return tuple(sentences)


def bias_kurtosis(ensemble: MLPEnsemble, K: Tensor) -> float:
    """The largest excess kurtosis that the bias of an output gives it, at any width; 0 where it is Gaussian.

    Args:
        ensemble: The ensemble.
        K: Kernel of the outputs, (N, N).

    Returns:
        Negative or 0.
    """
    cumulant = EXCESS_KURTOSIS[ensemble.bias_law[-1]] * ensemble.C_b[-1] ** 2
    return cumulant / float(K.diagonal().min()) ** 2 if cumulant else 0.0


def check_kinked_biases(ensemble: MLPEnsemble, x: Tensor) -> None:
    """Refuse vertices of two slopes where the hidden biases are far from Gaussian.

    Args:
        ensemble: The ensemble.
        x: (N, n_0).

    Raises:
        ValueError: With the excess kurtosis of the preactivations and what to do.
    """
    slopes = ensemble.activation.slopes
    if slopes is None or not ensemble.activation.kinked or not _odd_biases(ensemble):
        return
    mean_slope = (slopes[0] ** 2 + slopes[1] ** 2) / 2
    signal, largest = x.square().sum(1) / ensemble.widths[0], 0.0
    for C_b, C_W, law in zip(ensemble.C_b[:-1], ensemble.C_W[:-1], ensemble.bias_law[:-1], strict=True):
        K = C_b + C_W * signal
        kurtosis = EXCESS_KURTOSIS[law] * torch.where(K > 0, C_b / torch.where(K > 0, K, 1.0), 0.0).square()
        largest = max(largest, float(kurtosis.abs().max()))
        signal = mean_slope * K
    if largest > _NOT_SMALL:
        raise ValueError(
            f"ensemble: biases of {ensemble} are not Gaussian and make the excess kurtosis of preactivations "
            f"{largest:.2g} in size; the vertices of {ensemble.activation.name}, which has a kink, are known for "
            "Gaussian neurons. theory.seed_spread is exact for one input, theory.sample_ntk draws the networks; "
            "or set bias_law='gaussian'"
        )


def _odd_biases(ensemble: MLPEnsemble) -> bool:
    return any(law != "gaussian" and C_b > 0 for law, C_b in zip(ensemble.bias_law[:-1], ensemble.C_b, strict=False))


def _odd_first_layer(ensemble: MLPEnsemble) -> bool:
    return ensemble.depth > 1 and bool(EXCESS_KURTOSIS[ensemble.weight_law[0]])
