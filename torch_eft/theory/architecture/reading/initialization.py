"""C_W, C_b and the laws of layers, from the rule by which a network was initialized where its values agree with one.

One layer's own mean square is good to sqrt(2 / number of weights), which for a stem or a read-out is 10 % and more.
Layers of one kind usually share a rule: torch's default, a gain over the fan-in (LeCun, He), the mean of fan-in and
fan-out (Glorot), the fan-out, or one standard deviation for all. The rule is taken with which all layers agree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_eft.theory.architecture.reading.weight_laws import WeightStatistics
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS, LAWS, Law


@dataclass(frozen=True)
class Drawn:
    """What was measured of a layer.

    Args:
        W: Of its weights.
        b: Of its biases; None without.
        fan_in: Weights to a neuron.
        fan_out: Weights from one.
        neurons: After it.
        convolution: Whether it is one, or a dense layer.
        name: Of the layer.
    """

    W: WeightStatistics
    b: WeightStatistics | None
    fan_in: int
    fan_out: int
    neurons: int
    convolution: bool
    name: str = ""


@dataclass(frozen=True)
class LayerLaw:
    """Variances times their fan-in, and laws, of a layer."""

    C_W: float
    C_b: float
    weight_law: Law
    bias_law: Law


_RULES: tuple[Callable[[Drawn], float], ...] = (
    lambda layer: 1.0,
    lambda layer: 2 * layer.fan_in / (layer.fan_in + layer.fan_out),
    lambda layer: layer.fan_in / layer.fan_out,
    lambda layer: float(layer.fan_in),
)
"""C_W over gain^2: fan-in, Glorot, fan-out, one variance."""

_GAINS = (1 / 3, 9 / 16, 1.0, 2.0, 25 / 9)
"""gain^2 of ``nn.init``: torch's default, SELU, linear, ReLU, tanh."""

_DEVIATION, _NEAR = 3.5, 2.5
"""Standard errors within which a layer agrees with the others, and their mean with one of the gains."""


def layer_laws(layers: Sequence[Drawn]) -> list[LayerLaw]:
    """Return the laws of all layers of a network.

    Args:
        layers: In any order.

    Returns:
        One a layer.
    """
    shown = any(_by_default(layer.W, layer.fan_in) for layer in layers)
    found: dict[int, tuple[float, Law]] = {}
    for convolution in (True, False):
        kind = [index for index, layer in enumerate(layers) if layer.convolution == convolution]
        default = [index for index in kind if _is_default(layers[index].W, layers[index].fan_in, shown)]
        rest = [index for index in kind if index not in default]
        if rest and default:  # Glorot's can look like torch's in one small layer: another rule for all of them?
            together, exact = _by_rule([layers[index] for index in kind])
            if exact:
                default, rest = [], []
                found.update(zip(kind, together, strict=True))
        found.update(dict.fromkeys(default, (1 / 3, "uniform")))
        found.update(zip(rest, _by_rule([layers[index] for index in rest])[0], strict=True))
    biases = _bias_laws(layers, shown)
    return [LayerLaw(found[i][0], biases[i][0], found[i][1], biases[i][1]) for i in range(len(layers))]


def remarks(layers: Sequence[Drawn], laws: Sequence[LayerLaw]) -> tuple[str, ...]:
    """Say which variances are this network's own mean squares, and how good they are.

    Args:
        layers: As measured.
        laws: As ``layer_laws`` returns them.

    Returns:
        Sentences, none where every variance is a rule's.
    """
    found = []
    own = [
        (layer, law)
        for layer, law in zip(layers, laws, strict=True)
        if law.C_b and (law.bias_law != "uniform" or law.C_b != 1 / (3 * layer.fan_in))
    ]
    if own:
        first = own[0][1]
        error = math.sqrt((EXCESS_KURTOSIS[first.bias_law] + 2) / sum(layer.neurons for layer, _ in own))
        found.append(
            f"C_b = {first.C_b:.3g} is the mean square of this network's biases, good to {100 * error:.2g} %: K and "
            "Theta are as uncertain; build the architecture of nodes if it is known better"
        )
    unknown = [
        layer.name
        for layer, law in zip(layers, laws, strict=True)
        if layer.W.distribution == "other" and law.weight_law == "gaussian"
    ]
    if unknown:
        found.append(
            f"the weights of {', '.join(map(repr, unknown[:3]))}{' and others' if len(unknown) > 3 else ''} follow no "
            "known law of initialization; they are taken for independent Gaussian draws of their mean square, which "
            "they are not if the network was trained: read it before training"
        )
    if any(law.weight_law == "orthogonal" for law in laws):
        found.append(
            "orthogonal weights are not independent: K and Theta are right, the spread is that of Gaussian weights and "
            "too large"
        )
    return tuple(found)


def _by_default(one: WeightStatistics, fan_in: int, laws: Sequence[str] = ("uniform",)) -> bool:
    """Whether numbers are uniform within torch's default bound, and reach as far."""
    known = abs(3 * fan_in * one.variance - 1) < 4 * 3 * fan_in * one.variance_error
    return one.distribution in laws and known and one.largest <= (1 + 1e-6) / math.sqrt(fan_in)


def _is_default(one: WeightStatistics, fan_in: int, shown: bool) -> bool:
    """Where another layer shows torch's default, also of few numbers, or of ones that a test rejects by chance."""
    few = shown and one.distribution == "too few to tell"
    # Training would move some of many numbers beyond the bound.
    laws = ("uniform", "other") if shown else ("uniform",)
    return _by_default(one, fan_in, laws) or (few and one.largest <= (1 + 1e-6) / math.sqrt(fan_in))


def _by_rule(layers: list[Drawn]) -> tuple[list[tuple[float, Law]], bool]:
    """C_W and law of layers of one kind, and whether they are a rule's with a usual gain."""
    if not layers:
        return [], False
    laws = [_law(layer.W) for layer in layers]
    told = {law for law, layer in zip(laws, layers, strict=True) if layer.W.distribution != "too few to tell"}
    if len(told) == 1:
        laws = [*told] * len(layers)
    numbers = [layer.fan_in * layer.neurons for layer in layers]
    errors = [math.sqrt((EXCESS_KURTOSIS[law] + 2) / count) for law, count in zip(laws, numbers, strict=True)]
    values = [layer.fan_in * layer.W.variance for layer in layers]
    pooled = None
    for rule in _RULES[: len(_RULES) if len(layers) > 1 else 1]:
        ratios = [value / rule(layer) for value, layer in zip(values, layers, strict=True)]
        gain = sum(n * ratio for n, ratio in zip(numbers, ratios, strict=True)) / sum(numbers)
        if any(abs(ratio / gain - 1) > _DEVIATION * e for ratio, e in zip(ratios, errors, strict=True)):
            continue
        error = math.sqrt(sum((e * n) ** 2 for e, n in zip(errors, numbers, strict=True))) / sum(numbers)
        near = min(_GAINS, key=lambda each: abs(each / gain - 1))
        agreed = [gain * rule(layer) for layer in layers]
        if abs(near / gain - 1) < _NEAR * error:
            return [(near * rule(layer), law) for layer, law in zip(layers, laws, strict=True)], True
        pooled = pooled or agreed
    return list(zip(pooled or values, laws, strict=True)), False


def _bias_laws(layers: Sequence[Drawn], shown: bool) -> list[tuple[float, Law]]:
    found: list[tuple[float, Law]] = [(0.0, "gaussian")] * len(layers)
    rest = []
    for index, layer in enumerate(layers):
        if layer.b is None or layer.b.variance == 0:
            continue
        if _is_default(layer.b, layer.fan_in, shown):
            found[index] = (1 / (3 * layer.fan_in), "uniform")
        else:
            rest.append((index, layer.b, layer.neurons))
    if not rest:
        return found
    laws = {_law(b) for _, b, _ in rest if b.distribution != "too few to tell"}
    law = laws.pop() if len(laws) == 1 else "gaussian"
    law = "gaussian" if law == "orthogonal" else law
    common = sum(n * b.variance for _, b, n in rest) / sum(n for _, _, n in rest)
    error = math.sqrt(EXCESS_KURTOSIS[law] + 2)
    same = all(abs(b.variance / common - 1) < _DEVIATION * error / math.sqrt(n) for _, b, n in rest)
    for index, b, _ in rest:
        found[index] = (common if same else b.variance, law)
    return found


def _law(one: WeightStatistics) -> Law:
    """The law that the theory takes: Gaussian where it knows no better."""
    return next((law for law in LAWS if law == one.distribution), "gaussian")
