"""Changes of outputs and NTK over a displacement of the parameters, realized and by derivatives at its start.

With d = theta - theta_0, the real displacement (of any optimizer), and J = J_0 + s J_1 + s^2 J_2 + .. along
theta_0 + s d,

    f(theta) - f(theta_0) = f' d + f'' d d / 2 + f''' d d d / 6 + O(d^4),
    H(theta) - H(theta_0) = (J_1 lambda J_0^T + transpose) + (J_2 lambda J_0^T + transpose + J_1 lambda J_1^T) + O(d^3).

For a step of gradient descent, d = - eta lambda J^T e, the first terms are -eta H e and the dNTK, - eta (dH e + its
transpose), the second ones dH e e and the ddNTKs (PDLT 11.1 and chapter infinity): outputs with the NTK frozen are of
order 0 in 1/n, everything else here is of order 1/n.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.isolation import Model, Parameters, check_parameters, isolated
from torch_eft.measure.forward.probe import OutputFn, as_probe
from torch_eft.measure.jacobian.engine import DEFAULT_MEMORY
from torch_eft.measure.jacobian.plan import checked_lambdas
from torch_eft.measure.kernels.dntk import NTKDerivatives, derivatives_validity, ntk_derivatives
from torch_eft.measure.kernels.ntk import ntk as ntk_of
from torch_eft.measure.kernels.products import NTKOperator
from torch_eft.measure.taylor.series import taylor_series
from torch_eft.results.presentation.repr import short_repr
from torch_eft.results.trajectory import Validity


@dataclass(frozen=True, repr=False)
class DisplacementTerms:
    """Realized changes over a displacement, and their terms by derivatives at its start.

    Args:
        output: (N, C), at the start.
        output_change: (N, C), realized.
        output_terms: (3, N, C): f' d, f'' d d / 2, f''' d d d / 6.
        ntk: At the start, (N, N, C, C) or (N, N); None if it was not asked for.
        ntk_change: Realized.
        ntk_terms: (1 or 2, ...): from dNTK, and from the ddNTKs.
        kinked: Operations with kinks, whose crossings no term contains.
        frozen_moved: |d| of the parameters with lambda = 0, relative to |d|: the NTK's terms leave them out.
        cut: What the forward leaves out of its gradient: then the terms are no derivatives.

    Example:
        >>> import torch
        >>> from torch_eft.measure import DisplacementTerms
        >>> z = torch.zeros(4, 2)
        >>> terms = DisplacementTerms(z, z, torch.zeros(3, 4, 2), None, None, None, ("relu in '1'",), 0.0)
        >>> terms.validity.flag
        'caution'
    """

    output: Tensor
    output_change: Tensor
    output_terms: Tensor
    ntk: Tensor | None
    ntk_change: Tensor | None
    ntk_terms: Tensor | None
    kinked: tuple[str, ...]
    frozen_moved: float
    cut: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return short_repr(self)

    @property
    def validity(self) -> Validity:
        """Effects that the terms leave out: crossings of kinks, and parameters with lambda = 0 that moved."""
        smooth = derivatives_validity(self.kinked, self.cut)
        if self.frozen_moved == 0 or self.cut:
            return smooth
        text = f"{100 * self.frozen_moved:.2g} % of the displacement is of parameters with lambda = 0"
        return Validity("caution", (*smooth.reasons, text), {"frozen_moved": self.frozen_moved})


def displacement_terms(
    model: Model,
    x: Any,
    theta_0: Parameters,
    theta: Parameters,
    *,
    lambdas: Mapping[str, float] | float | None = None,
    derivatives: int = 2,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    kernels: tuple[Tensor, Tensor] | None = None,
    ntk: bool = True,
    memory: int = DEFAULT_MEMORY,
) -> DisplacementTerms:
    """Measure the changes of outputs and NTK from theta_0 to theta, realized and by derivatives at theta_0.

    Args:
        model: Any module, in evaluation mode; its own parameters are not used.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        theta_0: Every trainable parameter at the start, ``{name: tensor}`` or a module that holds them.
        theta: Every trainable parameter at the end, likewise.
        lambdas: The learning-rate tensor, see ``measure.ntk``.
        derivatives: 1: the NTK's change by dNTK; 2: by the ddNTKs as well.
        trace: Average the NTK over outputs.
        output_fn: Turns what the model returns into (N, C).
        kernels: H at theta_0 and at theta, where they are known.
        ntk: False leaves the NTK out.
        memory: Bytes allowed, see ``measure.ntk``.

    Returns:
        Changes and terms.

    Raises:
        ValueError: As ``taylor_series`` and ``ntk_derivatives``; if ``derivatives`` is not 1 or 2.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(3, 2, bias=False)  # linear in its parameters: the first term is all
        >>> terms = measure.displacement_terms(model, torch.eye(3), model, {"weight": torch.zeros(2, 3)})
        >>> torch.allclose(terms.output_change, terms.output_terms[0]), terms.ntk_terms.norm()
        (True, tensor(0.))
    """
    if derivatives not in (1, 2):
        raise ValueError(f"derivatives: {derivatives!r} given; 1 is dNTK, 2 is dNTK and ddNTK")
    check_parameters(theta_0=theta_0, theta=theta)
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        series = taylor_series(network, probe, theta_0, theta)
        start, end = network.at(theta_0, "theta_0"), network.at(theta, "theta")
        d = {name: end.params[name] - value for name, value in start.params.items()}
        H = change = terms = None
        kinked, cut = series.kinked, series.cut
        if ntk:
            if kernels is None:
                H, H_end = (ntk_of(at, probe, lambdas=lambdas, trace=trace, memory=memory) for at in (start, end))
            else:
                H, H_end = (value.to(next(iter(d.values())).device) for value in kernels)
            measured = ntk_derivatives(
                start,
                probe,
                d,
                lambdas=lambdas,
                derivatives=derivatives,
                trace=H.ndim == 2,
                memory=memory,
                kernel=False,
            )
            kinked = tuple(dict.fromkeys((*kinked, *measured.kinked)))
            cut = tuple(dict.fromkeys((*cut, *measured.cut)))
            change, terms = H_end - H, _ntk_terms(measured)
        squares = {name: value.double().square() for name, value in d.items()}
        whole = torch.stack([square.sum() for square in squares.values()]).sum()
        if isinstance(lambdas, Mapping):  # numbers, or tensors with a number for every number
            held = [square * (torch.as_tensor(lambdas[name]).to(square) == 0) for name, square in squares.items()]
            left = torch.stack([square.sum() for square in held]).sum()
        else:
            left = torch.zeros_like(whole)
        share = float((left / whole.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
    return DisplacementTerms(
        series.terms[0], series.value - series.terms[0], series.terms[1:], H, change, terms, kinked, share, cut
    )


def _ntk_terms(measured: NTKDerivatives) -> Tensor:
    """The NTK's change of order 1 and, where it is known, 2 in the displacement, (1 or 2, ...)."""
    terms = [_symmetrized(measured.dH)]
    if measured.ddI is not None and measured.ddII is not None:
        terms.append(_symmetrized(measured.ddI) / 2 + measured.ddII)
    return torch.stack(terms)


def _symmetrized(dH: Tensor) -> Tensor:
    """dH_{ij;ab} + dH_{ji;ba}: the NTK's own rate of change, of a one-sided dNTK (N, N, C, C) or (N, N)."""
    return dH + (dH.transpose(0, 1) if dH.ndim == 2 else dH.permute(1, 0, 3, 2))


@dataclass(frozen=True, repr=False)
class RelativeDNTK:
    """Sizes of dNTK and ddNTK relative to the NTK along one direction v, in units in which the length of v drops out.

    Along v, outputs move by J v and the NTK by dH v + its transpose, then by half of ddI v v + its transpose +
    2 ddII v v. Divided by ||H|| and by powers of the rms motion of the outputs, both say how much the NTK changes while
    the outputs of the probe move by one unit: of order 1/n at width n, 0 at infinite width.

    Args:
        dntk: (||dH v + transpose|| / ||H||) / (||J v|| / sqrt(N C)).
        ddntk: (||ddI v v + transpose + 2 ddII v v|| / (2 ||H||)) / (||J v||^2 / N C); None if not asked for.
        validity: Caution where the network has kinks.

    Example:
        >>> from torch_eft import Validity
        >>> from torch_eft.measure import RelativeDNTK
        >>> RelativeDNTK(0.1, None, Validity("valid", "the derivatives of a smooth network"))
        RelativeDNTK(
          dntk: 0.1
          validity: valid: the derivatives of a smooth network
        )
    """

    dntk: float
    ddntk: float | None
    validity: Validity

    def __repr__(self) -> str:
        return short_repr(self)


def relative_dntk(
    model: Model,
    x: Any,
    gradient: Mapping[str, Tensor],
    *,
    theta: Parameters | None = None,
    lambdas: Mapping[str, float] | float | None = None,
    derivatives: int = 2,
    trace: bool = False,
    output_fn: OutputFn | None = None,
    memory: int = DEFAULT_MEMORY,
) -> RelativeDNTK | None:
    """Measure the sizes of dNTK and ddNTK along v = lambda times a gradient.

    Raises ``ValueError`` as ``ntk_derivatives``.

    Args:
        model: Any module, in evaluation mode.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        gradient: ``{name: tensor}`` for every trainable parameter, of any scale.
        theta: Parameters, ``{name: tensor}`` or a module that holds them; None, or one left out, is the model's own.
        lambdas: The learning-rate tensor, see ``measure.ntk``.
        derivatives: 1 (dNTK) or 2 (ddNTK as well).
        trace: Average kernels over outputs.
        output_fn: Turns what the model returns into (N, C).
        memory: Bytes allowed, see ``measure.ntk``.

    Returns:
        The sizes, or None where the direction moves no output.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(3, 2)  # linear in its parameters: the NTK is constant
        >>> gradient = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> measure.relative_dntk(model, torch.eye(3), gradient).dntk
        0.0
    """
    check_parameters(gradient=gradient, theta={} if theta is None else theta)
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        at = network if theta is None else network.at(theta)
        scales = checked_lambdas(at, lambdas)
        v = {name: g * scales.get(name, 0.0) for name, g in at.complete(gradient, "gradient").items()}
        # The length drops out: a unit vector keeps the numbers away from overflow.
        size = torch.stack([value.norm() for value in v.values()]).norm()
        if not float(size) > 0:
            return None
        v = {name: value / size for name, value in v.items()}
        measured = ntk_derivatives(at, probe, v, lambdas=lambdas, derivatives=derivatives, trace=trace, memory=memory)
        assert measured.H is not None
        operator = NTKOperator(at, probe, lambdas)
        norms = [operator.jvp(v).norm(), measured.H.norm(), *(term.norm() for term in _ntk_terms(measured))]
        motion, H, first, *second = torch.stack(norms).tolist()
    if not (motion > 0 and H > 0):
        return None
    rms = motion / operator.outputs.numel() ** 0.5
    return RelativeDNTK(first / H / rms, second[0] / H / rms**2 if second else None, measured.validity)
