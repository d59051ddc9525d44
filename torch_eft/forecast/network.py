"""The forecast of one network's training from its own NTK, dNTK and ddNTK at the start: measured, then integrated.

Order 0 trains with the NTK frozen; order 1 adds the first response to dNTK and ddNTK (``theory.hierarchy``), with an
error of order 1/n^2 where that of order 0 is of order 1/n. The tensors are measured along the directions that order 0
moves in (``theory.path_tensors``), so that time and memory do not grow with powers of the number of training points.

Of this network's tensors, dNTK (of random sign, correlated with the outputs) and ddNTK (of non-zero mean) enter outputs
and NTK at the same order. Cumulants over initializations are not needed: z, H, dH, ddI and ddII of this network are all
that PDLT's update equations take.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_eft.forecast.start import Start
from torch_eft.forecast.validity import check_conflicts, check_stability, gauge_of, kinked_validity, validity_of
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.kernels.dntk import almost_everywhere
from torch_eft.results.trajectory import Trajectory
from torch_eft.theory.hierarchy.contractions import DEFAULT_MEMORY
from torch_eft.theory.hierarchy.evolution import FirstOrder
from torch_eft.theory.training.optimizer import Descent, LossFunction, Reduction, Schedule, descent

Dynamics = Literal["gradient_descent", "gradient_flow"]


def predict_from_network(
    model: nn.Module,
    x_train: Any,
    y_train: Tensor,
    x_probe: Any,
    learning_rate: float,
    steps: int,
    lambdas: Mapping[str, float] | float | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    reduction: Reduction = "mean",
    order: int = 1,
    loss: str | LossFunction = "mse",
    schedule: Schedule | None = None,
    batches: Sequence[Sequence[int] | Tensor] | None = None,
    dynamics: Dynamics = "gradient_descent",
    output_fn: OutputFn | None = None,
    dampening: float = 0.0,
    modes: int | None = None,
    tolerance: float = 1e-4,
    memory: int = DEFAULT_MEMORY,
) -> Trajectory:
    """How the outputs and the NTK of this network will move in training, from its state now, in float64.

    Args:
        model: Any module, as ``measure.ntk`` takes it; in evaluation mode, and left untouched.
        x_train: Training inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        y_train: Targets, (N, C); classes (N,) for the cross-entropy.
        x_probe: Probe inputs, like ``x_train``.
        learning_rate: eta > 0, multiplying ``lambdas``.
        steps: Number T of optimizer steps.
        lambdas: The learning-rate tensor, one number or ``{parameter name: lambda}``; None means 1.
        momentum: Of ``torch.optim.SGD``.
        nesterov: Of ``torch.optim.SGD``.
        reduction: ``"mean"``: torch's ``MSELoss`` or ``CrossEntropyLoss``; ``"sum"``: (1/2) sum (z - y)^2 (PDLT), or
            the sum of cross-entropies.
        order: 0, the NTK frozen; 1, with the response to dNTK and ddNTK.
        loss: ``"mse"``, ``"cross_entropy"``, or a differentiable function of (outputs, targets) to a number.
        schedule: The learning rate of every step in place of ``learning_rate``: a sequence or a function of the step.
        batches: The training samples of every step's minibatch; gone through again if fewer than ``steps``.
        dynamics: ``"gradient_descent"``, or ``"gradient_flow"`` on the whole squared error, in closed form (time t =
            step, in units of the learning rate).
        output_fn: Turns what the model returns into (N, C).
        dampening: Of ``torch.optim.SGD``.
        modes: Directions of the frozen path, in the space of parameters, along which dNTK and ddNTK are measured, at
            most; None for all within ``tolerance``. The cost is about 3/2 of their number squared in Gram matrices.
        tolerance: Directions with less than this share of the path are left out, and such a share of the correction.
        memory: Bytes allowed for the NTK's differentials, and for one Gram matrix with its factors.

    Returns:
        A ``Trajectory`` of this network; its covariance is 0.

    Raises:
        ValueError: If an argument is out of range, the learning rate is beyond the stability bound, training points
            conflict, ``memory`` is too small, or the network cannot be measured.
    """
    if order not in (0, 1):
        raise ValueError(f"order: {order} given; 0 is the frozen NTK, 1 adds dNTK and ddNTK")
    if (modes is not None and modes < 1) or not 0 <= tolerance < 1:
        raise ValueError(f"modes: {modes}, tolerance: {tolerance:g} given; give at least one mode, 0 <= tolerance < 1")
    if dynamics not in ("gradient_descent", "gradient_flow"):
        raise ValueError(f"dynamics: {dynamics!r} given; give 'gradient_descent' or 'gradient_flow'")
    train_probe, probe = as_probe(x_train), as_probe(x_probe)
    optimizer = descent(learning_rate, steps, momentum, dampening, nesterov, schedule, batches, train_probe.size)
    flows = dynamics == "gradient_flow"
    if flows and (loss != "mse" or momentum or schedule is not None or batches is not None):
        raise ValueError(
            "dynamics: 'gradient_flow' is in closed form for the squared error, full batch, without momentum and "
            "schedule; give loss='mse' and none of those, or 'gradient_descent' with a small learning rate"
        )
    everything = Probe(_joined(probe.inputs, train_probe.inputs))
    with isolated(model, output_fn, torch.float64) as network:
        start = Start(network, everything, train_probe, y_train, loss, reduction, lambdas, memory, probe.size)
        check_conflicts(start.loss, start.z, start.H, start.train)
        if not flows:
            check_stability(start.loss, start.z, start.H, start.train, optimizer)
        zs, first, note, kinks = (
            start.flow(learning_rate, steps, order, modes, tolerance)
            if flows
            else start.descend(optimizer, order, modes, tolerance)
        )
    where = f"{dynamics.replace('_', ' ')}, {_described(optimizer, flows)}, loss {start.loss_name}"
    return _trajectory(start, zs, first, f"order {order} of this network's NTK hierarchy{note}; {where}", kinks)


def _joined(first: Any, second: Any) -> Any:
    """Two batches of the same structure as one."""
    (leaves, structure), (others, other_structure) = tree_flatten(first), tree_flatten(second)
    if structure != other_structure or any(
        isinstance(a, Tensor) != isinstance(b, Tensor) or (isinstance(a, Tensor) and a.shape[1:] != b.shape[1:])
        for a, b in zip(leaves, others, strict=True)
    ):
        raise ValueError(
            f"x_probe: {Probe(first).description} given, x_train: {Probe(second).description}; both must be of the "
            "same structure and, but for the number of samples, of the same shapes"
        )
    joined = [
        torch.cat([a, b.to(a.device)]) if isinstance(a, Tensor) else a for a, b in zip(leaves, others, strict=True)
    ]
    return tree_unflatten(joined, structure)


def _described(optimizer: Descent, flows: bool) -> str:
    if flows or optimizer.steps == 0:
        return "full batch"
    rates = optimizer.learning_rates
    eta = f"eta {rates[0]:g}" if min(rates) == max(rates) else f"eta {min(rates):g} to {max(rates):g}"
    batch = "full batch" if optimizer.batches is None else "fixed minibatches"
    name = "Nesterov" if optimizer.nesterov else "momentum"
    return f"{eta}, {name} {optimizer.momentum:g}, {batch}" if optimizer.momentum else f"{eta}, {batch}"


def _trajectory(
    start: Start, zs: Tensor, first: FirstOrder | None, provenance: str, kinks: tuple[str, ...]
) -> Trajectory:
    T, K, C, N = len(zs), start.K, start.C, start.probes
    z, z1 = zs, None if first is None else first.z
    if z1 is not None:
        z = zs + z1

    def by_point(H: Tensor) -> Tensor:
        return H.unflatten(-1, (N, C)).unflatten(-3, (N, C)).transpose(-3, -2)

    H0 = by_point(start.whole_H[:K, :K])
    drift = by_point(first.H) if first is not None else H0.new_zeros(1).expand(T, *H0.shape)
    gauge = None if first is None else gauge_of(zs, first, start.whole_H[:K, :K], start.train)
    validity = validity_of(start.loss, start.z, gauge, start.H, start.train)
    text = almost_everywhere(kinks)
    if first is not None and text is not None:
        validity = kinked_validity(text)
    output_truncation, ntk_truncation = None, None
    if gauge is not None:
        next_order = gauge.g.square()
        moved = (zs - zs[0])[:, :K].square().mean(1).sqrt().max()
        output_truncation = (next_order * moved)[:, None, None].expand(T, N, C)
        ntk_truncation = (next_order * H0.square().mean().sqrt())[:, None, None, None, None].expand(drift.shape)
    return Trajectory(
        steps=torch.arange(T, device=z.device),
        output_mean=z[:, :K].unflatten(1, (N, C)),
        output_covariance=z.new_zeros(1).expand(T, N, N, C, C),
        ntk_mean=(H0 + drift) if first is not None else H0.expand(T, *H0.shape),
        ntk_drift=drift,
        provenance=provenance,
        validity=validity,
        output_truncation=output_truncation,
        ntk_truncation=ntk_truncation,
        train_output_mean=z[:, K:].unflatten(1, (-1, C)),
    )
