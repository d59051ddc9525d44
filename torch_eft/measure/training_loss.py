"""Recognition of the loss that a training step minimizes, by its numbers: squared error, cross-entropy, or a given one.

A training step can hide anything. Its loss value and its gradient on the first batch cannot:
they are compared with those of ``c sum (z - y)^2`` for the usual constants c, and of cross-entropy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_eft.measure.forward.isolation import Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.training import LossFunction

LOSS_TOLERANCE = 1e-4
"""Relative agreement asked of the loss value and the gradient; float32 sums agree to 1e-6."""


_REDUCTIONS = (("mean", "mean over samples (torch's CrossEntropyLoss)"), ("sum", "sum over samples"))


@dataclass(frozen=True, repr=False)
class SquaredError:
    """The loss L = c sum_{a,i} (z_{i;a} - y_{i;a})^2.

    Args:
        c: Its constant.
        name: Its description, e.g. ``"mean over samples and outputs (torch's MSELoss)"``.
        targets: y, (N, C).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> measure.SquaredError(0.5, "half the sum (PDLT)", torch.zeros(3, 2)).rate_factor
        1.0
    """

    c: float
    name: str
    targets: Tensor

    __repr__ = short_repr

    @property
    def rate_factor(self) -> float:
        """Return what multiplies the learning rate to get PDLT's (1/2) sum (z - y)^2."""
        return 2 * self.c

    @property
    def function(self) -> LossFunction:
        """Return the loss as a function of outputs (N, C) and targets, in any order of the samples."""
        return _squared_error(self.c, self.targets)


@dataclass(frozen=True, repr=False)
class TrainingLoss:
    """The loss of a training step as a function of outputs (N, C) and targets.

    Args:
        kind: ``"mse"``, ``"cross_entropy"`` or ``"given"``.
        name: Its description.
        targets: As the loss takes them: (N, C), or (N,) classes; for a given function as they came.
        factor: The loss is ``factor`` times the sum (1/2) sum (z - y)^2, or the sum of cross-entropies; 1 if given.
        function: The loss itself, of outputs and targets of any number of samples: means stay means.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net, x, y = torch.nn.Linear(2, 3), torch.eye(2), torch.tensor([0, 2])
        >>> value = torch.nn.functional.cross_entropy(net(x), y)
        >>> value.backward()
        >>> gradients = {name: p.grad for name, p in net.named_parameters()}
        >>> measure.recognize_loss(net, x, y, value.detach(), gradients).kind
        'cross_entropy'
    """

    kind: Literal["mse", "cross_entropy", "given"]
    name: str
    targets: Tensor
    factor: float
    function: LossFunction

    __repr__ = short_repr


class UnrecognizedLossError(ValueError):
    """The loss of the training step is none of those that are known; the message says how this was seen.

    Example:
        >>> from torch_eft import measure
        >>> issubclass(measure.UnrecognizedLossError, ValueError)
        True
    """


def recognize_squared_error(
    model: Model,
    x: Any,
    y: Any,
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    *,
    output_fn: OutputFn | None = None,
) -> SquaredError:
    """Recognize squared error from the value and the gradient of a training step's loss on one batch.

    ``UnrecognizedLossError`` says in which of them the step differs from squared error on (x, y).

    Args:
        model: The network, before the step.
        x: The batch's inputs.
        y: The batch's targets: (N, C), (N,) for C = 1, or class numbers (N,), taken as one-hot.
        loss: The loss of the step, 0-d.
        gradients: ``{parameter name: gradient}`` of the step.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        The loss, with its constant.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net, x, y = torch.nn.Linear(2, 1), torch.eye(2), torch.ones(2, 1)
        >>> value = torch.nn.functional.mse_loss(net(x), y)
        >>> value.backward()
        >>> gradients = {name: p.grad for name, p in net.named_parameters()}
        >>> measure.recognize_squared_error(net, x, y, value.detach(), gradients).c
        0.5
    """
    return _squared_error_of(_Run(model, x, output_fn), y, loss, gradients)


def recognize_loss(
    model: Model,
    x: Any,
    y: Any,
    loss: Tensor,
    gradients: Mapping[str, Tensor],
    *,
    output_fn: OutputFn | None = None,
    loss_function: LossFunction | None = None,
) -> TrainingLoss:
    """Recognize the loss of a training step from its value and its gradient on one batch.

    Args:
        model: The network, before the step.
        x: The batch's inputs.
        y: The batch's targets, as for ``recognize_squared_error``, or class numbers or probabilities.
        loss: The loss of the step, 0-d.
        gradients: ``{parameter name: gradient}`` of the step.
        output_fn: Turns what the model returns into (N, C).
        loss_function: The loss as a function of outputs (N, C) and ``y``, if it is known: it is checked all the same.

    Returns:
        The loss as a function.

    Raises:
        UnrecognizedLossError: If value or gradient differ from all of them.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net, x, y = torch.nn.Linear(2, 1), torch.eye(2), torch.ones(2, 1)
        >>> value = (net(x) - y).square().sum()
        >>> value.backward()
        >>> gradients = {name: p.grad for name, p in net.named_parameters()}
        >>> measure.recognize_loss(net, x, y, value.detach(), gradients).name
        'sum over samples and outputs'
    """
    run = _Run(model, x, output_fn)
    if loss_function is not None:
        _verify(run, y, loss, gradients, loss_function, "the loss that was given")
        return TrainingLoss("given", "the loss that was given", y, 1.0, loss_function)
    try:
        squared = _squared_error_of(run, y, loss, gradients)
    except UnrecognizedLossError as error:
        reason = error
    else:
        function = _squared_error(squared.c, squared.targets)
        return TrainingLoss("mse", squared.name, squared.targets, 2 * squared.c, function)
    for reduction, name in _REDUCTIONS:
        function = _cross_entropy(reduction)
        try:
            _verify(run, y, loss, gradients, function, "the cross-entropy")
        except UnrecognizedLossError:
            continue
        factor = 1 / len(y) if reduction == "mean" else 1.0
        return TrainingLoss("cross_entropy", f"cross-entropy, {name}", y, factor, function)
    raise UnrecognizedLossError(
        f"neither squared error ({reason}) nor cross-entropy; give loss_function= if it is another one"
    )


def loss_gradient(
    model: Model, x: Any, y: Any, function: LossFunction, output_fn: OutputFn | None = None
) -> dict[str, Tensor]:
    """Return the gradient of a loss on one batch, without a trace in the model.

    Args:
        model: The network.
        x: The batch's inputs.
        y: The batch's targets.
        function: The loss, of outputs (N, C) and targets.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        ``{parameter name: gradient}``.
    """
    with _Run(model, x, output_fn).outputs() as (leaves, z):
        own = torch.autograd.grad(function(z, y), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, own, strict=True))


@dataclass(frozen=True)
class _Run:
    """A forward of a network on a batch.

    Args:
        model: The network.
        x: The inputs.
        output_fn: Turns what the model returns into (N, C).
    """

    model: Model
    x: Any
    output_fn: OutputFn | None

    @contextmanager
    def outputs(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the parameters as leaves and the outputs (N, C) as a function of them."""
        probe = as_probe(self.x)
        with isolated(self.model, self.output_fn) as network:
            leaves = {name: value.clone().requires_grad_() for name, value in network.params.items()}
            with torch.no_grad():
                checked_output(network, probe)
            yield leaves, network(leaves, network.place(probe))


def _squared_error_of(run: _Run, y: Any, loss: Tensor, gradients: Mapping[str, Tensor]) -> SquaredError:
    with run.outputs() as (leaves, z):
        targets = _as_targets(y, z)
        total = (z - targets).square().sum()
        c, name = _matching_constant(total.detach(), loss.detach().to(total), len(z), z.shape[1])
        _check_gradients(leaves, c * total, gradients, "squared error")
    return SquaredError(c, name, targets.detach())


def _verify(
    run: _Run, y: Any, loss: Tensor, gradients: Mapping[str, Tensor], function: LossFunction, name: str
) -> None:
    with run.outputs() as (leaves, z):
        try:
            value = function(z, y)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UnrecognizedLossError(f"{name} cannot be computed from these targets: {error}") from None
        own, given = float(value.detach()), float(loss)
        if not abs(own - given) <= LOSS_TOLERANCE * abs(own):
            raise UnrecognizedLossError(f"the step's loss is {given:.6g}, {name} on the batch {own:.6g}")
        _check_gradients(leaves, value, gradients, name)


def _check_gradients(leaves: Mapping[str, Tensor], value: Tensor, gradients: Mapping[str, Tensor], name: str) -> None:
    """Compare the gradients of a step with those of the loss ``value``, called ``name``."""
    own = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    mine = dict(zip(leaves, own, strict=True))
    missing = [key for key in mine if key not in gradients and bool(mine[key].any())]
    if missing:
        raise UnrecognizedLossError(f"the step has no gradient for {missing[0]!r}")
    differences = [(gradients[key].to(g) - g).norm() for key, g in mine.items() if key in gradients]
    relative = float(torch.stack(differences).norm() / torch.stack([g.norm() for g in mine.values()]).norm())
    if not relative <= LOSS_TOLERANCE:
        raise UnrecognizedLossError(
            f"the step's gradient differs from that of {name} on the batch by {relative:.2g} (dropout, batch "
            "statistics, augmentation, another loss term or reduced precision)"
        )


def _as_targets(y: Any, z: Tensor) -> Tensor:
    if isinstance(y, Tensor):
        if y.shape == z.shape:
            return y.to(z)
        if y.shape == z.shape[:1]:
            if y.is_floating_point() and z.shape[1] == 1:
                return y[:, None].to(z)
            if not y.is_floating_point() and y.min() >= 0 and y.max() < z.shape[1]:
                return F.one_hot(y.long(), z.shape[1]).to(z)
    given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
    raise UnrecognizedLossError(f"targets {given} cannot be laid beside outputs of shape {tuple(z.shape)}")


def _constants(count: int, channels: int) -> list[tuple[float, str]]:
    return [
        (1 / (count * channels), "mean over samples and outputs (torch's MSELoss)"),
        (1 / 2, "half the sum (PDLT)"),
        (1.0, "sum over samples and outputs"),
        (1 / (2 * count), "half the sum over outputs, mean over samples"),
        (1 / count, "sum over outputs, mean over samples"),
        (1 / (2 * count * channels), "half the mean over samples and outputs"),
    ]


def _matching_constant(total: Tensor, loss: Tensor, count: int, channels: int) -> tuple[float, str]:
    value = float(loss)
    for c, name in _constants(count, channels):
        if abs(value - c * float(total)) <= LOSS_TOLERANCE * c * float(total):
            return c, name
    raise UnrecognizedLossError(
        f"the step's loss, {value:.6g}, is no usual multiple of the squared error on the batch, {float(total):.6g}"
    )


def known_losses(z: Tensor, y: Any) -> Iterator[TrainingLoss]:
    """Yield the losses that may be meant by outputs (N, C) and these targets: squared errors, then cross-entropies.

    Args:
        z: The outputs.
        y: The targets.

    Yields:
        The losses.
    """
    try:
        targets = _as_targets(y, z)
    except UnrecognizedLossError:
        pass
    else:
        for c, name in _constants(*z.shape):
            yield TrainingLoss("mse", name, targets, 2 * c, _squared_error(c, targets))
    if isinstance(y, Tensor):
        for reduction, name in _REDUCTIONS:
            factor = 1 / len(y) if reduction == "mean" else 1.0
            yield TrainingLoss("cross_entropy", f"cross-entropy, {name}", y, factor, _cross_entropy(reduction))


def _cross_entropy(reduction: str) -> LossFunction:
    def function(z: Tensor, y: Tensor) -> Tensor:
        targets = y.to(z.dtype) if y.is_floating_point() else y.long()
        return F.cross_entropy(z, targets.to(z.device), reduction=reduction)

    return function


def _squared_error(c: float, targets: Tensor) -> LossFunction:
    """Keep the mean's share of a batch: 1/(N C), 1/N and 1/(2 N) .. go with the batch's own N."""
    N, C = targets.shape
    mean = min((1 / (N * C), 1 / (2 * N), 1 / N, 1 / (2 * N * C)), key=lambda value: abs(value - c))
    per_sample = c * N if abs(mean - c) <= LOSS_TOLERANCE * c and N > 1 else None

    def function(z: Tensor, y: Tensor) -> Tensor:
        if y.shape != z.shape:
            y = F.one_hot(y.long(), z.shape[1]) if not y.is_floating_point() else y[:, None]
        total = (z - y.to(z)).square().sum()
        return total * (c if per_sample is None else per_sample / len(z))

    return function


def batch_fingerprint(x: Tensor, y: Tensor) -> Tensor:
    """Return three numbers that depend on which samples there are, but not on their order."""

    def project(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(len(tensor), -1).double()
        return flat @ torch.cos(torch.arange(1, flat.shape[1] + 1, dtype=torch.float64, device=flat.device))

    first, second = project(x), project(y)
    return torch.stack([first.square().mean(), second.square().mean(), (first * second).mean()])


def same_batch(fingerprint: Tensor, reference: Tensor) -> Tensor:
    """Return whether two fingerprints are of one set of samples, up to the rounding of reordered sums; 0-d."""
    return ((fingerprint - reference).abs() <= 1e-9 * reference[:2].max()).all()
