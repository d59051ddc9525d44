"""The diagnosis of an MLP and its texts: short for a terminal, and its details as Markdown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from torch_eft.diagnosis.derived.variants import Variant
from torch_eft.diagnosis.findings import Finding
from torch_eft.diagnosis.planes import depth_width_plane, phase_plane, short_name
from torch_eft.diagnosis.text import aligned, bullets, code, labeled, or_dash, percent, table, with_error
from torch_eft.results.presentation.html import text_html
from torch_eft.results.presentation.result import Result
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.estimates.aspect_ratio import AspectRatio
from torch_eft.theory.estimates.expected_drift import ExpectedDrift
from torch_eft.theory.estimates.plateau import plateau_steps
from torch_eft.theory.estimates.seed_spread import SeedSpread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """The theory's statements about a network at initialization.

    ``print`` shows the verdict, warnings with advice, and five numbers beside those of a network twice as deep and one
    twice as wide; ``.details`` is all of it, as Markdown; ``.plot()`` draws where the network stands.

    Args:
        network: Description of the ensemble.
        phase: ``"ordered"``, ``"critical"`` or ``"chaotic"``: squared gradients over this depth below half, within a
            factor of 2 of, or above twice those at criticality (those at layer L where there is no criticality).
        verdict: One line: whether it trains, and how much seeds differ.
        criticality: The phase as a sentence, with the size.
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
        stability: The same in the unit of the optimizer and the loss, as a sentence.
        plateau: kappa, the NTK's largest eigenvalue over that which tells inputs apart: full-batch gradient descent
            takes about 2 sqrt(kappa) steps to half of the loss; None where nothing trains.
        validity: Of the infinite-width theory.
        first_order: Validity of order 1/n.
        ensemble: The ensemble.
        mean_square: Mean of |x|^2 / n_0 over the inputs.
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
    criticality: str
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
    stability: str
    plateau: float | None
    validity: Validity
    first_order: Validity
    ensemble: MLPEnsemble = field(compare=False)
    mean_square: float
    kind: Literal["derived"] = "derived"

    @property
    def status(self) -> int:
        """0 without warnings, 1 with."""
        return int(bool(self.warnings))

    @property
    def name(self) -> str:
        """The network's name in a line: runs of equal widths are counted where it is long."""
        return self.network if len(self.network) <= 60 else short_name(self.ensemble)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        kept = [entry.name for entry in fields(self) if entry.name != "ensemble"]
        return {name: _plain(getattr(self, name)) for name in kept}

    @property
    def details(self) -> str:
        """Everything, as Markdown."""
        return _details(self)

    def plot(self) -> "Figure":
        """Draw where the network stands: the phase plane (C_b, C_W) and the depth-width map.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: Without a hidden layer.
        """
        from torch_eft.diagnosis.figures import planes_figure

        place = self.ensemble, self.aspect_ratio, self.mean_square
        return planes_figure(phase_plane(*place), depth_width_plane(*place))

    def __repr__(self) -> str:
        return f"Diagnosis({self.name}: {self.verdict})"

    def __str__(self) -> str:
        """Return the short report, for a terminal."""
        return _summary(self)

    def _repr_html_(self) -> str:
        return text_html(str(self))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def _summary(diagnosis: Diagnosis) -> str:
    """Return verdict, warnings, advice and five numbers."""
    lines = [diagnosis.name, "", *labeled("verdict", diagnosis.verdict)]
    for finding in diagnosis.warnings:
        lines += labeled("warning", finding.message)
        if finding.remedy:
            lines += [*labeled("  advice", finding.remedy), *code(finding.line)]
    if diagnosis.variants:
        lines += ["", *aligned(_compared(diagnosis.variants)), ""]
    else:
        lines.append("")
    return "\n".join([*lines, *_notes(diagnosis), *labeled("more", "print(diagnosis.details), diagnosis.plot()")])


def _compared(variants: Sequence[Variant]) -> list[list[str]]:
    return [
        ["", *(one.name for one in variants)],
        ["r = L / n", *(f"{one.r:.3g}" for one in variants)],
        ["output variance, seed to seed", *(percent(one.output_spread) for one in variants)],
        ["NTK, seed to seed", *(percent(one.ntk_spread) for one in variants)],
        ["NTK drift in training, about", *(percent(one.drift) for one in variants)],
        ["largest stable learning rate", *(or_dash(one.largest_learning_rate, ".3g") for one in variants)],
    ]


def _notes(diagnosis: Diagnosis) -> list[str]:
    """Return how far the numbers hold, and their units."""
    spread = diagnosis.spread
    words = {"valid": "to order 1/n", "caution": "rough, mostly too low", "invalid": "of the right order at best"}
    heavy = "; a heavy tail, most seeds show less" if spread.validity.flag == "caution" else ""
    holds = f"exact at these widths{heavy}" if spread.exact else words[spread.validity.flag]
    drift = "" if diagnosis.drift.size is None else "; the drift is an order of magnitude for targets of size 1"
    notes = labeled("numbers", f"seed to seed: {holds}{drift}")
    if diagnosis.stability:
        notes += labeled("rates", diagnosis.stability)
    return notes


def _details(diagnosis: Diagnosis) -> str:
    """Return the report on an MLP."""
    ratio = diagnosis.aspect_ratio
    sentences = [
        diagnosis.verdict,
        diagnosis.criticality,
        f"over the depth, at infinite width: kernel K^(L) / K^(1) = {diagnosis.kernel_growth:.3g}, squared gradients "
        f"at layer 1 over those at layer L {diagnosis.gradient_growth:.3g}",
        *ratio.lines(),
        *_epsilon(diagnosis),
        *_spread(diagnosis),
        *_drift(diagnosis),
        *_plateau(diagnosis),
        *_learning_rates(diagnosis),
        f"infinite width (order 0) as a description: {diagnosis.validity.flag}",
        f"validity of order 1/n: {diagnosis.first_order}",
    ]
    lines = [f"### {diagnosis.network}", "", *bullets(sentences), *bullets(diagnosis.remarks, "weights: ")]
    lines += [*bullets(map(str, diagnosis.warnings), "WARNING: "), *bullets(diagnosis.advice, "advice: ")]
    lines += [f"- as code: `{one}`" for found in diagnosis.warnings for one in found.line.splitlines()]
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


def _plateau(diagnosis: Diagnosis) -> list[str]:
    if diagnosis.plateau is None:
        return []
    kappa, steps = diagnosis.plateau, plateau_steps(diagnosis.plateau, diagnosis.ensemble)
    return [
        f"the NTK's largest eigenvalue is {kappa:.3g} times the largest that tells inputs apart: full-batch gradient "
        f"descent at a quarter of the largest stable rate takes about {steps:.2g} steps to half of the loss, "
        "where that is more than the task itself takes (fitted to trainings of depth 6 to 14, within a factor of 2)"
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
        cells = ["critical", f"{point.C_b:.4g}", f"{point.C_W:.4g}", place, "1", "1"]
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
