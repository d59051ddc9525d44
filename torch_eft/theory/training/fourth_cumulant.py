"""The fourth cumulant of an output in training: how far from Gaussian the trained distribution is, at order 1/n.

On squared error z_x(t) is linear in z(0) at order 0, with J = dz_x(t) / dz(0), so that w = K J is its covariance with
z(0). To order 1/n (Wick contraction of the cumulants at the start, derived here)

    kappa_4(z_x(t)) = (1/n) { 3 V[JJ, JJ] + 12 (D + 2 F)[JJ, r] + 12 (A + 2 B)[r, r]
                              + 24 (P, Q)[J, w w] + 24 (R, S, T, U)[w w w] }

where every e(0) in the response of z_x(t) to H, dH, ddI and ddII is replaced by w: r is how z_x(t) responds to H. Other
outputs and the targets drop out: kappa_4 is the same for all outputs and targets. At t = 0 it is 3 V / n (PDLT 4.3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.signal_propagation.regimes import first_order_validity
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.corrections.infinite_width_path import OrderZeroPath
from torch_eft.theory.training.corrections.output_covariance import carried_kernel
from torch_eft.theory.training.optimizer import Loss, Reduction, Schedule
from torch_eft.theory.training.predict import InfiniteWidthTraining
from torch_eft.theory.training.sampled.dynamics import SampledTraining
from torch_eft.theory.training.sampled.initial_distribution import all_vertices
from torch_eft.theory.training.scope import covered_descent

_RESPONSES = 2**22
"""Entries of the largest arrays of the responses made at once."""


@dataclass(frozen=True)
class FourthCumulant:
    """Of any one output on the probe points.

    Args:
        steps: (T,).
        value: (T, N_p), kappa_4 at order 1/n.
        excess: (T, N_p), the excess kurtosis kappa_4 / Var^2, the variance at infinite width.
        provenance: Which theory, for which ensemble.
        validity: Where it holds.
    """

    steps: Tensor
    value: Tensor
    excess: Tensor
    provenance: str
    validity: Validity


def predict_fourth_cumulant(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    x_probe: Tensor,
    learning_rate: float,
    steps: int,
    reduction: Reduction = "mean",
    at_steps: Sequence[int] | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    schedule: Schedule | None = None,
    samples: int = 4096,
    replicas: int = 2,
    seed: int = 0,
) -> FourthCumulant:
    """The fourth cumulant of the outputs in full-batch training on squared error, for any targets.

    Args:
        ensemble: The ensemble, with a smooth activation.
        x_train: Training inputs, (N, n_0).
        x_probe: Probe inputs, (N_p, n_0).
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        steps: Number T of optimizer steps.
        reduction: As in ``predict_training``.
        at_steps: The steps to return; None means 0, 1, .. T. Each is trained up to for each probe.
        momentum: Of ``torch.optim.SGD``.
        nesterov: Of ``torch.optim.SGD``.
        schedule: The learning rate of every step in place of ``learning_rate``.
        samples: Sample size of moments with three and four labels (four points or fewer are integrated).
        replicas: Independent samples it is shared by.
        seed: Their seed; the global random state is left alone.

    Raises:
        ValueError: If shapes do not fit, the learning rate is beyond the stability bound, the activation has a kink or
            training points coincide.
    """
    wanted = list(range(steps + 1) if at_steps is None else at_steps)
    if not wanted or min(wanted) < 0 or max(wanted) > steps:
        raise ValueError(f"steps: {steps}, at_steps: {at_steps} given; need 0 <= at_steps <= steps")
    optimizer = covered_descent(learning_rate, steps, "gradient_descent", momentum, 0.0, nesterov, schedule)
    y = torch.zeros(len(x_train), ensemble.widths[-1], dtype=torch.float64, device=x_train.device)
    training = InfiniteWidthTraining(
        ensemble, x_train, y, x_probe, learning_rate, reduction, "gradient_descent", optimizer=optimizer
    )
    finite = FiniteWidthTraining(
        ensemble,
        training.x_probe,
        training.x_train,
        y,
        training.rate,
        "gradient_descent",
        samples,
        replicas,
        seed,
        optimizer=training.optimizer,
    )
    tensors, error = all_vertices(finite.vertices)
    times = torch.tensor(wanted, device=finite.x.device)
    value = fourth_cumulant(finite.path, tensors, finite.probes, times) / ensemble.widths[-2]
    J = finite.path.response(times)[:, : finite.probes]
    variance = (J @ finite.path.K @ J.mT).diagonal(dim1=1, dim2=2)
    told = f"order 1/n, n = {ensemble.widths[-2]}, {ensemble}, full-batch training on squared error, any targets"
    if finite.vertices.sampled:
        told += f"; relative standard error of sampled vertices up to {error:.2g}"
    excess = value / variance.square().clamp_min(torch.finfo(value.dtype).tiny)
    return FourthCumulant(times, value, excess, told, first_order_validity(ensemble, finite.x))


def fourth_cumulant(path: OrderZeroPath, tensors: Mapping[str, Tensor], probes: int, steps: Tensor) -> Tensor:
    """n_{L-1} times kappa_4 on the first ``probes`` points.

    Args:
        path: The order-0 path, of gradient descent.
        tensors: Vertices over all points, labels as printed.
        probes: N_p.
        steps: (T,).

    Returns:
        (T, N_p).
    """
    J = path.response(steps)[:, :probes]  # (T, x, points)
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


def _responses(path: OrderZeroPath, tensors: Mapping[str, Tensor], J: Tensor, w: Tensor, steps: Tensor) -> Tensor:
    """What F, P .. U add to z_x(t) of a network that starts from w, with J for zeta, (T, x)."""
    wanted = sorted({int(step) for step in steps})
    targets = torch.zeros(len(path.U), 1, dtype=J.dtype, device=J.device)
    means = {**tensors, "G1": torch.zeros_like(tensors["G1"]), "Theta1": torch.zeros_like(tensors["Theta1"])}
    descent = path.sums.descent(max(wanted))
    training = SampledTraining(
        path.K, path.Theta, Loss("mse", targets, "sum"), descent, means, torch.zeros_like(path.K)
    )
    times = torch.tensor([wanted.index(int(step)) for step in steps], device=J.device)
    place = torch.cartesian_prod(times, torch.arange(J.shape[1], device=J.device))
    rows = max(1, _RESPONSES // (len(path.K) * len(path.U) ** 2))
    found = []
    for some, z, zeta in zip(place.split(rows), w.flatten(0, 1).split(rows), J.flatten(0, 1).split(rows), strict=True):
        c = training.response(z[..., None], zeta[..., None], wanted)[..., 0]
        found.append(c[some[:, 0], torch.arange(len(some), device=J.device), some[:, 1]])
    return torch.cat(found).reshape(len(steps), J.shape[1])
