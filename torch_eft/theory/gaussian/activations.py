"""Activations as the theory sees them: a scalar function, its derivatives, its symmetries.

The registry holds the activations with a name; ``register_activation`` adds to it, and
every place that takes an activation also takes a callable.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from numpy.polynomial import Polynomial
from torch import Tensor
from torch.nn import functional as F

from torch_eft.results.choices import check_choice


@dataclass(frozen=True, repr=False)
class Activation:
    """An elementwise activation sigma(z).

    Args:
        name: The name under which it is known, e.g. in reports.
        function: sigma, elementwise on a tensor of any shape and floating dtype.
        slopes: ``(negative, positive)`` for sigma(z) = slope * z on either side of zero
            (linear, ReLU, leaky ReLU, absolute value), the scale-invariant class of
            PDLT 2.2; Gaussian expectations then have closed forms. None otherwise.
        kinks: Where sigma or a derivative of it jumps, e.g. ``(0.0,)`` for ELU, whose second derivative does.
            Between them sigma is smooth. Two different ``slopes`` imply ``(0.0,)``.
        derivative: ``derivative(z, order)`` in closed form, for any order from 1 on; None takes automatic
            differentiation, which costs several times as much.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> square = theory.Activation("square", torch.square)
        >>> square(torch.tensor([1.0, 2.0]), order=1)
        tensor([2., 4.])
    """

    name: str
    function: Callable[[Tensor], Tensor]
    slopes: tuple[float, float] | None = None
    kinks: tuple[float, ...] = ()
    derivative: Callable[[Tensor, int], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.slopes is not None:
            object.__setattr__(self, "kinks", () if self.slopes[0] == self.slopes[1] else (0.0,))

    def __repr__(self) -> str:
        kinks = f", kinks={self.kinks}" if self.kinks else ""
        return f"Activation({self.name!r}{kinks})"

    def stored_as(self) -> str:
        """Return what stands for it in a file: its name, by which it is registered.

        Raises:
            TypeError: If it is not.
        """
        if _REGISTRY.get(self.name) is not self:
            raise TypeError(f"activation: {self.name!r} is a function, which files do not hold; register_activation it")
        return self.name

    @classmethod
    def from_stored(cls, name: str) -> "Activation":
        """Return the activation that a file names."""
        return get_activation(name)

    @property
    def kinked(self) -> bool:
        """True if sigma or a derivative of it is known to jump somewhere."""
        return bool(self.kinks)

    def sides(self, order: int, kink: float = 0.0) -> tuple[float, float]:
        """The derivative of the given order on the left and on the right of ``kink``."""
        step = 1e-15 * max(1.0, abs(kink))
        left, right = self(torch.tensor([kink - step, kink + step], dtype=torch.float64, device="cpu"), order).tolist()
        return left, right

    def jump(self, order: int, kink: float = 0.0) -> float:
        """The jump of the derivative of the given order at ``kink``, right minus left; 0 where it is rounding."""
        left, right = self.sides(order, kink)
        return right - left if abs(right - left) > 1e-12 * (1.0 + abs(left) + abs(right)) else 0.0

    def __call__(self, z: Tensor, order: int = 0) -> Tensor:
        """Evaluate sigma, or its derivative of the given order, at every entry of a tensor.

        Derivatives without a closed form come from automatic differentiation. At a kink that is a one-sided or
        averaged slope, and derivatives of order >= 2 are those almost everywhere.

        Args:
            z: Any shape and floating dtype.
            order: Of the derivative; 0 is sigma itself.

        Returns:
            Same shape and dtype as ``z``.

        Raises:
            ValueError: If automatic differentiation does not reach the order.
        """
        if order == 0:
            with torch.no_grad():
                return self.function(z)
        if self.derivative is not None:
            with torch.no_grad():
                return self.derivative(z, order)
        with torch.inference_mode(False), torch.enable_grad():
            point = z.detach().clone().requires_grad_()
            value = self.function(point)
            for level in range(order):
                if not value.requires_grad:  # the previous derivative is constant, or claims to be
                    _check_constant(self, level)
                    return torch.zeros_like(z)
                try:
                    (value,) = torch.autograd.grad(value.sum(), point, create_graph=True, materialize_grads=True)
                except (RuntimeError, NotImplementedError) as error:
                    raise ValueError(
                        f"activation: {self.name} has no derivative of order {order} by automatic differentiation "
                        f"({error}); write it in differentiable torch operations"
                    ) from error
        return torch.zeros_like(z) if value._is_zerotensor() else value.detach()


ActivationLike: TypeAlias = str | Activation | Callable[[Tensor], Tensor]


@lru_cache
def _check_constant(activation: Activation, order: int) -> None:
    """Check that a derivative without a graph is constant almost everywhere, and not cut off from its inputs.

    Raises:
        ValueError: If it varies, as with a custom backward that cannot be differentiated.
    """
    z = torch.linspace(-2.9, 2.8, 64, dtype=torch.float64, device="cpu")
    if float((activation(z, order) != activation(z + 1e-4, order)).double().mean()) > 0.25:
        raise ValueError(
            f"activation: {activation.name} has no derivative of order {order + 1} by automatic differentiation "
            f"(its derivative of order {order} varies without a graph); write it in differentiable torch operations"
        )


def leaky_relu(negative_slope: float) -> Activation:
    """Leaky ReLU of any slope.

    Args:
        negative_slope: sigma(z) = ``negative_slope * z`` for z <= 0, and z for z > 0.

    Returns:
        The activation.

    Example:
        >>> from torch_eft import theory
        >>> theory.leaky_relu(0.2).slopes
        (0.2, 1.0)
    """
    return Activation(
        f"leaky_relu({negative_slope:g})",
        lambda z: F.leaky_relu(z, negative_slope),
        slopes=(float(negative_slope), 1.0),
    )


def _elu(z: Tensor) -> Tensor:
    return torch.where(z > 0, z, torch.expm1(z.clamp_max(0.0)))


def _selu(z: Tensor) -> Tensor:
    return _SELU_SCALE * torch.where(z > 0, z, _SELU_ALPHA * torch.expm1(z.clamp_max(0.0)))


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
"""Klambauer et al. 2017, with torch's digits."""


def _tanh_derivative(z: Tensor, order: int) -> Tensor:
    """(1 - t^2) Q(t) with t = tanh z."""
    t = torch.tanh(z)
    return (1 - t * t) * _value(_tanh_factor(order), t)


@lru_cache
def _tanh_factor(order: int) -> Polynomial:
    """Q_1 = 1 and Q_{k+1} = (1 - t^2) Q_k' - 2 t Q_k."""
    if order == 1:
        return Polynomial([1.0])
    before = _tanh_factor(order - 1)
    return Polynomial([1.0, 0.0, -1.0]) * before.deriv() - Polynomial([0.0, 2.0]) * before


def _gelu_derivative(z: Tensor, order: int) -> Tensor:
    """Phi + z phi, then phi(z) R(z)."""
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    if order == 1:
        return 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0))) + z * density
    return density * _value(_gelu_factor(order), z)


@lru_cache
def _gelu_factor(order: int) -> Polynomial:
    """R_2 = 2 - z^2 and R_{k+1} = R_k' - z R_k."""
    if order == 2:
        return Polynomial([2.0, 0.0, -1.0])
    before = _gelu_factor(order - 1)
    return before.deriv() - Polynomial([0.0, 1.0]) * before


def _value(polynomial: Polynomial, x: Tensor) -> Tensor:
    *lower, highest = polynomial.coef.tolist()
    total = torch.full_like(x, highest)
    for coefficient in reversed(lower):
        total = total * x + coefficient
    return total


_REGISTRY: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("linear", lambda z: z * 1.0, slopes=(1.0, 1.0)),
        Activation("relu", torch.relu, slopes=(0.0, 1.0)),
        Activation("leaky_relu", leaky_relu(0.01).function, slopes=(0.01, 1.0)),
        Activation("tanh", torch.tanh, derivative=_tanh_derivative),
        Activation("erf", torch.erf),
        Activation("sin", torch.sin),
        Activation("gelu", lambda z: 0.5 * z * (1.0 + torch.erf(z / math.sqrt(2.0))), derivative=_gelu_derivative),
        Activation("gelu_tanh", lambda z: F.gelu(z, approximate="tanh")),
        Activation("silu", F.silu),
        Activation("softplus", lambda z: torch.logaddexp(z, torch.zeros_like(z))),
        Activation("sigmoid", torch.sigmoid),
        Activation("abs", torch.abs, slopes=(-1.0, 1.0)),
        Activation("arctan", torch.arctan),
        Activation("cos", torch.cos),
        Activation("mish", lambda z: z * torch.tanh(torch.logaddexp(z, torch.zeros_like(z)))),
        Activation("elu", _elu, kinks=(0.0,)),
        Activation("selu", _selu, kinks=(0.0,)),
        Activation("softsign", lambda z: z / (1.0 + z.abs()), kinks=(0.0,)),
        Activation("hardswish", lambda z: z * (z + 3.0).clamp(0.0, 6.0) / 6.0, kinks=(-3.0, 3.0)),
    )
}


def available_activations() -> tuple[str, ...]:
    """The names that ``get_activation`` knows, sorted.

    Returns:
        The names.

    Example:
        >>> from torch_eft import theory
        >>> {"gelu", "relu", "tanh"} <= set(theory.available_activations())
        True
    """
    return tuple(sorted(_REGISTRY))


def register_activation(activation: Activation) -> None:
    """Make an activation available under its name.

    Args:
        activation: The activation.

    Raises:
        ValueError: If the name is taken, in any case.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> theory.register_activation(theory.Activation("cube", lambda z: z**3))
        >>> theory.get_activation("Cube")(torch.tensor(2.0))
        tensor(8.)
    """
    if _registered(activation.name) is not None:
        raise ValueError(f"activation: the name {activation.name!r} is taken; choose another one")
    _REGISTRY[activation.name] = activation


def get_activation(activation: ActivationLike) -> Activation:
    """The activation of a given name or function.

    Raises ``ValueError`` if the name is unknown.

    Args:
        activation: A registered name, in any case and with or without underscores (``"ReLU"``, ``"LeakyReLU"``); an
            ``Activation``; or any elementwise function.

    Returns:
        The ``Activation``.

    Raises:
        TypeError: If it is a class, or neither a name nor callable.

    Example:
        >>> from torch_eft import theory
        >>> theory.get_activation("Tanh")
        Activation('tanh')
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        known = _registered(activation)
        if known is not None:
            return known
        check_choice("activation", activation, available_activations(), "an elementwise function of a tensor")
    if isinstance(activation, type):
        name = activation.__name__
        raise TypeError(f"activation: the class {name} given; give an instance, {name}(), or its name, {name!r}")
    if callable(activation):
        return Activation(getattr(activation, "__name__", type(activation).__name__), activation)
    raise TypeError(f"activation: expected a name or an elementwise function, got {type(activation).__name__}")


def _registered(name: str) -> Activation | None:
    """The activation of that name, whatever its case and underscores."""
    plain = name.lower().replace("_", "")
    return next((known for key, known in _REGISTRY.items() if key.lower().replace("_", "") == plain), None)
