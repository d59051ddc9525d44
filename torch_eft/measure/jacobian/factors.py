"""Jacobians of a network sample by sample: as factors where its layers are recognized, as such elsewhere."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.jacobian.capture import Capture, LayerCall, unrecognized
from torch_eft.measure.jacobian.fallback import along, fallback_factors
from torch_eft.measure.jacobian.gram import Factor, PerOutput
from torch_eft.measure.jacobian.layers import Axis, factors, formed_as_it_comes
from torch_eft.measure.jacobian.plan import ChangedUseError, JacobianPlan, sample_count
from torch_eft.measure.jets.jet import coefficients_of

_SMALL = 2**19  # numbers in all calls' outputs


def jacobian_factors(
    network: IsolatedModel,
    inputs: Any,
    trainable: Sequence[str],
    plan: JacobianPlan,
    direction: Mapping[str, Tensor] | None = None,
    order: int = 0,
) -> list[Factor]:
    """Return the Jacobian's Taylor coefficients J_0 .. J_order as factors that cover every parameter.

    Args:
        network: The network.
        inputs: Some samples, where the network is.
        trainable: Names of the parameters.
        plan: Which of them have factors, and which fall back.
        direction: What J is differentiated along; needed above order 0.
        order: Of the last coefficient.

    Returns:
        The factors of some number of parameters each.

    Raises:
        ChangedUseError: If the network does something else with its parameters than when the plan was made.
    """
    result: list[Factor] = []
    samples = sample_count(inputs)
    recognized = [name for name in trainable if name not in plan.fallback]
    if recognized:
        leaves = {name: network.params[name].detach().requires_grad_() for name in trainable}
        params = dict(network.params) | (leaves if direction is None else along(leaves, direction, order))
        with Capture({name: params[name] for name in trainable}, plan.fallback) as capture:
            outputs = network(params, inputs)
        if outputs.shape[1] != plan.outputs:
            raise ChangedUseError({recognized[0]: "as the number of outputs changes"})
        plan.check(capture.calls, unrecognized(outputs, leaves) - set(plan.fallback), samples)
        if plan.calls:
            result = _factors(outputs, capture.calls, plan.axes, samples, order)
    missing = [name for name in plan.fallback if name in trainable]
    if missing:
        result += fallback_factors(network, inputs, missing, trainable, direction, order, plan.looped)
    return result


def _factors(
    outputs: Tensor, calls: Sequence[LayerCall], axes: Sequence[Axis], samples: int, order: int
) -> list[Factor]:
    """Compute the factors from g_p = d z_order / d o_{order - p} of every call's output.

    Small layers take all outputs of the network at once. Large ones take them one after the other: kernels are large
    enough, operations without a batching rule would be looped over and their results copied, and the Jacobian of a
    layer with many places can take the place of its gradients.

    Returns:
        The factors of all calls.
    """
    last = coefficients_of(outputs, order)[order]
    channels = outputs.shape[1]
    edges = [call.edges[order - p] for call in calls for p in range(order + 1)]
    shapes = [call.shape for call in calls for _ in range(order + 1)]
    if last is None or not last.requires_grad:
        zeros = [torch.zeros(shape, dtype=outputs.dtype, device=outputs.device) for shape in shapes]
        return factors(calls, _by_call([(zero,) * channels for zero in zeros], order), axes, samples)
    if channels > 1 and sum(shape.numel() for shape in shapes) <= _SMALL:
        parts = _all_at_once(last, edges, shapes)
        if parts is not None:
            return factors(calls, _by_call(parts, order), axes, samples)
    uses = Counter(name for call in calls for name in call.names)
    formed = {}
    for index, (call, axis) in enumerate(zip(calls, axes, strict=True)):
        if all(uses[name] == 1 for name in call.names):
            layer = formed_as_it_comes(call, axis, samples, channels)
            if layer is not None:
                formed[index] = layer
    kept = [index for index in range(len(calls)) if index not in formed]
    rows: list[list[Tensor]] = []
    for i in range(channels):
        gradients = torch.autograd.grad(last[:, i].sum(), edges, retain_graph=i < channels - 1, allow_unused=True)
        given = [last.new_zeros(shape) if g is None else g for g, shape in zip(gradients, shapes, strict=True)]
        for index, layer in formed.items():
            layer.add(given[index * (order + 1) : (index + 1) * (order + 1)])
        rows.append([given[index * (order + 1) + p] for index in kept for p in range(order + 1)])
        del gradients, given
    kept_gradients = _by_call([tuple(parts) for parts in zip(*rows, strict=True)], order)
    others = factors([calls[index] for index in kept], kept_gradients, [axes[index] for index in kept], samples)
    return [factor for layer in formed.values() for factor in layer.factors()] + others


def _by_call(parts: Sequence[PerOutput], order: int) -> list[tuple[PerOutput, ...]]:
    return [tuple(parts[start : start + order + 1]) for start in range(0, len(parts), order + 1)]


def _all_at_once(last: Tensor, edges: Sequence[Any], shapes: Sequence[torch.Size]) -> list[PerOutput] | None:
    """Differentiate sum_a last_{a;i} for every output i in one backward pass; None where that is not possible."""
    channels = last.shape[1]
    unit = torch.eye(channels, dtype=last.dtype, device=last.device)[:, None].expand(-1, len(last), -1)
    try:
        gradients = torch.autograd.grad(last, edges, unit, is_grads_batched=True, allow_unused=True, retain_graph=True)
    except RuntimeError:  # an operation that cannot be batched
        return None
    return [
        (last.new_zeros(shape),) * channels if g is None else g.unbind(0)
        for g, shape in zip(gradients, shapes, strict=True)
    ]
