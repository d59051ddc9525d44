"""The forecast of one network's training from its own measured NTK, dNTK and ddNTK at the start.

Order 0 trains with the NTK frozen; order 1 adds the first response to dNTK and ddNTK (``theory.hierarchy``), with an
error of order 1/n^2 where that of order 0 is of order 1/n. The tensors are measured along the directions in which order
0 moves (``theory.hierarchy.contractions``), so that time and memory do not grow with powers of the number of training
points.

Of this network's tensors, dNTK (of random sign, correlated with the outputs) and ddNTK (of non-zero mean) enter outputs
and NTK at the same order. Cumulants over initializations are not needed: z, H, dH, ddI and ddII of this network are all
that PDLT's update equations take.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_eft.forecast.start import ForecastOrders, StartingDerivatives
from torch_eft.forecast.validity import (
    check_conflicts,
    check_stability,
    expansion_parameter,
    validity_at_order_0,
    validity_at_order_1,
    validity_with_kinks,
)
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.kernels.dntk import almost_everywhere
from torch_eft.results.training import Training, as_training
from torch_eft.results.trajectory import Trajectory
from torch_eft.theory.hierarchy.contractions import DEFAULT_MEMORY


def predict_from_network(
    model: nn.Module,
    x_train: Any,
    y_train: Tensor,
    x_probe: Any,
    training: Training | None = None,
    *,
    learning_rate: float | None = None,
    steps: float | None = None,
    order: int = 1,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
    num_modes: int | None = None,
    tolerance: float = 1e-4,
    memory: int = DEFAULT_MEMORY,
    **keywords: Any,
) -> Trajectory:
    """Predict how the outputs and the NTK of this network will move in training, from its present state, in float64.

    Args:
        model: Any module accepted by ``measure.ntk``; evaluated in evaluation mode, and left untouched.
        x_train: Training inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        y_train: Targets, (N, C); classes (N,) for the cross-entropy.
        x_probe: Probe inputs, like ``x_train``.
        training: The training; None builds it from the keywords.
        learning_rate: eta > 0, multiplying ``lambdas``.
        steps: Number T of optimizer steps.
        order: 0, the NTK frozen; 1, with the response to dNTK and ddNTK.
        lambdas: The learning-rate tensor, see ``measure.ntk``.
        output_fn: Converts the model's return value to (N, C).
        num_modes: Largest number of directions of the frozen path, in the space of parameters, along which dNTK and
            ddNTK are measured; None for all within ``tolerance``. The cost is about 3/2 of their number squared in Gram
            matrices.
        tolerance: Directions with less than this share of the path are left out, with such a share of the correction.
        memory: Bytes allowed for the NTK's differentials, and for one Gram matrix with its factors.
        **keywords: Further fields of a ``torch_eft.Training``: ``loss``, ``reduction``, ``momentum``, ``schedule``,
            ``batches``, ``dynamics``, ...

    Returns:
        A ``Trajectory`` of this network; its covariance is 0.

    Raises:
        ValueError: If an argument is out of range, the learning rate is beyond the stability bound, training points
            conflict, ``memory`` is too small, or the network cannot be measured.

    Example:
        >>> import torch
        >>> import torch_eft as eft
        >>> model, x, y = torch.nn.Linear(3, 2), torch.eye(3), torch.ones(3, 2)
        >>> forecast = eft.predict_from_network(model, x, y, x[:2], learning_rate=0.1, steps=5)
        >>> forecast.output_mean.shape, forecast.ntk_mean.shape
        (torch.Size([6, 2, 2]), torch.Size([6, 2, 2, 2, 2]))
        >>> bool(forecast.ntk_change.any())  # a linear network has a frozen NTK
        False
    """
    if order not in (0, 1):
        raise ValueError(f"order: {order} given; 0 is the frozen NTK, 1 adds dNTK and ddNTK")
    if (num_modes is not None and num_modes < 1) or not 0 <= tolerance < 1:
        raise ValueError(
            f"num_modes: {num_modes}, tolerance: {tolerance:g} given; give at least one mode, 0 <= tolerance < 1"
        )
    training = as_training(training, learning_rate=learning_rate, steps=steps, **keywords)
    if training.steps == float("inf") or training.steps != int(training.steps):
        raise ValueError(f"steps: {training.steps:g} given; give a whole number")
    train, probe = as_probe(x_train), as_probe(x_probe)
    everything = Probe(joined_inputs(probe.inputs, train.inputs))
    with isolated(model, output_fn, torch.float64) as network:
        start = StartingDerivatives(network, everything, train, y_train, training, lambdas, memory)
        check_conflicts(start)
        check_stability(start, training)
        orders = start.forecast(order, num_modes, tolerance)
    note = ""
    if orders.first is not None:
        rest = f", {orders.left_out:.1g} of the path left out" if orders.left_out > 0 else ""
        note = f" (dNTK and ddNTK along {orders.directions} directions of the path{rest})"
    return _trajectory(start, orders, f"order {order} of this network's NTK hierarchy{note}; {training}")


def joined_inputs(first: Any, second: Any) -> Any:
    """Join two batches of the same structure.

    Args:
        first: Those of the probe.
        second: Those of the training.

    Returns:
        One batch, the first in front.

    Raises:
        ValueError: If structures or shapes differ.
    """
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


def _trajectory(start: StartingDerivatives, orders: ForecastOrders, provenance: str) -> Trajectory:
    z0, first = orders.z0, orders.first
    T, K, C, N = len(z0), start.K, start.C, start.K // start.C

    def by_point(H: Tensor) -> Tensor:
        return H.unflatten(-1, (N, C)).unflatten(-3, (N, C)).transpose(-3, -2)

    z, H_0, drift = z0, by_point(start.whole_H[:K, :K]), None
    output_truncation, ntk_truncation = None, None
    validity = validity_at_order_0()
    if first is not None:
        z, drift = z0 + first.z, by_point(first.H)
        parameter = expansion_parameter(z0, first, start)
        kinks = almost_everywhere(orders.kinks)
        validity = validity_at_order_1(start, parameter) if kinks is None else validity_with_kinks(kinks)
        next_order = parameter.largest.square()
        moved = (z0 - z0[0])[:, :K].square().mean(1).sqrt().max()
        output_truncation = (next_order * moved)[:, None, None].expand(T, N, C)
        ntk_truncation = (next_order * H_0.square().mean().sqrt())[:, None, None, None, None].expand(drift.shape)
    return Trajectory(
        steps=torch.arange(T, device=z.device),
        output_mean=z[:, :K].unflatten(1, (N, C)),
        output_covariance=z.new_zeros(1).expand(T, N, N, C, C),
        ntk_mean=H_0.expand(T, *H_0.shape) if drift is None else H_0 + drift,
        ntk_change=H_0.new_zeros(1).expand(T, *H_0.shape) if drift is None else drift,
        provenance=provenance,
        validity=validity,
        output_truncation=output_truncation,
        ntk_truncation=ntk_truncation,
        train_output_mean=z[:, K:].unflatten(1, (-1, C)),
    )
