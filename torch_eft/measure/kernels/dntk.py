"""The NTK's differentials dNTK and ddNTK: whole on small probes, contracted with a direction on large ones.

With sums over parameters weighted by lambda (PDLT 11.1, chapter infinity),

    dH_{ijk;abc}    = sum (d_mu d_nu z_{i;a}) (d_mu z_{j;b}) (d_nu z_{k;c})
    ddI_{ijkl;abcd} = sum (d_mu d_nu d_rho z_{i;a}) (d_mu z_{j;b}) (d_nu z_{k;c}) (d_rho z_{l;d})
    ddII_{ijkl;abcd} = sum (d_mu d_nu z_{i;a}) (d_mu d_rho z_{j;b}) (d_nu z_{k;c}) (d_rho z_{l;d}).

Contracted with v = lambda J^T e they are Gram matrices of the Jacobian's Taylor coefficients along theta + s v,

    J = J_0 + s J_1 + s^2 J_2:   dH e = J_1 lambda J_0^T,   ddI e e = 2 J_2 lambda J_0^T,   ddII e e = J_1 lambda J_1^T.

dH is one-sided as defined: the NTK's own rate of change along v is dH e plus its transpose.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_eft.measure.forward.checks import MemoryLimitError, check_finite, derivatives_of_order
from torch_eft.measure.forward.decompositions import Decomposed
from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY, JacobianGram
from torch_eft.measure.jacobian.plan import wrong_name
from torch_eft.measure.jets.jet import watch_kinks
from torch_eft.measure.kernels.products import NTKOperator, checked_direction
from torch_eft.measure.kernels.reverse_mode import differentials
from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.trajectory import Validity

Direction: TypeAlias = Tensor | Mapping[str, Tensor]


class AlmostEverywhereWarning(UserWarning):
    """The network has kinks: its differentials are those between them.

    Example:
        >>> import warnings, torch
        >>> from torch_eft import measure
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     _ = measure.dntk(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU()), torch.ones(1, 1))
        >>> caught[0].category.__name__
        'AlmostEverywhereWarning'
    """


@dataclass(frozen=True, repr=False)
class NTKDerivatives:
    """H and its differentials contracted with a direction, (N, N, C, C) each, or (N, N) of a trace.

    Args:
        H: The NTK, or None if not asked for.
        dH: ``[a, b, i, j] = sum_{c,k} dH_{ijk;abc} e_{kc}``.
        ddI: ``sum ddI_{ijkl;abcd} e_{kc} e_{ld}``, or None if not asked for.
        ddII: Likewise.
        kinked: Operations with kinks that the network executes.
        method: ``"jets"``, or ``"reverse mode"`` with the operation that has no rule for jets.
        cut: What the forward leaves out of its gradient: then dH is not the rate of change of H.

    Example:
        z = w_2 w_1 x at w_1 = w_2 = x = 1 has the gradient (1, 1) and the off-diagonal second derivative 1.

        >>> import torch
        >>> from torch_eft import measure
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> one = torch.ones(1, 1)
        >>> theta = {name: one for name, _ in net.named_parameters()}
        >>> with measure.Network(net, one) as network:
        ...     result = network.at(theta).derivatives(one)
        >>> [float(value) for value in (result.H, result.dH, result.ddI, result.ddII)]
        [2.0, 2.0, 0.0, 2.0]
    """

    H: Tensor | None
    dH: Tensor
    ddI: Tensor | None
    ddII: Tensor | None
    kinked: tuple[str, ...]
    method: str
    cut: tuple[str, ...] = ()

    __repr__ = short_repr

    @property
    def validity(self) -> Validity:
        """Say whether the numbers are the derivatives of a smooth network."""
        return derivatives_validity(self.kinked, self.cut)


@dataclass(frozen=True, repr=False)
class DDNTK:
    """The two ddNTKs; unpacks as ``ddI, ddII``.

    Args:
        ddI: ``[a, b, c, d, i, j, k, l] = ddI_{ijkl;abcd}``, or contracted ``[a, b, i, j]``.
        ddII: Likewise.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> result = measure.ddntk(torch.nn.Linear(2, 1), torch.eye(2))  # linear in its parameters
        >>> result.ddI.shape, float(result.ddII.abs().max())
        (torch.Size([2, 2, 2, 2, 1, 1, 1, 1]), 0.0)
    """

    ddI: Tensor
    ddII: Tensor

    __repr__ = short_repr

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over ddI and ddII."""
        return iter((self.ddI, self.ddII))


def almost_everywhere(kinked: tuple[str, ...]) -> str | None:
    """Return the caveat of derivatives of a network with kinks, or None without."""
    if not kinked:
        return None
    return (
        f"almost everywhere: the network has kinks ({', '.join(kinked)}), whose crossings contribute to the change of "
        "H but not to its derivatives; use the realized change of H, or a secant over the"
        " training step (ntk_finite_difference)"
    )


def no_derivatives(cut: tuple[str, ...]) -> str:
    """Return why the higher derivatives by autodiff are not those of the network."""
    return (
        "no derivatives: a part of the forward is cut from the gradient, or has a backward of its own "
        f"({', '.join(cut)}); H is that of the training, but need not change as its derivatives say: use the realized "
        "change of H (ntk_change), or a secant (ntk_finite_difference)"
    )


def derivatives_validity(kinked: tuple[str, ...], cut: tuple[str, ...] = ()) -> Validity:
    """Return the validity of derivatives of a network with these kinks, and these parts cut from its gradient."""
    if cut:
        return Validity("invalid", no_derivatives(cut))
    caveat = almost_everywhere(kinked)
    return Validity("valid", "the derivatives of a smooth network") if caveat is None else Validity("caution", caveat)


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
    """Compute H, dH and, with ``derivatives=2``, ddI and ddII, contracted with one direction.

    Args:
        model: Any module.
        x: See ``ntk``.
        direction: e (N, C) in the space of outputs on ``x`` (the training error, an eigenvector of H ...), standing for
            v = lambda J^T e; or v itself, ``{parameter: tensor}`` (``ntk_vjp`` makes it of other inputs).
        lambdas: See ``ntk``.
        derivatives: 1 (dH) or 2 (ddI and ddII as well).
        trace: Average over outputs i = j.
        output_fn: See ``ntk``.
        memory: Bytes allowed.
        kernel: Compute H itself as well.

    Returns:
        The contracted tensors.

    Raises:
        ValueError: As ``ntk``; if the direction has another shape; if the derivatives fail their check.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> result = measure.ntk_derivatives(net, torch.eye(3), torch.ones(3, 2), derivatives=1)
        >>> result.dH.shape, result.ddI, result.method, result.validity.flag
        (torch.Size([3, 3, 2, 2]), None, 'jets', 'valid')
    """
    if derivatives not in (1, 2):
        raise ValueError(f"derivatives: {derivatives!r} given; 1 is dH, 2 is dH, ddI and ddII")
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        engine = JacobianGram(network, probe, lambdas, memory)
        v = _in_parameter_space(network, probe, direction, lambdas, engine.trainable)
        pairs = [*([(0, 0)] if kernel else []), (1, 0), *([(2, 0), (1, 1)] if derivatives == 2 else [])]
        with watch_kinks() as kinks:
            gram = engine.gram(pairs, v, trace=trace)
        check_finite(network, gram.matrices.values(), "its differentials are")
        return NTKDerivatives(
            gram.matrices.get((0, 0)),
            gram[1, 0],
            2 * gram[2, 0] if derivatives == 2 else None,
            gram.matrices.get((1, 1)),
            tuple(dict.fromkeys(kinks)),
            gram.method,
            gram.cut,
        )


def _in_parameter_space(
    network: IsolatedModel,
    probe: Probe,
    direction: Direction,
    lambdas: Mapping[str, float] | float | None,
    trainable: list[str],
) -> dict[str, Tensor]:
    """Return v for the parameters with lambda > 0."""
    if isinstance(direction, Tensor):
        operator = NTKOperator(network, probe, lambdas)
        return operator.ntk_vjp(checked_direction(direction, operator, ", or {parameter: tensor}"))
    if set(direction) != set(network.params):
        raise ValueError(f"direction: {wrong_name(direction, network.params)}; name every trainable parameter once")
    v = network.complete(direction, "direction")
    return {name: v[name] for name in trainable}


def dntk(
    model: Model,
    x: Any,
    direction: Direction | None = None,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Tensor:
    """Compute the dNTK of ``model`` on ``x``, in evaluation mode: whole, or contracted with a direction.

    Errors as ``ntk_derivatives``; ``MemoryLimitError`` if the whole does not fit into ``memory``.

    Args:
        model: Any module.
        x: See ``ntk``.
        direction: See ``ntk_derivatives``; None for the whole tensor, which takes (N C)^2 backward passes.
        lambdas: See ``ntk``.
        output_fn: See ``ntk``.
        memory: Bytes allowed.

    Returns:
        ``[a, b, c, i, j, k] = dH_{ijk;abc}``, (N, N, N, C, C, C); contracted, ``[a, b, i, j]``, (N, N, C, C).

    Warns:
        AlmostEverywhereWarning: If the network has kinks.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> dH = measure.dntk(torch.nn.Linear(2, 1), torch.eye(2))  # linear in its parameters
        >>> dH.shape, float(dH.abs().max())
        (torch.Size([2, 2, 2, 1, 1, 1]), 0.0)
    """
    if direction is None:
        return _whole(model, x, lambdas, ("dH",), output_fn, memory)[0]
    result = ntk_derivatives(
        model, x, direction, lambdas=lambdas, derivatives=1, output_fn=output_fn, memory=memory, kernel=False
    )
    _warn(result)
    return result.dH


def ddntk(
    model: Model,
    x: Any,
    direction: Direction | None = None,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> DDNTK:
    """Compute the two ddNTKs, whole or contracted with a direction; errors as ``dntk``.

    Args:
        model: Any module.
        x: See ``ntk``.
        direction: See ``ntk_derivatives``; None for the whole tensors, which take (N C)^3 / 4 backward passes.
        lambdas: See ``ntk``.
        output_fn: See ``ntk``.
        memory: Bytes allowed.

    Returns:
        ddI and ddII, (N, N, N, N, C, C, C, C) each; contracted, (N, N, C, C) each.

    Warns:
        AlmostEverywhereWarning: If the network has kinks.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> ddI, ddII = measure.ddntk(torch.nn.Linear(2, 1), torch.eye(2), torch.ones(2, 1))
        >>> ddI.shape, float(ddII.abs().max())
        (torch.Size([2, 2, 1, 1]), 0.0)
    """
    if direction is None:
        return DDNTK(*_whole(model, x, lambdas, ("ddI", "ddII"), output_fn, memory))
    result = ntk_derivatives(model, x, direction, lambdas=lambdas, output_fn=output_fn, memory=memory, kernel=False)
    _warn(result)
    assert result.ddI is not None and result.ddII is not None
    return DDNTK(result.ddI, result.ddII)


def _warn(result: NTKDerivatives) -> None:
    """Warn of kinks; refuse what is no derivative, as a bare tensor says nothing of its validity."""
    if result.cut:
        raise ValueError(f"model: {no_derivatives(result.cut)}")
    caveat = almost_everywhere(result.kinked)
    if caveat is not None:
        warnings.warn(caveat, AlmostEverywhereWarning, stacklevel=3)


def _whole(
    model: Model,
    x: Any,
    lambdas: Mapping[str, float] | float | None,
    names: tuple[str, ...],
    output_fn: OutputFn | None,
    memory: int,
) -> list[Tensor]:
    """Reverse mode of reverse mode, then compared with jets in one direction."""
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        engine = JacobianGram(network, probe, lambdas, memory)
        with torch.no_grad():
            outputs = checked_output(network, probe)
        _check_memory(outputs, sum(network.params[name].numel() for name in engine.trainable), names, memory)
        stacked = {name: value[None] for name, value in network.params.items()}
        # Written out in the backward, too, where a checkpoint runs its part of the forward again.
        with derivatives_of_order(2 if names == ("dH",) else 3, network.origin), Decomposed():
            whole = differentials(
                lambda params: network({name: value[0] for name, value in params.items()}, engine.inputs)[None],
                stacked,
                engine.lambdas,
                names,
            )
        tensors = {name: getattr(whole, name)[0] for name in names}
        result = _check_in_one_direction(network, probe, lambdas, tensors, memory)
    _warn(result)
    return list(tensors.values())


def _check_memory(outputs: Tensor, parameters: int, names: tuple[str, ...], memory: int) -> None:
    M, size = outputs.numel(), outputs.element_size()
    needed = size * sum({"dH": M**3 + M * parameters}.get(name, M**4 + M**2 * parameters) for name in names)
    if needed > memory:
        raise MemoryLimitError(
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
) -> NTKDerivatives:
    """Refuse a tensor that the jets contradict; returns those in one direction."""
    like = next(iter(tensors.values()))
    generator = torch.Generator(device="cpu").manual_seed(0)
    e = torch.randn(like.shape[0], like.shape[-1], generator=generator, device="cpu").to(like)
    other = ntk_derivatives(network, probe, e, lambdas=lambdas, memory=memory)
    assert other.H is not None and other.ddII is not None
    eps = torch.finfo(like.dtype).eps
    scales = {"dH": (other.H.norm() * other.ddII.norm()) ** 0.5, "ddI": other.ddII.norm(), "ddII": other.ddII.norm()}
    for name, value in tensors.items():
        if name == "dH":
            contracted = torch.einsum("abcijk,ck->abij", value, e)
        else:
            contracted = torch.einsum("abcdijkl,ck,dl->abij", value, e, e)
        expected = getattr(other, name)
        # Half the digits, and roundings of |J_1| |J_0| or |J_1|^2 where products cancel.
        allowed = eps**0.5 * expected.norm() + 1e3 * eps * scales[name]
        if not bool((contracted - expected).norm() <= allowed):
            raise ValueError(
                f"model: its {name} cannot be trusted: reverse mode gives {float(contracted.norm()):.6g} in a random "
                f"direction, Taylor series {float(expected.norm()):.6g}"
            )
    return other
