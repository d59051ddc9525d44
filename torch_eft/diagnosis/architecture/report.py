"""The diagnosis of an architecture and its texts: short for a terminal, and its details as Markdown."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch_eft.diagnosis.findings import Finding
from torch_eft.diagnosis.measured.report import MeasuredDiagnosis
from torch_eft.diagnosis.text import aligned, bullets, code, labeled, percent, table
from torch_eft.results.presentation.html import text_html
from torch_eft.results.presentation.result import Result
from torch_eft.results.trajectory import Validity
from torch_eft.theory.estimates.layer_profile import LayerProfile, StreamProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Population:
    """Neurons that share an index: a hidden layer, or all that is added to one residual stream.

    Args:
        name: Of its layer; of a stream, of its first and last.
        neurons: Channels, features.
        share: The part of the variance of the NTK over seeds that they make.

    Example:
        >>> import torch, torch_eft as eft
        >>> layers = torch.nn.Conv1d(1, 32, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(192, 2)
        >>> report = eft.diagnose(torch.nn.Sequential(*layers), torch.eye(8)[:2, None])
        >>> report.populations
        (Population(name='0', neurons=32, share=1.0),)
    """

    name: str
    neurons: int
    share: float


@dataclass(frozen=True, repr=False)
class ArchitectureDiagnosis(Result):
    """What is derived of convolutions, skips and norms before training: infinite width, and the spread at order 1/n.

    ``print`` shows the verdict, warnings with advice, and six numbers; ``.details`` is all of it, as Markdown;
    ``.plot()`` draws kernels and gradients along the depth.

    Args:
        network: Its class and size.
        verdict: One line: whether it trains, and how much seeds differ.
        gradients: A sentence: how gradients change over the depth, with the numbers.
        warnings: Problems, each with its remedy.
        advice: The remedies.
        layers: Layers with weights, in the order of the forward.
        streams: Residual streams.
        populations: Hidden populations, with what each does to the spread.
        gradient_growth: Squared gradients at the first layer over those at the last hidden one.
        kernel_growth: K_L / K_0, the kernel at the last hidden layer or sum over that at the first layer.
        r: Sum over populations of 1 / n, weighted by their shares of the spread; L / n for equal ones.
        epsilon: Var G / (E G)^2, G the variance of an output given everything below the last layer.
        ntk_spread: Standard deviation of the NTK's trace over seeds, relative to its mean.
        ntk_spread_error: Its standard error, by the neurons drawn for it.
        lambda_max: Largest eigenvalue of the NTK on all inputs, measured on this network: several outputs, which are
            independent only at infinite width, make it larger than there.
        largest_learning_rate: N C / lambda_max: below it full-batch gradient descent on ``MSELoss`` with these inputs
            is stable in the linearized network; in the unit of the optimizer and the loss.
        stability: What it is the largest learning rate of.
        plateau: kappa, the NTK's largest eigenvalue over that which tells inputs apart, on a few inputs; None where
            they are equal.
        validity: Where the spread at order 1/n holds.
        remarks: What limits all this.
        inputs: N.
        measured: Networks drawn and measured beside it; None where nobody asked.
        kind: ``"architecture"``.

    Example:
        >>> import torch, torch_eft as eft
        >>> layers = torch.nn.Conv1d(1, 32, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(192, 2)
        >>> report = eft.diagnose(torch.nn.Sequential(*layers), torch.eye(8)[:2, None])
        >>> report.kind, [population.neurons for population in report.populations]
        ('architecture', [32])
    """

    network: str
    verdict: str
    gradients: str
    warnings: tuple[Finding, ...]
    advice: tuple[str, ...]
    layers: tuple[LayerProfile, ...]
    streams: tuple[StreamProfile, ...]
    populations: tuple[Population, ...]
    gradient_growth: float | None
    kernel_growth: float | None
    r: float
    epsilon: float
    ntk_spread: float
    ntk_spread_error: float
    lambda_max: float
    largest_learning_rate: float | None
    stability: str
    plateau: float | None
    validity: Validity
    remarks: tuple[str, ...]
    inputs: int
    measured: MeasuredDiagnosis | None = None
    kind: Literal["architecture"] = "architecture"

    @property
    def status(self) -> int:
        """0 without warnings, 1 with."""
        return int(bool(self.warnings))

    @property
    def largest_share(self) -> Population | None:
        """The population that makes most of the spread; None without a hidden layer."""
        return max(self.populations, key=lambda each: each.share, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for JSON."""
        return asdict(self)

    @property
    def details(self) -> str:
        """Everything, as Markdown."""
        return _details(self)

    def plot(self) -> "Figure":
        """Draw kernels and squared gradients along the depth, and the layers' parts of the NTK.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from torch_eft.diagnosis.figures import measured_figure

        hidden = self.layers[:-1]
        lines = [each.gradient for each in hidden], [each.K for each in hidden]
        shares = {each.name: each.share for each in self.layers}
        return measured_figure(
            f"{self.network}: derived", [each.name for each in hidden], *lines, shares, how="derived"
        )

    def __repr__(self) -> str:
        return f"ArchitectureDiagnosis({self.network}: {self.verdict})"

    def __str__(self) -> str:
        """Return the short report, for a terminal."""
        return _summary(self)

    def _repr_html_(self) -> str:
        return text_html(str(self))


def _summary(diagnosis: ArchitectureDiagnosis) -> str:
    lines = [diagnosis.network, "", *labeled("verdict", diagnosis.verdict)]
    for finding in diagnosis.warnings:
        lines += labeled("warning", finding.message)
        if finding.remedy:
            lines += [*labeled("  advice", finding.remedy), *code(finding.line)]
    lines += ["", *aligned(_numbers(diagnosis)), ""]
    largest = diagnosis.largest_share
    if largest is not None and len(diagnosis.populations) > 1:
        lines += labeled(
            "spread",
            f"{percent(largest.share)} of the NTK's variance over seeds comes from {largest.name}, {largest.neurons} "
            "neurons",
        )
    lines += labeled(
        "derived",
        "from its layers and the law of their weights (infinite width and order 1/n), but for the learning rate",
    )
    lines += labeled("rates", diagnosis.stability) if diagnosis.stability else []
    lines += labeled("remark", diagnosis.validity.reason) if diagnosis.validity.flag != "valid" else []
    return "\n".join([*lines, *labeled("more", "print(diagnosis.details), diagnosis.plot()")])


def _numbers(diagnosis: ArchitectureDiagnosis) -> list[list[str]]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    return [
        ["squared gradients, first layer over last", number(diagnosis.gradient_growth)],
        ["kernel K, last layer over first", number(diagnosis.kernel_growth)],
        ["output variance, seed to seed", percent(math.sqrt(max(0.0, diagnosis.epsilon)))],
        ["NTK, seed to seed", percent(diagnosis.ntk_spread)],
        ["depth over width, r", number(diagnosis.r)],
        ["largest stable learning rate", number(diagnosis.largest_learning_rate)],
    ]


def _details(diagnosis: ArchitectureDiagnosis) -> str:
    sentences = [
        "derived from the graph of its layers and the law of their weights: infinite width, spread at order 1/n",
        diagnosis.verdict,
        diagnosis.gradients,
        *map(_stream, diagnosis.streams),
        *_derived(diagnosis),
        str(diagnosis.validity),
    ]
    lines = [f"### {diagnosis.network}", "", *bullets(sentences), *bullets(diagnosis.remarks, "remark: ")]
    lines += [*bullets(map(str, diagnosis.warnings), "WARNING: "), *bullets(diagnosis.advice, "advice: ")]
    rows = [
        [
            each.name,
            f"{each.neurons}",
            f"{each.positions}",
            f"{each.K:.4g}",
            f"{each.gradient:.3g}",
            percent(each.share),
        ]
        for each in diagnosis.layers
    ]
    head = ["derived: layer", "neurons", "positions", "K", "squared gradient", "NTK share"]
    lines += ["", *table(head, rows)]
    if diagnosis.populations:
        rows = [[each.name, f"{each.neurons}", percent(each.share)] for each in diagnosis.populations]
        lines += ["", *table(["derived: population", "neurons", "makes of the NTK's variance over seeds"], rows)]
    if diagnosis.measured is not None:
        lines += ["", *table(["beside it", "derived", "measured"], _beside(diagnosis, diagnosis.measured))]
        lines += ["", diagnosis.measured.details]
    return "\n".join(lines)


def _stream(stream: StreamProfile) -> str:
    blocks = f"{stream.blocks} block" + "s" * (stream.blocks > 1)
    text = (
        f"stream {stream.name}: over {blocks} K grows {stream.kernel_growth:.3g}-fold and the squared gradient, "
        f"backward, {stream.gradient_growth:.3g}-fold, {stream.gradient_growth ** (1 / stream.blocks):.3g} a block"
    )
    if stream.exponent is not None:
        text += f" = (K_L / K_0)^{stream.exponent:.2f}: a power law, critical for any initial weights (pre-norm)"
    return text


def _derived(diagnosis: ArchitectureDiagnosis) -> list[str]:
    found = [
        f"r = {diagnosis.r:.3g}: 1/n summed over {len(diagnosis.populations)} populations, weighted by what each makes "
        "of the spread",
        f"epsilon = Var G / E[G]^2 = {diagnosis.epsilon:.3g}: the variance of outputs varies by "
        f"{percent(math.sqrt(max(0.0, diagnosis.epsilon)))} from seed to seed",
        f"the NTK's trace varies by {percent(diagnosis.ntk_spread)} +- {percent(diagnosis.ntk_spread_error)} from seed "
        "to seed",
    ]
    if diagnosis.largest_learning_rate is not None:
        found.append(
            f"measured on this network: lambda_max = {diagnosis.lambda_max:.4g} on these {diagnosis.inputs} inputs; "
            f"full-batch gradient descent on squared error is stable below eta = {diagnosis.largest_learning_rate:.3g} "
            f"(linearized network; {diagnosis.stability})"
        )
    if diagnosis.plateau is not None:
        found.append(
            f"the NTK's largest eigenvalue is {diagnosis.plateau:.3g} times the largest that tells inputs apart"
        )
    return found


def _beside(diagnosis: ArchitectureDiagnosis, measured: MeasuredDiagnosis) -> list[list[str]]:
    def root(value: float | None) -> str:
        return percent(None if value is None else math.sqrt(max(0.0, value)))

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    return [
        ["output variance, seed to seed", root(diagnosis.epsilon), root(measured.epsilon_features)],
        ["NTK, seed to seed", percent(diagnosis.ntk_spread), root(measured.epsilon_ntk)],
        [
            "NTK's largest eigenvalue over the next that tells inputs apart",
            number(diagnosis.plateau),
            number(measured.plateau),
        ],
    ]
