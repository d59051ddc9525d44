"""Measured against theory: infinite width (order 0) beside the running training."""

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.comparison import Compared, InfiniteWidthComparison
from torch_eft.diagnosis import Diagnosis, diagnose
from torch_eft.live.optimizers import learning_rates, unlike_gradient_descent
from torch_eft.live.part import History, Part, Report, Start, Visit
from torch_eft.measure.initialization import NotAnMLPError, read_ensemble
from torch_eft.measure.learning_rates import read_learning_rates
from torch_eft.measure.probe import OutputFn, Probe
from torch_eft.measure.snapshot import Plan, Snapshot
from torch_eft.measure.training import (
    UnrecognisedLossError,
    batch_fingerprint,
    recognise_squared_error,
    same_batch,
)
from torch_eft.tensorboard.figures import comparison_figure
from torch_eft.tensorboard.tags import BAND, compared_quantities, tag
from torch_eft.theory.activations import ActivationLike
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.expectations import QuadratureError
from torch_eft.trajectory import Validity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TheoryPart(Part):
    """Order 0 of the theory, as long as the training is what it covers.

    Args:
        ensemble: C_b and C_W, if known, with the network's widths and activation; None reads them off the network
            at theta_0. lambda is the optimizer's in any case.
        activation: The activation to look for, where it is none of the registered ones.
        output_fn: Turns what the model returns into (N, C).
    """

    name = "theory"
    cost = "standard"

    def __init__(
        self,
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        output_fn: OutputFn | None = None,
    ) -> None:
        self.given = ensemble
        self.activation = activation
        self.output_fn = output_fn
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self.validity: Validity | None = None
        self._diagnosis: Diagnosis | None = None
        self._pages: dict[str, str] = {}
        self._comparison: InfiniteWidthComparison | None = None
        self._network: nn.Module | None = None
        self._probe: Tensor | None = None
        self._waiting: dict[int, tuple[Snapshot, Snapshot]] = {}
        self._ensemble: MLPEnsemble | None = None
        self._batch: tuple[Tensor, Tensor] | None = None
        self._loss: Tensor | None = None
        self._fingerprint: Tensor | None = None
        self._rates: list[float] = []

    @property
    def _undecided(self) -> bool:
        return self._comparison is None and self.validity is None

    def plan(self, outputs: int, samples: int) -> Plan:
        """Outputs (always there) and the NTK."""
        return Plan(ntk=True)

    def check(self, network: nn.Module, probe: Probe, outputs: int) -> None:
        """A given ensemble must have the network's widths."""
        if self.given is None:
            return
        activation = self.activation or self.given.activation
        try:
            widths = read_ensemble(network, None, probe.inputs, activation, self.output_fn)
        except NotAnMLPError:
            return  # said in words when training begins
        if widths.ensemble.widths != self.given.widths:
            raise ValueError(f"ensemble: widths {self.given.widths} given, the network has {widths.ensemble.widths}")

    def begin(self, start: Start) -> Report:
        """Read the ensemble off the network; rule out what the loop already shows to be outside."""
        if not start.fresh and self._comparison is not None:
            return Report()  # a second fit of the same trainer goes on where the first one stopped
        self.forget()
        pages: dict[str, str] = {}
        inputs = start.probe.inputs
        try:
            activation = self.activation or (self.given.activation if self.given else None)
            read = read_ensemble(start.network, start.optimizers, inputs, activation, self.output_fn)
            self._ensemble = read.ensemble if self.given is None else _with_lambda_of(self.given, read.ensemble)
            self._diagnosis = diagnose(read if self.given is None else self.given, inputs)
            pages["diagnosis"] = str(self._diagnosis)
        except (NotAnMLPError, QuadratureError) as error:
            pages["diagnosis"] = f"No diagnosis: {error}."
            return Report(pages=pages | self._stop(str(error)))
        except Exception as error:
            self._stop(f"{type(error).__name__}: {error}")
            raise
        if not start.fresh:
            return Report(
                pages=pages | self._stop(f"training starts at step {start.step}, the theory at initialisation")
            )
        reason = start.outside or _unlike_one_plain_descent(start.optimizers)
        if reason is not None:
            return Report(pages=pages | self._stop(reason))
        self._network, self._probe = start.network, inputs
        return Report(pages=pages)

    def observe(self, visit: Visit) -> Report:
        """Theory beside measurement, or nothing where the theory does not apply."""
        return Report(scalars=self._scalars(visit.step, visit.snapshot, visit.reference))

    def _scalars(self, step: int, snapshot: Snapshot, reference: Snapshot) -> dict[str, float]:
        if self._comparison is None:
            if self.validity is None:
                self._waiting[step] = (snapshot, reference)
            return {}
        if snapshot.ntk is None or reference.ntk is None:
            return {}
        ntk_0 = reference.ntk.to(snapshot.ntk)  # a checkpoint may have brought it back elsewhere
        scalars = compared_scalars(self._comparison.compare(step, snapshot.output, snapshot.ntk, ntk_0))
        if snapshot.hidden:
            scalars[tag("representation_change", "order_0")] = 0.0  # representations are frozen
        return scalars

    def on_batch(self, batch: Any) -> None:
        """Keep the first batch; see that the others hold the same samples."""
        if self.validity is not None and self._comparison is None:
            return
        pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)
        self._batch = (batch[0], batch[1]) if pair else None
        if self._fingerprint is not None and (
            self._batch is None or not same_batch(batch_fingerprint(*self._batch), self._fingerprint)
        ):
            self._comparison = None
            self._pages = self._stop("a later batch holds other samples than the first: not full-batch training")

    def on_loss(self, loss: Tensor) -> None:
        """Keep the first loss."""
        if self._undecided:
            self._loss = loss

    def on_gradient(self, step: int, optimizer: Optimizer) -> Report:
        """Decide, before the first step is taken; later, see that learning rates stay."""
        if self._comparison is not None and learning_rates(optimizer) != self._rates:
            self._comparison = None
            return Report(
                pages=self._stop(f"the learning rate changed at step {step}: order 0 is derived for a constant one")
            )
        if not self._undecided or self._network is None:
            pages, self._pages = self._pages, {}
            return Report(pages=pages)
        try:
            pages = self._decide(optimizer)
        except Exception as error:
            self._stop(f"{type(error).__name__}: {error}")
            raise
        late: History = {}
        for at_step, (snapshot, reference) in self._waiting.items():
            late[at_step] = self._scalars(at_step, snapshot, reference)
        self._waiting, self._network, self._loss, self._batch = {}, None, None, None
        return Report(late=late, pages=pages)

    def _decide(self, optimizer: Optimizer) -> dict[str, str]:
        assert self._network is not None and self._ensemble is not None and self._probe is not None
        if self._batch is None or self._loss is None:
            return self._stop("the batch is not a pair (inputs, targets) of tensors")
        x, y = self._batch
        gradients = {name: p.grad for name, p in self._network.named_parameters() if p.grad is not None}
        rate = read_learning_rates(self._network, [optimizer]).learning_rate
        try:
            loss = recognise_squared_error(self._network, x, y, self._loss, gradients, self.output_fn)
            comparison = InfiniteWidthComparison(
                self._ensemble,
                x.flatten(1),
                loss.targets,
                self._probe.flatten(1).to(x.device),
                rate * loss.rate_factor,
            )
        except UnrecognisedLossError as error:
            return self._stop(str(error))
        except ValueError as error:  # the learning rate is unstable, or inputs do not fit the ensemble
            return self._stop(str(error))
        self._comparison, self.validity = comparison, comparison.validity
        self._fingerprint, self._rates = batch_fingerprint(x, y), learning_rates(optimizer)
        text = f"Full-batch gradient descent on squared error ({loss.name}), learning rate {rate:g}. {self.validity}"
        return {"validity": f"{text}\n\nPredicted for the {self._ensemble} ensemble."}

    def _stop(self, reason: str) -> dict[str, str]:
        """From here on measurements only, and why."""
        self.validity = Validity("invalid", reason)
        self._network = None
        return {"validity": f"No theory for this run, measurements only: {reason}."}

    def info(self) -> dict[str, Any]:
        """Network, r, epsilon and criticality as diagnosed; level and validity of the comparison."""
        validity = self.validity
        info: dict[str, Any] = {
            "level": "ensemble, order 0",
            "validity": None if validity is None else {"flag": validity.flag, "reason": validity.reason},
        }
        if self._diagnosis is not None:
            ratio = self._diagnosis.aspect_ratio
            info |= {
                "network": self._diagnosis.network,
                "depth": ratio.depth,
                "width": ratio.width,
                "r": ratio.r,
                "epsilon": ratio.epsilon,
                "regime": ratio.regime,
                "criticality": self._diagnosis.verdict,
            }
        return info

    def last_figures(self, history: History, reference: Snapshot, last: Snapshot) -> "dict[str, Figure]":
        """Measured against theory, a figure a quantity: several panels are unreadable at thumbnail size."""
        return {
            f"measured_against_theory/{quantity}": comparison_figure(history, [quantity])
            for quantity in compared_quantities(history)
        }


def compared_scalars(compared: dict[str, Compared]) -> dict[str, float]:
    """The scalars of a comparison at order 0, without what is not finite."""
    scalars = {}
    for quantity, values in compared.items():
        scalars[tag(quantity)] = values.measured
        scalars[tag(quantity, "order_0")] = values.theory
        if values.sigma is not None:
            for series, sign in zip(BAND, (-1, 1), strict=True):
                scalars[tag(quantity, series)] = values.theory + sign * values.sigma
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


def _unlike_one_plain_descent(optimizers: list[Optimizer]) -> str | None:
    if len(optimizers) != 1:
        return f"{len(optimizers)} optimizers"
    return unlike_gradient_descent(optimizers[0])


def _with_lambda_of(ensemble: MLPEnsemble, other: MLPEnsemble) -> MLPEnsemble:
    return MLPEnsemble(ensemble.widths, ensemble.activation, ensemble.C_b, ensemble.C_W, other.lambda_b, other.lambda_W)
