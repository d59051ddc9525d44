"""The fourth cumulant of an output in training: how far from Gaussian the trained distribution is, at order 1/n.

On squared error z_x(t) is linear in z(0) at infinite width, with J = dz_x(t) / dz(0), so that w = K J is its covariance
with z(0). To order 1/n (Wick contraction of the cumulants at the start, derived here)

    kappa_4(z_x(t)) = (1/n) { 3 V[JJ, JJ] + 12 (D + 2 F)[JJ, r] + 12 (A + 2 B)[r, r]
                              + 24 (P, Q)[J, w w] + 24 (R, S, T, U)[w w w] }

where every e(0) in the response of z_x(t) to H, dH, ddI and ddII is replaced by w: r is how z_x(t) responds to H. Other
outputs and the targets drop out: kappa_4 is the same for all outputs and targets. At t = 0 it is 3 V / n (PDLT 4.3).
Weights that are not Gaussian count within the vertices, as those of a network with one output; a bias that is not adds
(<b^4> - 3 C_b^2) (sum J)^4 at order 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.training import Training, as_training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.signal_propagation.regimes import first_order_validity
from torch_eft.theory.training.corrections.correction import CORRECTIONS, provenance
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.corrections.output_covariance import carried_kernel
from torch_eft.theory.training.infinite_width import FrozenTraining, InfiniteWidthPath
from torch_eft.theory.training.optimizer import Loss
from torch_eft.theory.training.sampled.dynamics import SampledTraining
from torch_eft.theory.training.sampled.initial_distribution import all_vertices

_RESPONSES = 2**22
"""Entries of the largest arrays of the responses made at once."""


@dataclass(frozen=True, repr=False)
class FourthCumulant:
    """The fourth cumulant of any one output on the probe points.

    Args:
        steps: (T,).
        value: (T, N_p), kappa_4 at order 1/n.
        excess: (T, N_p), the excess kurtosis kappa_4 / Var^2, the variance at infinite width.
        error: The largest relative standard error of the sampled vertices; 0 where they are integrated.
        provenance: Which theory, for which ensemble.
        validity: Where it holds.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble, x = theory.MLPEnsemble([2, 50, 1], "linear"), torch.eye(2, dtype=torch.float64)
        >>> theory.predict_fourth_cumulant(ensemble, x, x[:1], learning_rate=0.1, steps=3).value.shape
        torch.Size([4, 1])
    """

    steps: Tensor
    value: Tensor
    excess: Tensor
    error: float
    provenance: str
    validity: Validity

    __repr__ = short_repr


def predict_fourth_cumulant(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    x_probe: Tensor,
    training: Training | None = None,
    *,
    learning_rate: float | None = None,
    steps: float | None = None,
    at_steps: Sequence[float] | None = None,
    num_samples: int = 4096,
    num_replicas: int = 2,
    seed: int = 0,
    **keywords: Any,
) -> FourthCumulant:
    """Return the fourth cumulant of the outputs in full-batch gradient descent on squared error, for any targets.

    Args:
        ensemble: The ensemble, with a smooth activation.
        x_train: Training inputs, (N, n_0).
        x_probe: Probe inputs, (N_p, n_0).
        training: The training; None builds it from the keywords.
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        steps: Number T of optimizer steps.
        at_steps: The steps to return; None means 0, 1, .. T. For each probe and each of them one path is integrated.
        num_samples: Sample size of moments with three and four labels (four points or fewer are integrated).
        num_replicas: Independent samples it is shared by.
        seed: Their seed; the global random state is left alone.
        **keywords: Further fields of a ``torch_eft.Training``: ``reduction``, ``momentum``, ``schedule``, ...

    Raises:
        ValueError: If shapes do not fit, the training is of another kind, its learning rate is beyond the stability
            bound, the activation has a kink or training points coincide.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> ensemble, x = theory.MLPEnsemble([2, 50, 1], "linear"), torch.eye(2, dtype=torch.float64)
        >>> start = theory.predict_fourth_cumulant(ensemble, x, x[:1], learning_rate=0.1, steps=0)
        >>> round(float(start.excess), 9)  # 6 / n for one linear hidden layer
        0.12
    """
    training = as_training(training, learning_rate=learning_rate, steps=steps, **keywords)
    if training.flows:
        raise ValueError("dynamics: 'gradient_flow' given; the fourth cumulant is derived for gradient descent")
    times = training.times(at_steps, x_train.device)
    y = torch.zeros(len(x_train), ensemble.widths[-1], dtype=torch.float64, device=x_train.device)
    frozen = FrozenTraining(ensemble, x_train, y, x_probe, training)
    finite = FiniteWidthTraining(frozen, num_samples=num_samples, num_replicas=num_replicas, seed=seed)
    tensors, error = all_vertices(
        finite.vertices,
        torch.arange(len(frozen.x), device=frozen.x.device),
        single=EXCESS_KURTOSIS[ensemble.weight_law[-1]] != 0,
    )
    value = fourth_cumulant(frozen, tensors, frozen.probes, times) / ensemble.widths[-2]
    # An output's bias is one number for all points: its cumulant is there at any width.
    bias = EXCESS_KURTOSIS[ensemble.bias_law[-1]] * ensemble.C_b[-1] ** 2
    value = value + bias * frozen.response(times, frozen.probes).sum(2) ** 4
    variance = frozen.output(times)[1].diagonal(dim1=1, dim2=2)
    notes = ["any targets"]
    if finite.vertices.sampled:
        notes.append(f"relative standard error of sampled vertices up to {error:.2g}")
    excess = value / variance.square().clamp_min(torch.finfo(value.dtype).tiny)
    source = provenance(ensemble, training, CORRECTIONS, notes)
    return FourthCumulant(times, value, excess, error, source, first_order_validity(ensemble, finite.x))


def fourth_cumulant(path: InfiniteWidthPath, tensors: Mapping[str, Tensor], probes: int, steps: Tensor) -> Tensor:
    """n_{L-1} times kappa_4 on the first ``probes`` points.

    Args:
        path: The path at infinite width, of gradient descent.
        tensors: Vertices over all points, labels as printed.
        probes: N_p.
        steps: (T,).

    Returns:
        (T, N_p).
    """
    J = path.response(steps, probes)  # (T, x, points)
    w = J @ path.K
    modes = w[:, :, path.train] @ path.U
    r = -(carried_kernel(path, probes, steps) * modes[:, :, None, :]) @ path.U.T  # (T, x, points, train)
    V, D, A, B = (tensors[name] for name in "VDAB")
    D, A = D[..., path.train], A[:, path.train][..., path.train]
    B_1324, B_1423 = (B[:, :, path.train][..., path.train], B[:, path.train][:, :, path.train])
    kernel = torch.einsum("txw,txv,wvcd->txcd", J, J, V)
    value = 3 * torch.einsum("txcd,txc,txd->tx", kernel, J, J)
    value = value + 12 * torch.einsum("txw,txv,wvya,txya->tx", J, J, D, r)
    value = value + 12 * torch.einsum("txya,yazb,txzb->tx", r, A, r)
    value = value + 12 * torch.einsum("txya,yzab,txzb->tx", r, B_1324, r)
    value = value + 12 * torch.einsum("txya,ybaz,txzb->tx", r, B_1423, r)
    return value + 24 * _responses(path, tensors, J, w, steps)


def _responses(path: InfiniteWidthPath, tensors: Mapping[str, Tensor], J: Tensor, w: Tensor, steps: Tensor) -> Tensor:
    """The terms of F, P .. U in z_x(t) of a network that starts from w, with J for zeta, (T, x)."""
    wanted = sorted({int(step) for step in steps})
    targets = torch.zeros(len(path.U), 1, dtype=J.dtype, device=J.device)
    means = {**tensors, "G1": torch.zeros_like(tensors["G1"]), "Theta1": torch.zeros_like(tensors["Theta1"])}
    loss = Loss("mse", targets, "sum")
    training = SampledTraining(path.K, path.Theta, loss, path.training, means, torch.zeros_like(path.K))
    times = torch.tensor([wanted.index(int(step)) for step in steps], device=J.device)
    place = torch.cartesian_prod(times, torch.arange(J.shape[1], device=J.device))
    rows = max(1, _RESPONSES // (len(path.K) * len(path.U) ** 2))
    responses = []
    for some, z, zeta in zip(place.split(rows), w.flatten(0, 1).split(rows), J.flatten(0, 1).split(rows), strict=True):
        c = training.response(z[..., None], zeta[..., None], wanted)[..., 0]
        responses.append(c[some[:, 0], torch.arange(len(some), device=J.device), some[:, 1]])
    return torch.cat(responses).reshape(len(steps), J.shape[1])
