"""The diagnosis as Markdown that reads as plain text, too."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_eft.diagnosis.measured import MeasuredDiagnosis
    from torch_eft.diagnosis.mlp import Diagnosis
    from torch_eft.diagnosis.variants import Variant

__all__ = ["derived_text", "measured_text", "table"]


def derived_text(diagnosis: "Diagnosis") -> str:
    """Of an MLP."""
    ratio = diagnosis.aspect_ratio
    reason = diagnosis.first_order.reason.removeprefix("order 1/n: ")
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
        f"validity of order 1/n: {diagnosis.first_order.flag}: {reason}",
    ]
    lines = [f"### {diagnosis.network}", "", *_bullets(sentences), *_bullets(diagnosis.remarks, "weights: ")]
    lines += [*_bullets(map(str, diagnosis.warnings), "WARNING: "), *_bullets(diagnosis.advice, "advice: ")]
    lines += ["", *_layers(diagnosis)]
    if diagnosis.variants:
        lines += ["", *_variants(diagnosis.variants)]
    return "\n".join(lines)


def _epsilon(diagnosis: "Diagnosis") -> list[str]:
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


def _spread(diagnosis: "Diagnosis") -> list[str]:
    spread = diagnosis.spread
    found = [
        f"expected from seed to seed, one input: outputs have standard deviation {spread.output:.3g} and excess "
        f"kurtosis {spread.output_kurtosis:.2g}; the NTK of one output varies by {100 * spread.ntk:.3g} %, its mean "
        f"over outputs by {100 * spread.ntk_trace:.3g} % ({spread.validity.flag}: {spread.validity.reason})"
    ]
    if diagnosis.dead >= 1e-4:
        found.append(f"probability that a hidden layer is silent for a given input: {diagnosis.dead:.2g}")
    return found


def _drift(diagnosis: "Diagnosis") -> list[str]:
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


def _learning_rates(diagnosis: "Diagnosis") -> list[str]:
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
            parts += "; first initialise closer to criticality"
    return [
        f"full-batch gradient descent on MSELoss is stable below eta = {diagnosis.largest_learning_rate:.3g} ({of}; "
        "linearised model: finite networks can survive more)",
        parts,
    ]


def _layers(diagnosis: "Diagnosis") -> list[str]:
    rows = [
        [
            str(row.layer),
            _with_error(row.C_b, row.C_b_error),
            _with_error(row.C_W, row.C_W_error),
            f"{row.K:.4g}",
            _or_dash(row.chi_par, ".4f"),
            _or_dash(row.chi_perp, ".4f"),
            "-" if row.share is None else f"{100 * row.share:.3g} %",
            _or_dash(row.lr_b, ".3g"),
            _or_dash(row.lr_W, ".3g"),
        ]
        for row in diagnosis.layers
    ]
    if (point := diagnosis.aspect_ratio.critical) is not None:
        place = "any K" if point.K_star is None else f"K* = {point.K_star:.4g}"
        cells = [f"critical ({point.universality_class})", f"{point.C_b:.4g}", f"{point.C_W:.4g}", place, "1", "1"]
        rows.append([*cells, f"{100 / len(diagnosis.layers):.3g} %", "-", "-"])
    return table(["layer", "C_b", "C_W", "K", "chi_par", "chi_perp", "NTK share", "lr bias", "lr weight"], rows)


def _variants(variants: Sequence["Variant"]) -> list[str]:
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
        rows.append(["largest eta", *(_or_dash(one.largest_learning_rate, ".3g") for one in variants)])
    return table(["recomputed", *(one.name for one in variants)], rows)


def measured_text(diagnosis: "MeasuredDiagnosis") -> str:
    """Of any other module."""
    sentences = [
        f"measured, not derived: {diagnosis.reason}",
        diagnosis.verdict,
        *_measured(diagnosis),
    ]
    lines = [f"### {diagnosis.network}", "", *_bullets(sentences), *_bullets(diagnosis.remarks, "remark: ")]
    lines += [*_bullets(map(str, diagnosis.warnings), "WARNING: "), *_bullets(diagnosis.advice, "advice: ")]
    if diagnosis.blocks:
        rows = [
            [
                block.name,
                block.kind,
                f"{block.features:g}",
                f"{block.variance:.4g}",
                f"{block.gradient:.3g}",
                "-" if block.chi is None else _with_error(block.chi, block.chi_error),
            ]
            for block in diagnosis.blocks
        ]
        head = ["measured: block", "kind", "features", "mean square", "squared gradient", "chi to the next"]
        lines += ["", *table(head, rows)]
    if diagnosis.shares:
        rows = [[name or "(top)", f"{100 * share:.3g} %"] for name, share in diagnosis.shares.items()]
        lines += ["", *table(["measured: layer", "NTK share"], rows)]
    return "\n".join(lines)


def _measured(diagnosis: "MeasuredDiagnosis") -> list[str]:
    found, over = [], f"measured over {diagnosis.seeds} seeds"
    if diagnosis.signal_growth is not None:
        found.append(f"measured: mean square of the features, last place over first: {diagnosis.signal_growth:.3g}")
    if diagnosis.output_spread is not None:
        found.append(
            f"{over}: outputs have root mean square {diagnosis.output_scale:.3g} and standard deviation "
            f"{diagnosis.output_spread:.3g} from seed to seed"
        )
    if (epsilon := diagnosis.epsilon_ntk) is not None:
        found.append(
            f"{over}: Var log tr H = {diagnosis.ntk_log_variance:.3g}, so that the NTK's effective epsilon, "
            f"Var tr H/E[tr H]^2, is {_with_error(epsilon, diagnosis.epsilon_ntk_error)}: its trace varies by "
            f"{100 * math.sqrt(epsilon):.3g} % from seed to seed"
        )
    if (epsilon := diagnosis.epsilon_features) is not None:
        size = "0 (normalised)" if epsilon < 1e-6 else f"{epsilon:.3g}"
        found.append(f"{over}: effective epsilon of what enters the last layer {size}")
    if diagnosis.largest_learning_rate is not None:
        found.append(
            f"measured: lambda_max = {diagnosis.lambda_max:.4g} on these {diagnosis.inputs} inputs; full-batch "
            f"gradient descent on MSELoss is stable below eta = {diagnosis.largest_learning_rate:.3g} (linearised "
            "network, one learning rate for all parameters)"
        )
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, line by line."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def _bullets(sentences: Iterable[str], label: str = "") -> list[str]:
    return [f"- {label}{sentence}" for sentence in sentences]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} +- {error:.1g}"


def _or_dash(value: float | None, style: str) -> str:
    return "-" if value is None else f"{value:{style}}"
