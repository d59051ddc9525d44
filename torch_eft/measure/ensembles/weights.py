"""Says how the distribution of a layer's weights changes the theory.

Independent weights with another fourth moment than Gaussian ones, uniform ones above all, change single neurons only;
orthogonal weights, which are dependent, change the vertices themselves
(PDLT 2.3 and 4.1 use the Gaussian fourth moment; the statements below were checked against drawn networks).
"""

from collections.abc import Sequence

from torch import Tensor

from torch_eft.theory.architecture.reading.weight_laws import WeightStatistics

_BOUNDED_OR_OTHER = ("uniform", "truncated normal", "other")


def remarks(
    weights: Sequence[WeightStatistics], biases: Sequence[WeightStatistics | None], K: Sequence[float], x: Tensor
) -> tuple[str, ...]:
    """Write sentences on how the distributions of weights and biases change the theory.

    Args:
        weights: Layer by layer.
        biases: Layer by layer; None without a bias.
        K: Mean square of the preactivations, layer by layer.
        x: Inputs, (N, n_0).

    Returns:
        The sentences; none for Gaussian weights and biases.
    """
    sentences = []
    kinds = [w.distribution for w in weights]
    for kind in ("uniform", "truncated normal", "other", "constant"):
        if kind in kinds:
            sentences.append(f"{_layers(kinds, kind)}: {_independent(kind, weights, kinds, x)}")
    if "orthogonal" in kinds:
        sentences.append(
            f"{_layers(kinds, 'orthogonal')}: orthogonal weights, which are not independent: K and Theta at infinite "
            "width are those of Gaussian ones, V, F and B of order 1/n have their own recursions; for one input "
            "V' = chi_par^2 V + C_W^2 (<s^4> - 3 <s^2>^2) with V = -2 K^2 at the first layer, so that V / K^2 stays of "
            "order 1 for tanh and linear (nu = 0 instead of 2/3 and 2) and grows with nu = 3 instead of 5 for ReLU"
        )
    if "too few to tell" in kinds:
        sentences.append(
            f"{_layers(kinds, 'too few to tell')}: too few weights to distinguish Gaussian from uniform ones; the "
            "theory takes them as Gaussian"
        )
    odd = [b is not None and b.distribution in _BOUNDED_OR_OTHER and b.variance > 0 for b in biases]
    if any(odd):
        kurtosis = max(
            (
                b.excess_kurtosis * (b.variance / k) ** 2
                for b, k, o in zip(biases, K, odd, strict=True)
                if o and b and k
            ),
            key=abs,
            default=0.0,
        )
        sentences.append(
            f"{_layers(odd, True)}: the biases are not Gaussian, which gives preactivations the excess kurtosis "
            f"k4 (C_b / K)^2 at any width (k4 that of the biases), up to {kurtosis:.2g} here; the theory counts it "
            "where they are uniform or truncated normal, and takes 0 for others"
        )
    return tuple(sentences)


def _independent(kind: str, weights: Sequence[WeightStatistics], kinds: Sequence[str], x: Tensor) -> str:
    if kind == "constant":
        return "all weights are equal: not a random layer, the theory does not apply"
    k4 = [w.excess_kurtosis for w in weights if w.distribution == kind]
    span = f"{k4[0]:.2g}" if max(k4) - min(k4) < 0.05 else f"{min(k4):.2g} to {max(k4):.2g}"
    name = "neither Gaussian nor uniform weights; if independent" if kind == "other" else f"{kind} weights"
    text = (
        f"{name} (excess kurtosis k4 = {span}): nu and every vertex are right at leading order; k4 changes single "
        "neurons only, the last layer's excess kurtosis by k4 C_W^2 <s^4> / (n K^2) and the variance of its H_ii by "
        "k4 C_W^2 <s'^4> Theta^2 / n (Theta of the layer before), and V by a relative 1/n; "
    )
    text += "the theory takes them as Gaussian" if kind == "other" else "the theory counts it"
    if kinds[0] == kind:
        rows = x.detach().double().flatten(1)
        share = rows.pow(4).sum(1) / rows.square().sum(1).square().clamp_min(1e-300)
        text += (
            "; the first layer's preactivations have the excess kurtosis k4 sum x^4 / (sum x^2)^2 = "
            f"{weights[0].excess_kurtosis * float(share.max()):.2g} at most on these inputs (no biases)"
        )
    return text


def _layers(kinds: Sequence[object], kind: object) -> str:
    numbers = [str(index) for index, value in enumerate(kinds, 1) if value == kind]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
