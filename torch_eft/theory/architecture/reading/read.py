"""Reads an architecture off a module by tracing its forward into tensor operations.

The forward runs once on tensors without values, so that nothing of the module changes and no random number is drawn.
Parameters are matched by identity; what is computed from the inputs alone, in front of the first layer, is data. In the
end the module runs on random inputs, and its outputs and gradients are compared with those of what was read.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.architecture.reading.arguments import USE_SEEDS
from torch_eft.theory.architecture.reading.checking import disagreement
from torch_eft.theory.architecture.reading.graph import Graph, NotReadableError
from torch_eft.theory.architecture.reading.operations import read_operation


def read_architecture(module: Any, x: Tensor, *, lambdas: Mapping[str, float] | None = None) -> Architecture:
    """Read the architecture of a freshly initialized module, with the law of its weights.

    Dense layers, convolutions, elementwise activations, pooling by average, sums (skips), LayerNorm, RMSNorm,
    GroupNorm and BatchNorm in evaluation mode are read, in any order; the last layer must be a Linear. All else is
    refused by name.

    Args:
        module: An ``nn.Module``; its weights are taken for draws of their initialization.
        x: Inputs that it takes, (N, ...); only their shape matters.
        lambdas: ``{parameter name: lambda}``, relative learning rates, as ``measure.ntk`` takes them; None is 1 for
            every parameter that requires a gradient.

    Returns:
        The architecture.

    Raises:
        NotReadableError: If something is not covered; the message names it and says what to do instead.
        TypeError: If the first argument is no module.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> layers = torch.nn.Conv1d(1, 8, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(48, 2)
        >>> theory.read_architecture(torch.nn.Sequential(*layers), torch.zeros(1, 1, 8))
        Architecture(2 weights, 1 population: 0 (8 neurons); 2 outputs)
    """
    module = getattr(module, "_orig_mod", module)  # compiled
    if not callable(module) or not hasattr(module, "named_parameters"):
        raise TypeError(f"module: {type(module).__name__} given; give a torch.nn.Module, then its inputs")
    if not isinstance(x, Tensor) or x.ndim < 2 or len(x) == 0:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise NotReadableError(f"x: {given} given; give one tensor of inputs, (N, ...)")
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    dtype = next((p.dtype for p in parameters.values() if p.is_floating_point()), x.dtype)
    inputs = torch.empty(2, *x.shape[1:], dtype=dtype if x.is_floating_point() else x.dtype, device="cpu")

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(module, {**parameters, **buffers}, (x,))

    placed = [
        {name: each.detach().cpu().requires_grad_(each.requires_grad) for name, each in held.items()}
        for held in (parameters, buffers)
    ]
    try:
        with torch.no_grad():
            traced = make_fx(forward, tracing_mode="fake", pre_dispatch=True)(*placed, inputs)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotReadableError(
            f"the forward cannot be traced ({first}); its path must not depend on values, and it must take x alone"
        ) from error
    graph = Graph(traced, parameters, placed[1], lambdas)
    for node in traced.graph.nodes:
        if node.op == "call_function":
            graph.read(node, read_operation)
        elif node.op == "get_attr":
            graph.constant(node)
        elif node.op == "output":
            found = graph.finished(node)
            difference = disagreement(module, found, graph.held, placed[0], placed[1], x)
            if difference is None:
                return found
            raise NotReadableError(f"the forward is not what it was read as: {difference}; {USE_SEEDS}")
    raise NotReadableError("the forward returns nothing")
