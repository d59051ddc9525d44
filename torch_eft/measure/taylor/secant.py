"""The NTK's realized change over a step, which in networks with kinks differs from what autodiff's derivative says."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import IsolatedModel, Model, Parameters, check_parameters, isolated
from torch_eft.measure.forward.kinks import Sides, kink_sides
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.trajectory import Validity


@dataclass(frozen=True, repr=False)
class NTKChange:
    """The realized change of the NTK between two settings of the parameters, per unit of distance.

    Args:
        value: (H(theta) - H(theta_0)) / distance, (N, N, C, C), or (N, N) averaged over outputs.
        distance: The divisor.
        kinked: The kinked operations met, as ``kinked_operations`` names them.
        crossings: Share of the kinked units, over samples, that changed their side; 0 without kinks, NaN if some are in
            operations whose units are not seen (recurrent layers).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> theta = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
        >>> change = measure.ntk_change(model, torch.eye(3), model, theta)
        >>> change.value.shape, change.crossings, change.validity.flag
        (torch.Size([3, 3, 2, 2]), 0.0, 'valid')
    """

    value: Tensor
    distance: float
    kinked: tuple[str, ...]
    crossings: float

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def validity(self) -> Validity:
        """The relation of the secant to the derivative; ``numbers["crossings"]`` decides it."""
        numbers = {"crossings": self.crossings}
        if not self.kinked:
            return Validity("valid", "smooth network: the secant tends to the derivative as the distance tends to 0")
        if math.isnan(self.crossings):
            return Validity(
                "caution",
                "kinks whose units are not seen: the secant holds for this step, autodiff's derivative may not",
                numbers,
            )
        if self.crossings == 0:
            return Validity(
                "valid",
                "within the kinks: no unit changed its side, and autodiff's derivative is the slope",
                numbers,
            )
        return Validity(
            "caution",
            f"across kinks: {self.crossings:.2g} of the kinked units changed their side, which autodiff's derivative "
            "leaves out; the secant holds for this step",
            numbers,
        )


def ntk_change(
    model: Model,
    x: Any,
    theta_0: Parameters,
    theta: Parameters,
    *,
    distance: float = 1.0,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> NTKChange:
    """Measure (H(theta) - H(theta_0)) / distance, the realized change of the NTK, for example over a training step.

    Raises ``ValueError`` as ``ntk``; if a name is not that of a trainable parameter, a shape differs, or ``distance``
    is not positive.

    Args:
        model: Any module; its own parameters are used only where theta_0 or theta leaves one out.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        theta_0: Parameters before, ``{name: tensor}`` or a module that holds them.
        theta: Parameters after, likewise.
        distance: Divisor, e.g. the learning rate times the number of steps.
        lambdas: The learning-rate tensor, see ``measure.ntk``.
        trace: Average over outputs.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed for each NTK, see ``measure.ntk``.

    Returns:
        The change and the share of kinked units that changed their side.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(3, 2, bias=False)  # linear in its parameters: the NTK is constant
        >>> measure.ntk_change(model, torch.eye(3), model, {"weight": torch.zeros(2, 3)}).value.norm()
        tensor(0.)
    """
    check_parameters(theta_0=theta_0, theta=theta)
    with isolated(model, output_fn) as network:
        start, end = network.at(theta_0, "theta_0"), network.at(theta)
        return _between(start, end, as_probe(x), distance, lambdas, trace, memory)


def ntk_finite_difference(
    model: Model,
    x: Any,
    direction: Mapping[str, Tensor],
    *,
    distance: float,
    lambdas: Mapping[str, float] | float | None = None,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> NTKChange:
    """Measure (H(theta + s d) - H(theta - s d)) / (2 s), the slope of the NTK along d at the scale of a distance s.

    For smooth networks this is the derivative along d up to a remainder of order s^2. For kinked ones take the size of
    a training step, and look at ``crossings``.

    Raises ``ValueError`` as ``ntk_change``.

    Args:
        model: Any module, at theta.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        direction: d, ``{name of a trainable parameter: tensor}``; 0 where a parameter is left out. For a step of
            gradient descent with learning rate eta: minus lambda times the gradient, and ``distance`` = eta.
        distance: s > 0.
        lambdas: The learning-rate tensor, see ``measure.ntk``.
        trace: Average over outputs.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed for each NTK, see ``measure.ntk``.

    Returns:
        The slope and the share of kinked units that change their side between the two ends.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        >>> d = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> slope = measure.ntk_finite_difference(model, torch.eye(3), d, distance=1e-4).value
        >>> dH = measure.dntk(model, torch.eye(3), d)
        >>> torch.allclose(slope, dH + dH.permute(1, 0, 3, 2), rtol=1e-5)
        True
    """
    check_parameters(direction=direction)
    with isolated(model, output_fn) as network:
        network.complete(direction, "direction")
        theta = {name: network.params[name] for name in direction}
        start, end = (
            network.at({name: value + s * direction[name].to(value) for name, value in theta.items()})
            for s in (-distance, distance)
        )
        return _between(start, end, as_probe(x), 2 * distance, lambdas, trace, memory)


REACH = 0.008
"""Relative change of the NTK over the steps of ``ntk_terms_by_differences``: larger ones leave out more, and smaller
ones round more. In single precision the error was at most 0.0024 of the change (CNN, transformer, changes of 0.005 to
0.8)."""


def ntk_terms_by_differences(
    network: IsolatedModel,
    x: Any,
    theta: Mapping[str, Tensor],
    d: Mapping[str, Tensor],
    H: Tensor,
    *,
    reach: float,
    at: Callable[[Parameters], IsolatedModel] | None = None,
    lambdas: Mapping[str, float] | float | None = None,
    memory: int = DEFAULT_MEMORY,
    outputs: str | None = None,
) -> Tensor:
    """Compute H' d and H'' d d / 2 of a smooth network by central differences: two NTKs, where derivatives take six.

    The step s is such that the NTK changes by ``REACH`` over s d.

    Args:
        network: Isolated.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        theta: The point.
        d: The displacement, for the same parameters.
        H: The NTK at theta, (N, N, C, C) or (N, N).
        reach: Roughly the relative change of the NTK over d.
        at: The network at given parameters; None: ``network.at``.
        lambdas: The learning-rate tensor, see ``measure.ntk``.
        memory: Bytes allowed, see ``measure.ntk``.
        outputs: See ``measure.ntk``.

    Returns:
        Both terms, (2, ...).
    """
    s, moved = min(1.0, REACH / reach) if reach > 0 else 1.0, network.at if at is None else at
    ahead, behind = (
        ntk(
            moved({name: value + sign * s * d[name].to(value) for name, value in theta.items()}),
            as_probe(x),
            lambdas=lambdas,
            trace=H.ndim == 2,
            memory=memory,
            outputs=outputs,
        ).double()
        for sign in (1, -1)
    )
    here = H.to(ahead)
    return torch.stack([(ahead - behind) / (2 * s), (ahead - 2 * here + behind) / (2 * s * s)])


def _between(
    start: IsolatedModel,
    end: IsolatedModel,
    probe: Probe,
    distance: float,
    lambdas: Mapping[str, float] | float | None,
    trace: bool,
    memory: int,
) -> NTKChange:
    if not 0 < distance < math.inf:
        raise ValueError(f"distance: {distance:g} given; it must be positive and finite")
    H_0, H = (ntk(network, probe, lambdas=lambdas, trace=trace, memory=memory) for network in (start, end))
    sides_0, sides = (kink_sides(network, network.params, probe) for network in (start, end))
    names = tuple(dict.fromkeys(sides_0.names + sides.names))
    return NTKChange((H - H_0) / distance, distance, names, _crossings(sides_0, sides))


def _crossings(first: Sides, second: Sides) -> float:
    """Share of units on another side. Waits for the device once; units that only one forward has count as crossed."""
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
