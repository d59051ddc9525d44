"""The instruments of an observer: each looks at one concern of a training and answers with a reading.

An instrument knows no trainer and no logger. Every method has a default that does nothing. An instrument that raises is
skipped at that measurement (warned of once, counted); the others go on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.measure.network.network import Network
from torch_eft.measure.network.snapshot import Plan, Snapshot
from torch_eft.results.trajectory import Validity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History: TypeAlias = dict[int, dict[str, float]]
"""``{optimizer step: {tag: value}}``."""

Cost: TypeAlias = Literal["light", "standard", "full"]


class MeasurementWarning(UserWarning):
    """A measurement failed and was skipped, or results could not be written; training is not affected.

    Example:
        >>> import warnings
        >>> from torch_eft.live import MeasurementWarning
        >>> warnings.simplefilter("error", MeasurementWarning)  # stop at the first one
    """


@dataclass(frozen=True)
class Event:
    """A mark on the time axis: a quantity leaves its band, a prediction leaves its validity.

    Args:
        step: The optimizer step.
        quantity: A name of ``torch_eft.results.quantities``, or ``"validity"``.
        text: One sentence, with the numbers that decided.

    Example:
        >>> from torch_eft.live import Event
        >>> Event(100, "validity", "terms of order 1 are 0.3 times those of order 0").step
        100
    """

    step: int
    quantity: str
    text: str


@dataclass(frozen=True)
class Obstacle:
    """A property of the training loop that keeps it from being plain full-batch training on one device.

    Args:
        reason: A short phrase, e.g. ``"gradient clipping at 0.1"``.
        minibatches: Whether mini-batches, one or several a step, are all that it is: networks trained beside this one
            follow those.
        rates: Whether the learning rates of the network's parameters are not known, so that lambda has no value.

    Example:
        >>> from torch_eft.live import Obstacle
        >>> Obstacle("gradient clipping at 1.0").minibatches
        False
    """

    reason: str
    minibatches: bool = False
    rates: bool = False


@dataclass(frozen=True)
class TrainingStart:
    """A training that is about to begin, or to go on.

    Args:
        model: The live module; its parameters hold theta_0 if ``fresh``.
        network: The same on the probe, isolated while training begins: measure by its methods.
        optimizers: Those of the training; may be empty.
        step: Optimizer steps taken so far.
        fresh: Whether training starts here rather than going on from a checkpoint.
        obstacle: Why the loop is not plain full-batch training on one device (mini-batches, gradient accumulation,
            clipping, several processes ...); None if it is, as far as the loop knows. What the optimizer and the data
            show is not included.
        total_steps: Optimizer steps of the whole training, where the loop knows them.
        full_batch: Whether the loop knows that every step takes the same batch, all of the data; else batches show it.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> from torch_eft.live import TrainingStart
        >>> model = torch.nn.Linear(2, 1)
        >>> start = TrainingStart(model, measure.Network(model, torch.zeros(3, 2)), [], 0, fresh=True, obstacle=None)
        >>> start.network.probe.size
        3
    """

    model: nn.Module
    network: Network
    optimizers: list[Optimizer]
    step: int
    fresh: bool
    obstacle: Obstacle | None
    total_steps: int | None = None
    full_batch: bool = False


@dataclass(frozen=True)
class Contraction:
    """Sizes of dNTK and ddNTK that an instrument has measured.

    Args:
        start: Optimizer steps taken at the parameters where the derivatives were taken.
        end: Those at the end of the displacement along which they are contracted; None: along the gradient.
        dntk: Size of the dNTK.
        ddntk: Size of the ddNTK, if it was measured.
        logged: The step at which they are logged.
    """

    start: int
    end: int | None
    dntk: float
    ddntk: float | None
    logged: int


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Args:
        step: Optimizer steps taken.
        model: The live module: only read it.
        network: The same on the probe, isolated once for all instruments: measure by its methods.
        snapshot: What the plans of all instruments asked for, now.
        reference: The same at theta_0.
        lambdas: The learning-rate tensor of the snapshot's NTK.
        last: Whether this is the last measurement of the training.
        theta_0: ``{parameter: value}`` of the trainable parameters at the reference, where an instrument asks for it
            by ``needs_theta_0``; else None.
        statistics: ``{buffer: value}`` with which BatchNorm normalizes at the reference; empty where there is none that
            training updates.
        plan: What the snapshot holds: ``network.at(theta).snapshot(plan)`` is the same at other parameters.
        thorough: Whether the budget has room for what an instrument might leave out: terms of second order, say.
        contractions: Sizes of dNTK and ddNTK found at this measurement, for the forecasts that are asked after.
        room: Whether the budget has room for so many seconds more; None: no limit is known.

    Example:
        >>> import torch
        >>> from torch_eft import measure
        >>> from torch_eft.live import Measurement
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> network = measure.Network(model, torch.eye(2))
        >>> snapshot = network.snapshot(measure.Plan(ntk=True))
        >>> Measurement(0, model, network, snapshot, snapshot, {"weight": 1.0}).network.ntk(trace=True)
        tensor([[1., 0.],
                [0., 1.]])
    """

    step: int
    model: nn.Module
    network: Network
    snapshot: Snapshot
    reference: Snapshot
    lambdas: dict[str, float]
    last: bool = False
    theta_0: dict[str, Tensor] | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    thorough: bool = True
    contractions: list[Contraction] = field(default_factory=list)
    room: Callable[[float], bool] | None = None


@dataclass
class Reading:
    """The answer of an instrument.

    Args:
        scalars: ``{tag: value}`` of this step; tags by ``torch_eft.results.tags.tag``. Values that are not finite are
            dropped.
        pages: ``{name: Markdown}``; logged as ``eft/<name>``.
        events: Marks on the time axis. The observer itself marks when a measured quantity leaves the band that is
            logged beside it.
        late: ``{earlier step: {tag: value}}``, for numbers that were not available then.
        histograms: ``{tag: values}``.

    Example:
        >>> from torch_eft.live import Reading
        >>> Reading({"eft/ntk_trace/measured": 2.0}).scalars
        {'eft/ntk_trace/measured': 2.0}
    """

    scalars: dict[str, float] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    late: History = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A prediction for the run.

    Args:
        level: Level of theory and order, e.g. ``"ensemble, order 1"``.
        validity: Where it holds, or why there is none; None before that is decided.
    """

    level: str
    validity: Validity | None


@dataclass(frozen=True)
class RunFacts:
    """An instrument's knowledge of the run; None where it knows nothing.

    Args:
        claim: What it predicts; None: it predicts nothing. Of several instruments the first that is not invalid is
            shown.
        network: A name for the network; None: its class.
        depth: L.
        width: n.
        r: L / n.
        epsilon: Var G / E[G]^2.
        regime: The regime of r.
        criticality: One sentence on the critical point.
        unpredicted: ``{quantity: sentence}``: why a quantity has no prediction at finite width. The tab shows it in
            the quantity's card; without one, the reason of a claim that does not hold.
        expected: The band of 90 % of networks in which the NTK's drift ends.
        left_out: What a forecast leaves out, and the argument that brings it.
    """

    claim: Claim | None = None
    network: str | None = None
    depth: int | None = None
    width: float | None = None
    r: float | None = None
    epsilon: float | None = None
    regime: str | None = None
    criticality: str | None = None
    unpredicted: Mapping[str, str] | None = None
    expected: tuple[float, float] | None = None
    left_out: str | None = None


class Instrument:
    """Base of all instruments.

    Attributes:
        name: Name in checkpoints, budgets and messages; one per class (and per instance, if there are several).
        cost: The smallest preset that includes it.
        needs_theta_0: Whether measurements must carry the parameters at the reference.
        looks_back: Whether it compares with an earlier measurement, so that the time of the first one says nothing
            about the others.
        of_snapshots: Whether it compares two snapshots and reads nothing else, so that it can be asked again about
            theta_0, where that is measured anew.
        left_out: What it leaves out of a measurement that is not ``thorough``, in words; empty: nothing but checks.
        draws_curves: Whether it runs wherever measurements are made at any budget (``torch_eft.live.config.schedule``),
            as light ones do; others then ask the budget, too.

    Example:
        >>> import torch
        >>> from torch_eft.live import Instrument, Observer, Reading
        >>> class OutputSize(Instrument):
        ...     name = "output_size"
        ...     def observe(self, measurement):
        ...         return Reading({"eft/output_size/measured": float(measurement.snapshot.output.norm())})
        >>> observer = Observer(torch.nn.Linear(2, 1), torch.zeros(3, 2), instruments=[OutputSize()])
        >>> observer.begin()
        >>> list(observer.history[0])
        ['eft/output_size/measured']
    """

    name: str = "instrument"
    cost: Cost = "light"
    needs_theta_0: bool = False
    looks_back: bool = False
    of_snapshots: bool = False
    draws_curves: bool = False
    left_out: str = ""

    def plan(self, outputs: int, samples: int) -> Plan:
        """The parts of each snapshot that it needs, for ``outputs`` = C and ``samples`` = N."""
        return Plan()

    def check(self, network: Network) -> None:
        """Before training: raise ``ValueError`` if its arguments do not fit the network, which is isolated here."""

    def keeps_theta_0(self, model: nn.Module) -> bool:
        """Return whether measurements of this network must carry the parameters at the reference: a copy of them."""
        return self.needs_theta_0

    def begin(self, start: TrainingStart) -> Reading:
        """Training starts, or goes on; called before the first measurement."""
        return Reading()

    def observe(self, measurement: Measurement) -> Reading:
        """A measurement was made. The budget may leave out those between the first and the last."""
        return Reading()

    def idle(self) -> bool:
        """Return whether there is nothing for it to measure, so that no budget need be asked."""
        return False

    def listens(self) -> bool:
        """Return whether what follows, up to ``after_step``, still does something: else it is not called."""
        return True

    def observe_batch(self, batch: Any) -> None:
        """A training batch arrived, on the network's device."""

    def observe_loss(self, loss: Tensor) -> None:
        """The batch's loss was computed; detached."""

    def before_step(self, step: int, optimizer: Optimizer) -> Reading:
        """``optimizer`` is about to take a step, gradients in ``.grad``; ``step`` steps were taken before."""
        return Reading()

    def after_step(self, step: int, network: nn.Module) -> Reading:
        """A step was taken, ``step`` in all. Called after every step: it must be cheap, or mostly do nothing."""
        return Reading()

    def undecided(self) -> bool:
        """Return whether its next ``before_step`` may make a forecast: work that is booked apart."""
        return False

    def forget(self) -> None:
        """Drop what belongs to an earlier run: a new one starts, or another state is about to be loaded."""

    def state(self) -> dict[str, Any]:
        """Save all that is needed to go on after a checkpoint.

        Returns:
            Plain types and tensors only. Parameters of theta_0, ``{name: value}``, go by the key ``"theta_0"``: they
            may be kept beside the checkpoint, or not at all, and then are None in the state that is loaded.
        """
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""

    def facts(self) -> RunFacts:
        """Its knowledge of the run: network, prediction, validity."""
        return RunFacts()

    def first_figures(self, reference: Snapshot) -> "dict[str, Figure]":
        """Figures of theta_0, before training."""
        return {}

    def last_figures(self, history: History, reference: Snapshot, last: Snapshot) -> "dict[str, Figure]":
        """Figures at the end of training."""
        return {}
