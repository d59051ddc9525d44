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
from torch_eft.live.instruments.common import LARGEST, reason_of
from torch_eft.live.instruments.forecasts.full_batch import UNSHOWN
from torch_eft.live.instruments.forecasts.step_check import without_gradients
from torch_eft.live.instruments.trained_beside.coming_step import ComingStep, not_followed, output_fn_of
from torch_eft.live.instruments.trained_beside.predicted_change import LIMIT, gauge_of, sizes
from torch_eft.live.instruments.trained_beside.shadow import FIRST_STEP
from torch_eft.measure.forward.isolation import IsolatedModel, Parameters, isolated
from torch_eft.measure.forward.kinks import kinked_operations
from torch_eft.measure.forward.output import checked_output
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.network.batch_norm import batch_norms
from torch_eft.measure.network.snapshot import Plan
from torch_eft.measure.taylor.model import TaylorModel, as_call
from torch_eft.measure.taylor.model_checks import check_modules
from torch_eft.measure.taylor.optimizer import same_options
from torch_eft.measure.taylor.secant import ntk_terms_by_differences
from torch_eft.measure.taylor.trained_step import TrainedStep
from torch_eft.measure.training_loss import LOSS_TOLERANCE
from torch_eft.results.tags import tag
from torch_eft.results.training import LossFunction

COST = 60.0
"""Training steps that a replay of five steps takes (small CNN, processor time), until the first one is timed."""

SHARE = 2
"""Replays for which the budget must have room that one is made: the other instruments need theirs."""


INPUTS = 8
"""Inputs of the probe, the first ones, on which the NTK of a replay is compared: it takes three more of them."""


@dataclass
class _Replay:
    """One under way.

    Args:
        start: The measurement at s.
        models: Taylor models and their optimizers, by order.
        follower: Parameters that take every step with the network's own gradient, and their optimizer.
        step: What the training minimizes.
        context: The first batch's inputs, where BatchNorm takes its statistics.
        taken: Steps so far.
        seconds: Spent on it so far.
    """

    start: Measurement
    models: dict[int, tuple[TaylorModel, Optimizer]] = field(default_factory=dict)
    follower: tuple[TaylorModel, Optimizer] | None = None
    step: TrainedStep | None = None
    context: Any = None
    taken: int = 0
    seconds: float = 0.0

    @property
    def widest(self) -> TaylorModel:
        """The model of the highest order."""
        return self.models[max(self.models)][0]


class ReplayInstrument(Instrument):
    """Forecasts of the change of outputs and NTK over the next T steps, by Taylor models of order 1, 2 and 3.

    Args:
        steps: T.
        loss_function: The loss of outputs (N, C) and targets, if it is neither squared error nor cross-entropy.
        largest: Trainable parameters up to which it is done: it takes some ten copies of them for T steps.
        always: Whether one follows every measurement; else where the budget has room.

    Attributes:
        latest_seconds: What the latest replay took; NaN before the first.

    Raises:
        ValueError: If ``steps`` is not a positive integer.
    """

    name = "replay"
    cost = "standard"

    def __init__(
        self,
        *,
        steps: int = 5,
        loss_function: LossFunction | None = None,
        largest: int = LARGEST // 4,
        always: bool = True,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: {steps!r} given; give the number of steps that are taken again, such as 5")
        self.steps, self.loss_function, self.largest, self.always = steps, loss_function, largest, always
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._refusal: str | None = None
        self._orders: tuple[int, ...] = (3, 2, 1)
        self._kinked = ""
        self._normed = False
        self._output_fn: OutputFn | None = None
        self._replay: _Replay | None = None
        self._coming = ComingStep()
        self._known: TrainedStep | None = None
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
        self._output_fn = output_fn_of(start.network)
        self._refusal = not_followed(start, self.largest)
        if self._refusal is None:
            kinked = kinked_operations(start.network.current, start.network.probe, output_fn=start.network.output_fn)
            if kinked:
                self._orders, self._kinked = (1,), kinked[0]
            self._normed = bool(batch_norms(start.model))
        return self._told(Reading())

    def observe(self, measurement: Measurement) -> Reading:
        """Take the next steps again, if a replay is not under way and the budget has room for one."""
        waiting = self._replay
        if waiting is not None and not waiting.models and measurement.step > waiting.start.step:
            return self._stopped(UNSHOWN)
        if self._refusal is not None or waiting is not None or measurement.last:
            return Reading()
        if not self.always and measurement.room is not None:
            cost = self.latest_seconds if math.isfinite(self.latest_seconds) else COST * self._step_time
            if not measurement.room(SHARE * cost):
                return Reading()
        self._replay = _Replay(measurement)
        return Reading()

    def idle(self) -> bool:
        """Yes: a visit takes no time of its own, and the budget is asked for the steps that follow."""
        return True

    def listens(self) -> bool:
        """Whether there will be a replay."""
        return self._refusal is None

    def observe_batch(self, batch: Any) -> None:
        """Keep it for the coming step."""
        self._coming.see(batch, None if self._replay is None else self._replay.start.model)

    def observe_loss(self, loss: Tensor) -> None:
        """Keep it until the loss is recognized."""
        if self._replay is not None:
            self._coming.see_loss(loss)

    def before_step(self, step: int, optimizer: Optimizer) -> Reading:
        """Let the Taylor models take the step that the network is about to take."""
        self._time_steps()
        reading = self._look(step)  # where the loop announces not every step
        replay, coming = self._replay, self._coming
        if replay is None or self._refusal is not None:
            coming.clear()
            return reading
        begun = time.perf_counter()
        try:
            if len(coming.batches) != coming.count or not coming.batches:  # shown before the measurement
                self._replay = None if replay.taken == 0 else replay
                if coming.shown and replay.taken == 0:
                    return reading
                return self._stopped(UNSHOWN)
            if step != replay.start.step + replay.taken:
                return self._stopped("steps are taken that the loop does not announce")
            if without_gradients(replay.start.model):  # the optimizer takes no step, nor does a GradScaler
                self._replay = None
                return reading
            self._take(replay, optimizer)
        except Exception as error:  # dropout, an unknown loss, no Taylor rule, no memory
            return self._stopped(reason_of(error))
        finally:
            coming.clear()
        replay.taken += 1
        replay.seconds += time.perf_counter() - begun
        return reading

    def after_step(self, step: int, network: nn.Module) -> Reading:
        """Compare after the first step, as a check, and after the last one."""
        return self._look(step)

    def _take(self, replay: _Replay, optimizer: Optimizer) -> None:
        """Let every Taylor model take the coming step: the first one with the network's gradient, which is theirs."""
        network = replay.start.model
        if replay.step is None:
            check_modules(network, self._normed)
        # Every step: gradients may be clipped at some only, a scale grow, an epoch end with fewer batches.
        known = self._known if replay.step is None else replay.step
        replay.step = self._coming.recognized(network, self._output_fn, self.loss_function, known)
        factor = replay.step.factor
        gradients = {name: p.grad / factor for name, p in network.named_parameters() if p.grad is not None}
        if replay.follower is None:
            self._known = replay.step
            replay.context = self._coming.pairs()[0][0] if self._normed else None
            widest = TaylorModel(
                network, taylor_order=self._orders[0], output_fn=self._output_fn, as_trained=self._normed
            )
            for order in self._orders:
                model = widest if order == self._orders[0] else widest.of_order(order)
                own = model.optimizer_like(optimizer)
                replay.models[order] = model, own
                model.step_along(gradients, own)
            follower = widest.of_order(1)
            replay.follower = follower, follower.optimizer_like(optimizer)
            follower.step_along(gradients, replay.follower[1])
            return
        batches = replay.step.on(self._coming.pairs())
        for model, own in (*replay.models.values(), replay.follower):
            same_options(own, optimizer)
            if model is replay.follower[0]:
                model.step_along(gradients, own)
            else:
                model.step_on(batches, own)

    def _look(self, step: int) -> Reading:
        replay = self._replay
        if replay is None or not replay.models or step != replay.start.step + replay.taken:
            return Reading()
        trained = {name for name, p in replay.start.model.named_parameters() if p.requires_grad}
        if replay.widest.theta.keys() != trained:
            self._replay = None  # frozen or thawed on the way: another network from here on
            return Reading()
        begun = time.perf_counter()
        deviation = _deviation(replay)
        if not deviation <= FIRST_STEP:
            which = "step is" if replay.taken == 1 else f"{replay.taken} steps are"
            return self._stopped(
                f"the network's {which} {deviation:.2g} of it away from the optimizer's own (gradients clipped or "
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

    def _compared(self, replay: _Replay) -> dict[str, float]:
        """Sizes of realized and predicted changes, their band, and errors."""
        start = replay.start
        assert replay.step is not None
        with isolated(start.model, self._output_fn) as network:
            z, change, predicted = self._outputs(replay, network)
            scalars = sizes("replay_output", change, predicted, z.numel() ** 0.5, self._rounding)
            self._gauge = gauge_of(predicted)
            if self._gauge is not None and not self._gauge <= LIMIT:
                return {tag("replay_output"): scalars[tag("replay_output")]}
            if start.snapshot.ntk is not None and 3 in replay.models:
                scalars |= self._of_ntk(replay, network)
        return scalars

    @property
    def _rounding(self) -> float:
        """Relative rounding of the network's own steps that theirs do not have: of gradients in 16 bits, T times."""
        rounding = 0.0 if self._known is None else self._known.rounding
        return rounding * self.steps**0.5 if rounding > LOSS_TOLERANCE else 0.0

    def _outputs(self, replay: _Replay, network: IsolatedModel) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Outputs at s, their change since, and what every order predicts of it."""
        start, probe = replay.start, replay.start.network.probe
        inputs = network.place(probe)
        if not self._normed:
            z = start.snapshot.output.double()
            change = checked_output(network, probe).detach().double() - z
            args, kwargs = as_call(inputs)
            with torch.no_grad():
                return z, change, {k: model(*args, **kwargs).double() - z for k, (model, _) in replay.models.items()}
        model, context = replay.widest, replay.context
        z, now = (model.outputs_beside(context, inputs, at).double() for at in (model.theta_0, network.params))
        with torch.no_grad():
            predicted = {k: each.outputs_beside(context, inputs).double() - z for k, (each, _) in replay.models.items()}
        return z, now - z, predicted

    def _of_ntk(self, replay: _Replay, network: IsolatedModel) -> dict[str, float]:
        start, model = replay.start, replay.models[3][0]
        prepare = start.network.prepare
        options: dict[str, Any] = {"lambdas": start.lambdas, "memory": start.network.memory}
        options["outputs"] = start.network.outputs
        theta_0, probe = model.theta_0, start.network.probe.first(INPUTS)

        def at(theta: Parameters) -> IsolatedModel:
            moved = network.at(theta)
            return moved if prepare is None else prepare(moved)

        assert start.snapshot.ntk is not None
        H = start.snapshot.ntk[: probe.size, : probe.size]
        trace = H.ndim == 2
        H_now = ntk(at({}), probe, trace=trace, **options)
        if self._normed:  # the batches whose statistics are taken may have become more since
            H = ntk(at(theta_0), probe, trace=trace, **options)
        scale, change = float(H.norm()), (H_now - H.to(H_now)).double()
        d = {name: value.detach() - theta_0[name] for name, value in model.theta.items()}
        reach = float(change.norm()) / scale if scale > 0 else 0.0
        if not math.isfinite(reach):
            return {}
        first, second = ntk_terms_by_differences(network, probe, theta_0, d, H, reach=reach, at=at, **options)
        predicted = {1: torch.zeros_like(first), 2: first, 3: first + second}
        gauge = gauge_of(predicted)
        if gauge is None or not gauge <= LIMIT:
            return {tag("replay_ntk"): reach}
        return sizes("replay_ntk", change, predicted, scale, self._rounding)

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
            "dNTK, order 3 ddNTK as well. The band is order 3 plus and minus its distance from order 2: an estimate "
            "of what order 3 leaves out, not a spread over seeds. The NTK is that of the first "
            f"{INPUTS} inputs of the probe, its terms by differences: errors of its change below 0.004 come from these."
        )
        if not self.always:
            text += (
                f" One costs about {self._cost_in_steps} training steps: it is made where the budget has room. "
                '`extra=["replay"]` makes one after every measurement.'
            )
        if self._normed:
            text += (
                " BatchNorm's statistics are those of the batch in training, and a part of what is expanded; the "
                "probe's outputs take those of the first of these batches, before and after."
            )
        if self._rounding > 0:
            text += (
                f" The network's gradients are computed in 16 bits, {self._rounding / self.steps**0.5:.1g} of them "
                f"away from those of the Taylor models: the band is wider by {self._rounding:.1g} of the change, and "
                "smaller errors say nothing."
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

    @property
    def _cost_in_steps(self) -> str:
        steps = self.latest_seconds / self._step_time
        return f"{steps if math.isfinite(steps) else COST * self.steps / 5:.1g}"

    def state(self) -> dict[str, Any]:
        """Nothing: a replay under way is not gone on with."""
        return {}


def _deviation(replay: _Replay) -> float:
    """How far the network's steps are from the optimizer's with the same gradients."""
    assert replay.follower is not None
    model = replay.follower[0]
    theta_0 = model.theta_0
    now, sizes = dict(replay.start.model.named_parameters()), []
    for name, value in model.theta.items():
        before, real = theta_0[name], now[name].detach()
        moved = value.detach() - before.to(value)
        rounding = 4 * torch.finfo(real.dtype).eps * before.norm()
        sizes.append(torch.stack([(value.detach() - real).norm(), moved.norm(), rounding]))
    error, length, rounding = torch.stack(sizes).norm(dim=0).tolist()
    return max(0.0, error - rounding) / length if length > 0 else float(error > rounding)
