"""Drift of the kernel H_P by which an adaptive optimizer moves the outputs, split into that by P and that by J."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.live.instrument import Instrument, Measurement, Reading, TrainingStart
from torch_eft.live.instruments.common import LARGEST, copied, current, memory, reason_of, too_many
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.kernels.preconditioner import Preconditioner, UnknownYetError, preconditioner
from torch_eft.measure.kernels.steps.preconditioned_drift import drift_between
from torch_eft.results.tags import layer_tag, tag

_COPIES = 2  # theta and P of the reference


@dataclass
class _Start:
    step: int
    theta: dict[str, Tensor]
    P: Preconditioner


class PreconditionedInstrument(Instrument):
    """How far H_P = J lambda P J^T has moved since the first measurement at which P is known: after the first step.

    The NTK drift is that of H = J lambda J^T, which this is beside. It takes four kernels a measurement.

    Args:
        largest: Trainable parameters up to which the copies are kept.
    """

    name = "preconditioned"
    cost = "full"
    looks_back = True

    def __init__(self, *, largest: int = LARGEST // _COPIES) -> None:
        self.largest = largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._refusal: str | None = None
        self._optimizer: Optimizer | None = None
        self._start: _Start | None = None
        self._lost: str | None = None

    def begin(self, start: TrainingStart) -> Reading:
        """Decide whether copies can be kept, and whether there is one optimizer."""
        if start.fresh:
            self.forget()
        elif self._start is not None:
            self._start = _on_devices_of(start.model, self._start)
        self._refusal = self._lost or too_many(start.model, self.largest)
        if len(start.optimizers) == 1:
            self._optimizer = start.optimizers[0]
        else:
            self._refusal = f"{len(start.optimizers)} optimizers"
        if self._refusal is not None:
            return self._refused(self._refusal)
        return Reading(
            pages={
                "preconditioned": "Drift of H_P = J lambda P J^T, the kernel of the optimizer's step, from the first "
                "measurement after a step; its shares by the preconditioner P and by the Jacobian J add up to 1. The "
                f"NTK drift is that of H = J lambda J^T. It takes {memory(start.model, _COPIES)}."
            }
        )

    def idle(self) -> bool:
        """Return whether it has ended."""
        return self._refusal is not None

    def observe(self, measurement: Measurement) -> Reading:
        """Compare with the first measurement at which P was known."""
        if self._refusal is not None or self._optimizer is None or not self._optimizer.state:
            return Reading()
        if not any(float(group["lr"]) > 0 for group in self._optimizer.param_groups):
            return Reading()  # the end of a schedule: lambda has no value
        try:
            P = preconditioner(measurement.model, self._optimizer)
        except UnknownYetError:  # Adagrad has a state from the beginning, and steps may be left out
            return Reading()
        except ValueError as error:
            return self._refused(reason_of(error))
        if self._start is None:
            own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in P.items()}
            self._start = _Start(measurement.step, copied(measurement.model), own)
            return Reading()
        network = measurement.network
        start, now = network.at(self._start.theta), network.at(current(measurement.model))
        assert isinstance(start.current, IsolatedModel) and isinstance(now.current, IsolatedModel)
        options: dict[str, Any] = {"trace": measurement.plan.ntk_trace, "memory": network.memory}
        found = drift_between(
            start.current, now.current, network.probe, self._start.P, P, outputs=network.outputs, **options
        )
        shares = {layer_tag("ntk_preconditioned_shares", part): share for part, share in found.shares.items()}
        return Reading({tag("ntk_preconditioned_drift"): found.drift} | shares)

    def _refused(self, reason: str) -> Reading:
        self._refusal = reason
        return Reading(pages={"preconditioned": f"No drift of H_P for this run: {reason}."})

    def state(self) -> dict[str, Any]:
        """What the drift is counted from: another reference after a resume would be another drift."""
        if self._start is None:
            return {"step": None}
        kept = {f"theta {name}": value for name, value in self._start.theta.items()}
        for name, value in self._start.P.items():
            kept[f"P {name}"] = (
                value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
            )
        return {"step": self._start.step, "theta_0": kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        step, kept = state.get("step"), state.get("theta_0")
        if step is None:
            return
        if kept is None:
            self._lost = (
                f"it is counted from step {step}, whose parameters and P the checkpoint does not hold; give "
                'keep_theta_0="checkpoint"'
            )
            return
        theta, P = (
            {name.removeprefix(kind): value for name, value in kept.items() if name.startswith(kind)}
            for kind in ("theta ", "P ")
        )
        self._start = _Start(
            int(step), theta, {name: value if value.ndim else float(value) for name, value in P.items()}
        )


def _on_devices_of(model: nn.Module, start: _Start) -> _Start:
    devices = {name: p.device for name, p in model.named_parameters()}
    theta = {name: value.to(devices[name]) for name, value in start.theta.items()}
    P = {name: value.to(devices[name]) if isinstance(value, Tensor) else value for name, value in start.P.items()}
    return _Start(start.step, theta, P)
