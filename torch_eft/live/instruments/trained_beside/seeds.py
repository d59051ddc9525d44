"""A band that is measured: networks drawn anew, trained beside the network on the same batches.

For any network, loss and optimizer, where no theory tells how much networks differ. Nothing is extrapolated: seeds of a
training's first steps do not foretell its later ones (their spread changes, and their order does not persist).
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.instrument import Event, Instrument, Measurement, Reading, TrainingStart
from torch_eft.live.instruments.common import LARGEST, memory, reason_of
from torch_eft.live.instruments.trained_beside.coming_step import ComingStep, not_followed, output_fn_of
from torch_eft.measure.ensembles.trained_seeds import TrainedSeeds
from torch_eft.measure.kernels.metrics import relative_change
from torch_eft.measure.kernels.random_outputs import ntk_drift
from torch_eft.measure.network.snapshot import Plan, Snapshot
from torch_eft.measure.taylor.trained_step import TrainedStep
from torch_eft.results.tags import SEEDS, SEEDS_BAND, tag
from torch_eft.results.training import LossFunction

TOLERANCE = 0.1
"""Share of a step by which the network's own may differ from its copy's: reduced precision rounds gradients at 1e-2."""


class SeedsInstrument(Instrument):
    """Lowest, median and highest of networks drawn anew, for the NTK drift and the representation change.

    Every training step costs one more for every network, and every measurement as many snapshots: no preset includes
    it, ``seeds=4`` (or ``extra=["seeds"]``) asks for it.

    Args:
        num_seeds: M >= 2 networks. Another one lies between the lowest and the highest with probability
            (M - 1)/(M + 1), whatever the distribution.
        steps: Optimizer steps over which they are trained; None: as long as the network is.
        initialize: Draws the parameters of the module it is given, in place; None uses ``reset_parameters`` or an
            ``_init_weights`` of the module, if the network could be one of its draws.
        loss_function: The loss of outputs (N, C) and targets, if it is neither squared error nor cross-entropy.
        seed: Of the first network.
        largest: Trainable parameters, of all networks together, up to which they are trained.

    Raises:
        ValueError: If ``num_seeds`` is less than 2.
    """

    name = "seeds"
    cost = "full"
    looks_back = True

    def __init__(
        self,
        num_seeds: int = 4,
        *,
        steps: int | None = None,
        initialize: Callable[[nn.Module], Any] | None = None,
        loss_function: LossFunction | None = None,
        seed: int = 0,
        largest: int = LARGEST,
    ) -> None:
        if isinstance(num_seeds, bool) or not isinstance(num_seeds, int) or num_seeds < 2:
            raise ValueError(f"seeds: {num_seeds!r} given; give a number of networks >= 2, such as 4, or 0 for none")
        self.num_seeds, self.steps, self.initialize = num_seeds, steps, initialize
        self.loss_function, self.seed, self.largest = loss_function, seed, largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._start: TrainingStart | None = None
        self._seeds: TrainedSeeds | None = None
        self._coming = ComingStep()
        self._step: TrainedStep | None = None
        self._reference: Snapshot | None = None
        self._starts: list[Snapshot] = []
        self._controlled = True

    def plan(self, outputs: int, samples: int) -> Plan:
        """Those of the others."""
        return Plan()

    def begin(self, start: TrainingStart) -> Reading:
        """Rule out what the loop already shows to be outside."""
        if not start.fresh and self._seeds is not None:
            return Reading()  # a second fit goes on where the first one stopped
        self.forget()
        reason = None
        if not start.fresh:
            reason = f"training goes on at step {start.step}, and checkpoints do not hold them"
        else:
            reason = not_followed(start, self.largest // self.num_seeds)
        if reason is not None:
            return self._stopped(start.step, reason)
        self._start = start
        return Reading()

    def observe_batch(self, batch: Any) -> None:
        """Keep it for the coming step."""
        if self._start is not None:
            self._coming.see(batch, self._start.model)

    def observe_loss(self, loss: Tensor) -> None:
        """Keep the first one."""
        if self._step is None:
            self._coming.see_loss(loss)

    def before_step(self, step: int, optimizer: Optimizer) -> Reading:
        """Let all networks take the step that the real one is about to take."""
        if self._start is None:
            return Reading()
        reason = self._unlike()
        if reason is None and self.steps is not None and step - self._start.step >= self.steps:
            return self._stopped(step, f"{self.steps} steps were asked for", as_asked=True)
        if reason is not None:
            return self._stopped(step, reason)
        reading = Reading()
        try:
            batches = self._coming.pairs()
            if self._seeds is None:
                self._make(optimizer)
                reading.pages["seeds"] = self._page()
            assert self._seeds is not None and self._step is not None
            self._seeds.step(self._step.on(batches), optimizer, controlled=self._controlled)
        except Exception as error:  # an unknown loss, no draw, no memory: some may have taken the step, others not
            return self._stopped(step, reason_of(error))
        finally:
            self._coming.clear()
        self._controlled = False
        return reading

    def observe(self, measurement: Measurement) -> Reading:
        """The networks' own changes since their own starts."""
        seeds = self._seeds
        if seeds is None:
            return Reading()
        reason = self._unlike()
        if reason is not None:
            return self._stopped(measurement.step, reason)
        self._controlled = True  # the next step is compared again
        reading = Reading()
        if self._reference is not measurement.reference:  # BatchNorm's batches may have come since
            self._reference = measurement.reference
            self._starts = [self._snapshot(measurement, theta) for theta in seeds.theta_0]
        found: dict[str, list[float]] = {}
        for start, theta in zip(self._starts, seeds.theta, strict=True):
            for quantity, value in _changes(start, self._snapshot(measurement, theta), measurement.plan).items():
                found.setdefault(quantity, []).append(value)
        for quantity, values in found.items():
            if not all(value < float("inf") for value in values):
                return self._stopped(measurement.step, f"one of the {len(values)} networks has diverged")
            low, high = SEEDS_BAND
            shown = {SEEDS: statistics.median(values), low: min(values), high: max(values)}
            reading.scalars |= {tag(quantity, series): value for series, value in shown.items()}
        return reading

    @staticmethod
    def _snapshot(measurement: Measurement, theta: Mapping[str, Tensor]) -> Snapshot:
        return measurement.network.at(theta).snapshot(measurement.plan)

    def _make(self, optimizer: Optimizer) -> None:
        assert self._start is not None
        model = self._start.model
        for name, part in model.named_modules():
            if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
                raise ValueError(
                    f"{name!r} ({type(part).__name__}) drops out, so that no copy can be seen to take the network's "
                    "own step; set p = 0"
                )
        output_fn = output_fn_of(self._start.network)
        self._step = self._coming.recognized(model, output_fn, self.loss_function)
        self._seeds = TrainedSeeds(
            model,
            optimizer,
            num_networks=self.num_seeds,
            initialize=self.initialize,
            output_fn=output_fn,
            seed=self.seed,
        )

    def _unlike(self) -> str | None:
        """Why the networks are not trained as the real one is, by a copy of it that took its latest step; or None."""
        deviation = None if self._seeds is None else self._seeds.deviation()
        if deviation is None or deviation <= TOLERANCE:
            return None
        return (
            f"the network's step is {deviation:.2g} of it away from what a copy of it takes on the same batch "
            "(gradients clipped or changed after the backward pass, a step left out, weights written elsewhere)"
        )

    def _page(self) -> str:
        assert self._start is not None and self._step is not None
        M = self.num_seeds
        return (
            f"Measured on {M} seeds, not predicted: {M} networks drawn anew are trained beside this one by copies of "
            f"its optimizer on the same batches (loss: {self._step.loss.name}). The charts of NTK drift and "
            "representation change show the lowest, the median and the highest of them; another seed lies between the "
            f"lowest and the highest with probability {M - 1}/{M + 1}, whatever the distribution. They take "
            f"{memory(self._start.model, 2 * M)}, and their optimizers' states; autocast is off in them."
        )

    def _stopped(self, step: int, reason: str, *, as_asked: bool = False) -> Reading:
        had = self._seeds is not None
        self._seeds, self._start, self._coming, self._starts = None, None, ComingStep(), []
        if not had:
            return Reading(pages={"seeds": f"No networks of other seeds for this run: {reason}."})
        text = f"Networks of other seeds end at step {step}: {reason}"
        return Reading(pages={"seeds": f"{text}."}, events=[] if as_asked else [Event(step, "validity", text)])


def _changes(start: Snapshot, now: Snapshot, plan: Plan) -> dict[str, float]:
    """Relative changes of the NTK and, on average over layers, of the hidden kernels."""
    found: dict[str, Tensor] = {}
    if start.ntk is not None and now.ntk is not None:
        found["ntk_drift"] = ntk_drift(now.ntk, start.ntk, plan.outputs)
    layers = [relative_change(K, start.hidden[name]) for name, K in now.hidden.items() if name in start.hidden]
    if layers:
        found["representation_change"] = torch.stack(layers).mean().to(layers[0])
    values = torch.stack([value.double() for value in found.values()]).tolist() if found else []  # one wait
    return dict(zip(found, values, strict=True))
