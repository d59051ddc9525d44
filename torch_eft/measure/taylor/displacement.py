"""What a displacement of the parameters did to outputs and NTK, beside what derivatives at its start say of it.

With d = theta' - theta, the real displacement (of any optimizer), and J = J_0 + s J_1 + s^2 J_2 + .. along theta + s d,

    f(theta') - f(theta) = f' d + f'' d d / 2 + f''' d d d / 6 + O(d^4),
    H(theta') - H(theta) = (J_1 lambda J_0^T + transpose) + (J_2 lambda J_0^T + transpose + J_1 lambda J_1^T) + O(d^3).

For a step of gradient descent, d = - eta lambda J^T e, the first terms are -eta H e and the dNTK, - eta (dH e + its
transpose), the second ones dH e e and the ddNTKs (PDLT 11.1 and chapter infinity): outputs with the NTK frozen are of
order 0 in 1/n, everything else here is of order 1/n.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY, checked_lambdas
from torch_eft.measure.kernels.dntk import almost_everywhere, ntk_derivatives
from torch_eft.measure.kernels.ntk import ntk as ntk_of
from torch_eft.measure.taylor.series import taylor_series
from torch_eft.results.trajectory import Validity


@dataclass(frozen=True)
class DisplacementTerms:
    """Realized changes over a displacement, and their terms from its start.

    Args:
        output: (N, C), at the start.
        output_change: (N, C), realized.
        output_terms: (3, N, C): f' d, f'' d d / 2, f''' d d d / 6.
        ntk: At the start, (N, N, C, C) or (N, N); None if it was not asked for.
        ntk_change: Realized.
        ntk_terms: (1 or 2, ...): from dNTK, and from the ddNTKs.
        kinked: Operations with kinks, whose crossings no term contains.
        frozen_moved: |d| of the parameters with lambda = 0, relative to |d|: the NTK's terms leave them out.
    """

    output: Tensor
    output_change: Tensor
    output_terms: Tensor
    ntk: Tensor | None
    ntk_change: Tensor | None
    ntk_terms: Tensor | None
    kinked: tuple[str, ...]
    frozen_moved: float

    @property
    def validity(self) -> str:
        """What the terms stand for, in words."""
        text = almost_everywhere(self.kinked) or "the derivatives of a smooth network"
        if self.frozen_moved > 0:
            text += f"; {100 * self.frozen_moved:.2g} % of the displacement is of parameters with lambda = 0"
        return text


def interval(
    model: Model,
    params0: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    x: Any,
    lambdas: Mapping[str, float] | float | None = None,
    order: int = 2,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    kernels: tuple[Tensor, Tensor] | None = None,
    ntk: bool = True,
    memory: int = DEFAULT_MEMORY,
) -> DisplacementTerms:
    """Changes of outputs and NTK from ``params0`` to ``params``, realized and by derivatives at ``params0``.

    Args:
        model: Any module, in evaluation mode; its own parameters are not used.
        params0: theta, ``{name: tensor}`` of every trainable parameter.
        params: theta', likewise.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        lambdas: The learning-rate tensor of the NTK, as ``ntk`` takes it.
        order: 1: the NTK's change by dNTK; 2: by the ddNTKs as well.
        trace: Average the NTK over outputs.
        output_fn: Turns what the model returns into (N, C).
        kernels: H at ``params0`` and at ``params``, where they are known.
        ntk: Whether the NTK is wanted.
        memory: Bytes allowed.

    Raises:
        ValueError: As ``taylor_series`` and ``ntk_derivatives``; if ``order`` is not 1 or 2.
    """
    if order not in (1, 2):
        raise ValueError(f"order: {order} given; 1 is dNTK, 2 is dNTK and ddNTK")
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        series = taylor_series(network, params0, params, probe, 3)
        first, second = network.complete(params0, "params0"), network.complete(params, "params")
        at_start = replace(network, params=first)
        d = {name: second[name] - value for name, value in first.items()}
        moving = set(first) if not isinstance(lambdas, Mapping) else {name for name in first if lambdas[name] > 0}
        H = change = terms = None
        kinked = series.kinked
        if ntk:
            if kernels is None:
                H, H_end = (
                    ntk_of(replace(network, params=at), probe, lambdas=lambdas, trace=trace, memory=memory)
                    for at in (first, second)
                )
            else:
                H, H_end = (value.to(next(iter(first.values())).device) for value in kernels)
            found = ntk_derivatives(
                at_start,
                probe,
                d,
                lambdas=lambdas,
                derivatives=order,
                trace=H.ndim == 2,
                memory=memory,
                kernel=False,
            )
            kinked = tuple(dict.fromkeys((*kinked, *found.kinked)))
            change, linear = H_end - H, symmetrized(found.dH)
            terms = linear[None]
            if found.ddI is not None and found.ddII is not None:
                terms = torch.stack([linear, symmetrized(found.ddI) / 2 + found.ddII])
        squares = torch.stack([value.double().square().sum() for value in d.values()])
        left = torch.tensor([name not in moving for name in d], device=squares.device)
        share = float((squares[left].sum() / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
    return DisplacementTerms(
        series.terms[0], series.value - series.terms[0], series.terms[1:], H, change, terms, kinked, share
    )


def symmetrized(dH: Tensor) -> Tensor:
    """dH_{ij;ab} + dH_{ji;ba}: the NTK's own rate of change, of a one-sided dNTK (N, N, C, C) or (N, N)."""
    return dH + (dH.transpose(0, 1) if dH.ndim == 2 else dH.permute(1, 0, 3, 2))


@dataclass(frozen=True)
class RelativeDNTK:
    """Sizes along one direction.

    Args:
        dntk: (||dH v + transpose|| / ||H||) / (||J v|| / sqrt(N C)).
        ddntk: (||ddI v v + transpose + 2 ddII v v|| / (2 ||H||)) / (||J v||^2 / N C); None if not asked for.
        validity: Where they hold.
    """

    dntk: float
    ddntk: float | None
    validity: Validity


def relative_dntk(
    model: Model,
    params: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    x: Any,
    lambdas: Mapping[str, float] | float | None = None,
    order: int = 2,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> RelativeDNTK | None:
    """The sizes along v = lambda times a gradient.

    Args:
        model: Any module, in evaluation mode.
        params: theta, ``{name: tensor}``; the model's own where a name is left out.
        gradient: ``{name: tensor}`` for every trainable parameter, of any scale.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        lambdas: As ``ntk`` takes them.
        order: 1 (dNTK) or 2.
        trace: Average kernels over outputs.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed.

    Returns:
        The sizes, or None where the direction moves no output.

    Raises:
        ValueError: As ``ntk_derivatives``.
    """
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        at = network.at(params, "params")
        scales = checked_lambdas(at, lambdas)
        v = {name: g * scales.get(name, 0.0) for name, g in at.complete(gradient, "gradient").items()}
        # The length drops out: a unit vector keeps the numbers away from overflow.
        size = torch.stack([value.norm() for value in v.values()]).norm()
        if not float(size) > 0:
            return None
        v = {name: value / size for name, value in v.items()}
        found = ntk_derivatives(at, probe, v, lambdas=lambdas, derivatives=order, trace=trace, memory=memory)
        inputs = at.place(probe)
        moved = _along(at, inputs, v)
        assert found.H is not None
        channels = checked_output(at, probe).numel()
        numbers = [moved.norm(), found.H.norm(), symmetrized(found.dH).norm()]
        if found.ddI is not None and found.ddII is not None:
            numbers.append((symmetrized(found.ddI) / 2 + found.ddII).norm())
        motion, H, first, *second = torch.stack(numbers).tolist()
    if not (motion > 0 and H > 0):
        return None
    rms = motion / channels**0.5
    return RelativeDNTK(first / H / rms, second[0] / H / rms**2 if second else None, found.validity)


def _along(network: Any, inputs: Any, v: Mapping[str, Tensor]) -> Tensor:
    """J v, (N, C), by two backward passes: the derivative of u . J v in u."""
    leaves = {name: network.params[name].detach().requires_grad_() for name in v}
    z = network({**network.params, **leaves}, inputs)
    u = torch.zeros_like(z).requires_grad_()
    pulled = torch.autograd.grad(
        z, list(leaves.values()), u, create_graph=True, allow_unused=True, materialize_grads=True
    )
    pairs = [(p, v[name]) for name, p in zip(leaves, pulled, strict=True) if p.requires_grad]
    if not pairs:
        return torch.zeros_like(z)
    rows, along = zip(*pairs, strict=True)
    return torch.autograd.grad(rows, u, along)[0].detach()
