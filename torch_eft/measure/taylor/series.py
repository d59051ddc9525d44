"""The network's function along its real trajectory, term by term in the displacement of the parameters (PDLT 0.5).

With d = theta - theta_0,

    f(theta) = f(theta_0) + f'(theta_0) d + f''(theta_0) d d / 2 + f'''(theta_0) d d d / 6 + remainder.

In the large-width counting f' d is O(1), the terms of order 2 and 3 are both O(1/n) and the remainder is O(1/n^2).
Jets give all terms in one forward pass; where an operation has no rule, repeated reverse mode along the line does.
"""

import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torch_eft.measure.forward.checks import check_differentiable_function
from torch_eft.measure.forward.isolation import IsolatedModel, Model, isolated
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn, Probe, as_probe
from torch_eft.measure.jets.jet import MAX_ORDER, NoJetRuleError, coefficients_of, lift, watch_kinks
from torch_eft.measure.jets.reverse import series_by_reverse_mode

JETS = "jets"
REVERSE = "reverse-over-reverse"


@dataclass(frozen=True)
class TaylorSeries:
    """The Taylor terms of a network's output and what they leave.

    Args:
        terms: (order + 1, N, C): f(theta_0), f' d, f'' d d / 2, f''' d d d / 6.
        value: (N, C), f(theta).
        remainder: (N, C), f(theta) minus the sum of the terms.
        method: ``"jets"``, or ``"reverse-over-reverse"`` where an operation has no rule for jets.
        cost: Time for the terms in units of one forward pass.
        kinked: Names of the operations with kinks or jumps that the terms went through.
        remarks: Limits of validity, in words.
    """

    terms: Tensor
    value: Tensor
    remainder: Tensor
    method: str
    cost: float
    kinked: tuple[str, ...]
    remarks: tuple[str, ...]


def taylor_terms(
    model: Model,
    params0: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    x: Any,
    order: int = 3,
    output_fn: OutputFn | None = None,
    check: bool | None = None,
) -> Tensor:
    """The terms f(theta_0), f' d, f'' d d / 2, f''' d d d / 6 of the output, d = params - params0; (order + 1, N, C).

    Args and errors as for ``taylor_series``.
    """
    return taylor_series(model, params0, params, x, order, output_fn, check).terms


def taylor_series(
    model: Model,
    params0: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    x: Any,
    order: int = 3,
    output_fn: OutputFn | None = None,
    check: bool | None = None,
) -> TaylorSeries:
    """The Taylor terms of the output about ``params0`` at ``params``, in evaluation mode, and their remainder.

    Args:
        model: Any module; its own parameters are not used but for their names, shapes, dtype and device.
        params0: theta_0, ``{name: tensor}`` for every trainable parameter.
        params: theta, likewise.
        x: A tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        order: Of the last term, 0 to 3.
        output_fn: Turns what the model returns into (N, C).
        check: Compare the terms of the jets, in one random direction of the output, with reverse mode, which is
            independent of their rules: always, never, or (None) the first time for this model, probe and order.

    Raises:
        ValueError: If the forward rejects ``x``, the output is not (N, C), parameters are missing, unknown or of
            another shape, the order is not 0 to 3, terms are not finite, or the check fails.
    """
    if not isinstance(order, int) or isinstance(order, bool) or not 0 <= order <= MAX_ORDER:
        raise ValueError(f"order: {order!r} given; it must be 0, 1, 2 or {MAX_ORDER}")
    probe = as_probe(x)
    with isolated(model, output_fn) as network:
        base = replace(network, params=_matched("params0", params0, network.params))
        moved = replace(network, params=_matched("params", params, network.params))
        direction = {name: moved.params[name] - value for name, value in base.params.items()}
        with torch.no_grad():
            passes = [_timed(moved, partial(checked_output, at, probe)) for at in (base, moved)]
        value, seconds = passes[1][0], min(spent for _, spent in passes)
        (terms, method, kinked, remarks), spent = _timed(moved, lambda: _terms(base, direction, probe, order))
        terms = terms.detach()
        _check_finite(terms, value)
        if method == JETS and order > 0:
            key = (probe.description, network.output_fn)
            seen = _checked.setdefault(network.origin, {})
            if check or (check is None and seen.get(key, 0) < order):
                remarks += _compare(base, direction, probe, terms)
                seen[key] = max(order, seen.get(key, 0))
    return TaylorSeries(
        terms=terms,
        value=value,
        remainder=value - terms.sum(0),
        method=method,
        cost=spent / seconds,
        kinked=kinked,
        remarks=(*_validity(order, kinked), *remarks),
    )


_checked: "weakref.WeakKeyDictionary[nn.Module, dict[Any, int]]" = weakref.WeakKeyDictionary()
"""The highest order that was compared with reverse mode, for every model and kind of probe."""


def _matched(argument: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the dtype and on the device of the model's."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{argument}: {type(given).__name__} given; give {{name: tensor}}")
    if not own:
        raise ValueError("model: it has no trainable parameter to expand in; set requires_grad on some")
    if set(given) != set(own):
        wrong = sorted(set(given) ^ set(own))[0]
        raise ValueError(
            f"{argument}: {wrong!r} is {'missing' if wrong in own else 'no trainable parameter'}; name every "
            "trainable parameter once"
        )
    for name, value in own.items():
        if not isinstance(given[name], Tensor) or given[name].shape != value.shape:
            found = tuple(given[name].shape) if isinstance(given[name], Tensor) else type(given[name]).__name__
            raise ValueError(f"{argument}: {found} given for {name!r}; the model's is {tuple(value.shape)}")
    return {name: given[name].detach().to(value) for name, value in own.items()}


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
    check_differentiable_function(base, base.place(probe))  # which jets would have found out
    with watch_kinks() as kinks:
        terms = series_by_reverse_mode(base, direction, probe, order)
    return terms, REVERSE, tuple(kinks), (f"computed by {REVERSE} differentiation: {reason}",)


def _by_jets(base: IsolatedModel, direction: Mapping[str, Tensor], probe: Probe, order: int) -> Tensor:
    jets: dict[str, Tensor] = {name: lift(value, direction[name], order) for name, value in base.params.items()}
    output = base(jets, tree_map_only(Tensor, torch.clone, base.place(probe)))
    value, *higher = coefficients_of(output, order)
    assert value is not None
    return torch.stack([value, *[torch.zeros_like(value) if part is None else part for part in higher]])


def _compare(base: IsolatedModel, direction: Mapping[str, Tensor], probe: Probe, terms: Tensor) -> tuple[str, ...]:
    """Terms by jets against reverse mode in one random direction; a remark where the latter is not to be had.

    Raises:
        ValueError: If they differ.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    pattern = torch.randn(terms.shape[1:], generator=generator, device="cpu").to(terms)
    order = len(terms) - 1
    try:
        expected = series_by_reverse_mode(base, direction, probe, order, pattern)
    except ValueError as error:
        return (f"not checked against reverse mode: {error}",)
    found = (terms * pattern).sum((1, 2))
    # A third of the digits: a wrong rule is wrong by much more, and third derivatives amplify rounding.
    tolerance = torch.finfo(terms.dtype).eps ** (1 / 3) * (terms * pattern).abs().sum((1, 2))
    floor = 1e3 * torch.finfo(terms.dtype).eps * (terms[0] * pattern).abs().sum()
    wrong = (found - expected).abs() > tolerance + floor
    for degree, (is_wrong, a, b) in enumerate(zip(wrong.tolist(), found.tolist(), expected.tolist(), strict=True)):
        if is_wrong:
            raise ValueError(
                f"model: the Taylor term of order {degree} is {a:.6g} by jets and {b:.6g} by reverse mode in one "
                "direction of the output, so one of them is wrong; please report the operations of this model"
            )
    return ()


def _check_finite(terms: Tensor, value: Tensor) -> None:
    if terms.device.type == "meta":
        return
    finite = [*torch.isfinite(terms).all((1, 2)), torch.isfinite(value).all()]
    *orders, at_end = torch.stack(finite).tolist()
    if not at_end:
        raise ValueError("params: the output there is not finite")
    for degree, is_finite in enumerate(orders):
        if not is_finite:
            raise ValueError(
                f"params0: the Taylor term of order {degree} is not finite; parameters contain NaN or infinite "
                "values, or an operation has no derivative there (a square root at 0)"
            )


def _validity(order: int, kinked: tuple[str, ...]) -> tuple[str, ...]:
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


@dataclass(frozen=True)
class TaylorSizes:
    """Norms over probe and outputs, relative to ||f - f_0||.

    Args:
        change: ||f - f_0|| itself.
        terms: Of the terms of order 1, 2, ..
        left: What is left after the terms up to order 1, 2, ..
        rounding: About what rounding alone leaves.
    """

    change: float
    terms: tuple[float, ...]
    left: tuple[float, ...]
    rounding: float

    def orders_needed(self, tolerance: float) -> int:
        """The fewest terms that leave at most ``tolerance``; one more than there are if none do."""
        return next((k for k, left in enumerate(self.left, start=1) if left <= tolerance), len(self.left) + 1)


def taylor_sizes(series: TaylorSeries) -> TaylorSizes | None:
    """The sizes of a series' terms; None where outputs have not moved."""
    moved = series.value - series.terms[0]
    partial = series.terms[1:].cumsum(0)
    scale = series.value.norm() + series.terms[1:].flatten(1).norm(dim=1).sum()
    numbers = torch.cat(
        [
            torch.stack([moved.norm(), scale]),
            series.terms[1:].flatten(1).norm(dim=1),
            (moved - partial).flatten(1).norm(dim=1),
        ]
    ).tolist()
    change, scale_of_sum, *rest = numbers
    if not change > 0 or not math.isfinite(change):
        return None
    count = len(rest) // 2
    # A forward's rounding is a few eps of its size; sums over layers make it some tens of eps.
    rounding = 32 * torch.finfo(series.value.dtype).eps * scale_of_sum / change
    return TaylorSizes(
        change,
        tuple(value / change for value in rest[:count]),
        tuple(value / change for value in rest[count:]),
        rounding,
    )
