"""How much one step of gradient descent differs between batches, at a frozen kernel.

A batch of B out of N samples, drawn without replacement, moves the outputs by -(eta / B) sum_{i in B} H_i e_i, with H_i
the columns of sample i and e_i the gradient of its loss in its outputs. Over all batches the mean is the step of the
whole set, and the covariance

    eta^2 (N - B) / (B (N - 1)) [ (1/N) sum_i v_i v_i^T - mean mean^T ],      v_i = H_i e_i

(sampling without replacement). The outputs of real steps scatter so to first order in eta.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.measure.jacobian.plan import Lambdas
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.kernels.products import NTKOperator
from torch_eft.results.presentation.repr import short_repr


@dataclass(frozen=True, repr=False)
class GradientNoise:
    """The change of the outputs by one step, over batches.

    Args:
        changes: -eta H_i e_i of every sample i of the training set, (N, N', C): a batch's change is their mean.
        batch_size: B.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> noise = measure.GradientNoise(torch.tensor([1.0, 3.0]).view(2, 1, 1), batch_size=1)
        >>> noise.mean.tolist(), noise.covariance.tolist(), noise.change([1]).tolist()
        ([[2.0]], [[1.0]], [[3.0]])
    """

    changes: Tensor
    batch_size: int

    __repr__ = short_repr

    @property
    def mean(self) -> Tensor:
        """The change by the whole set, (N', C)."""
        return self.changes.mean(0)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the change over batches, (N' C, N' C), rows as ``as_matrix`` has them."""
        N, B = len(self.changes), self.batch_size
        if N == B:
            return self.changes.new_zeros(2 * (self.changes[0].numel(),))
        centered = (self.changes - self.mean).flatten(1)
        return (N - B) / (B * (N - 1)) * (centered.mT @ centered) / N

    def change(self, samples: Sequence[int] | Tensor) -> Tensor:
        """Return the change by a known batch, (N', C)."""
        return self.changes[torch.as_tensor(samples, device=self.changes.device)].mean(0)


def gradient_noise(
    model: Model,
    x: Any,
    x_train: Any,
    loss_function: Callable[[Tensor], Tensor],
    batch_size: int,
    learning_rate: float,
    *,
    lambdas: Lambdas = None,
    preconditioner: Optimizer | None = None,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> GradientNoise:
    """Predict mean and covariance of the outputs' change by one step on a batch, at the kernel of now.

    Args:
        model: Any module.
        x: N' inputs whose outputs are looked at; see ``ntk``.
        x_train: The N inputs of the training set.
        loss_function: The mean loss over the training set as a function of its outputs (N, C).
        batch_size: B.
        learning_rate: eta.
        lambdas: See ``ntk``.
        preconditioner: See ``ntk``: P is then taken as frozen, and the fresh part of the step alone is meant.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed, see ``ntk``.

    Returns:
        The changes.

    Raises:
        ValueError: If the batch is larger than the set, or the loss no number.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.eye(2)
        >>> noise = measure.gradient_noise(model, x, x, lambda z: z.sum() / 2, batch_size=1, learning_rate=0.5)
        >>> noise.mean.flatten().tolist(), noise.covariance.tolist()
        ([-0.25, -0.25], [[0.0625, -0.0625], [-0.0625, 0.0625]])
    """
    probe, train = as_probe(x), as_probe(x_train)
    if not 1 <= batch_size <= train.size:
        raise ValueError(f"batch_size: {batch_size} given; the training set has {train.size} samples")
    with isolated(model, output_fn) as network:
        e = _errors(network, train, loss_function)
        H = ntk(network, probe, other=train, lambdas=lambdas, preconditioner=preconditioner, memory=memory)
    return GradientNoise(-learning_rate * torch.einsum("abij,bj->bai", H, e.to(H)), batch_size)


def batch_changes(
    model: Model,
    x: Any,
    x_train: Any,
    loss_function: Callable[[Tensor], Tensor],
    batches: Sequence[Sequence[int]],
    learning_rate: float,
    *,
    lambdas: Lambdas = None,
    output_fn: OutputFn | None = None,
) -> Tensor:
    """Measure the changes of the outputs by one step on each of some batches, without taking them.

    What ``gradient_noise`` predicts, beside it: their scatter is the covariance to first order in eta.

    Args:
        model: See ``gradient_noise``.
        x: Likewise.
        x_train: Likewise.
        loss_function: Likewise.
        batches: Numbers of the samples of each.
        learning_rate: eta.
        lambdas: See ``ntk``.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        (batches, N', C).

    Raises:
        ValueError: If the loss is no number.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.eye(2)
        >>> changes = measure.batch_changes(model, x, x, lambda z: z.sum() / 2, [[0], [1], [0, 1]], learning_rate=0.5)
        >>> changes.shape, round(float(changes[2, 0, 0]), 3)
        (torch.Size([3, 2, 1]), -0.25)
    """
    probe, train = as_probe(x), as_probe(x_train)
    with isolated(model, output_fn) as network:
        e = _errors(network, train, loss_function)
        operator = NTKOperator(network, train, lambdas)
        with torch.no_grad():
            before = checked_output(network, probe)
        changes = []
        for batch in batches:
            own, samples = torch.zeros_like(e), list(batch)
            own[samples] = e[samples] / len(samples)
            step = operator.ntk_vjp(own)
            with torch.no_grad():
                moved = {name: network.params[name] - learning_rate * value for name, value in step.items()}
                changes.append(checked_output(network.at(moved), probe) - before)
    return torch.stack(changes)


def _errors(network: IsolatedModel, train: Probe, loss_function: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of each sample's own loss in its outputs, (N, C)."""
    with torch.no_grad():
        z = checked_output(network, train)
    leaf = z.detach().requires_grad_()
    loss = loss_function(leaf)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError("loss_function: it must return the mean loss of outputs (N, C) as one number")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient * train.size
