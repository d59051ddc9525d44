"""The ensemble of networks that the theory describes: a random MLP."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch_eft.results.choices import check_choice
from torch_eft.theory.gaussian.activations import Activation, ActivationLike, get_activation
from torch_eft.theory.gaussian.laws import LAWS, Law


@dataclass(frozen=True, init=False)
class MLPEnsemble:
    """Multilayer perceptrons at initialization (PDLT 2.1-2.3, 8.0).

    ``z^(1) = b + W x``, ``z^(l+1) = b + W sigma(z^(l))``, l = 1 .. L-1, all entries independent, of mean 0 and
    variances ``C_b`` and ``C_W / n_{l-1}``, Gaussian unless said; the learning-rate tensor is ``lambda_b`` for
    biases and ``lambda_W / n_{l-1}`` for weights. One torch learning rate for every
    parameter is ``lambda_b = 1``, ``lambda_W = n_{l-1}``.

    The laws of weights and biases enter kernels, vertices, estimates and the theory of training; each result names what
    it takes as Gaussian.

    Args:
        widths: n_0 (inputs), hidden widths, n_L (outputs); L = len(widths) - 1.
        activation: A name, an ``Activation`` or an elementwise function.
        C_b: Bias variance >= 0; one value, or one per layer (l = 1 .. L).
        C_W: Rescaled weight variance > 0; likewise.
        lambda_b: Learning-rate tensor of the biases >= 0; likewise.
        lambda_W: Learning-rate tensor of the weights, times n_{l-1}, >= 0; likewise.
        weight_law: ``"gaussian"``, ``"uniform"``, ``"truncated normal"`` (cut at two standard deviations) or
            ``"orthogonal"``; one for all layers, or one per layer.
        bias_law: Likewise, without ``"orthogonal"``.
        errors: Standard errors of values estimated from a network, ``{"C_b": (one per layer), ...}``; None where
            nothing was estimated.
        remarks: Sentences on what the weights of that network change in the theory, where they are not Gaussian.
            Ensembles that differ only in ``errors`` and ``remarks`` are equal.

    Raises:
        ValueError: If a value is out of range or the number of values is not 1 or L.
        TypeError: If the activation is neither a name nor callable.

    Example:
        >>> from torch_eft import theory
        >>> ensemble = theory.MLPEnsemble([64, 128, 128, 10], "tanh", C_b=0.0, C_W=[1.0, 1.0, 2.0])
        >>> ensemble.depth, ensemble.hidden_widths, ensemble.C_W
        (3, (128, 128), (1.0, 1.0, 2.0))
        >>> print(ensemble)
        MLP 64-128-128-10, tanh
    """

    widths: tuple[int, ...]
    activation: Activation
    C_b: tuple[float, ...]
    C_W: tuple[float, ...]
    lambda_b: tuple[float, ...]
    lambda_W: tuple[float, ...]
    weight_law: tuple[Law, ...]
    bias_law: tuple[Law, ...]
    errors: Mapping[str, tuple[float, ...]] | None = field(default=None, compare=False)
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __init__(
        self,
        widths: Sequence[int],
        activation: ActivationLike,
        *,
        C_b: float | Sequence[float] = 0.0,
        C_W: float | Sequence[float] = 1.0,
        lambda_b: float | Sequence[float] = 1.0,
        lambda_W: float | Sequence[float] = 1.0,
        weight_law: Law | Sequence[Law] = "gaussian",
        bias_law: Law | Sequence[Law] = "gaussian",
        errors: Mapping[str, Sequence[float]] | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        if not isinstance(widths, Sequence) or isinstance(widths, str):
            raise ValueError(
                f"widths: {widths!r} given; give a list n_0, ..., n_L and then the activation, such as [784, 128, 10], "
                "'tanh'"
            )
        widths = tuple(widths)
        if len(widths) < 2 or any(not isinstance(n, int) or n < 1 for n in widths):
            raise ValueError(f"widths: {widths} given; give at least two positive integers n_0, ..., n_L")
        depth = len(widths) - 1
        fields = {
            "widths": widths,
            "activation": get_activation(activation),
            "C_b": _per_layer("C_b", C_b, depth),
            "C_W": _per_layer("C_W", C_W, depth, positive=True),
            "lambda_b": _per_layer("lambda_b", lambda_b, depth),
            "lambda_W": _per_layer("lambda_W", lambda_W, depth),
            "weight_law": _laws("weight_law", weight_law, depth, LAWS),
            "bias_law": _laws("bias_law", bias_law, depth, LAWS[:3]),
            "errors": None if errors is None else _checked_errors(errors, depth),
            "remarks": tuple(remarks),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def depth(self) -> int:
        """L, the number of weight matrices."""
        return len(self.widths) - 1

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """n_1 .. n_{L-1}."""
        return self.widths[1:-1]

    @property
    def aspect_ratio(self) -> float:
        """The ratio r = L / n (PDLT 3.4), n the harmonic mean of the hidden widths; 0 without a hidden layer."""
        if not self.hidden_widths:
            return 0.0
        return self.depth * sum(1 / n for n in self.hidden_widths) / len(self.hidden_widths)

    @property
    def gaussian(self) -> bool:
        """True if all weights and all biases are Gaussian."""
        return {*self.weight_law, *self.bias_law} == {"gaussian"}

    def __repr__(self) -> str:
        names = _PER_LAYER if self.gaussian else (*_PER_LAYER, "weight_law", "bias_law")
        values = {name: getattr(self, name) for name in names}
        shown = [
            f"{name}={value[0]!r}" if len(set(value)) == 1 else f"{name}={value}" for name, value in values.items()
        ]
        return f"MLPEnsemble({list(self.widths)}, {self.activation.name!r}, {', '.join(shown)})"

    def __str__(self) -> str:
        return f"MLP {'-'.join(map(str, self.widths))}, {self.activation.name}"


def check_ensemble(given: object) -> None:
    """Raise unless an ensemble is given.

    Raises:
        TypeError: With what was given in its place.
    """
    if not isinstance(given, MLPEnsemble):
        raise TypeError(
            f"ensemble: {type(given).__name__} given; give a theory.MLPEnsemble, first of all arguments. "
            "measure.read_ensemble(model) reads one off an MLP"
        )


def twice_as_deep(ensemble: MLPEnsemble) -> MLPEnsemble:
    """Repeat every hidden layer; the new weights are drawn and trained like those of the layer after."""
    hidden = [n for n in ensemble.hidden_widths for _ in range(2)]
    after = [0, *(layer for layer in range(1, ensemble.depth) for _ in range(2))]
    return _like(ensemble, [ensemble.widths[0], *hidden, ensemble.widths[-1]], after)


def twice_as_wide(ensemble: MLPEnsemble) -> MLPEnsemble:
    """Double the hidden widths."""
    widths = [ensemble.widths[0], *(2 * n for n in ensemble.hidden_widths), ensemble.widths[-1]]
    return _like(ensemble, widths, list(range(ensemble.depth)))


def _like(ensemble: MLPEnsemble, widths: list[int], layers: list[int]) -> MLPEnsemble:
    """Return an ensemble of other widths with the parameters of ``layers`` of ``ensemble``.

    lambda_W proportional to the fan-in is one torch learning rate for all weights: it stays that; else lambda_W does.
    """
    rates = [value / n for value, n in zip(ensemble.lambda_W, ensemble.widths[:-1], strict=True)]
    plain = max(rates) - min(rates) <= 1e-12 * max(rates)
    return MLPEnsemble(
        widths,
        ensemble.activation,
        C_b=[ensemble.C_b[layer] for layer in layers],
        C_W=[ensemble.C_W[layer] for layer in layers],
        weight_law=[ensemble.weight_law[layer] for layer in layers],
        bias_law=[ensemble.bias_law[layer] for layer in layers],
        lambda_b=[ensemble.lambda_b[layer] for layer in layers],
        lambda_W=[rates[0] * n for n in widths[:-1]] if plain else [ensemble.lambda_W[layer] for layer in layers],
    )


_PER_LAYER = ("C_b", "C_W", "lambda_b", "lambda_W")


def _checked_errors(errors: Mapping[str, Sequence[float]], depth: int) -> dict[str, tuple[float, ...]]:
    for name, values in errors.items():
        check_choice("errors", name, _PER_LAYER)
        if len(values) != depth:
            raise ValueError(f"errors: {len(values)} values of {name} given for {depth} layers; give one per layer")
    return {name: tuple(float(value) for value in values) for name, values in errors.items()}


def _laws(name: str, value: Law | Sequence[Law], depth: int, known: tuple[Law, ...]) -> tuple[Law, ...]:
    values = (value,) * depth if isinstance(value, str) else tuple(value)
    for law in values:
        check_choice(name, law, known)
    if len(values) != depth:
        raise ValueError(f"{name}: {len(values)} laws given for {depth} layers; give one, or one per layer")
    return values


def _per_layer(name: str, value: float | Sequence[float], depth: int, positive: bool = False) -> tuple[float, ...]:
    if isinstance(value, str):
        raise ValueError(f"{name}: {value!r} given; give one number or one per layer")
    values = (value,) * depth if isinstance(value, int | float) else tuple(value)
    if len(values) != depth:
        raise ValueError(f"{name}: {len(values)} values given for {depth} layers; give one value or one per layer")
    for number in values:
        if not math.isfinite(number) or number < 0 or (positive and number == 0):
            raise ValueError(f"{name}: {number:g} given; it must be finite and {'> 0' if positive else '>= 0'}")
    return tuple(float(number) for number in values)
