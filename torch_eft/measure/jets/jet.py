"""Jets: tensors that carry their Taylor series, so that a network evaluated on them yields its own.

A ``Jet`` is a truncated series h(s) = h_0 + h_1 s + ... + h_k s^k, k <= 3, whose coefficients are tensors of one
shape. It can be used as a tensor: as an input or a parameter of any module,

    theta = {name: jet((p, v[name], None, None)) for name, p in params.items()}
    terms = functional_call(model, theta, (x,)).coefficients      # f(theta), f' v, f'' v v / 2, f''' v v v / 6

A coefficient that is exactly zero is None and costs nothing. Every rule is made of differentiable operations on the
coefficients: reverse mode through the last one gives the gradients of directional derivatives. An operation with no
rule raises ``NoJetRuleError``, and nothing ever falls back on h_0 alone:

- Operations on jets where gradients are off (``torch.no_grad()``, the ``forward`` of an ``autograd.Function``) raise,
  since autograd would take their derivative as zero there, or from elsewhere. Detach the coefficients if no graph is
  wanted, and leave gradients on.
- What reaches torch's dispatcher past ``__torch_function__`` raises, as do ``item``, ``bool``, ``numpy`` and writing
  into a jet by index or through a view. Other in-place operations give the jet new coefficients.
- Comparisons are those of h_0 and constant; ``detach`` is the constant h_0.

Where a slope jumps (ReLU, a maximum, a comparison) derivatives are those almost everywhere; ``watch_kinks`` names such
operations.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_eft.measure.forward.decompositions import NORMS, WRITTEN_OUT, without_dispatch
from torch_eft.measure.jets.composed import COMPOSED
from torch_eft.measure.jets.kinked import KINKED_RULES
from torch_eft.measure.jets.linear import LINEAR_RULES, VIEWS
from torch_eft.measure.jets.names import COMPARISONS, CONSTANT, OF_THE_PRIMAL, SPACES, name_of
from torch_eft.measure.jets.series import NoJetRuleError, Series, note_kink, primal, watch_kinks
from torch_eft.measure.jets.smooth import SMOOTH_RULES

__all__ = ["MAX_ORDER", "Jet", "NoJetRuleError", "coefficients_of", "jet", "lift", "watch_kinks", "with_numbers_of"]

MAX_ORDER = 3


class Jet(Tensor):
    """A tensor with its Taylor series; made by ``jet`` or ``lift``."""

    _series: Series
    _family: list[weakref.ref["Jet"]] | None
    """All jets that are views of one tensor, this one included."""

    @staticmethod
    def __new__(cls, series: Series) -> "Jet":
        """Unchecked; ``jet`` checks."""
        first = primal(series)
        self = Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype, device=first.device)
        self._series, self._family = series, None
        return self

    @property
    def coefficients(self) -> tuple[Tensor | None, ...]:
        """(h_0, ..., h_k); None is exactly zero."""
        return tuple(self._series)

    @property
    def order(self) -> int:
        """The highest order k."""
        return len(self._series) - 1

    @property
    def primal(self) -> Tensor:
        """h_0."""
        return primal(self._series)

    # Read often, so past __torch_function__.
    shape = property(lambda self: self.primal.shape)
    dtype = property(lambda self: self.primal.dtype)
    device = property(lambda self: self.primal.device)
    ndim = property(lambda self: self.primal.ndim)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Jet(order {self.order}, {self.primal!r})"

    def __hash__(self) -> int:
        return id(self)

    def data_ptr(self) -> int:
        """Zero, as no storage holds a series: so the weights of recurrent layers are not flattened into one."""
        return 0

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply the rule of ``func``; raises ``NoJetRuleError`` if it has none."""
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            return _by_rule(func, rule, args, kwargs)
        if func in OF_THE_PRIMAL:
            return func(*_primals(args), **_primals(kwargs))
        if func in COMPARISONS or func in CONSTANT:
            _check_gradients_are_on(func)
            if func in COMPARISONS:
                note_kink(func.__name__.strip("_"))
            return func(*_primals(args), **_primals(kwargs)).detach()
        if func in _IN_PLACE:
            return _in_place(func, args, kwargs)
        written = COMPOSED.get(func) or WRITTEN_OUT.get(func) or without_dispatch(func)
        if written is None:
            raise NoJetRuleError(f"{name_of(func)}: it has no rule for Taylor series")
        try:
            value = written(*args, **kwargs)
        except NoJetRuleError as error:
            raise _naming(func, error) from error
        if value is None and func in WRITTEN_OUT:
            raise NoJetRuleError(f"{name_of(func)}: it cannot be written out with these arguments (training mode?)")
        if func in NORMS:
            with_numbers_of(value, func, *args, **kwargs)
        return value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Raises NoJetRuleError: nothing may see h_0 alone, such as a custom autograd.Function would."""
        raise NoJetRuleError(f"{func}: it was reached past the rules for Taylor series (a custom autograd.Function?)")


def jet(coefficients: Sequence[Tensor | None]) -> Jet:
    """Make a jet with the given coefficients.

    Args:
        coefficients: (h_0, ..., h_k), k <= 3, floating point and of one shape; None is exactly zero, but not for h_0.

    Returns:
        The jet.

    Raises:
        ValueError: If there are none or too many, or h_0 is None, or shapes differ.
        TypeError: If one is a jet itself, or h_0 is not floating point.
    """
    first = coefficients[0] if coefficients else None
    if first is None or len(coefficients) > MAX_ORDER + 1:
        raise ValueError(
            f"coefficients: {len(coefficients)} given; give h_0 to h_k with h_0 a tensor, k <= {MAX_ORDER}"
        )
    if any(isinstance(part, Jet) for part in coefficients) or not first.is_floating_point():
        raise TypeError("coefficients: they must be plain floating point tensors")
    if any(part is not None and part.shape != first.shape for part in coefficients):
        shapes = [None if part is None else tuple(part.shape) for part in coefficients]
        raise ValueError(f"coefficients: the shapes {shapes} differ; they must be the same")
    return Jet(Series(coefficients))


def with_numbers_of(value: Tensor, func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Put the very numbers of a fused operation into what it was written out as, whose gradients stay.

    Else both differ by rounding, and of a large network some unit behind it stands on the other side of its kink: its
    Jacobian is then another one than that of the network that trains.

    Args:
        value: The operation written out, a new tensor or jet.
        func: One of ``NORMS``.
        *args: Its arguments; of jets h_0 is taken.
        **kwargs: Likewise.
    """
    first = value.primal if isinstance(value, Jet) else value
    with torch.no_grad():
        fused = func(*_primals(args), **_primals(kwargs))
        if fused.shape == first.shape and fused.dtype == first.dtype:
            first.copy_(fused)


def lift(tensor: Tensor, tangent: Tensor | None, order: int) -> Jet:
    """The straight line ``tensor + s * tangent`` as a jet of the given order."""
    return jet((tensor, *[tangent, None, None][:order]))


def coefficients_of(x: Tensor, order: int) -> tuple[Tensor | None, ...]:
    """The coefficients of a jet up to ``order``; (x, None, ...) for a plain tensor."""
    given = x.coefficients if isinstance(x, Jet) else (x,)
    return (*given, *[None] * order)[: order + 1]


def _by_rule(func: Callable[..., Any], rule: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Unpack jets into series, apply the rule and pack its result."""
    _check_gradients_are_on(func)
    if kwargs.get("out") is not None:
        raise NoJetRuleError(f"{name_of(func)}: out= has no rule for Taylor series")
    met: list[Series] = []
    values = [_unpacked(value, met) for value in args]
    options = {name: _unpacked(value, met) for name, value in kwargs.items()}
    if not args and "input" in options:
        values = [options.pop("input")]
    if any(len(series) != len(met[0]) for series in met):
        raise ValueError(f"jets: orders {sorted({len(s) - 1 for s in met})} meet in {name_of(func)}; use one")
    try:
        if all(part is None for series in met for part in series[1:]):
            result = _constant(func, len(met[0]), values, options)
        else:
            result = rule(*values, **options)
    except NoJetRuleError as error:
        raise _naming(func, error) from error
    # Nothing was done (contiguous, to): then it is the same tensor, too.
    if args and isinstance(args[0], Jet) and result is args[0]._series:
        return args[0]
    packed = _packed(result)
    if func in VIEWS and isinstance(args[0], Jet):
        _join(args[0], packed)
    return packed


def _check_gradients_are_on(func: Callable[..., Any]) -> None:
    if not torch.is_grad_enabled():
        raise NoJetRuleError(
            f"{name_of(func)}: gradients are off here (torch.no_grad, or the forward of a custom autograd.Function), "
            "where the derivative of a Taylor series is not known"
        )


def _unpacked(value: Any, met: list[Series]) -> Any:
    if isinstance(value, Jet):
        met.append(value._series)
        return value._series
    if type(value) in (list, tuple):
        return type(value)([_unpacked(entry, met) for entry in value])
    return value


def _constant(func: Callable[..., Any], count: int, values: list[Any], options: dict[str, Any]) -> Any:
    """Apply ``func`` itself to series without higher coefficients."""

    def first(value: Any) -> Any:
        if isinstance(value, Series):
            return value[0]
        return type(value)([first(entry) for entry in value]) if type(value) in (list, tuple) else value

    def series(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Series([value, *[None] * (count - 1)])
        return type(value)([series(entry) for entry in value]) if isinstance(value, tuple | list) else value

    return series(func(*[first(value) for value in values], **{name: first(value) for name, value in options.items()}))


def _packed(value: Any) -> Any:
    if isinstance(value, Series):
        first = primal(value)
        if not first.is_floating_point():  # indices, or cast to integers
            return first
        return Jet(Series([first, *[_regular(part, first) for part in value[1:]]]))
    if isinstance(value, tuple | list):
        return type(value)([_packed(entry) for entry in value])
    return value


def _regular(part: Tensor | None, first: Tensor) -> Tensor | None:
    """A coefficient in the shape and dtype of h_0, whatever constants h_0 was combined with."""
    if part is None:
        return None
    if part.dtype != first.dtype:
        part = part.to(first.dtype)
    return part if part.shape == first.shape else part.expand(first.shape)


def _join(base: Jet, views: Any) -> None:
    """Record that ``views`` may share memory with ``base``, so that in-place operations on either are refused."""
    if base._family is None:
        base._family = [weakref.ref(base)]
    for view in views if isinstance(views, tuple | list) else [views]:
        if isinstance(view, Jet):
            view._family = base._family
            base._family.append(weakref.ref(view))


def _in_place(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Jet:
    """Give the first argument the coefficients of the out-of-place result."""
    target = args[0] if args else kwargs.get("input")
    if not isinstance(target, Jet):
        raise NoJetRuleError(f"{name_of(func)}: a Taylor series would be written into a plain tensor")
    alive = [entry for entry in (ref() for ref in target._family or ()) if entry is not None]
    if any(entry is not target for entry in alive):
        raise NoJetRuleError(f"{name_of(func)}: a Taylor series that has views, or is one, would be changed in place")
    value = _IN_PLACE[func](*args, **kwargs)
    if not isinstance(value, Jet) or value.shape != target.shape or value.dtype != target.dtype:
        raise NoJetRuleError(f"{name_of(func)}: it would change the shape or dtype of a Taylor series in place")
    target._series = value._series
    return target


def _naming(func: Callable[..., Any], error: NoJetRuleError) -> NoJetRuleError:
    """The error with the name of the operation that the caller wrote in front."""
    return NoJetRuleError(f"{name_of(func)}: {error}")


def _primals(values: Any) -> Any:
    if isinstance(values, Jet):
        return values.primal
    if isinstance(values, dict):
        return {name: _primals(value) for name, value in values.items()}
    return type(values)([_primals(value) for value in values]) if type(values) in (list, tuple) else values


_RULES = {**LINEAR_RULES, **SMOOTH_RULES, **KINKED_RULES}


def _in_place_operations() -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Every builtin ``name_`` beside a ``name`` with a rule."""
    for space in SPACES:
        for name in dir(space):
            if name.endswith("_") and not name.endswith("__"):
                plain = getattr(space, name[:-1], None)
                if plain in _RULES or plain in COMPOSED:
                    yield getattr(space, name), plain


_IN_PLACE = dict(_in_place_operations())
