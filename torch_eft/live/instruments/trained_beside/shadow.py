"""Shadows: the Taylor models of order 1 and 3 about theta_0, trained beside the network by the same optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_eft.forecast.comparison.compared import Compared, component
from torch_eft.live.instrument import Event, Instrument, Measurement, Reading, TrainingStart
from torch_eft.live.instruments.common import LARGEST, compared_scalars, memory
from torch_eft.live.instruments.forecasts.full_batch import UNSHOWN
from torch_eft.live.instruments.forecasts.step_check import versions, without_gradients
from torch_eft.live.instruments.trained_beside.coming_step import ComingStep, not_followed, output_fn_of
from torch_eft.measure.forward.isolation import isolated
from torch_eft.measure.kernels.optimizers import plain_optimizer
from torch_eft.measure.network.network import Network
from torch_eft.measure.taylor.model import TaylorModel, as_call
from torch_eft.measure.taylor.model_checks import check_modules
from torch_eft.measure.taylor.optimizer import same_options
from torch_eft.measure.taylor.trained_step import TrainedStep
from torch_eft.results.training import LossFunction
from torch_eft.results.trajectory import Validity

FIRST_STEP = 1e-2
"""Share of the first step by which it may differ: Adam's is lr whatever the gradient, where that is all rounding."""


class ShadowInstrument(Instrument):
    """Trains Taylor models beside the network: what its linear model would do, and with the first correction in 1/n.

    Every training step costs a few more (1.7 times an ordinary one for order 1, about 5 times for order 3), and every
    order a few copies of the parameters: no preset includes it, ``extra=["shadow"]`` asks for it.

    Args:
        loss_function: The loss of outputs (N, C) and targets, if it is neither squared error nor cross-entropy.
        taylor_orders: 1, 3 or both.
        largest: Trainable parameters up to which shadows are trained.

    Raises:
        ValueError: If ``taylor_orders`` is something else.
    """

    name = "shadow"
    cost = "full"

    def __init__(
        self,
        *,
        loss_function: LossFunction | None = None,
        taylor_orders: Sequence[int] = (1, 3),
        largest: int = LARGEST // 4,
    ) -> None:
        if not taylor_orders or not set(taylor_orders) <= {1, 3}:
            raise ValueError(
                f"taylor_orders: {tuple(taylor_orders)} given; give 1 (infinite width), 3 (first order in 1/n) or both"
            )
        self.loss_function, self.taylor_orders, self.largest = loss_function, sorted(set(taylor_orders)), largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self.validity: Validity | None = None
        self._start: TrainingStart | None = None
        self._shadows: dict[int, tuple[TaylorModel, Optimizer]] = {}
        self._coming = ComingStep()
        self._step: TrainedStep | None = None
        self._outputs_0: Tensor | None = None
        self._moved = 0.0
        self._taken = 0
        self._versions, self._ahead, self._counts = -1, False, False
        self._optimizer: Optimizer | None = None
        self._diverged: set[int] = set()

    def begin(self, start: TrainingStart) -> Reading:
        """Rule out what the loop already shows to be outside."""
        if not start.fresh and self._shadows:
            return Reading()  # a second fit goes on where the first one stopped
        self.forget()
        reason = None
        if not start.fresh:
            reason = f"training starts at step {start.step}, shadows at initialization"
        else:
            reason = not_followed(start, self.largest)
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
        """Take the step that the network is about to take."""
        if self._start is None:
            return Reading()
        reason = self._skipped() or self._unlike()
        if reason is not None:
            return self._stopped(step, reason)
        model = self._start.model
        if all(p.grad is None for p in model.parameters()) or (not self._taken and without_gradients(model)):
            self._coming.clear()
            self._versions, self._ahead = versions(model), False
            return Reading()  # the optimizer takes no step either
        self._optimizer = plain_optimizer(optimizer)
        reading = Reading()
        try:
            batches = self._coming.pairs()
            if self._step is None:
                self._make(optimizer)
                copies = memory(self._start.model, 4 * len(self._shadows))
                reading.pages["shadow"] = (
                    f"Shadows of order {self._named}, loss: {self._loss_name}. They take about {copies}."
                )
        except ValueError as error:  # unrecognized loss, dropout, batch statistics, no derivatives
            return self._stopped(step, str(error))
        finally:
            self._coming.clear()
        assert self._step is not None
        for shadow, own_optimizer in self._shadows.values():
            same_options(own_optimizer, optimizer)
            shadow.step_on(self._step.on(batches), own_optimizer)
        self._taken += 1
        self._versions, self._ahead = versions(model), True
        return reading

    def _skipped(self) -> str | None:
        """Return why the shadows are a step ahead, or None: every step of an optimizer writes to parameters.

        Versions do not count what a fused one writes: they tell only if they have been seen to count.
        """
        if not self._ahead or self._start is None:
            return None
        idle = versions(self._start.model) == self._versions
        self._counts |= not idle
        if idle and self._counts:
            return "the optimizer skipped a step that they took (a GradScaler does, for infinite gradients)"
        return None

    def _unlike(self) -> str | None:
        """Return why the network's first step was not that of its shadows, which have its gradient at theta_0.

        Weights and the optimizer's state are compared: Adam's first step is the same for gradients of any size.
        """
        if self._taken != 1 or self._start is None or self._optimizer is None or not self._shadows:
            return None
        shadow, own = self._shadows[self.taylor_orders[0]]
        now, theta_0 = dict(self._start.model.named_parameters()), shadow.theta_0
        sizes: dict[str, list[Tensor]] = {}  # what: distances, lengths, and roundings
        for name, value in shadow.theta.items():
            eps = torch.finfo(now[name].dtype).eps
            pairs: dict[str, tuple[Tensor, Tensor, Tensor]] = {"weights": (value, now[name], theta_0[name])}
            for key, state in own.state.get(value, {}).items():
                other = self._optimizer.state.get(now[name], {}).get(key)
                if isinstance(state, Tensor) and isinstance(other, Tensor) and state.shape == other.shape:
                    pairs[key] = (state, other, torch.zeros_like(state))
            for key, (mine, theirs, before) in pairs.items():
                found = [(mine - theirs).norm(), (mine - before).norm(), 4 * eps * before.norm()]
                sizes.setdefault(key, []).append(torch.stack([each.detach().float() for each in found]))
        for values in sizes.values():
            error, length, rounding = torch.stack(values).norm(dim=0).tolist()
            if not error <= FIRST_STEP * length + rounding:
                return (
                    f"the network's first step is {error / length:.2g} of it away from the optimizer's own (gradients "
                    "clipped or changed after the backward pass, a decay, or weights written elsewhere)"
                )
        return None

    def observe(self, measurement: Measurement) -> Reading:
        """Shadows beside the network."""
        if self._outputs_0 is None:
            self._outputs_0 = measurement.snapshot.output
        reason = self._skipped() or self._unlike()
        if reason is not None:
            return self._stopped(measurement.step, reason)
        if not self._shadows:
            idle = versions(measurement.model) == self._versions
            unshown = self._start is not None and measurement.step > self._start.step and not idle
            return self._stopped(measurement.step, UNSHOWN) if unshown else Reading()
        z, start = measurement.snapshot.output, self._outputs_0
        outputs = {order: output_of(shadow, measurement.network) for order, (shadow, _) in self._shadows.items()}
        reading = Reading()
        for order, value in outputs.items():
            if order not in self._diverged and not bool(torch.isfinite(value).all()):
                self._diverged.add(order)
                reading.events.append(
                    Event(
                        measurement.step,
                        "shadow_output",
                        f"The shadow of order {order} has diverged: its terms are not small",
                    )
                )
        reference = outputs[self.taylor_orders[0]]
        u, count = reference - start, z.numel() ** 0.5
        self._moved = max(self._moved, float(u.norm()))
        if self._moved > 0:
            series = {f"order_{order // 2}": value for order, value in outputs.items()}
            along = {name: float(component(value - start, u)) / count for name, value in series.items()}
            errors = {name: float((z - value).norm()) / self._moved for name, value in series.items()}
            reading.scalars = compared_scalars(
                {
                    "shadow_output": Compared(float(component(z - start, u)) / count, **along),
                    "shadow_output_error": Compared(None, **errors),
                }
            )
        if measurement.last:
            shadow = self._shadows[self.taylor_orders[-1]][0]
            self.validity = shadow.check(measurement.network.probe.inputs)
            reading.pages["shadow"] = f"Shadows of order {self._named}, loss: {self._loss_name}. {self.validity}"
        return reading

    def _make(self, optimizer: Optimizer) -> None:
        assert self._start is not None
        network, output_fn = self._start.model, output_fn_of(self._start.network)
        check_modules(network)
        step = self._coming.recognized(network, output_fn, self.loss_function)
        first = TaylorModel(network, taylor_order=self.taylor_orders[0], output_fn=output_fn)
        models = [first, *(first.of_order(order) for order in self.taylor_orders[1:])]
        self._shadows = {model.taylor_order: (model, model.optimizer_like(optimizer)) for model in models}
        self._step = step

    @property
    def _named(self) -> str:
        return " and ".join(map(str, self.taylor_orders))

    @property
    def _loss_name(self) -> str:
        return "" if self._step is None else self._step.loss.name

    def _stopped(self, step: int, reason: str) -> Reading:
        had = bool(self._shadows)
        self._shadows, self._start, self._coming = {}, None, ComingStep()
        self.validity = Validity("invalid", reason)
        events = [Event(step, "validity", f"Shadows: {reason}")] if had else []
        return Reading(pages={"shadow": f"No shadows for this run: {reason}."}, events=events)


def output_of(shadow: TaylorModel, network: Network) -> Tensor:
    """The shadow's output on the probe, (N, C)."""
    with isolated(network.current) as place, torch.no_grad():
        args, kwargs = as_call(place.place(network.probe))
        value: Tensor = shadow(*args, **kwargs)
    return value.detach()
