"""The diagnosis of an MLP and its text: Markdown that reads as plain text, too."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch_eft.diagnosis.findings import Finding
from torch_eft.diagnosis.text import bullets, or_dash, table, with_error
from torch_eft.diagnosis.variants import Variant
from torch_eft.results.trajectory import Validity
from torch_eft.theory.estimates.aspect_ratio import AspectRatio
from torch_eft.theory.estimates.expected_drift import ExpectedDrift
from torch_eft.theory.estimates.seed_spread import SeedSpread

Phase = Literal["ordered", "critical", "chaotic"]


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

    Example:
        >>> import torch_eft as eft
        >>> layer = eft.diagnose(eft.theory.MLPEnsemble([10, 20, 20, 1], "relu", C_W=2.0)).layers[1]
        >>> layer.layer, round(layer.chi_perp, 6)
        (2, 1.0)
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
    """The theory's statements about a network at initialization; ``str()`` prints them.

    Args:
        network: Description of the ensemble.
        phase: ``"ordered"``, ``"critical"`` or ``"chaotic"``: squared gradients over this depth below half, within a
            factor of 2 of, or above twice those at criticality (those at layer L where there is no criticality).
        verdict: The phase as a sentence, with the size.
        warnings: Problems, each with its remedy.
        advice: The remedies; empty if nothing is to be changed.
        recommended: (C_b, C_W) at criticality; None where the activation has none.
        kernel_growth: K^(L) / K^(1) at infinite width.
        gradient_growth: E|dz/dz^(1)|^2 of an output, at infinite width.
        aspect_ratio: Depth, width, r = L / n, epsilon and what follows from them, with the critical point.
        spread: How much networks differ from seed to seed.
        drift: How far the NTK moves in training.
        dead: Probability that a hidden layer is silent for a given input (ReLU), 0 for other activations.
        variants: This network, one twice as deep, one twice as wide, recomputed on at most the first 64 inputs; empty
            without a hidden layer.
        layers: One entry per layer.
        remarks: On the distribution of the weights; empty if there are none.
        inputs: N, the number of inputs it was made for; None for one with |x|^2 = n_0.
        largest_learning_rate: Below it gradient descent on ``MSELoss`` decreases the loss monotonically, at infinite
            width, with these inputs as training set; None where no parameter has a learning rate.
        validity: Of the infinite-width theory.
        first_order: Validity of order 1/n.
        kind: ``"derived"``.

    Example:
        >>> import torch_eft as eft
        >>> report = eft.diagnose(eft.theory.MLPEnsemble([10, 20, 20, 1], "tanh", C_W=3.0))
        >>> report.phase, report.status, len(report.layers)
        ('chaotic', 1, 3)
    """

    network: str
    phase: Phase
    verdict: str
    warnings: tuple[Finding, ...]
    advice: tuple[str, ...]
    recommended: tuple[float, float] | None
    kernel_growth: float
    gradient_growth: float
    aspect_ratio: AspectRatio
    spread: SeedSpread
    drift: ExpectedDrift
    dead: float
    variants: tuple[Variant, ...]
    layers: tuple[LayerDiagnosis, ...]
    remarks: tuple[str, ...]
    inputs: int | None
    largest_learning_rate: float | None
    validity: Validity
    first_order: Validity
    kind: Literal["derived"] = "derived"

    @property
    def status(self) -> int:
        """0 without warnings, 1 with."""
        return int(bool(self.warnings))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the report as Markdown, readable as plain text too."""
        return _text(self)


def _text(diagnosis: Diagnosis) -> str:
    """Return the report on an MLP."""
    ratio = diagnosis.aspect_ratio
    sentences = [
        diagnosis.verdict,
        f"over the depth, at infinite width: kernel K^(L) / K^(1) = {diagnosis.kernel_growth:.3g}, squared gradients "
        f"at layer 1 over those at layer L {diagnosis.gradient_growth:.3g}",
        *ratio.lines(),
        *_epsilon(diagnosis),
        *_spread(diagnosis),
        *_drift(diagnosis),
        *_learning_rates(diagnosis),
        f"infinite width (order 0) as a description: {diagnosis.validity.flag}",
        f"validity of order 1/n: {diagnosis.first_order}",
    ]
    lines = [f"### {diagnosis.network}", "", *bullets(sentences), *bullets(diagnosis.remarks, "weights: ")]
    lines += [*bullets(map(str, diagnosis.warnings), "WARNING: "), *bullets(diagnosis.advice, "advice: ")]
    lines += ["", *_layers(diagnosis)]
    if diagnosis.variants:
        lines += ["", *_variants(diagnosis.variants)]
    return "\n".join(lines)


def _epsilon(diagnosis: Diagnosis) -> list[str]:
    ratio = diagnosis.aspect_ratio
    if ratio.epsilon < 0.2:
        return []
    if "exact" in ratio.estimate:
        return [f"epsilon is not small: read the exact value, {ratio.epsilon_all_orders:.4g}, not that of order 1/n"]
    kind = "a lower bound" if ratio.at_criticality else "unreliable"
    return [
        f"epsilon is not small: its value at order 1/n is {kind}, beyond it about {ratio.epsilon_all_orders:.3g} "
        "(an estimate)"
    ]


def _spread(diagnosis: Diagnosis) -> list[str]:
    spread = diagnosis.spread
    found = [
        f"expected from seed to seed, one input: outputs have standard deviation {spread.output:.3g} and excess "
        f"kurtosis {spread.output_kurtosis:.2g}; the NTK of one output varies by {100 * spread.ntk:.3g} %, its mean "
        f"over outputs by {100 * spread.ntk_trace:.3g} % ({spread.validity.flag}: {spread.validity.reason})"
    ]
    if diagnosis.dead >= 1e-4:
        found.append(f"probability that a hidden layer is silent for a given input: {diagnosis.dead:.2g}")
    return found


def _drift(diagnosis: Diagnosis) -> list[str]:
    drift = diagnosis.drift
    if drift.motion is None:
        return []
    if drift.unit_targets is None or drift.per_loss is None or drift.at_rest is None:
        size = "" if drift.size is None else f" of the order of {100 * drift.size:.2g} % for targets of size 1"
        return [f"expected NTK drift over training{size} ({drift.validity.flag}: {drift.validity.reason})"]
    return [
        f"expected NTK drift over training: {100 * drift.per_loss:+.2g} % per unit of loss (1/2 sum e^2) decreased, "
        f"{100 * drift.at_rest:+.2g} % for unlearning the initial output, {100 * drift.unit_targets:+.2g} % for "
        f"targets of size 1 ({drift.validity.flag}: {drift.validity.reason})"
    ]


def _learning_rates(diagnosis: Diagnosis) -> list[str]:
    if diagnosis.largest_learning_rate is None:
        return []
    count = diagnosis.inputs
    of = "inputs with |x|^2 = n_0, any number" if count is None else f"these {count} inputs"
    shares = [row.share for row in diagnosis.layers if row.share is not None]
    if max(shares) < 1.1 * min(shares):
        parts = "layers share the NTK equally within 10 %"
    else:
        parts = (
            f"layers make {100 * min(shares):.2g} to {100 * max(shares):.2g} % of the NTK each; eta times the "
            "table's lr makes them equal, same NTK"
        )
        if diagnosis.recommended is not None and diagnosis.phase != "critical":
            parts += "; first initialize closer to criticality"
    return [
        f"full-batch gradient descent on MSELoss is stable below eta = {diagnosis.largest_learning_rate:.3g} ({of}; "
        "linearized model: finite networks can survive more)",
        parts,
    ]


def _layers(diagnosis: Diagnosis) -> list[str]:
    rows = [
        [
            str(row.layer),
            with_error(row.C_b, row.C_b_error),
            with_error(row.C_W, row.C_W_error),
            f"{row.K:.4g}",
            or_dash(row.chi_par, ".4f"),
            or_dash(row.chi_perp, ".4f"),
            "-" if row.share is None else f"{100 * row.share:.3g} %",
            or_dash(row.lr_b, ".3g"),
            or_dash(row.lr_W, ".3g"),
        ]
        for row in diagnosis.layers
    ]
    if (point := diagnosis.aspect_ratio.critical) is not None:
        place = "any K" if point.K_star is None else f"K* = {point.K_star:.4g}"
        cells = [f"critical ({point.universality_class})", f"{point.C_b:.4g}", f"{point.C_W:.4g}", place, "1", "1"]
        rows.append([*cells, f"{100 / len(diagnosis.layers):.3g} %", "-", "-"])
    return table(["layer", "C_b", "C_W", "K", "chi_par", "chi_perp", "NTK share", "lr bias", "lr weight"], rows)


def _variants(variants: Sequence[Variant]) -> list[str]:
    rows = [
        ["r = L/n", *(f"{one.r:.3g}" for one in variants)],
        ["epsilon, order 1/n", *(f"{one.epsilon:.3g}" for one in variants)],
        ["epsilon beyond", *(f"{one.epsilon_all_orders:.3g}" for one in variants)],
        ["NTK from seed to seed", *(f"{100 * one.ntk_spread:.3g} %" for one in variants)],
        ["K^(L) / K^(1)", *(f"{one.kernel_growth:.3g}" for one in variants)],
        ["squared gradients, layer 1 / L", *(f"{one.gradient_growth:.3g}" for one in variants)],
        ["NTK drift, order of magnitude", *("-" if v.drift is None else f"{100 * v.drift:.2g} %" for v in variants)],
    ]
    if any(one.largest_learning_rate is not None for one in variants):
        rows.append(["largest eta", *(or_dash(one.largest_learning_rate, ".3g") for one in variants)])
    return table(["recomputed", *(one.name for one in variants)], rows)
