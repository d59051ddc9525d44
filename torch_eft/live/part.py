"""What an observer is made of: one concern, told what was measured, answering with a report.

A part knows no trainer and no logger. Every method has a default that does nothing. A part that raises is skipped at
that visit (warned of once, counted); the other parts go on.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.measure.forward.probe import OutputFn, Probe
from torch_eft.measure.network.snapshot import Plan, Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History: TypeAlias = dict[int, dict[str, float]]
"""``{optimizer step: {tag: value}}``."""

Cost: TypeAlias = Literal["light", "standard", "full"]


class MeasurementWarning(UserWarning):
    """A measurement failed and was skipped, or results could not be written; training is not affected."""


@dataclass(frozen=True)
class Event:
    """Something to mark on the time axis: a quantity leaves its band, a prediction leaves its validity.

    Args:
        step: The optimizer step.
        quantity: A key of ``QUANTITIES``, or ``"validity"``.
        text: One sentence, with the numbers that decided.
    """

    step: int
    quantity: str
    text: str


@dataclass(frozen=True)
class Start:
    """A training is about to begin, or to go on.

    Args:
        network: The module that is measured; its parameters hold theta_0 if ``fresh``.
        probe: The fixed inputs.
        optimizers: Those of the training.
        step: Optimizer steps taken so far.
        fresh: Whether the run starts here, at initialization: no checkpoint, no earlier fit.
        outside: Why the loop itself shows that this is no plain full-batch training on one device (mini-batches,
            accumulation, clipping, several processes ...), in words; None if it does not. What the optimizer is, parts
            see for themselves.
        lambdas: ``{parameter: lambda}``, the learning-rate tensor with which the NTK is measured.
        output_fn: Turns what the network returns into (N, C).
        total_steps: Optimizer steps to be taken in all, where the loop knows.
    """

    network: nn.Module
    probe: Probe
    optimizers: list[Optimizer]
    step: int
    fresh: bool
    outside: str | None
    lambdas: dict[str, float]
    output_fn: OutputFn | None = None
    total_steps: int | None = None


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Args:
        step: Optimizer steps taken.
        network: The live module: only read it, or hand it to ``measure``, which isolates it.
        probe: The fixed inputs.
        output_fn: Turns what the network returns into (N, C).
        snapshot: What every part's plan asked for, now.
        reference: The same at theta_0.
        lambdas: The learning-rate tensor of the snapshot's NTK.
        last: Whether this is the last visit of the training.
        theta_0: ``{parameter: value}`` of the trainable parameters at the reference, where a part asks for it by
            ``needs_theta_0``; else None.
    """

    step: int
    network: nn.Module
    probe: Probe
    output_fn: OutputFn | None
    snapshot: Snapshot
    reference: Snapshot
    lambdas: dict[str, float]
    last: bool = False
    theta_0: dict[str, Tensor] | None = None


@dataclass
class Reading:
    """What a part has to say.

    Args:
        scalars: ``{tag: value}`` of this step; tags by ``torch_eft.results.tags.tag``. What is not finite is
            dropped.
        pages: ``{name: Markdown}``; logged as ``eft/<name>``.
        events: Marks on the time axis. That a measured quantity leaves the band that is logged beside it need not
            be told: the observer sees it.
        late: ``{earlier step: {tag: value}}``, for numbers that could not be had then.
        histograms: ``{tag: values}``.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    late: History = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)


class Instrument:
    """One concern of an observer.

    Attributes:
        name: Names it in checkpoints, budgets and messages; one a class (and instance, if there are several).
        cost: The smallest preset that has it.
        needs_theta_0: Whether visits must carry the parameters at the reference.
        looks_back: Whether it compares with an earlier visit, so that what the first one takes says nothing of others.
    """

    name: str = "part"
    cost: Cost = "light"
    needs_theta_0: bool = False
    looks_back: bool = False

    def plan(self, outputs: int, samples: int) -> Plan:
        """What it needs measured in each snapshot, for ``outputs`` = C and ``samples`` = N."""
        return Plan()

    def check(self, network: nn.Module, probe: Probe, outputs: int) -> None:
        """Before training: raise ``ValueError`` if its arguments do not fit the network."""

    def begin(self, start: Start) -> Reading:
        """Training starts, or goes on; called before the first measurement."""
        return Reading()

    def observe(self, visit: Measurement) -> Reading:
        """A measurement was made. The budget may leave out visits between the first and the last."""
        return Reading()

    def on_batch(self, batch: Any) -> None:
        """A training batch arrived, on the network's device."""

    def on_loss(self, loss: Tensor) -> None:
        """Its loss was computed; detached."""

    def on_gradient(self, step: int, optimizer: Optimizer) -> Reading:
        """``optimizer`` is about to take a step, gradients in ``.grad``; ``step`` steps were taken before."""
        return Reading()

    def on_step(self, step: int, network: nn.Module) -> Reading:
        """A step was taken, ``step`` in all. Called every step: it must be cheap, or do nothing most times."""
        return Reading()

    def forget(self) -> None:
        """Drop what belongs to an earlier run: a new one starts, or another one's state is about to be loaded."""

    def state(self) -> dict[str, Any]:
        """What it needs to go on after a checkpoint: plain types and tensors only.

        Parameters of theta_0, ``{name: value}``, go by the key ``"theta_0"``: they may be kept beside the checkpoint,
        or not at all, and then are None in the state that is loaded.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""

    def info(self) -> dict[str, Any]:
        """What it knows of the run, plain types: ``level``, ``validity`` {flag, reason}, ``r``, ``epsilon`` ...

        Merged into the run info: of several parts that give a level and a validity, the first that is not invalid wins.
        """
        return {}

    def first_figures(self, reference: Snapshot) -> "dict[str, Figure]":
        """Figures of theta_0, before training."""
        return {}

    def last_figures(self, history: History, reference: Snapshot, last: Snapshot) -> "dict[str, Figure]":
        """Figures at the end of training."""
        return {}
