"""The diagnosis of a network before training: critical or not, how deep for its width."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.measure.initialization import ReadEnsemble, read_ensemble
from torch_eft.theory.aspect_ratio import infinite_width_validity, output_fluctuation, regime
from torch_eft.theory.criticality import CriticalPoint, criticality, slope_of_variance, slope_squared
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.expectations import QuadratureError
from torch_eft.theory.statistics import initial_statistics
from torch_eft.trajectory import Validity


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer against criticality.

    Args:
        layer: l = 1 .. L.
        C_b: Bias variance.
        C_W: Rescaled weight variance.
        C_b_error: Standard error, if C_b was estimated from weights.
        C_W_error: Standard error, if C_W was estimated from weights.
        K: Mean diagonal of the kernel K^(l).
        chi_par: C_W d<s^2>/dK at the kernel of the layer before; None for the first layer.
        chi_perp: C_W <s'^2> there; None for the first layer.
    """

    layer: int
    C_b: float
    C_W: float
    C_b_error: float | None
    C_W_error: float | None
    K: float
    chi_par: float | None
    chi_perp: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What the theory says of a network at initialisation; ``str()`` prints it.

    Args:
        network: The ensemble in words.
        depth: L.
        width: n, harmonic mean of the hidden widths; None without a hidden layer.
        aspect_ratio: r = L / n.
        epsilon: Var G / E[G]^2 at the output, to order 1/n.
        regime: In words.
        critical: The critical point of the activation, or None.
        layers: Layer by layer.
        growth: prod_{l >= 2} C_W^(l) / C_W(critical): signal gain over the depth relative to criticality; None
            without a critical point.
        verdict: Critical or not, in words.
        advice: What to change; empty if nothing.
        validity: Of the infinite-width theory.
    """

    network: str
    depth: int
    width: float | None
    aspect_ratio: float
    epsilon: float
    regime: str
    critical: CriticalPoint | None
    layers: tuple[LayerDiagnosis, ...]
    growth: float | None
    verdict: str
    advice: tuple[str, ...]
    validity: Validity

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """The report as Markdown, readable as plain text too."""
        lines = [
            f"### {self.network}",
            "",
            f"- depth L = {self.depth}, width n = {'none' if self.width is None else f'{self.width:g}'}, "
            f"aspect ratio r = L/n = {self.aspect_ratio:.4g}",
            f"- epsilon = Var G/E[G]^2 = {self.epsilon:.4g} (order 1/n): {self.regime}",
            f"- {self.verdict}",
            f"- order 0 is {self.validity}",
            *(f"- advice: {sentence}" for sentence in self.advice),
            "",
            "| layer | C_b | C_W | K | chi_par | chi_perp |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.layers:
            cells = [
                str(row.layer),
                _with_error(row.C_b, row.C_b_error),
                _with_error(row.C_W, row.C_W_error),
                f"{row.K:.4g}",
                "-" if row.chi_par is None else f"{row.chi_par:.4f}",
                "-" if row.chi_perp is None else f"{row.chi_perp:.4f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if self.critical is not None:
            point = self.critical
            place = "any K" if point.K_star is None else f"K* = {point.K_star:.4g}"
            cells = [f"critical ({point.universality_class})", f"{point.C_b:.4g}", f"{point.C_W:.4g}", place, "1", "1"]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def diagnose(model_or_ensemble: nn.Module | MLPEnsemble | ReadEnsemble, x: Tensor | None = None) -> Diagnosis:
    """Diagnose criticality and depth-to-width ratio of an MLP.

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
    inputs = torch.ones(1, ensemble.widths[0]) if x is None else x.detach().flatten(1)
    layers = _layers(ensemble, read if isinstance(read, ReadEnsemble) else None, inputs)
    critical, verdict, growth, advice = _criticality_verdict(ensemble)
    epsilon = output_fluctuation(ensemble, inputs)
    if max(epsilon, ensemble.aspect_ratio) >= 0.2:
        advice.append("too deep for its width: half the depth or twice the hidden widths about halve r and epsilon")
    hidden = ensemble.hidden_widths
    return Diagnosis(
        network=str(ensemble),
        depth=ensemble.depth,
        width=len(hidden) / sum(1 / n for n in hidden) if hidden else None,
        aspect_ratio=ensemble.aspect_ratio,
        epsilon=epsilon,
        regime=regime(ensemble.aspect_ratio, epsilon),
        critical=critical,
        layers=layers,
        growth=growth,
        verdict=verdict,
        advice=tuple(advice),
        validity=infinite_width_validity(ensemble, inputs),
    )


def _layers(ensemble: MLPEnsemble, read: ReadEnsemble | None, x: Tensor) -> tuple[LayerDiagnosis, ...]:
    rows = []
    before = None
    for index, statistics in enumerate(initial_statistics(ensemble, x)):
        C_W, K = ensemble.C_W[index], statistics.K.diagonal()
        rows.append(
            LayerDiagnosis(
                layer=statistics.layer,
                C_b=ensemble.C_b[index],
                C_W=C_W,
                C_b_error=None if read is None else read.C_b_error[index],
                C_W_error=None if read is None else read.C_W_error[index],
                K=float(K.mean()),
                chi_par=None if before is None else C_W * float(slope_of_variance(ensemble.activation, before).mean()),
                chi_perp=None if before is None else C_W * float(slope_squared(ensemble.activation, before).mean()),
            )
        )
        before = K
    return tuple(rows)


def _criticality_verdict(ensemble: MLPEnsemble) -> tuple[CriticalPoint | None, str, float | None, list[str]]:
    name = ensemble.activation.name
    try:
        critical = criticality(ensemble.activation)
    except QuadratureError as error:
        return None, f"criticality unknown: {error}", None, []
    if critical is None:
        verdict = f"{name} has no critical initialisation: signals or gradients change exponentially with depth"
        return None, verdict, None, []
    growth = math.prod(C_W / critical.C_W for C_W in ensemble.C_W[1:])
    drift = f"prod C_W / C_W(critical) = {growth:.3g} over layers 2..L, C_W(critical) = {critical.C_W:.4g}"
    advice = []
    if 0.5 <= growth <= 2:
        verdict = f"critical within a factor of 2: {drift}"
    else:
        side = "subcritical (ordered), gradients vanish" if growth < 1 else "supercritical (chaotic), gradients explode"
        verdict = f"{side} with depth: {drift}"
        advice.append(f"initialise weights with variance {critical.C_W:.4g} / n_in and biases with {critical.C_b:.4g}")
    excess = [C_b for C_b in ensemble.C_b[1:] if abs(C_b - critical.C_b) > 0.1]
    if excess:
        verdict += f"; C_b up to {max(excess, key=lambda c: abs(c - critical.C_b)):.3g}, critical is {critical.C_b:.4g}"
    return critical, verdict, growth, advice


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} +- {error:.1g}"
