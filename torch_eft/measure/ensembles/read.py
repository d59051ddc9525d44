"""Reads the ensemble off an MLP: its activation, C_b, C_W and lambda.

Names and classes are not trusted: the network is run once, and it is an MLP only if the input of every linear layer is
the activation of the layer before, to rounding.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.measure.ensembles.learning_rates import read_learning_rates
from torch_eft.measure.ensembles.weights import remarks
from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.architecture.reading.graph import NotReadableError
from torch_eft.theory.architecture.reading.read import read_architecture
from torch_eft.theory.architecture.reading.weight_laws import WeightStatistics, weight_statistics
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import (
    Activation,
    ActivationLike,
    available_activations,
    get_activation,
    leaky_relu,
)
from torch_eft.theory.gaussian.laws import LAWS, Law

_ENLARGEMENTS = 3


class NotAnMLPError(ValueError):
    """The network is not a multilayer perceptron of the kind that the theory covers; the message gives the reason.

    Example:
        >>> from torch import nn
        >>> from torch_eft import measure
        >>> try:
        ...     measure.read_ensemble(nn.Conv1d(1, 1, 1))
        ... except measure.NotAnMLPError as error:
        ...     print(error)
        not an MLP: Conv1d has no nn.Linear
    """


def read_ensemble(
    model: Model,
    x: Any = None,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    activation: ActivationLike | None = None,
    output_fn: OutputFn | None = None,
) -> MLPEnsemble:
    """Read the ensemble off a freshly initialized MLP and its optimizer.

    C_b = mean(b^2) and C_W = n_in mean(W^2) are estimated from the weights as they are: for a trained or pretrained
    network they do not describe its initialization.

    Raises ``NotAnMLPError`` if the network is not such an MLP, with the reason. Raises ``ValueError`` if the forward
    rejects ``x``.

    Args:
        model: A network whose forward is linear layers with one elementwise activation between them.
        x: Inputs of the forward; None draws a few standard normal ones.
        optimizer: Gives lambda (a parameter group's learning rate relative to the first group's); None means 1.
        activation: The activation, where it is none of the registered ones.
        output_fn: Turns what the model returns into (N, C).

    Returns:
        The ensemble, with the laws of weights and biases where they are recognized, the standard errors of C_b and
        C_W as ``errors`` and, as ``remarks``, what weights and biases that are not Gaussian change in the theory.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_eft import measure
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10))
        >>> ensemble = measure.read_ensemble(model)
        >>> print(ensemble)
        MLP 64-256-10, tanh
        >>> [round(C_W, 1) for C_W in ensemble.C_W]  # nn.Linear draws its weights uniformly with C_W = 1/3
        [0.3, 0.3]
        >>> len(ensemble.errors["C_W"])
        2
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    with isolated(model, output_fn) as network:
        layers = _linear_layers(network)
        if x is None:
            first = next(iter(layers.values()))
            generator = torch.Generator(device="cpu").manual_seed(0)
            x = torch.randn(8, first.in_features, generator=generator, device="cpu")
        mlp = _verified_mlp(network, as_probe(x), layers, activation)
    rates = read_learning_rates(network.origin, optimizers).lambdas if optimizers else None
    linear = list(mlp.layers.values())
    weights = [_weight_statistics(name, layer) for name, layer in mlp.layers.items()]
    biases = [None if layer.bias is None else weight_statistics(layer.bias) for layer in linear]
    told_weights, told_biases = _as_torch_draws(linear, weights, biases)
    return MLPEnsemble(
        widths=[linear[0].in_features, *(layer.out_features for layer in linear)],
        activation=mlp.activation,
        C_b=[bias.variance for bias in told_biases],
        C_W=[layer.in_features * weight.variance for layer, weight in zip(linear, told_weights, strict=True)],
        lambda_b=[
            0.0 if layer.bias is None else _lambda(rates, name, "bias", layer.bias)
            for name, layer in mlp.layers.items()
        ],
        lambda_W=[
            _lambda(rates, name, "weight", layer.weight) * layer.in_features for name, layer in mlp.layers.items()
        ],
        weight_law=[_law(weight) for weight in told_weights],
        bias_law=[_law(bias) for bias in told_biases],
        errors={
            "C_b": [bias.variance_error for bias in told_biases],
            "C_W": [
                layer.in_features * weight.variance_error for layer, weight in zip(linear, told_weights, strict=True)
            ],
        },
        remarks=remarks(weights, biases, mlp.K, mlp.inputs),
    )


def read_isolated_architecture(
    model: Model,
    x: Any,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    as_trained: bool = False,
) -> Architecture:
    """Read the architecture of a freshly initialized module, without a trace in it.

    Args:
        model: Any module, or one that is isolated.
        x: Inputs that it takes; only their shape matters.
        optimizer: Gives lambda, as ``read_ensemble`` takes it.
        as_trained: Read it in the modes in which it is, instead of evaluation mode.

    Returns:
        The architecture.

    Raises:
        NotReadableError: If something of it is not covered; the message names it.
    """
    inputs = as_probe(x).inputs
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    with isolated(model) as network, network.as_trained() if as_trained else nullcontext():
        if network.output_fn is not None:
            raise NotReadableError("an output_fn follows its forward")
        lambdas = read_learning_rates(network.origin, optimizers).lambdas if optimizers else None
        return read_architecture(network.shadow, inputs, lambdas=lambdas)


def _as_torch_draws(
    linear: list[nn.Linear], weights: Sequence[WeightStatistics], biases: Sequence[WeightStatistics | None]
) -> tuple[list[WeightStatistics], list[WeightStatistics]]:
    """Statistics of weights and biases, where numbers drawn by ``nn.Linear`` are taken for what they are.

    Its weights and biases are uniform within 1/sqrt(n_in), so that their variance, 1 / (3 n_in), is known, while the
    mean square of ten biases is good to 30 %. Where a layer's weights show that initialization, uniform numbers of that
    bound have this variance, and so have numbers within it that are too few to tell.

    Returns:
        Of the weights and of the biases, layer by layer.
    """
    bounds = [1 / math.sqrt(layer.in_features) for layer in linear]
    shown = any(
        one.distribution == "uniform" and _within(one, bound) for one, bound in zip(weights, bounds, strict=True)
    )
    absent = WeightStatistics(0.0, 0.0, 0.0, "constant")

    def told(one: WeightStatistics | None, bound: float) -> WeightStatistics:
        if one is None or one.variance == 0:
            return absent
        few = one.distribution == "too few to tell" and one.largest <= bound * (1 + 1e-6)
        if shown and (few or (one.distribution == "uniform" and _within(one, bound))):
            return WeightStatistics(bound**2 / 3, 0.0, -1.2, "uniform", one.largest)
        return one

    return [told(one, bound) for one, bound in zip(weights, bounds, strict=True)], [
        told(one, bound) for one, bound in zip(biases, bounds, strict=True)
    ]


def _within(one: WeightStatistics, bound: float) -> bool:
    """Whether uniform numbers have this bound: none is beyond, and their mean square is that of it."""
    return one.largest <= bound * (1 + 1e-6) and abs(one.variance - bound**2 / 3) < 4 * one.variance_error


def _law(one: WeightStatistics) -> Law:
    """The law that the theory takes: Gaussian where it knows no better."""
    return next((law for law in LAWS if law == one.distribution), "gaussian")


@dataclass(frozen=True)
class _MLP:
    layers: dict[str, nn.Linear]
    activation: Activation
    K: list[float]
    inputs: Tensor


Call: TypeAlias = tuple[str, Tensor, Tensor]
"""One use of a linear layer: its name, input and output."""


def _linear_layers(network: IsolatedModel) -> dict[str, nn.Linear]:
    layers = {name: module for name, module in network.shadow.named_modules() if isinstance(module, nn.Linear)}
    if not layers:
        raise NotAnMLPError(f"not an MLP: {type(network.origin).__name__} has no nn.Linear")
    used = [id(p) for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None]
    covered = set(used)
    if len(covered) < len(used):
        raise NotAnMLPError("not an MLP: layers share a parameter, so their weights are not independent")
    owners = dict(network.shadow.named_modules())
    for name, parameter in network.shadow.named_parameters():
        if id(parameter) not in covered:
            owner = owners[name.rpartition(".")[0]]
            raise NotAnMLPError(f"not an MLP: the parameter {name!r} ({type(owner).__name__}) belongs to no nn.Linear")
    return layers


def _verified_mlp(
    network: IsolatedModel, probe: Probe, layers: dict[str, nn.Linear], given: ActivationLike | None
) -> _MLP:
    calls, output = _recorded(network, probe, layers)
    names = [name for name, _, _ in calls]
    if sorted(names) != sorted(layers):
        odd = next(name for name in layers if names.count(name) != 1)
        raise NotAnMLPError(f"not an MLP: the layer {odd!r} is used {names.count(odd)} times in one forward")
    if not bool(output.isfinite().all()):
        raise NotAnMLPError("not a random MLP: its outputs are not finite; some weights or inputs are too large")
    inputs = network.place(probe)
    if not isinstance(inputs, Tensor):
        raise NotAnMLPError("not an MLP: its forward takes several inputs")
    if not _same(calls[0][1], inputs.flatten(1)):
        raise NotAnMLPError(f"not an MLP: {names[0]!r} does not act on the flattened inputs, they are processed before")
    if not _same(calls[-1][2], output):
        raise NotAnMLPError(f"not an MLP: the output is not that of its last layer {names[-1]!r}")
    matching = _matching_activations(calls, given)
    for _ in range(_ENLARGEMENTS):  # activations can be alike near 0, or on one side of it
        if len(matching) == 1:
            break
        inputs = -10 * inputs
        larger, _ = _recorded(network, Probe(inputs), layers)
        matching = [candidate for candidate in matching if _agrees(candidate, larger)] or matching
    K = [float(z.double().square().mean()) for _, _, z in calls]
    return _MLP({name: layers[name] for name in names}, matching[0], K, calls[0][1])


def _recorded(network: IsolatedModel, probe: Probe, layers: dict[str, nn.Linear]) -> tuple[list[Call], Tensor]:
    """Return what enters and leaves the linear layers in one forward, in order, and the output."""
    calls: list[Call] = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, value, name=name: calls.append((name, args[0].detach(), value.detach()))
        )
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            return calls, checked_output(network, probe)
    finally:
        for handle in handles:
            handle.remove()


def _matching_activations(calls: list[Call], given: ActivationLike | None) -> list[Activation]:
    if given is not None:
        candidates = [get_activation(given)]
    elif len(calls) == 1:
        candidates = [get_activation("linear")]
    else:
        candidates = [get_activation(name) for name in available_activations()]
        candidates += _leaky_candidates(calls[0][2], calls[1][1])
    matching = [candidate for candidate in candidates if _agrees(candidate, calls)]
    if matching:
        return matching
    raise NotAnMLPError(
        "not an MLP: what enters a layer is not the same elementwise activation of the previous layer everywhere "
        f"(tried {', '.join(candidate.name for candidate in candidates)}); pass activation= if it is another one"
    )


def _agrees(candidate: Activation, calls: list[Call]) -> bool:
    pairs = [(before[2], after[1]) for before, after in pairwise(calls)]
    return all(z.shape == s.shape and _same(candidate(z), s) for z, s in pairs)


def _leaky_candidates(z: Tensor, s: Tensor) -> list[Activation]:
    if z.shape != s.shape or not bool((z < 0).any()):
        return []
    slope = float((s[z < 0] / z[z < 0]).median())
    return [leaky_relu(slope)] if 0 < slope < 1 else []


def _same(value: Tensor, reference: Tensor) -> bool:
    if value.shape != reference.shape:
        return False
    tolerance = 32 * torch.finfo(reference.dtype).eps
    return bool(torch.allclose(value, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max())))


def _weight_statistics(name: str, layer: nn.Linear) -> WeightStatistics:
    statistics = weight_statistics(layer.weight)
    if statistics.variance == 0 or not math.isfinite(statistics.variance):
        state = "all zero" if statistics.variance == 0 else "not finite"
        raise NotAnMLPError(f"not a random MLP: the weights of {name!r} are {state}")
    return statistics


def _lambda(rates: dict[str, float] | None, layer: str, kind: str, parameter: Tensor) -> float:
    if not parameter.requires_grad:
        return 0.0
    return 1.0 if rates is None else rates[f"{layer}.{kind}" if layer else kind]
