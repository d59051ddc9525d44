"""One step of a training, as models beside the network take it: the loss of its batches, recognized by its numbers.

A step may add up the gradients of several batches, whose losses the loop divides by their number or does not, and a
``GradScaler`` may have multiplied losses or gradients by a power of two. All that is known are the losses shown and the
gradients that are there: they are compared with those of the known losses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, log2
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.forward.isolation import IsolatedModel, isolated
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.training_loss import LOSS_TOLERANCE, TrainingLoss, UnrecognizedLossError, known_losses
from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.training import LossFunction

PRECISION, GRADIENT_PRECISION = 0.02, 0.1
"""Relative rounding of the loss and of its gradient that is allowed in 16 bits: bfloat16 rounds at 0.004, layer by
layer; BatchNorm's gradients are differences (0.06 was seen)."""

Batches = Sequence[tuple[Any, Any]]
"""(inputs, targets) of every batch of a step."""

LossOfOutputs = Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class TrainedStep:
    """What a training step minimizes: ``share`` times the sum of the losses of its batches.

    Args:
        loss: The loss of one batch.
        share: 1, or 1 / (number of batches).
        factor: What gradients carry besides: 1, or that of a ``GradScaler``.
        rounding: Relative difference of the step's gradient from that in full precision.

    Example:
        >>> import torch
        >>> from torch_eft.measure.taylor.trained_step import recognize_step
        >>> net, x, y = torch.nn.Linear(2, 3), torch.eye(2), torch.tensor([0, 2])
        >>> value = 1024 * torch.nn.functional.cross_entropy(net(x), y) / 2  # a GradScaler's, and one of two batches
        >>> value.backward()
        >>> value = 1024 * torch.nn.functional.cross_entropy(net(x[:1]), y[:1]) / 2
        >>> value.backward()
        >>> gradients = {name: p.grad for name, p in net.named_parameters()}
        >>> shown = torch.nn.functional.cross_entropy(net(x), y).detach() / 2
        >>> step = recognize_step(net, [(x, y), (x[:1], y[:1])], shown, gradients)
        >>> step.loss.kind, step.share, step.factor
        ('cross_entropy', 0.5, 1024.0)
    """

    loss: TrainingLoss
    share: float
    factor: float
    rounding: float

    __repr__ = short_repr

    def on(self, batches: Batches) -> list[tuple[Any, LossOfOutputs]]:
        """Return inputs and the loss of their outputs for every batch of a step; the step minimizes the sum."""
        share = self.share

        def loss_of(y: Any) -> LossOfOutputs:
            return lambda z: self.loss.function(z, y) if share == 1 else share * self.loss.function(z, y)

        return [(x, loss_of(y)) for x, y in batches]


def recognize_step(
    model: nn.Module,
    batches: Batches,
    shown: Tensor,
    gradients: Mapping[str, Tensor],
    *,
    output_fn: OutputFn | None = None,
    loss_function: LossFunction | None = None,
    known: TrainedStep | None = None,
    reduced: bool = False,
) -> TrainedStep:
    """Recognize the loss of a training step, whose forwards run in the modes in which the network is.

    Args:
        model: The network, before the step.
        batches: Those whose gradients have been added up.
        shown: The loss of the first of them as the loop shows it, 0-d.
        gradients: ``{parameter name: gradient}`` of the step.
        output_fn: Turns what the model returns into (N, C).
        loss_function: The loss as a function of outputs (N, C) and targets, if it is none of the known ones.
        known: An earlier step of the training, where one has been recognized: no other loss is tried.
        reduced: Whether losses and gradients were computed in 16 bits, as under autocast.

    Returns:
        The step.

    Raises:
        UnrecognizedLossError: If losses or gradients differ from all of them.
    """
    possible = (1.0, 1 / len(batches)) if known is None else (1.0, 1 / len(batches), known.share)
    shares = sorted(set(possible), reverse=True)
    step_loss, reasons = float(shown), list[str]()
    tolerance = PRECISION if reduced else LOSS_TOLERANCE
    given = None
    if loss_function is not None:
        given = TrainingLoss("given", "the loss that was given", batches[0][1], 1.0, loss_function)
    with isolated(model, output_fn) as network, network.as_trained():
        leaves = {name: value.clone().requires_grad_() for name, value in network.params.items()}
        first = _outputs(network, leaves, batches[0][0])
        asked = given if known is None else known.loss
        for loss in known_losses(first.detach(), batches[0][1]) if asked is None else [asked]:
            try:
                value = loss.function(first, batches[0][1])
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                reasons.append(f"{loss.name} cannot be computed from these targets: {error}")
                continue
            own = float(value.detach())
            ratios = [step_loss / own / share if own else inf for share in shares]
            fits = next((share for share, r in zip(shares, ratios, strict=True) if abs(r - 1) <= tolerance), None)
            if fits is None and not any(_scaled(ratio, tolerance) for ratio in ratios):
                reasons.insert(0, f"the step's loss is {step_loss:.6g}, {loss.name} on the batch {own:.6g}")
                continue
            G = dict(zip(leaves, _gradients(value, leaves, keep=True), strict=True))
            for inputs, y in batches[1:]:
                z = _outputs(network, leaves, inputs)
                for name, part in zip(leaves, _gradients(loss.function(z, y), leaves), strict=True):
                    G[name] = G[name] + part
            found = _matched(G, gradients, shares, fits, GRADIENT_PRECISION if reduced else LOSS_TOLERANCE)
            if isinstance(found, str):
                # Of several multiples of one loss, that of the step's own value says how far its gradient is.
                reasons.insert(0 if fits is None else len(reasons), found.format(name=loss.name))
                continue
            return TrainedStep(loss, *found)
    other = "" if asked is not None else "neither squared error nor cross-entropy; give loss_function= if it is another"
    raise UnrecognizedLossError("; ".join(part for part in (other, reasons[-1] if reasons else "") if part))


def reduced_precision(model: nn.Module) -> bool:
    """Return whether the gradients that are there were computed in 16 bits, as under autocast.

    Those of weights then are 16-bit numbers: the last 13 bits of their float32 are zero, which rounding in float32
    leaves in one of 8,000. To be asked before a second batch adds its own.

    Args:
        model: The network.
    """
    for p in model.parameters():
        if p.grad is None or p.ndim < 2 or p.numel() < 32:
            continue
        if p.grad.element_size() == 2:
            return True
        if p.grad.dtype == torch.float32:
            bits = p.grad.detach().contiguous().view(torch.int32)
            whole = ((bits & 0x1FFF) == 0) & (bits != 0)
            if int(whole.sum()) >= max(8, 0.99 * int((bits != 0).sum())):
                return True
    return False


def _outputs(network: IsolatedModel, leaves: dict[str, Tensor], inputs: Any) -> Tensor:
    z = network(leaves, network.place(as_probe(inputs)))
    if not isinstance(z, Tensor) or z.ndim != 2 or not z.is_floating_point():
        shape = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise UnrecognizedLossError(f"the network's output on a training batch is {shape}, not (N, C)")
    return z


def _gradients(value: Tensor, leaves: dict[str, Tensor], keep: bool = False) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True, "retain_graph": keep}
    return torch.autograd.grad(value, list(leaves.values()), **options)


def _scaled(ratio: float, tolerance: float) -> float | None:
    """The power of two above 1 that a ratio is, or None."""
    if not (isfinite(ratio) and ratio > 1.5):
        return None
    power: float = 2.0 ** round(log2(ratio))
    return power if abs(ratio / power - 1) <= tolerance else None


def _matched(
    G: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    shares: Sequence[float],
    share: float | None,
    tolerance: float,
) -> tuple[float, float, float] | str:
    """(share, factor, relative difference) with gradients = share * factor * G, or why there are none."""
    missing = [name for name, value in G.items() if name not in gradients and bool(value.any())]
    if missing:
        return f"the step has no gradient for {missing[0]!r}"
    pairs = [(value.double(), gradients[name].to(value).double()) for name, value in G.items() if name in gradients]
    sums = [torch.stack([(a * a).sum(), (a * b).sum(), (b * b).sum()]) for a, b in pairs]
    squares, product, size = torch.stack(sums).sum(0).tolist() if sums else (0.0, 0.0, 0.0)
    if not (squares > 0 and isfinite(size)):
        return "the step's gradient is zero or not finite"
    ratio = product / squares
    # Differences of the whole vectors from share * factor * G, by their products.
    best = inf
    factors = [(each, 1.0) for each in shares]
    if share is not None and (factor := _scaled(ratio / share, tolerance)) is not None:
        factors.append((share, factor))
    for each, factor in factors:
        scale = each * factor
        rest = torch.stack([(b - scale * a).norm() for a, b in pairs]).norm()
        relative = float(rest) / (scale * squares**0.5)
        if relative <= tolerance:
            return each, factor, relative
        best = min(best, relative)
    return (
        f"the step's gradient differs from that of {{name}} on the batch by {best:.2g} (dropout, batch statistics, "
        "augmentation, clipping, another loss term or reduced precision)"
    )
