"""Taylor terms of the network's function along its real trajectory, in the displacement of the parameters (PDLT 0.5).

With d = theta - theta_0,

    f(theta) = f(theta_0) + f'(theta_0) d + f''(theta_0) d d / 2 + f'''(theta_0) d d d / 6 + remainder.

In the large-width counting f' d is O(1), the terms of order 2 and 3 are both O(1/n) and the remainder is O(1/n^2).
Jets give all terms in one forward pass; where an operation has no rule, repeated reverse mode along the line does.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.checks import (
    NotFiniteError,
    check_differentiable_function,
    derivatives_are_trusted,
    differs_from_differences,
    reach_of,
)
from torch_eft.measure.forward.isolation import IsolatedModel, Model, Parameters, check_parameters, isolated
from torch_eft.measure.forward.kinks import bounded_norms, cut_operations
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jets.jet import MAX_ORDER, NoJetRuleError, coefficients_of, lift, watch_kinks
from torch_eft.measure.jets.reverse import projected_series_by_reverse_mode, series_by_reverse_mode
from torch_eft.results.presentation.repr import short_repr

JETS = "jets"
REVERSE = "reverse-over-reverse"

_log = logging.getLogger("torch_eft")
_compared: "WeakKeyDictionary[nn.Module, dict[Any, tuple[str, ...]]]" = WeakKeyDictionary()
"""What the forwards of modules leave out of their gradients, by order and kind of inputs, once that was compared."""


@dataclass(frozen=True, repr=False)
class TaylorSeries:
    """The Taylor terms of a network's output and their remainder.

    Args:
        terms: (order + 1, N, C): f(theta_0), f' d, f'' d d / 2, f''' d d d / 6.
        value: (N, C), f(theta).
        remainder: (N, C), f(theta) minus the sum of the terms.
        method: ``"jets"``, or ``"reverse-over-reverse"`` where an operation has no rule for jets.
        cost: Time for the terms in units of one forward pass.
        kinked: Names of the operations with kinks or jumps that the terms went through.
        remarks: Sentences on the limits of validity.
        cut: What the forward leaves out of its gradient: then the terms are no derivatives of the output.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(3, 2)
        >>> series = measure.taylor_series(model, torch.eye(3), model, model, taylor_order=1)
        >>> series.terms.shape, series.method, series.sizes() is None  # nothing has moved
        (torch.Size([2, 3, 2]), 'jets', True)
    """

    terms: Tensor
    value: Tensor
    remainder: Tensor
    method: str
    cost: float
    kinked: tuple[str, ...]
    remarks: tuple[str, ...]
    cut: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return short_repr(self)

    def sizes(self) -> "TaylorSizes | None":
        """The sizes of the terms relative to the change of the output; None if it has not moved."""
        moved = self.value - self.terms[0]
        higher = self.terms[1:]
        left = moved - higher.cumsum(0)
        norms = higher.flatten(1).norm(dim=1)
        numbers = [moved.norm()[None], (self.value.norm() + norms.sum())[None], norms, left.flatten(1).norm(dim=1)]
        change, scale, *rest = torch.cat(numbers).tolist()
        if not change > 0 or not math.isfinite(change):
            return None
        relative = [value / change for value in rest]
        # A forward's rounding is a few eps of its size; sums over layers make it some tens of eps.
        rounding = 32 * torch.finfo(self.value.dtype).eps * scale / change
        return TaylorSizes(change, tuple(relative[: len(higher)]), tuple(relative[len(higher) :]), rounding)


@dataclass(frozen=True)
class TaylorSizes:
    """Sizes of Taylor terms: norms over probe and outputs, relative to ||f - f_0||.

    At infinite width the term of order 1 is everything; at order 1/n those of order 2 and 3 appear together, and three
    terms leave O(1/n^2).

    Args:
        change: ||f - f_0|| itself.
        terms: Sizes of the terms of order 1, 2, ..
        left: Sizes of the remainder after the terms up to order 1, 2, ..
        rounding: Estimate of the remainder that rounding alone leaves.

    Example:
        >>> from torch_eft.measure import TaylorSizes
        >>> TaylorSizes(2.0, (0.9, 0.2, 0.01), (0.3, 0.04, 0.001), 1e-6).orders_needed(0.05)
        2
    """

    change: float
    terms: tuple[float, ...]
    left: tuple[float, ...]
    rounding: float

    def orders_needed(self, tolerance: float) -> int:
        """The smallest number of terms that leave at most ``tolerance``; one more than there are if none do."""
        return next((k for k, left in enumerate(self.left, start=1) if left <= tolerance), len(self.left) + 1)


def taylor_terms(
    model: Model,
    x: Any,
    theta_0: Parameters,
    theta: Parameters,
    *,
    taylor_order: int = 3,
    output_fn: OutputFn | None = None,
    check: bool = True,
) -> Tensor:
    """Compute the Taylor terms f(theta_0), f' d, f'' d d / 2, f''' d d d / 6 of the output, d = theta - theta_0.

    Args and errors as for ``taylor_series``.

    Returns:
        The terms, (taylor_order + 1, N, C).

    Raises:
        ValueError: Also where the forward leaves something out of its gradient (``TaylorSeries.cut``).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(3, 2)
        >>> theta = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> terms = measure.taylor_terms(model, torch.eye(3), model, theta)
        >>> terms.shape, bool(terms[2:].any())  # linear in its parameters
        (torch.Size([4, 3, 2]), False)
    """
    options: dict[str, Any] = {"taylor_order": taylor_order, "output_fn": output_fn, "check": check}
    series = taylor_series(model, x, theta_0, theta, **options)
    if series.cut:
        raise ValueError(f"model: {no_derivatives_of_output(series.cut)}")
    return series.terms


def taylor_sizes(
    model: Model,
    x: Any,
    theta_0: Parameters,
    theta: Parameters,
    *,
    taylor_order: int = 3,
    output_fn: OutputFn | None = None,
    check: bool = True,
) -> TaylorSizes | None:
    """Compute the sizes of the Taylor terms relative to the change of the output; None if it has not moved.

    Args and errors as for ``taylor_series``.

    Returns:
        The sizes.

    Raises:
        ValueError: Also where the forward leaves something out of its gradient (``TaylorSeries.cut``).

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Linear(3, 2).double()
        >>> theta = {name: 2 * p.detach() for name, p in model.named_parameters()}
        >>> sizes = measure.taylor_sizes(model, torch.eye(3), model, theta)
        >>> sizes.orders_needed(0.01)
        1
    """
    options: dict[str, Any] = {"taylor_order": taylor_order, "output_fn": output_fn, "check": check}
    series = taylor_series(model, x, theta_0, theta, **options)
    if series.cut:
        raise ValueError(f"model: {no_derivatives_of_output(series.cut)}")
    return series.sizes()


def taylor_series(
    model: Model,
    x: Any,
    theta_0: Parameters,
    theta: Parameters,
    *,
    taylor_order: int = 3,
    output_fn: OutputFn | None = None,
    check: bool = True,
) -> TaylorSeries:
    """Compute the Taylor terms of the output about theta_0 at theta, in evaluation mode, and their remainder.

    Args:
        model: Any module; its own parameters are not used but for their names, shapes, dtype and device.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        theta_0: Every trainable parameter at the point of expansion, ``{name: tensor}`` or a module that holds them.
        theta: Every trainable parameter at the end, likewise.
        taylor_order: Order of the last term, 0 to 3.
        output_fn: Turns what the model returns into (N, C).
        check: Compare the terms with central differences of outputs in float64: 10 forward passes at order 3.

    Returns:
        The terms and the remainder.

    Raises:
        ValueError: If the forward rejects ``x``, the output is not (N, C), parameters are missing, unknown or of
            another shape, the order is not 0 to 3, terms are not finite, or the check fails.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        >>> theta = {name: 1.01 * p.detach() for name, p in model.named_parameters()}
        >>> series = measure.taylor_series(model, torch.eye(3), model, theta)
        >>> series.terms.shape, bool(series.remainder.norm() < 1e-4 * series.terms[1].norm())
        (torch.Size([4, 3, 2]), True)
    """
    if not isinstance(taylor_order, int) or isinstance(taylor_order, bool) or not 0 <= taylor_order <= MAX_ORDER:
        raise ValueError(f"taylor_order: {taylor_order!r} given; it must be 0, 1, 2 or {MAX_ORDER}")
    check_parameters(theta_0=theta_0, theta=theta)
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        if not network.params:
            raise ValueError("model: it has no trainable parameter to expand in; set requires_grad on some")
        start, end = network.at(theta_0, "theta_0", every=True), network.at(theta, "theta", every=True)
        direction = {name: end.params[name] - value for name, value in start.params.items()}
        with torch.no_grad():
            passes = [_timed(end, partial(checked_output, at, probe)) for at in (start, end)]
        value, seconds = passes[1][0], min(spent for _, spent in passes)
        (terms, method, kinked, remarks), spent = _timed(end, lambda: _terms(start, direction, probe, taylor_order))
        terms = terms.detach()
        _check_finite(terms, value)
        cut = _checked_once(start, direction, probe, terms, bool(kinked)) if check else ()
        if cut:
            remarks = (no_derivatives_of_output(cut), *remarks)
    return TaylorSeries(
        terms=terms,
        value=value,
        remainder=value - terms.sum(0),
        method=method,
        cost=spent / seconds,
        kinked=kinked,
        remarks=(*_limits(taylor_order, kinked), *remarks),
        cut=cut,
    )


def no_derivatives_of_output(cut: tuple[str, ...]) -> str:
    """Return why the terms are not those of the output's own change."""
    return (
        "no derivatives: a part of the forward is cut from the gradient, or has a backward of its own "
        f"({', '.join(cut)}), so that the output need not change as the terms say; the remainder is what they leave of "
        "its change all the same"
    )


def _timed(network: IsolatedModel, compute: Callable[[], Any]) -> tuple[Any, float]:
    device = next(iter(network.params.values())).device
    _wait(device)
    start = time.perf_counter()
    result = compute()
    _wait(device)
    return result, max(time.perf_counter() - start, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _terms(
    base: IsolatedModel, direction: Mapping[str, Tensor], probe: Probe, order: int
) -> tuple[Tensor, str, tuple[str, ...], tuple[str, ...]]:
    """Terms, method, kinks and remarks."""
    try:
        with watch_kinks() as kinks:
            terms = _by_jets(base, direction, probe, order)
        return terms, JETS, tuple(kinks), ()
    except Exception as error:  # the plain forward has run: whatever it is, jets are the cause
        reason = str(error).splitlines()[0] if isinstance(error, NoJetRuleError) else f"{type(error).__name__}: {error}"
    check_differentiable_function(base, base.place(probe))  # jets would have refused such forwards by themselves
    with watch_kinks() as kinks:
        terms = series_by_reverse_mode(base, direction, probe, order)
    return terms, REVERSE, tuple(kinks), (f"computed by {REVERSE} differentiation: {reason}",)


def _by_jets(base: IsolatedModel, direction: Mapping[str, Tensor], probe: Probe, order: int) -> Tensor:
    jets: dict[str, Tensor] = {name: lift(value, direction[name], order) for name, value in base.params.items()}
    output = base(jets, tree_map_only(Tensor, torch.clone, base.place(probe)))
    value, *higher = coefficients_of(output, order)
    assert value is not None
    return torch.stack([value, *[torch.zeros_like(value) if part is None else part for part in higher]])


def _checked_once(
    base: IsolatedModel, direction: Mapping[str, Tensor], probe: Probe, terms: Tensor, kinked: bool
) -> tuple[str, ...]:
    """As ``_checked``, which is not done again where derivatives are trusted."""
    known = _compared.setdefault(base.origin, {})
    key = len(terms), kinked, probe.description
    if derivatives_are_trusted() and key in known:
        return known[key]
    cut = _checked(base, direction, probe, terms, kinked)
    if reach_of(base.params, direction) < math.inf:  # else nothing has moved, and nothing was compared
        known[key] = cut
    return cut


def _checked(
    base: IsolatedModel, direction: Mapping[str, Tensor], probe: Probe, terms: Tensor, kinked: bool
) -> tuple[str, ...]:
    """Compare terms with central differences of outputs; where they differ, with reverse mode.

    Args:
        base: The network at theta_0.
        direction: d, for every trainable parameter.
        probe: Inputs.
        terms: (order + 1, N, C).
        kinked: Whether the forward has kinks: differences of order 2 and 3 go across them.

    Returns:
        What the forward leaves out of its gradient, if differences show that it does.

    Raises:
        ValueError: If the terms are wrong.
    """
    reach = reach_of(base.params, direction)
    if not reach < math.inf or terms.device.type == "meta":
        return ()
    wide = base.bound(None, torch.float64)
    inputs = wide.place(probe)

    def outputs(s: float) -> list[Tensor]:
        moved = {name: value + s * direction[name].double() for name, value in wide.params.items()}
        with torch.no_grad():
            return [wide(moved, tree_map_only(Tensor, torch.clone, inputs))]

    eps = torch.finfo(terms.dtype).eps
    doubtful, differs = [], False
    for order in range(1, len(terms)):
        found, verdict = [terms[order].double()], None
        if order == 1 or not kinked:  # else they would go across kinks
            verdict = differs_from_differences(found, order, outputs, reach, eps, kinked)
        if verdict is not False:
            doubtful.append(order)
            differs |= bool(verdict)
    bounded = bounded_norms(base)
    if bounded or not doubtful:
        return bounded
    cut = cut_operations(base, base.place(probe))
    try:
        _compare(base, direction, probe, terms, doubtful)
    except ValueError:
        if cut:  # a gradient of its own: neither need be the derivative
            return cut
        raise
    if not differs:
        return ()
    return cut if cut or kinked else ("an operation that is not seen",)


def _compare(
    base: IsolatedModel, direction: Mapping[str, Tensor], probe: Probe, terms: Tensor, orders: Sequence[int]
) -> None:
    """Compare terms with reverse mode in one random direction of the output, where that is possible.

    Args:
        base: The network at theta_0.
        direction: d, for every trainable parameter.
        probe: Inputs.
        terms: (order + 1, N, C), by jets.
        orders: Which of them.

    Raises:
        ValueError: If they differ.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    pattern = torch.randn(terms.shape[1:], generator=generator, device="cpu").to(terms)
    try:
        expected = projected_series_by_reverse_mode(base, direction, probe, max(orders), pattern)
    except ValueError as error:
        _log.info("torch_eft: terms not compared with reverse mode: %s", error)
        return
    terms = terms[: len(expected)]
    by_jets = (terms * pattern).sum((1, 2))
    # A third of the digits: a wrong rule is wrong by much more, and third derivatives amplify rounding.
    tolerance = torch.finfo(terms.dtype).eps ** (1 / 3) * (terms * pattern).abs().sum((1, 2))
    floor = 1e3 * torch.finfo(terms.dtype).eps * (terms[0] * pattern).abs().sum()
    wrong = (by_jets - expected).abs() > tolerance + floor
    for degree, (is_wrong, a, b) in enumerate(zip(wrong.tolist(), by_jets.tolist(), expected.tolist(), strict=True)):
        if is_wrong:
            raise ValueError(
                f"model: the Taylor term of order {degree} is {a:.6g} by jets and {b:.6g} by reverse mode in one "
                "direction of the output, so one of them is wrong; please report the operations of this model"
            )


def _check_finite(terms: Tensor, value: Tensor) -> None:
    if terms.device.type == "meta":
        return
    finite = [*torch.isfinite(terms).all((1, 2)), torch.isfinite(value).all()]
    *orders, at_end = torch.stack(finite).tolist()
    if not at_end:
        raise NotFiniteError("theta: the output there is not finite")
    for degree, is_finite in enumerate(orders):
        if not is_finite:
            raise NotFiniteError(
                f"theta_0: the Taylor term of order {degree} is not finite; parameters contain NaN or infinite "
                "values, or an operation has no derivative there (a square root at 0)"
            )


def _limits(order: int, kinked: tuple[str, ...]) -> tuple[str, ...]:
    remarks = []
    if order == 2:
        remarks.append(
            "order 2 alone is not a consistent improvement on order 1: the terms of order 2 and 3 are both O(1/n)"
        )
    if order >= 2 and kinked:
        remarks.append(
            f"almost everywhere: the network has kinks ({', '.join(kinked)}), whose contribution no Taylor term "
            "contains; the terms of order 2 and 3 do not improve on order 1, and the remainder shows what is missing"
        )
    return tuple(remarks)
