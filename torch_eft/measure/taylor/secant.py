"""The NTK's realized change over a step, which for networks with kinks is not what autodiff's derivative says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.kinks import Sides, kink_sides
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.kernels.ntk import ntk


@dataclass(frozen=True)
class NTKChange:
    """The realized change of the NTK between two settings of the parameters, per unit step.

    Args:
        value: (H(second) - H(first)) / step, (N, N, C, C), or (N, N) averaged over outputs.
        step: The distance that the change is divided by.
        kinked: The kinked operations met, as ``kinked_operations`` names them.
        crossings: Share of the kinked units, over samples, that are on another side at the second setting than at the
            first; 0 without kinks, NaN if some are in operations whose units are not seen (recurrent layers).
    """

    value: Tensor
    step: float
    kinked: tuple[str, ...]
    crossings: float

    @property
    def validity(self) -> str:
        """What the value is, in words."""
        if not self.kinked:
            return "smooth network: the secant tends to the derivative as the step does to 0"
        if math.isnan(self.crossings):
            return "kinks whose units are not seen: the secant holds for this step, autodiff's derivative may not"
        if self.crossings == 0:
            return "within the kinks: no unit changed its side, and autodiff's derivative is the slope"
        return (
            f"across kinks: {self.crossings:.2g} of the kinked units changed their side, which autodiff's derivative "
            "leaves out; the secant holds for this step"
        )


def ntk_change(
    model: Model,
    x: Any,
    params0: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    step: float = 1.0,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
) -> NTKChange:
    """(H(params) - H(params0)) / step: how the NTK has really changed, over a training step for example.

    Args:
        model: Any module; its own parameters matter only where the two mappings leave them out.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        params0: ``{name of a trainable parameter: value}`` before.
        params: And after.
        step: What to divide by, e.g. the learning rate times the number of steps.
        lambdas: The learning-rate tensor, as ``ntk`` takes it.
        trace: Average over outputs.
        output_fn: Turns what the model returns into (N, C).

    Raises:
        ValueError: As ``ntk``; if a name is no trainable parameter, a shape is another, or ``step`` is not positive.
    """
    with isolated(model, output_fn) as network:
        first, second = (network.complete(values, name) for values, name in ((params0, "params0"), (params, "params")))
        return _between(network, as_probe(x), first, second, step, lambdas, trace)


def ntk_finite_difference(
    model: Model,
    x: Any,
    direction: Mapping[str, Tensor],
    step: float,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
) -> NTKChange:
    """(H(theta + step d) - H(theta - step d)) / (2 step): the slope of the NTK along d at the scale of a step.

    For smooth networks the derivative along d up to a remainder of order step^2. For kinked ones take the size of a
    training step, and look at ``crossings``.

    Args:
        model: Any module, at theta.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        direction: d, ``{name of a trainable parameter: tensor}``; 0 where a parameter is left out. For a step of
            gradient descent with learning rate eta: minus lambda times the gradient, and ``step`` = eta.
        step: Positive.
        lambdas: The learning-rate tensor, as ``ntk`` takes it.
        trace: Average over outputs.
        output_fn: Turns what the model returns into (N, C).

    Raises:
        ValueError: As ``ntk_change``.
    """
    with isolated(model, output_fn) as network:
        network.complete(direction, "direction")
        ends: list[dict[str, Tensor]] = []
        for sign in (-1, 1):
            moved = {
                name: network.params[name] + sign * step * d.to(network.params[name]) for name, d in direction.items()
            }
            ends.append({**network.params, **moved})
        return _between(network, as_probe(x), ends[0], ends[1], 2 * step, lambdas, trace)


def _between(
    network: IsolatedModel,
    probe: Probe,
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    step: float,
    lambdas: Mapping[str, float] | float | None,
    trace: bool,
) -> NTKChange:
    if not 0 < step < math.inf:
        raise ValueError(f"step: {step:g} given; it must be positive and finite")
    change, sides = [], []
    for params in (first, second):
        change.append(ntk(replace(network, params=params), probe, lambdas=lambdas, trace=trace))
        sides.append(kink_sides(network, params, probe))
    names = tuple(dict.fromkeys(sides[0].names + sides[1].names))
    return NTKChange((change[1] - change[0]) / step, step, names, _crossings(*sides))


def _crossings(first: Sides, second: Sides) -> float:
    """Waits for the device once. Units that only one of the two forwards has count as crossed."""
    if not (first.all_seen and second.all_seen):
        return math.nan
    crossed: list[Tensor] = []
    alone = total = 0
    for index in range(max(len(first.sides), len(second.sides))):
        here, there = first.sides[index : index + 1], second.sides[index : index + 1]
        units = max(side.numel() for side in (*here, *there))
        total += units
        if here and there and here[0].shape == there[0].shape:
            crossed.append((here[0] != there[0]).sum())
        else:
            alone += units
    return (alone + (int(torch.stack(crossed).sum()) if crossed else 0)) / max(1, total)
