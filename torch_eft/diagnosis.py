"""The diagnosis of a network before training: critical or not, how deep for its width, which learning rates."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from torch_eft.measure.initialization import ReadEnsemble, read_ensemble
from torch_eft.theory.aspect_ratio import AspectRatio, aspect_ratio
from torch_eft.theory.criticality import slope_of_variance, slope_squared
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.learning_rates import (
    LearningRateShares,
    equivalence_learning_rates,
    largest_learning_rate,
    layer_gains,
    layer_shares,
)
from torch_eft.theory.validity import infinite_width_validity
from torch_eft.trajectory import Validity


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer against criticality, and its part in training.

    Args:
        layer: l = 1 .. L.
        C_b: Bias variance.
        C_W: Rescaled weight variance.
        C_b_error: Standard error, if C_b was estimated from weights.
        C_W_error: Standard error, if C_W was estimated from weights.
        K: Mean diagonal of the kernel K^(l).
        chi_par: C_W d<s^2>/dK at the kernel of the layer before; None for the first layer.
        chi_perp: C_W <s'^2> there; None for the first layer.
        share: The part of the NTK (mean diagonal) that comes from this layer's parameters, 0 .. 1; None where no
            parameter has a learning rate.
        lr_b: Torch learning rate of the bias, relative to eta, that gives all layers equal shares of the same NTK;
            None where that does not exist.
        lr_W: The same of the weight.
    """

    layer: int
    C_b: float
    C_W: float
    C_b_error: float | None
    C_W_error: float | None
    K: float
    chi_par: float | None
    chi_perp: float | None
    share: float | None
    lr_b: float | None
    lr_W: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What the theory says of a network at initialisation; ``str()`` prints it.

    Args:
        network: The ensemble in words.
        aspect_ratio: Depth, width, r = L / n, epsilon and what follows from them, with the critical point.
        layers: Layer by layer.
        verdict: Critical or not, in words.
        advice: What to change; empty if nothing.
        remarks: On the distribution of the weights; empty if there are none.
        inputs: N, the number of inputs it was made for; None for one with |x|^2 = n_0.
        largest_learning_rate: Below it gradient descent on ``MSELoss`` decreases the loss monotonically, at infinite
            width, with these inputs as training set; None where no parameter has a learning rate.
        validity: Of the infinite-width theory.
    """

    network: str
    aspect_ratio: AspectRatio
    layers: tuple[LayerDiagnosis, ...]
    verdict: str
    advice: tuple[str, ...]
    remarks: tuple[str, ...]
    inputs: int | None
    largest_learning_rate: float | None
    validity: Validity

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The report as Markdown, readable as plain text too."""
        lines = [
            f"### {self.network}",
            "",
            *(f"- {sentence}" for sentence in (self.verdict, *self.aspect_ratio.lines(), *self._learning_rates())),
            f"- infinite width (order 0) as a description: {self.validity.flag}",
            *(f"- weights: {sentence}" for sentence in self.remarks),
            *(f"- advice: {sentence}" for sentence in self.advice),
            "",
            "| layer | C_b | C_W | K | chi_par | chi_perp | NTK share | lr bias | lr weight |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.layers:
            cells = [
                str(row.layer),
                _with_error(row.C_b, row.C_b_error),
                _with_error(row.C_W, row.C_W_error),
                f"{row.K:.4g}",
                "-" if row.chi_par is None else f"{row.chi_par:.4f}",
                "-" if row.chi_perp is None else f"{row.chi_perp:.4f}",
                "-" if row.share is None else f"{100 * row.share:.3g} %",
                "-" if row.lr_b is None else f"{row.lr_b:.3g}",
                "-" if row.lr_W is None else f"{row.lr_W:.3g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if (point := self.aspect_ratio.critical) is not None:
            place = "any K" if point.K_star is None else f"K* = {point.K_star:.4g}"
            cells = [f"critical ({point.universality_class})", f"{point.C_b:.4g}", f"{point.C_W:.4g}", place, "1", "1"]
            equal = f"{100 / len(self.layers):.3g} %"
            lines.append(f"| {' | '.join([*cells, equal, '-', '-'])} |")
        return "\n".join(lines)

    def _learning_rates(self) -> list[str]:
        if self.largest_learning_rate is None:
            return []
        of = "inputs with |x|^2 = n_0, any number" if self.inputs is None else f"these {self.inputs} inputs"
        shares = [row.share for row in self.layers if row.share is not None]
        if max(shares) < 1.1 * min(shares):
            parts = "layers share the NTK equally within 10 %"
        else:
            parts = (
                f"layers make {100 * min(shares):.2g} to {100 * max(shares):.2g} % of the NTK each; eta times the "
                "table's lr makes them equal, same NTK"
            )
            if self.aspect_ratio.critical is not None and not self.aspect_ratio.at_criticality:
                parts += "; first initialise closer to criticality"
        return [
            f"full-batch gradient descent on MSELoss is stable below eta = {self.largest_learning_rate:.3g} ({of}; "
            "linearised model: finite networks can survive more)",
            parts,
        ]


def diagnose(model_or_ensemble: nn.Module | MLPEnsemble | ReadEnsemble, x: Tensor | None = None) -> Diagnosis:
    """Diagnose criticality, depth-to-width ratio and learning rates of an MLP.

    Args:
        model_or_ensemble: An ``MLPEnsemble``, what ``read_ensemble`` returned, or a freshly
            initialised module, whose C_b and C_W are then estimated from its weights.
        x: Inputs, (N, ...) as the module takes them; without them, one input with |x|^2 = n_0.

    Returns:
        The diagnosis.

    Raises:
        NotAnMLPError: If the module is not an MLP that the theory covers, with the reason.
        ValueError: If ``x`` does not fit.
    """
    read = model_or_ensemble
    if isinstance(read, nn.Module):
        read = read_ensemble(read, x=x)
    ensemble = read.ensemble if isinstance(read, ReadEnsemble) else read
    inputs = None if x is None else x.detach().flatten(1)
    ratio = aspect_ratio(ensemble, inputs)
    verdict, advice = _criticality_verdict(ensemble, ratio)
    if max(ratio.epsilon, ratio.r) >= 0.2:
        advice.append("too deep for its width: half the depth or twice the hidden widths about halve r and epsilon")
    eta = largest_learning_rate(ensemble, inputs, "mean")
    return Diagnosis(
        network=str(ensemble),
        aspect_ratio=ratio,
        layers=_layers(ensemble, read if isinstance(read, ReadEnsemble) else None, inputs),
        verdict=verdict,
        advice=tuple(advice),
        remarks=read.remarks if isinstance(read, ReadEnsemble) else (),
        inputs=None if inputs is None else len(inputs),
        largest_learning_rate=eta if math.isfinite(eta) else None,
        validity=infinite_width_validity(ensemble, inputs),
    )


def _layers(ensemble: MLPEnsemble, read: ReadEnsemble | None, x: Tensor | None) -> tuple[LayerDiagnosis, ...]:
    K = layer_gains(ensemble, x).K
    biases, weights = layer_shares(ensemble, x)
    Theta = float((biases + weights).sum())
    equal = _equal_shares(ensemble, x, float(biases.sum()), float(weights.sum()))
    rows = []
    for index, C_W in enumerate(ensemble.C_W):
        before = K[index - 1] if index else None
        rows.append(
            LayerDiagnosis(
                layer=index + 1,
                C_b=ensemble.C_b[index],
                C_W=C_W,
                C_b_error=None if read is None else read.C_b_error[index],
                C_W_error=None if read is None else read.C_W_error[index],
                K=float(K[index].mean()),
                chi_par=None if before is None else C_W * float(slope_of_variance(ensemble.activation, before).mean()),
                chi_perp=None if before is None else C_W * float(slope_squared(ensemble.activation, before).mean()),
                share=float(biases[index] + weights[index]) / Theta if Theta > 0 else None,
                lr_b=None if equal is None else equal.lr_b[index],
                lr_W=None if equal is None else equal.lr_W[index],
            )
        )
    return tuple(rows)


def _equal_shares(ensemble: MLPEnsemble, x: Tensor | None, total_b: float, total_W: float) -> LearningRateShares | None:
    if total_b + total_W == 0:
        return None
    try:
        return equivalence_learning_rates(ensemble, x, total_b, total_W)
    except ValueError:  # far from criticality no gradient is left, in float64, in the first layers
        return None


def _criticality_verdict(ensemble: MLPEnsemble, ratio: AspectRatio) -> tuple[str, list[str]]:
    point, gain = ratio.critical, ratio.gradient_gain
    if point is None or gain is None:
        return ratio.criticality_reason, []
    at = f"C_b = {point.C_b:.4g}, C_W = {point.C_W:.4g}"
    size = f"squared gradients at layer 1 are {gain:.3g} times the critical ones ({at})"
    if ratio.at_criticality:
        return f"critical within a factor of 2: {size}", []
    side = "subcritical (ordered), gradients vanish" if gain < 1 else "supercritical (chaotic), gradients explode"
    advice = f"initialise weights with variance {point.C_W:.4g} / n_in and biases with {point.C_b:.4g}"
    return f"{side} with depth: {size}", [advice]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} +- {error:.1g}"
