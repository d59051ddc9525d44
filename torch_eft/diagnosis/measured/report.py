"""The diagnosis of a measured network and its texts: short for a terminal, and its details as Markdown."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch_eft.diagnosis.findings import Finding
from torch_eft.diagnosis.text import aligned, bullets, code, labeled, percent, table, with_error
from torch_eft.results.presentation.html import text_html
from torch_eft.results.presentation.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Block:
    """A bottleneck, which everything passes: the output of a layer or residual block.

    Args:
        name: Of the module.
        kind: Its class.
        features: Numbers a sample.
        variance: Mean square of the features, the mean over the networks measured.
        gradient: Squared gradient of an output summed over the features, the mean over the networks.
        chi: Susceptibility from here to the next place, the mean of the ratio of their squared gradients; None for the
            last place.
        chi_error: Its standard error over networks; None for a single one.
    """

    name: str
    kind: str
    features: int
    variance: float
    gradient: float
    chi: float | None
    chi_error: float | None


@dataclass(frozen=True, repr=False)
class MeasuredDiagnosis(Result):
    """Measurements of a network at initialization. Nothing here is derived.

    ``print`` shows the verdict, warnings with advice, and five numbers; ``.details`` is all of it, as Markdown;
    ``.plot()`` draws signals and gradients along the depth.

    Args:
        network: Its class and size.
        reason: Why the theory does not cover it.
        verdict: One line: whether it trains, and how much seeds differ.
        gradients: A sentence: how gradients change over the depth, with the numbers.
        warnings: Problems, each with its remedy.
        advice: The remedies.
        blocks: The bottlenecks in order; empty if none were found.
        gradient_growth: Squared gradients at the first place over those at the last; None with fewer than two places.
        signal_growth: Mean square of the features at the last place over that at the first; None likewise.
        num_networks: Networks drawn anew.
        output_scale: Root mean square of the outputs over networks (of this one if no others were drawn).
        output_spread: Standard deviation of an output from seed to seed; None without seeds.
        ntk_log_variance: Var log tr H over seeds; None without.
        epsilon_ntk: e^that - 1, the effective epsilon of the NTK: Var tr H / E[tr H]^2 if lognormal.
        epsilon_ntk_error: Its standard error.
        epsilon_features: e^Var - 1 of the mean square that enters the last layer, which sets the outputs' variance, as
            epsilon does for an MLP; None where that is not seen. A normalization in front of it makes it 0.
        shares: The part of the NTK's trace that each layer's parameters make, 0 .. 1, by name.
        lambda_max: Largest eigenvalue of this network's NTK on all inputs.
        largest_learning_rate: N C / lambda_max: below it full-batch gradient descent on ``MSELoss`` with these inputs
            decreases the loss monotonically in the linearized network; in the unit of the optimizer and the loss.
        stability: What it is the largest learning rate of.
        plateau: kappa, the NTK's largest eigenvalue over that which tells inputs apart, on a few inputs; None where
            it was not measured.
        remarks: What limits the measurement.
        inputs: N.
        kind: ``"measured"``.

    Example:
        >>> import torch, torch_eft as eft
        >>> layers = torch.nn.Conv1d(1, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(24, 2)
        >>> report = eft.diagnose(torch.nn.Sequential(*layers), torch.eye(8)[:2, None], num_networks=2)
        >>> report.kind, report.inputs, report.num_networks
        ('measured', 2, 2)
    """

    network: str
    reason: str
    verdict: str
    gradients: str
    warnings: tuple[Finding, ...]
    advice: tuple[str, ...]
    blocks: tuple[Block, ...]
    gradient_growth: float | None
    signal_growth: float | None
    num_networks: int
    output_scale: float
    output_spread: float | None
    ntk_log_variance: float | None
    epsilon_ntk: float | None
    epsilon_ntk_error: float | None
    epsilon_features: float | None
    shares: dict[str, float]
    lambda_max: float | None
    largest_learning_rate: float | None
    stability: str
    plateau: float | None
    remarks: tuple[str, ...]
    inputs: int
    kind: Literal["measured"] = "measured"

    @property
    def status(self) -> int:
        """0 without warnings, 1 with."""
        return int(bool(self.warnings))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        return asdict(self)

    @property
    def details(self) -> str:
        """Everything, as Markdown."""
        return _details(self)

    def plot(self) -> "Figure":
        """Draw signals and squared gradients along the depth, and the layers' parts of the NTK.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from torch_eft.diagnosis.figures import measured_figure

        names = [block.name for block in self.blocks]
        lines = [block.gradient for block in self.blocks], [block.variance for block in self.blocks]
        return measured_figure(f"{self.network}: measured, not derived", names, *lines, self.shares)

    def __repr__(self) -> str:
        return f"MeasuredDiagnosis({self.network}: {self.verdict})"

    def __str__(self) -> str:
        """Return the short report, for a terminal."""
        return _summary(self)

    def _repr_html_(self) -> str:
        return text_html(str(self))


def _summary(diagnosis: MeasuredDiagnosis) -> str:
    """Return verdict, warnings, advice and five numbers."""
    lines = [diagnosis.network, "", *labeled("verdict", diagnosis.verdict)]
    for finding in diagnosis.warnings:
        lines += labeled("warning", finding.message)
        if finding.remedy:
            lines += [*labeled("  advice", finding.remedy), *code(finding.line)]
    lines += ["", *aligned(_numbers(diagnosis)), ""]
    seeds = f"{diagnosis.num_networks} networks drawn anew" if diagnosis.num_networks else "this network alone"
    lines += labeled("measured", f"on {seeds}, as no theory covers it: {diagnosis.reason}")
    lines += labeled("rates", diagnosis.stability) if diagnosis.stability else []
    return "\n".join([*lines, *labeled("more", "print(diagnosis.details), diagnosis.plot()")])


def _numbers(diagnosis: MeasuredDiagnosis) -> list[list[str]]:
    def root(value: float | None) -> str:
        return percent(None if value is None else math.sqrt(value))

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    return [
        ["squared gradients, first place over last", number(diagnosis.gradient_growth)],
        ["outputs, root mean square", number(diagnosis.output_scale)],
        ["output variance, seed to seed", root(diagnosis.epsilon_features)],
        ["NTK, seed to seed", root(diagnosis.epsilon_ntk)],
        ["largest stable learning rate", number(diagnosis.largest_learning_rate)],
    ]


def _details(diagnosis: MeasuredDiagnosis) -> str:
    """Return the whole report on any other module."""
    sentences = [
        f"measured, not derived: {diagnosis.reason}",
        diagnosis.verdict,
        diagnosis.gradients,
        *_measured(diagnosis),
    ]
    lines = [f"### {diagnosis.network}", "", *bullets(sentences), *bullets(diagnosis.remarks, "remark: ")]
    lines += [*bullets(map(str, diagnosis.warnings), "WARNING: "), *bullets(diagnosis.advice, "advice: ")]
    if diagnosis.blocks:
        rows = [
            [
                block.name,
                block.kind,
                f"{block.features:g}",
                f"{block.variance:.4g}",
                f"{block.gradient:.3g}",
                "-" if block.chi is None else with_error(block.chi, block.chi_error),
            ]
            for block in diagnosis.blocks
        ]
        head = ["measured: block", "kind", "features", "mean square", "squared gradient", "chi to the next"]
        lines += ["", *table(head, rows)]
    if diagnosis.shares:
        rows = [[name or "(top)", f"{100 * share:.3g} %"] for name, share in diagnosis.shares.items()]
        lines += ["", *table(["measured: layer", "NTK share"], rows)]
    return "\n".join(lines)


def _measured(diagnosis: MeasuredDiagnosis) -> list[str]:
    found, over = [], f"measured over {diagnosis.num_networks} seeds"
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
            f"Var tr H/E[tr H]^2, is {with_error(epsilon, diagnosis.epsilon_ntk_error)}: its trace varies by "
            f"{100 * math.sqrt(epsilon):.3g} % from seed to seed"
        )
    if (epsilon := diagnosis.epsilon_features) is not None:
        size = "0 (normalized)" if epsilon < 1e-6 else f"{epsilon:.3g}"
        found.append(f"{over}: effective epsilon of what enters the last layer {size}")
    if diagnosis.largest_learning_rate is not None:
        found.append(
            f"measured: lambda_max = {diagnosis.lambda_max:.4g} on these {diagnosis.inputs} inputs; full-batch "
            f"gradient descent on squared error is stable below eta = {diagnosis.largest_learning_rate:.3g} "
            f"(linearized network, one learning rate for all parameters; {diagnosis.stability})"
        )
    if diagnosis.plateau is not None:
        found.append(
            f"measured: the NTK's largest eigenvalue is {diagnosis.plateau:.3g} times the largest that tells inputs "
            "apart"
        )
    return found
