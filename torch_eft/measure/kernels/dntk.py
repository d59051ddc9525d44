"""The NTK's differentials: dNTK and ddNTK, whole on small probes, contracted with a direction on large ones.

With sums over parameters weighted by lambda (PDLT 11.1, chapter infinity),

    dH_{ijk;abc}    = sum (d_mu d_nu z_{i;a}) (d_mu z_{j;b}) (d_nu z_{k;c})
    ddI_{ijkl;abcd} = sum (d_mu d_nu d_rho z_{i;a}) (d_mu z_{j;b}) (d_nu z_{k;c}) (d_rho z_{l;d})
    ddII_{ijkl;abcd} = sum (d_mu d_nu z_{i;a}) (d_mu d_rho z_{j;b}) (d_nu z_{k;c}) (d_rho z_{l;d}).

Contracted with v = lambda J^T e they are Gram matrices of the Jacobian's Taylor coefficients along theta + s v,

    J = J_0 + s J_1 + s^2 J_2:   dH e = J_1 lambda J_0^T,   ddI e e = 2 J_2 lambda J_0^T,   ddII e e = J_1 lambda J_1^T.

dH is one-sided as defined: the NTK's own rate of change along v is dH e + its transpose.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.checks import check_measurable, derivatives_of_order
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.forward.structure import all_finite
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY, JacobianGram
from torch_eft.measure.jets.jet import NoJetRuleError, watch_kinks
from torch_eft.measure.kernels.products import NTKOperator
from torch_eft.measure.kernels.reverse_mode import differentials

Direction = Tensor | Mapping[str, Tensor]


class AlmostEverywhereWarning(UserWarning):
    """The network has kinks: its differentials are those between them."""


@dataclass(frozen=True)
class NTKDerivatives:
    """H and its differentials contracted with a direction, (N, N, C, C) each, or (N, N) of a trace.

    Args:
        H: The NTK, or None if not asked for.
        dH: ``[a, b, i, j] = sum_{c,k} dH_{ijk;abc} e_{kc}``.
        ddI: ``sum ddI_{ijkl;abcd} e_{kc} e_{ld}``, or None if not asked for.
        ddII: Likewise.
        kinked: Operations with kinks that the network executes.
        method: ``"jets"``, or ``"reverse mode"`` with the operation that has no rule for jets.
    """

    H: Tensor | None
    dH: Tensor
    ddI: Tensor | None
    ddII: Tensor | None
    kinked: tuple[str, ...]
    method: str

    @property
    def validity(self) -> str:
        """What the numbers stand for, in words."""
        return almost_everywhere(self.kinked) or "the derivatives of a smooth network"


def almost_everywhere(kinked: tuple[str, ...]) -> str | None:
    """The label of derivatives of a network with kinks, or None without."""
    if not kinked:
        return None
    return (
        f"almost everywhere: the network has kinks ({', '.join(kinked)}), whose crossings contribute to the change of "
        "H but not to its derivatives; use the realized change of H, or a secant over the"
        " training step (ntk_finite_difference)"
    )


def ntk_derivatives(
    model: Model,
    x: Any,
    direction: Direction,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    derivatives: int = 2,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
    kernel: bool = True,
) -> NTKDerivatives:
    """H, dH and, with ``derivatives=2``, ddI and ddII, contracted with one direction.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        direction: e (N, C) in the space of outputs on ``x`` (the training error, an eigenvector of H ...), standing for
            v = lambda J^T e; or v itself, ``{parameter: tensor}`` (``ntk_vjp`` makes it of other inputs).
        lambdas: As ``ntk`` takes them.
        derivatives: 1 (dH) or 2 (ddI and ddII as well).
        trace: Average over outputs i = j.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed.
        kernel: Compute H itself as well.

    Raises:
        ValueError: As ``ntk``; if the direction has another shape; if the derivatives fail their check.
    """
    if derivatives not in (1, 2):
        raise ValueError(f"derivatives: {derivatives!r} given; 1 is dH, 2 is dH, ddI and ddII")
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        engine = JacobianGram(network, probe, lambdas, memory)
        v = _along(network, probe, direction, lambdas, engine.moving)
        pairs = [*([(0, 0)] if kernel else []), (1, 0), *([(2, 0), (1, 1)] if derivatives == 2 else [])]
        with watch_kinks() as kinks:
            found = engine.gram(pairs, v, trace)[""]
        if not all_finite(torch.stack([value.sum() for value in found.values()])):
            check_measurable(network)  # names the parameter
            raise ValueError("model: its differentials are not finite though the parameters are; derivatives overflow")
        return NTKDerivatives(
            found.get((0, 0)),
            found[1, 0],
            2 * found[2, 0] if derivatives == 2 else None,
            found.get((1, 1)),
            tuple(dict.fromkeys(kinks)),
            engine.method,
        )


def _along(
    network: IsolatedModel,
    probe: Probe,
    direction: Direction,
    lambdas: Mapping[str, float] | float | None,
    moving: list[str],
) -> dict[str, Tensor]:
    """V of the parameters that move."""
    if isinstance(direction, Tensor):
        operator = NTKOperator(network, probe, lambdas=lambdas)
        if direction.shape != operator.outputs.shape:
            raise ValueError(
                f"direction: {tuple(direction.shape)} given; give {tuple(operator.outputs.shape)}, a number for every "
                "sample and output, or {parameter: tensor}"
            )
        return operator.ntk_vjp(direction)
    if set(direction) != set(network.params):
        wrong = sorted(set(direction) ^ set(network.params))
        raise ValueError(
            f"direction: {wrong[0]!r} is {'missing' if wrong[0] in network.params else 'no trainable parameter'}; "
            "name every trainable parameter once"
        )
    for name, value in direction.items():
        if value.shape != network.params[name].shape:
            raise ValueError(
                f"direction: {tuple(value.shape)} given for {name!r}, which is {tuple(network.params[name].shape)}"
            )
    return {name: direction[name].detach().to(network.params[name]) for name in moving}


def dntk(
    model: Model,
    x: Any,
    direction: Direction | None = None,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Tensor:
    """The dNTK of ``model`` on ``x``, in evaluation mode: whole, or contracted with a direction.

    Args:
        model: Any module.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        direction: As ``ntk_derivatives`` takes it; None for the whole tensor, which takes (N C)^2 backward passes.
        lambdas: As ``ntk`` takes them.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed.

    Returns:
        ``[a, b, c, i, j, k] = dH_{ijk;abc}``, (N, N, N, C, C, C); contracted, ``[a, b, i, j]``, (N, N, C, C).

    Raises:
        ValueError: As ``ntk_derivatives``; if the whole does not fit into ``memory``.

    Warns:
        AlmostEverywhereWarning: If the network has kinks.
    """
    if direction is not None:
        found = ntk_derivatives(
            model, x, direction, lambdas=lambdas, derivatives=1, output_fn=output_fn, memory=memory, kernel=False
        )
        _warn(found.kinked)
        return found.dH
    return _whole(model, x, lambdas, ("dH",), output_fn, memory)[0]


def ddntk(
    model: Model,
    x: Any,
    direction: Direction | None = None,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> tuple[Tensor, Tensor]:
    """The two ddNTKs, ddI and ddII; arguments, errors and warnings as ``dntk``.

    Returns:
        (N, N, N, N, C, C, C, C) each, ``[a, b, c, d, i, j, k, l]``; contracted, (N, N, C, C) each.
    """
    if direction is not None:
        found = ntk_derivatives(
            model, x, direction, lambdas=lambdas, derivatives=2, output_fn=output_fn, memory=memory, kernel=False
        )
        _warn(found.kinked)
        assert found.ddI is not None and found.ddII is not None
        return found.ddI, found.ddII
    ddI, ddII = _whole(model, x, lambdas, ("ddI", "ddII"), output_fn, memory)
    return ddI, ddII


def _warn(kinked: tuple[str, ...]) -> None:
    text = almost_everywhere(kinked)
    if text is not None:
        warnings.warn(text, AlmostEverywhereWarning, stacklevel=3)


def _whole(
    model: Model,
    x: Any,
    lambdas: Mapping[str, float] | float | None,
    names: tuple[str, ...],
    output_fn: OutputFn | None,
    memory: int,
) -> list[Tensor]:
    """By reverse mode of reverse mode, then compared with jets in one direction."""
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        scales = JacobianGram(network, probe, lambdas, memory).lambdas  # refuses what cannot be measured
        with torch.no_grad():
            outputs = checked_output(network, probe)
        _check_memory(outputs, sum(network.params[name].numel() for name in scales), names, memory)
        inputs = network.place(probe)
        stacked = {name: value[None] for name, value in network.params.items()}
        # Written out in the backward, too, where a checkpoint runs its part of the forward again.
        with derivatives_of_order(2 if names == ("dH",) else 3, network.origin), Decomposed():
            found = differentials(
                lambda params: network({name: value[0] for name, value in params.items()}, inputs)[None],
                stacked,
                scales,
                names,
            )
        tensors = [getattr(found, name)[0] for name in names]
        kinked = _check_in_one_direction(network, probe, lambdas, dict(zip(names, tensors, strict=True)), memory)
    _warn(kinked)
    return tensors


def _check_memory(outputs: Tensor, parameters: int, names: tuple[str, ...], memory: int) -> None:
    M, size = outputs.numel(), outputs.element_size()
    needed = size * sum({"dH": M**3 + M * parameters}.get(name, M**4 + M**2 * parameters) for name in names)
    if needed > memory:
        raise ValueError(
            f"memory: {needed / 2**30:.2f} GiB needed for the whole {' and '.join(names)} of {len(outputs)} samples "
            f"and {outputs.shape[1]} outputs, {memory / 2**30:.2f} GiB allowed; allow more, take fewer samples or "
            "outputs, or contract with a direction"
        )


def _check_in_one_direction(
    network: IsolatedModel,
    probe: Probe,
    lambdas: Mapping[str, float] | float | None,
    tensors: dict[str, Tensor],
    memory: int,
) -> tuple[str, ...]:
    """Refuse a tensor that the jets contradict; returns the operations with kinks."""
    N, C = next(iter(tensors.values())).shape[0], next(iter(tensors.values())).shape[-1]
    generator = torch.Generator(device="cpu").manual_seed(0)
    like = next(iter(tensors.values()))
    e = torch.randn(N, C, generator=generator, device="cpu").to(like)
    found = ntk_derivatives(network, probe, e, lambdas=lambdas, memory=memory)
    assert found.H is not None and found.ddII is not None
    eps = torch.finfo(like.dtype).eps
    scales = {"dH": (found.H.norm() * found.ddII.norm()) ** 0.5, "ddI": found.ddII.norm(), "ddII": found.ddII.norm()}
    for name, value in tensors.items():
        if name == "dH":
            whole = torch.einsum("abcijk,ck->abij", value, e)
        else:
            whole = torch.einsum("abcdijkl,ck,dl->abij", value, e, e)
        other = getattr(found, name)
        # Half the digits, and roundings of |J_1| |J_0| or |J_1|^2 where products cancel.
        allowed = eps**0.5 * other.norm() + 1e3 * eps * scales[name]
        if not bool((whole - other).norm() <= allowed):
            raise ValueError(
                f"model: its {name} cannot be trusted: reverse mode gives {float(whole.norm()):.6g} in a random "
                f"direction, Taylor series {float(other.norm()):.6g}"
            )
    return found.kinked


__all__ = [
    "AlmostEverywhereWarning",
    "NTKDerivatives",
    "NoJetRuleError",
    "almost_everywhere",
    "ddntk",
    "dntk",
    "ntk_derivatives",
]
