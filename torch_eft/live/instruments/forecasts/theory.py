"""Forecast of the ensemble, order 0 and order 1/n, beside the running training."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from torch_eft.diagnosis import Diagnosis, diagnose
from torch_eft.diagnosis.measured.diagnose import measured_diagnosis
from torch_eft.forecast.comparison.architecture import ArchitectureComparison
from torch_eft.forecast.comparison.drift import LAW, DriftComparison, law_work
from torch_eft.forecast.comparison.ensemble import FIRST_HORIZON, EnsembleComparison
from torch_eft.forecast.comparison.work import Allowance
from torch_eft.live.instrument import Measurement, MeasurementWarning, Reading, RunFacts, TrainingStart
from torch_eft.live.instruments.common import compared_scalars, one_thread
from torch_eft.live.instruments.forecasts.bar import ForecastBar
from torch_eft.live.instruments.forecasts.base import ForecastInstrument
from torch_eft.live.instruments.forecasts.drift import DriftLines
from torch_eft.measure.ensembles.learning_rates import read_learning_rates
from torch_eft.measure.ensembles.read import NotAnMLPError, read_ensemble, read_isolated_architecture
from torch_eft.measure.network.network import Network
from torch_eft.measure.network.snapshot import Plan
from torch_eft.measure.training_loss import recognize_squared_error
from torch_eft.results.tags import tag
from torch_eft.results.training import Training, stability_in_unit
from torch_eft.theory.architecture.nodes import Architecture
from torch_eft.theory.architecture.reading.graph import NotReadableError
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.activations import ActivationLike
from torch_eft.theory.gaussian.quadrature import QuadratureError

_MANY_SAMPLES, _MOST_SAMPLES = 512, 1024
"""Samples of a probe from which on it is said what they take, and beyond which they are refused."""

_PER_PAIR = 1.6e-5
"""Seconds of one core that kernels at infinite width and their checks take for a pair of probe inputs (measured)."""

_READ = 20_000_000
"""Parameters up to which a network that is no MLP is read when a training begins."""

_FEW, _MEASURED = 4, 1_000_000
"""On how many inputs, and up to how many parameters, a network without theory is diagnosed when training begins."""


class TheoryInstrument(ForecastInstrument):
    """Compares a training with the theory of its ensemble, as long as that covers it; its page is ``eft/validity``.

    Args:
        ensemble: C_b and C_W, if known, with the network's widths and activation; None reads them off the network
            at theta_0. lambda is the optimizer's in any case.
        activation: The activation to look for, where it is not a registered one.
        order: 0, or 1 with as much of order 1/n as ``seconds`` covers: the law of the drift first, then mean drifts of
            the NTK and of hidden kernels, the mean output and its covariance.
        seconds: Work that order 1/n may take before the first step, counted in seconds of one core (so that every
            machine draws the same); what needs more is left out, and the page says what brings it.

    Raises:
        ValueError: If ``order`` or ``seconds`` is something else.
    """

    name = "theory"
    cost = "standard"
    what = "Forecast of the ensemble"
    page = "validity"

    def __init__(
        self,
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        *,
        order: int = 1,
        seconds: float = 10.0,
    ) -> None:
        if order not in (0, 1) or not seconds >= 0:
            raise ValueError(f"order: {order}, seconds: {seconds} given; give order 0 or 1, and seconds >= 0")
        self.given = ensemble
        self.activation = activation
        self.order, self.seconds = order, seconds
        super().__init__()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        super().forget()
        self._diagnosis: Diagnosis | None = None
        self._comparison: EnsembleComparison | ArchitectureComparison | None = None
        self._ensemble: MLPEnsemble | None = None
        self._architecture: Architecture | None = None  # where the network is no MLP
        self._hidden: list[str] = []
        self._drift: DriftLines | None = None
        self._start: Tensor | None = None
        self._unpredicted: dict[str, str] = {}
        self._expected: tuple[float, float] | None = None
        self._left_out = ""

    def plan(self, outputs: int, samples: int) -> Plan:
        """The NTK, besides the outputs."""
        return Plan(ntk=True)

    def check(self, network: Network) -> None:
        """Check that the probe is not too large for forecasts, and that a given ensemble has the network's widths."""
        samples = network.probe.size
        cost = f"probe: {samples} samples given; forecasts on so many take about {_PER_PAIR * samples**2:.0f} s"
        if samples > _MOST_SAMPLES:
            raise ValueError(
                f"{cost}, {_MOST_SAMPLES} are the most: give fewer, such as x[:64], or preset='light' for measurements "
                "alone"
            )
        if samples > _MANY_SAMPLES:
            warnings.warn(f"{cost} of one core; fewer, such as x[:64], show the same", MeasurementWarning, stacklevel=2)
        if self.given is None:
            return
        activation = self.activation or self.given.activation
        try:
            own = read_ensemble(network.current, network.probe.inputs, activation=activation)
        except NotAnMLPError:
            return  # its page says so when training begins
        if own.widths != self.given.widths:
            raise ValueError(f"ensemble: widths {self.given.widths} given, the network has {own.widths}")

    # ---- the training

    def begin(self, start: TrainingStart) -> Reading:
        """Read the ensemble off the network; end here if the loop is outside the theory already."""
        if self._goes_on(start):
            return Reading()
        pages: dict[str, str] = {}
        inputs = start.network.probe.inputs
        try:
            activation = self.activation or (self.given.activation if self.given else None)
            # Of sharded parameters a plain copy is measured, which no optimizer holds: measured, not forecast.
            optimizers = start.optimizers if start.obstacle is None or _held(start) else []
            read = read_ensemble(start.network.current, inputs, optimizer=optimizers, activation=activation)
            given = self._drawn(read) or self.given
            self._ensemble = read if given is None else _with_lambda_of(given, read)
            diagnosis = diagnose(given or read, inputs)
            self._diagnosis = diagnosis if isinstance(diagnosis, Diagnosis) else None
            pages["diagnosis"] = diagnosis.details
        except NotAnMLPError as error:
            pages["diagnosis"] = _measured_page(start, str(error))
            return Reading(pages=pages | self._begin_architecture(start, str(error)))
        except QuadratureError as error:
            pages["diagnosis"] = _measured_page(start, str(error))
            return Reading(pages=pages | self._stop(str(error)))
        except Exception as error:
            self._stop(f"{type(error).__name__}: {error}")
            raise
        reason = self._refusal(start)
        if reason is not None:
            return Reading(pages=pages | self._stop(reason))
        self._hidden = _activations(start.model, self._ensemble)
        return Reading(pages=pages)

    def _begin_architecture(self, start: TrainingStart, reason: str) -> dict[str, str]:
        """Read convolutions, skips and norms, where the training may be one that order 0 covers."""
        refusal = self._refusal(start)
        if self.given is not None or refusal is not None:
            return self._stop(reason if refusal is None else f"{refusal}; {reason}")
        if "comparison" in self._kept:  # it holds the kernels; weights that were trained do not show them any more
            return {}
        try:
            if sum(p.numel() for p in start.model.parameters()) > _READ:
                raise NotReadableError("it has too many parameters to be read while a training begins")
            if start.network.output_fn is not None:
                raise NotReadableError("an output_fn follows its forward")
            optimizers = start.optimizers if start.obstacle is None or _held(start) else []
            inputs = start.network.probe.inputs
            self._architecture = read_isolated_architecture(start.model, inputs, optimizer=optimizers, as_trained=True)
        except ValueError as error:
            return self._stop(f"{reason}; nor is it a graph of layers that is read: {error}")
        return {}

    def _drawn(self, now: MLPEnsemble) -> MLPEnsemble | None:
        """The ensemble that theta_0 was drawn from, by a checkpoint: trained weights do not show it any more."""
        if not self._kept or "ended" in self._kept:
            return None
        try:
            kept = self._kept["ensemble"]
            if kept["activation"] != now.activation.name or list(kept["widths"]) != list(now.widths):
                raise ValueError(f"it was {kept['activation']} with widths {kept['widths']}, the network is {now}")
            laws = {name: kept.get(name, "gaussian") for name in ("weight_law", "bias_law")}
            return MLPEnsemble(now.widths, now.activation, C_b=kept["C_b"], C_W=kept["C_W"], **laws)
        except Exception as error:  # a corrupt state is corrupt in many ways
            self._kept = {
                "ended": f"what the checkpoint says of the ensemble does not fit ({type(error).__name__}: {error})"
            }
            return None

    def _recognize(self, x: Any, y: Tensor, optimizer: Optimizer, options: dict[str, Any]) -> None:
        assert self._seen is not None
        network, start = self._seen.start.model, self._seen.start
        if not isinstance(x, Tensor):
            raise ValueError("not an MLP: its forward takes several inputs")
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        rate = read_learning_rates(network, [optimizer]).learning_rate
        output_fn = start.network.output_fn
        loss = self._recognized(
            lambda value: recognize_squared_error(network, x, y, value, gradients, output_fn=output_fn)
        )
        self._same_loss(loss.name, loss.rate_factor, loss.function)
        training = Training(
            reduction="sum",
            learning_rate=rate * loss.rate_factor,
            steps=start.total_steps or FIRST_HORIZON,
            **options,
        )
        z = None  # outputs at theta_0
        if self.order == 1 and self._ensemble is not None:
            kept = self._kept
            z = kept["start"].to(y) if kept else Network(network, x, output_fn=start.network.output_fn).output()
        self._start = z
        momentum = f", momentum {options['momentum']:g}" if options["momentum"] else ""
        words = f"Full-batch gradient descent on squared error ({loss.name}), learning rate {rate:g}{momentum}."
        self._problem = _Problem(x, loss.targets, training, words, loss.rate_factor)

    def _forecast(self) -> dict[str, str]:
        assert self._seen is not None
        problem: _Problem = self._problem
        self._problem = None
        x, y, training, kept = problem.x, problem.y, problem.training, self._kept
        if self._ensemble is None:
            return self._forecast_architecture(problem)
        probe = self._seen.start.network.probe.inputs.flatten(1).to(x.device)
        allowance = Allowance(self.seconds)
        if self.order == 1:
            allowance.plan({LAW: law_work(self._ensemble, len(x), len(probe), self.seconds)})
        with ForecastBar(allowance), one_thread(), stability_in_unit(problem.unit):
            self._comparison = EnsembleComparison(
                self._ensemble,
                x.flatten(1),
                y,
                probe,
                training,
                order=self.order,
                allowance=allowance,
                earlier=kept["comparison"] if kept else None,
            )
            drift = self._drift_law(x, y, probe, training, allowance)
        self._left_out = allowance.left_out
        H_0 = next((each.reference.ntk for each, _ in self._waiting), None)
        if kept and kept.get("expected"):
            low, high = kept["expected"]
            self._expected = float(low), float(high)
        elif self._drift is not None and H_0 is not None and self._seen.start.total_steps:
            self._expected = self._drift.expected(self._seen.start.total_steps, H_0)
        known = [self._comparison.validity] + ([] if self._drift is None else [self._drift.validity])
        self.validity = max(known, key=lambda each: ("valid", "caution", "invalid").index(each.flag))  # of all lines
        what = f"{self._comparison.description}; {drift}"
        page = f"{problem.words} {self.validity}\n\nPredicted for the {self._ensemble} ensemble: {what}."
        return {"validity": page}

    def _forecast_architecture(self, problem: "_Problem") -> dict[str, str]:
        assert self._seen is not None
        allowance = Allowance(self.seconds)
        probe = self._seen.start.network.probe.inputs.to(problem.x.device)
        with ForecastBar(allowance), one_thread(), stability_in_unit(problem.unit):
            self._comparison = comparison = ArchitectureComparison(
                self._architecture,
                problem.x,
                problem.y,
                probe,
                problem.training,
                allowance=allowance,
                earlier=self._kept["comparison"] if self._kept else None,
            )
        self.validity = comparison.validity
        sentence = "No prediction at finite width: order 1/n of convolutions, skips and norms is not drawn."
        self._unpredicted = dict.fromkeys(("ntk_drift", "dntk", "representation_change"), sentence)
        of = "an architecture kept by the checkpoint" if self._architecture is None else str(self._architecture)
        return {"validity": f"{problem.words} {self.validity}\n\nPredicted for {of}: {comparison.description}."}

    def _drift_law(self, x: Tensor, y: Tensor, probe: Tensor, training: Training, allowance: Allowance) -> str:
        """Make the law of this network's drift; returns what is drawn of it, or why nothing is."""
        assert self._ensemble is not None
        if self._start is None:
            return "the drift at order 0"
        if not allowance.covers(LAW):
            return self._without(f"{LAW} takes {allowance.refusal(LAW)}")
        try:
            with allowance.working(LAW):
                comparison = DriftComparison(
                    self._ensemble, x.flatten(1), y, probe, training, self._start, seconds=self.seconds
                )
        except (ValueError, QuadratureError) as error:
            return self._without(str(error))
        self._drift = DriftLines(comparison, self._hidden)
        if self._hidden:
            return comparison.description
        reason = (
            "the hidden kernels of the theory are of activations, which this network does not apply as modules, one "
            "after each hidden layer (nn.Tanh() ...)"
        )
        self._unpredicted = {"representation_change": f"No prediction at finite width: {reason}."}
        return f"{comparison.description}; hidden kernels at order 0: {reason}"

    def _without(self, reason: str) -> str:
        """Why there is no law of the drift, for the page; the tab shows it on the quantities' cards."""
        sentence = f"No prediction at finite width: {reason}."
        self._unpredicted = dict.fromkeys(("ntk_drift", "dntk", "representation_change"), sentence)
        return f"NTK drift, dNTK and change of hidden kernels at order 0: {reason}"

    def _none(self, reason: str) -> str:
        return f"No theory of the ensemble for this run, measurements only: {reason}."

    def state(self) -> dict[str, Any]:
        """The forecast, and its ensemble."""
        state, ensemble = super().state(), self._ensemble
        if "comparison" not in state or ensemble is None or self._comparison is None:
            return state  # what a checkpoint kept is complete, until the first step after it
        return state | {
            "start": self._start,
            "expected": None if self._expected is None else list(self._expected),
            "ensemble": {
                "widths": list(ensemble.widths),
                "activation": ensemble.activation.name,
                "C_b": list(ensemble.C_b),
                "C_W": list(ensemble.C_W),
                "weight_law": list(ensemble.weight_law),
                "bias_law": list(ensemble.bias_law),
            },
        }

    # ---- the numbers

    def _compared(self, measurement: Measurement) -> Reading:
        assert self._comparison is not None
        reading = Reading(self._scalars(measurement))
        if self._drift is not None:
            found, reading.late = self._drift.scalars(measurement)
            reading.scalars |= found
        reading.events += self._watch.events(measurement.step, self._comparison.expansion_parameter(measurement.step))
        if measurement.last:
            reading.pages |= self._layers_page(measurement)
        return reading

    def _scalars(self, measurement: Measurement) -> dict[str, float]:
        assert self._comparison is not None
        snapshot, reference = measurement.snapshot, measurement.reference
        if snapshot.ntk is None or reference.ntk is None:
            return {}
        ntk_0 = reference.ntk.to(snapshot.ntk)  # a checkpoint may have brought it back elsewhere
        compared = self._comparison.compare(
            measurement.step, snapshot.output, snapshot.ntk, ntk_0, self._kernels(measurement)
        )
        scalars = compared_scalars(compared)
        if snapshot.hidden:
            scalars[tag("representation_change", "order_0")] = 0.0  # representations are frozen
        return scalars

    def _kernels(self, measurement: Measurement) -> tuple[list[Tensor], list[Tensor]] | None:
        now, then = measurement.snapshot.hidden, measurement.reference.hidden
        if not self._hidden or not all(name in now and name in then for name in self._hidden):
            return None
        return [now[name] for name in self._hidden], [then[name].to(now[name]) for name in self._hidden]

    def _layers_page(self, measurement: Measurement) -> dict[str, str]:
        kernels = self._kernels(measurement)
        if kernels is None or self._comparison is None:
            return {}
        layers = self._comparison.layers(measurement.step, *kernels)
        if not layers:
            return {}
        rows = [
            f"| {name} | {measured:.3g} | 0 | {predicted:.3g} |"
            for name, (measured, predicted) in zip(self._hidden, layers, strict=True)
        ]
        return {
            "representation": "\n".join(
                [
                    f"Drift of hidden kernels at step {measurement.step}, along the ensemble's mean drift, relative to "
                    "the kernel at infinite width. One network's may differ from the mean by as much as the mean.",
                    "",
                    "| layer | measured | order 0 | order 1 |",
                    "|---|---|---|---|",
                    *rows,
                ]
            )
        }

    # ---- what it knows

    def facts(self) -> RunFacts:
        """Network, r, epsilon and criticality as diagnosed; level and validity of the comparison."""
        facts = replace(super().facts(), unpredicted=self._unpredicted)
        if self._comparison is not None:
            facts = replace(facts, expected=self._expected, left_out=self._left_out or None)
        if self._diagnosis is None:
            return facts
        ratio = self._diagnosis.aspect_ratio
        return replace(
            facts,
            network=self._diagnosis.network,
            depth=ratio.depth,
            width=ratio.width,
            r=ratio.r,
            epsilon=ratio.epsilon,
            regime=ratio.regime,
            criticality=self._diagnosis.criticality,
        )


@dataclass(frozen=True)
class _Problem:
    """A training that was recognized: inputs, targets as the squared error takes them, in words, and eta over lr."""

    x: Tensor
    y: Tensor
    training: Training
    words: str
    unit: float


def _measured_page(start: TrainingStart, reason: str) -> str:
    """The diagnosis of a network that no theory covers, measured on a few inputs; of a large one how to ask for it."""
    size = sum(p.numel() for p in start.model.parameters())
    if size > _MEASURED:
        return f"No diagnosis: {reason}. `torch_eft.diagnose(model, x)` measures it; {size:,} parameters take a while."
    few = tree_map_only(Tensor, lambda values: values[:_FEW], start.network.probe.inputs)
    try:
        return measured_diagnosis(start.network.current, few, reason, start.network.output_fn, num_networks=0).details
    except Exception as error:  # whatever a network may raise, the training goes on
        return f"No diagnosis: {reason}. It could not be measured either: {type(error).__name__}: {error}"


def _held(start: TrainingStart) -> bool:
    """Whether the optimizers hold parameters of the module that is measured."""
    measured = start.network.current
    module = measured if isinstance(measured, nn.Module) else measured.origin
    held = {id(p) for optimizer in start.optimizers for group in optimizer.param_groups for p in group["params"]}
    return any(id(p) in held for p in module.parameters())


def _activations(network: nn.Module, ensemble: MLPEnsemble) -> list[str]:
    """Names of the activation modules in the order of the hidden layers, if there is one per layer."""
    names = [name for name, m in network.named_modules() if type(m).__module__ == "torch.nn.modules.activation"]
    return names if len(names) == len(ensemble.hidden_widths) else []


def _with_lambda_of(ensemble: MLPEnsemble, other: MLPEnsemble) -> MLPEnsemble:
    return replace(ensemble, lambda_b=other.lambda_b, lambda_W=other.lambda_W)
