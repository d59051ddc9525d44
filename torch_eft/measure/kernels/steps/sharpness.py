"""The largest eigenvalue of the preconditioned curvature, beside the bound up to which an optimizer is stable.

The curvature is that of Gauss and Newton, J^T L'' J, with L'' the second derivative of the loss in the outputs;
preconditioned it is P^{1/2} J^T L'' J P^{1/2}, whose eigenvalues but for zeros are those of L''^{1/2} H_P L''^{1/2}.
Full-batch training sits near the bound for much of its time, SGD and Adam alike (Cohen et al. 2021, arXiv:2103.00065;
2022, arXiv:2207.14484), so that a ratio of 1 is no fault; far above it the next steps grow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_eft.measure.forward.isolation import Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.measure.kernels.metrics import as_matrix
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.kernels.preconditioner import stability_bound
from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.trajectory import Validity


@dataclass(frozen=True, repr=False)
class Sharpness:
    """The sharpness that an optimizer sees.

    Args:
        eigenvalue: The largest eigenvalue, in units in which the learning rate is eta.
        bound: That above which a quadratic loss is not descended.
        validity: For which samples, and what it is worth.

    Example:
        >>> from torch_eft import Validity, measure
        >>> measure.Sharpness(30.0, 38.0, Validity("caution", "of 16 samples")).ratio
        0.7894736842105263
    """

    eigenvalue: float
    bound: float
    validity: Validity

    __repr__ = short_repr

    @property
    def ratio(self) -> float:
        """The eigenvalue over the bound: above 1 the direction grows, as long as curvature and P stay as they are."""
        return self.eigenvalue / self.bound


def sharpness(
    model: Model,
    x: Any,
    loss_function: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    *,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Sharpness:
    """Measure the largest eigenvalue of the preconditioned Gauss-Newton curvature on some samples.

    Args:
        model: Any module.
        x: See ``ntk``; N samples with C outputs take matrices of N C rows.
        loss_function: The loss as a function of outputs (N, C), e.g. ``lambda z: F.cross_entropy(z, y)``.
        optimizer: The one that trains the model; see ``preconditioner``.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed, see ``ntk``.

    Returns:
        The eigenvalue, the bound and what they are worth.

    Raises:
        ValueError: If the preconditioner or the bound of the optimizer is not known, or the loss is no number.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net, x = torch.nn.Linear(2, 1, bias=False), torch.eye(2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        >>> found = measure.sharpness(net, x, lambda z: 0.5 * z.square().sum(), optimizer)
        >>> found.eigenvalue, found.bound
        (1.0, 4.0)
    """
    bound = stability_bound(optimizer)
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        with torch.no_grad():
            z = checked_output(network, probe)
        H = as_matrix(ntk(network, probe, preconditioner=optimizer, memory=memory)).double()
        second = _second_derivative(loss_function, z).double()
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    eigenvalue = float(torch.linalg.eigvalsh(root @ H @ root)[-1])
    reasons = [f"Gauss-Newton curvature of these {len(z)} samples: that of a batch or of all data is another one"]
    if bool((values < -1e-6 * values.abs().max()).any()):
        reasons.append("the loss is not convex in the outputs: its negative curvature is left out")
    return Sharpness(eigenvalue, bound, Validity("caution", tuple(reasons)))


def _second_derivative(loss_function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """L'' in the outputs, (N C, N C) in the order of ``as_matrix``."""
    leaf = z.detach().requires_grad_()
    loss = loss_function(leaf)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError("loss_function: it must return the loss of outputs (N, C) as one number")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    if not gradient.requires_grad:  # a loss that is linear in the outputs
        return torch.zeros(leaf.numel(), leaf.numel(), dtype=leaf.dtype, device=leaf.device)
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0].flatten() for value in gradient.flatten()]
    return torch.stack(rows)
