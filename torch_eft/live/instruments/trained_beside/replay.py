"""A few steps, taken again by Taylor models: frozen NTK, with dNTK, with dNTK and ddNTK, beside the real network.

After a measurement at step s the Taylor models of order 1, 2 and 3 about theta_s take the next T steps together with
the network, by copies of its optimizer (state included) on its batches. theta_{s+T} is not used: it is a forecast of an
interval, given its batches. Any smooth network, loss and optimizer. Its error is below |order 3 - order 2| in nearly
all cases; where that is more than ``LIMIT`` of the change, nothing is drawn.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.instrument import Instrument, Measurement, Reading, TrainingStart
from torch_eft.live.instruments.common import LARGEST, reason_of, too_many
from torch_eft.live.instruments.forecasts.full_batch import UNSHOWN
from torch_eft.live.instruments.trained_beside.shadow import FIRST_STEP, output_of
from torch_eft.measure.forward.kinks import kinked_operations
from torch_eft.measure.network.network import Network
from torch_eft.measure.network.snapshot import Plan
from torch_eft.measure.taylor.model import TaylorModel
from torch_eft.measure.taylor.model_checks import check_modules
from torch_eft.measure.taylor.optimizer import same_options
from torch_eft.measure.training_loss import TrainingLoss, UnrecognizedLossError, recognize_loss
from torch_eft.results.tags import MEASURED, TRUNCATION, tag
from torch_eft.results.training import LossFunction

LIMIT = 0.35
"""|order 3 - order 2| / |order 3| above which nothing is drawn: beyond, order 3 was seen wrong by as much as 1."""

COST = 130.0
"""Training steps that a replay of five steps takes (small CNN, processor time), until the first one is timed."""


@dataclass
class _Replay:
    """One under way.

    Args:
        start: The measurement at s.
        models: Taylor models and their optimizers, by order.
        loss: That of the training.
        taken: Steps so far.
        checked: Whether the first of them was seen to be the optimizer's own.
        seconds: Spent on it so far.
    """

    start: Measurement
    models: dict[int, tuple[TaylorModel, Optimizer]] = field(default_factory=dict)
    loss: TrainingLoss | None = None
    taken: int = 0
    checked: bool = False
    seconds: float = 0.0


class ReplayInstrument(Instrument):
    """Forecasts of the change of outputs and NTK over the next T steps, by Taylor models of order 1, 2 and 3.

    Args:
        steps: T.
        loss_function: The loss of outputs (N, C) and targets, if it is neither squared error nor cross-entropy.
        largest: Trainable parameters up to which it is done: it takes some ten copies of them for T steps.

    Attributes:
        latest_seconds: What the latest replay took; NaN before the first.

    Raises:
        ValueError: If ``steps`` is not a positive integer.
    """

    name = "replay"
    cost = "standard"

    def __init__(
        self, *, steps: int = 5, loss_function: LossFunction | None = None, largest: int = LARGEST // 4
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: {steps!r} given; give the number of steps that are taken again, such as 5")
        self.steps, self.loss_function, self.largest = steps, loss_function, largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._refusal: str | None = None
        self._orders: tuple[int, ...] = (1, 2, 3)
        self._kinked = ""
        self._replay: _Replay | None = None
        self._batch: Any = None
        self._batches = 0
        self._shown = False
        self._last_loss: Tensor | None = None
        self._page = ""
        self._gauge: float | None = None
        self.latest_seconds = math.nan  # seconds that a whole one took
        self._step_time = math.inf  # the shortest time between two steps
        self._before: float | None = None

    def plan(self, outputs: int, samples: int) -> Plan:
        """The NTK, which is compared at both ends."""
        return Plan(ntk=True)

    def begin(self, start: TrainingStart) -> Reading:
        """Rule out what the loop already shows to be outside."""
        self.forget()
        kinked = kinked_operations(start.network.current, start.network.probe, output_fn=start.network.output_fn)
        if kinked:
            self._orders, self._kinked = (1,), kinked[0]
        self._refusal = too_many(start.model, self.largest)
        if start.obstacle is not None and not start.obstacle.minibatches:
            self._refusal = start.obstacle.reason
        elif len(start.optimizers) != 1:
            self._refusal = f"{len(start.optimizers)} optimizers"
        return self._told(Reading())

    def observe(self, measurement: Measurement) -> Reading:
        """Take the next steps again, if a replay is not under way and the budget has room for one."""
        waiting = self._replay
        if waiting is not None and not waiting.models and measurement.step > waiting.start.step:
            return self._stopped(UNSHOWN)
        if self._refusal is not None or waiting is not None or measurement.last:
            return Reading()
        cost = self.latest_seconds if math.isfinite(self.latest_seconds) else COST * self._step_time
        if measurement.room is not None and math.isfinite(cost) and not measurement.room(cost):
            return Reading()
        self._replay = _Replay(measurement)
        return Reading()

    def observe_batch(self, batch: Any) -> None:
        """Keep it for the coming step."""
        self._shown = True
        if self._replay is not None:
            self._batch = batch
            self._batches += 1

    def observe_loss(self, loss: Tensor) -> None:
        """Keep it until the loss is recognized."""
        if self._replay is not None and self._replay.loss is None:
            self._last_loss = loss

    def before_step(self, step: int, optimizer: Optimizer) -> Reading:
        """Let the Taylor models take the step that the network is about to take."""
        self._time_steps()
        reading = self._look(step)  # where the loop announces not every step
        replay = self._replay
        batch, count = self._batch, self._batches
        self._batch, self._batches = None, 0
        if replay is None or self._refusal is not None:
            return reading
        if count == 0 and replay.taken == 0:  # the measurement came after this step's batch had been shown
            self._replay = None
            return reading if self._shown else self._stopped(UNSHOWN)
        begun = time.perf_counter()
        if step != replay.start.step + replay.taken:
            return self._stopped("steps are taken that the loop does not announce")
        if count != 1:
            return self._stopped(f"{count} batches before one step (1 is expected, without accumulation)")
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
            return self._stopped("the batch is not a pair (inputs, targets)")
        inputs, targets = batch
        try:
            if replay.loss is None:
                self._make(replay, inputs, targets, optimizer)
            assert replay.loss is not None
            function = replay.loss.function
            for model, own in replay.models.values():
                same_options(own, optimizer)
                model.step(inputs, lambda z: function(z, targets), own)
        except Exception as error:  # dropout, batch statistics, an unknown loss, no Taylor rule, no memory
            return self._stopped(reason_of(error))
        replay.taken += 1
        replay.seconds += time.perf_counter() - begun
        return Reading()

    def after_step(self, step: int, network: nn.Module) -> Reading:
        """Compare after the first step, as a check, and after the last one."""
        return self._look(step)

    def _look(self, step: int) -> Reading:
        replay = self._replay
        if replay is None or not replay.models or step != replay.start.step + replay.taken:
            return Reading()
        trained = {name for name, p in replay.start.model.named_parameters() if p.requires_grad}
        if replay.models[1][0].theta.keys() != trained:
            self._replay = None  # frozen or thawed on the way: another network from here on
            return Reading()
        begun = time.perf_counter()
        if not replay.checked:
            replay.checked = True
            deviation = _deviation(replay)
            if not deviation <= FIRST_STEP:
                return self._stopped(
                    f"the network's step is {deviation:.2g} of it away from the optimizer's own (gradients clipped or "
                    "changed after the backward pass, a step left out, or weights written elsewhere)"
                )
        if replay.taken < self.steps:
            replay.seconds += time.perf_counter() - begun
            return Reading()
        self._replay = None
        scalars = self._compared(replay)
        self.latest_seconds = replay.seconds + time.perf_counter() - begun
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        return self._told(Reading(late={replay.start.step: finite}))

    def _time_steps(self) -> None:
        now = time.perf_counter()
        if self._before is not None:
            self._step_time = min(now - self._before, self._step_time)
        self._before = now

    def _make(self, replay: _Replay, inputs: Any, targets: Tensor, optimizer: Optimizer) -> None:
        network, output_fn = replay.start.model, replay.start.network.output_fn
        check_modules(network)
        if self._last_loss is None:
            raise UnrecognizedLossError("the loop does not show its loss")
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        replay.loss = recognize_loss(
            network,
            inputs,
            targets,
            self._last_loss,
            gradients,
            output_fn=output_fn,
            loss_function=self.loss_function,
        )
        self._last_loss = None
        for order in self._orders:
            model = TaylorModel(network, taylor_order=order, output_fn=output_fn)
            replay.models[order] = model, model.optimizer_like(optimizer)

    def _compared(self, replay: _Replay) -> dict[str, float]:
        """Sizes of realized and predicted changes, their band, and errors."""
        start, given = replay.start, replay.start.network
        options: dict[str, Any] = {"output_fn": given.output_fn, "memory": given.memory, "lambdas": start.lambdas}
        options["outputs"] = given.outputs
        with Network(start.model, given.probe, **options) as network:
            z = start.snapshot.output.double()
            change = network.output().double() - z
            predicted = {k: output_of(model, network).double() - z for k, (model, _) in replay.models.items()}
            scalars = _sizes("replay_output", change, predicted, z.numel() ** 0.5)
            self._gauge = _gauge(predicted)
            if self._gauge is not None and not self._gauge <= LIMIT:
                return {tag("replay_output"): scalars[tag("replay_output")]}
            if start.snapshot.ntk is not None and 3 in replay.models:
                scalars |= self._of_ntk(replay, network)
        return scalars

    def _of_ntk(self, replay: _Replay, network: Network) -> dict[str, float]:
        trace = replay.start.plan.ntk_trace
        H, H_now = replay.start.snapshot.ntk, network.ntk(trace=trace)
        assert H is not None
        forecast = {name: value.detach() for name, value in replay.models[3][0].theta.items()}
        terms = network.displacement_terms(
            replay.models[3][0].theta_0, forecast, trace=trace, kernels=(H.to(H_now), H_now)
        )
        if terms.ntk_terms is None or terms.cut:
            return {}
        first, second = terms.ntk_terms.double()
        predicted = {1: torch.zeros_like(first), 2: first, 3: first + second}
        gauge, scale = _gauge(predicted), float(H.norm())
        if gauge is None or not gauge <= LIMIT:
            return {tag("replay_ntk"): float((H_now - H.to(H_now)).norm()) / scale}
        return _sizes("replay_ntk", (H_now - H.to(H_now)).double(), predicted, scale)

    def _stopped(self, reason: str) -> Reading:
        self._replay, self._refusal = None, reason
        return self._told(Reading())

    def _told(self, reading: Reading) -> Reading:
        page = self._text()
        if page != self._page:
            self._page = reading.pages["replay"] = page
        return reading

    def _text(self) -> str:
        if self._refusal is not None:
            return f"No steps are taken again by Taylor models in this run: {self._refusal}."
        text = (
            f"After a measurement the next {self.steps} steps are taken again by Taylor models about its parameters, "
            "by copies of the optimizer on the same batches: order 1 is infinite width (frozen NTK), order 2 adds "
            "dNTK, order 3 dNTK and ddNTK. The band is order 3 plus and minus its distance from order 2: an estimate "
            "of what order 3 leaves out, not a spread over seeds."
        )
        if self._kinked:
            text += (
                f" The network has kinks ({self._kinked}), whose crossings no derivative contains: order 1 only. "
                "Smooth activations (GELU, SiLU, tanh) have all orders."
            )
        if self._gauge is not None and not self._gauge <= LIMIT:
            why = f"order 3 differs from order 2 by {self._gauge:.2g} of the change, and beyond {LIMIT:g} it was seen"
            if self._gauge == math.inf:
                why = "what the orders add does not fall by half from each to the next, and then it was seen"
            text += (
                f" The latest forecast is hidden: {why} to say nothing; fewer steps or a smaller learning rate help."
            )

        return text

    def state(self) -> dict[str, Any]:
        """Nothing: a replay under way is not gone on with."""
        return {}


def _gauge(predicted: dict[int, Tensor]) -> float | None:
    """|order 3 - order 2| / |order 3|; infinite where the orders do not fall by half at least; None without order 3."""
    # Of orders that fall by a factor q each, what order 3 leaves out is q / (1 - q) times |order 3 - order 2|: inside
    # the band up to q = 1/2.
    if 3 not in predicted:
        return None
    size, last, before = (
        float(each.norm()) for each in (predicted[3], predicted[3] - predicted[2], predicted[2] - predicted[1])
    )
    if last == 0:
        return 0.0
    return last / size if size > 0 and last <= before / 2 else math.inf


def _sizes(quantity: str, change: Tensor, predicted: dict[int, Tensor], scale: float) -> dict[str, float]:
    """Sizes of the real and of the predicted changes and the band, and errors relative to the real one."""
    scalars: dict[str, float] = {}
    moved = float(change.norm())
    scalars[tag(quantity, MEASURED)] = moved / scale
    for order, value in predicted.items():
        scalars[tag(quantity, f"order_{order}")] = float(value.norm()) / scale
        if moved > 0:
            scalars[tag(f"{quantity}_error", f"order_{order}")] = float((value - change).norm()) / moved
    if 3 in predicted:
        size, rest = float(predicted[3].norm()), float((predicted[3] - predicted[2]).norm())
        band = (size - rest) / scale, (size + rest) / scale
        scalars |= {tag(quantity, series): value for series, value in zip(TRUNCATION, band, strict=True)}
    return scalars


def _deviation(replay: _Replay) -> float:
    """How far the network's first step is from that of its Taylor model, whose gradient is the same there."""
    model = replay.models[1][0]
    theta_0 = model.theta_0
    now, sizes = dict(replay.start.model.named_parameters()), []
    for name, value in model.theta.items():
        before, real = theta_0[name], now[name].detach()
        moved = value.detach() - before.to(value)
        rounding = 4 * torch.finfo(real.dtype).eps * before.norm()
        sizes.append(torch.stack([(value.detach() - real).norm(), moved.norm(), rounding]))
    error, length, rounding = torch.stack(sizes).norm(dim=0).tolist()
    return max(0.0, error - rounding) / length if length > 0 else float(error > rounding)
