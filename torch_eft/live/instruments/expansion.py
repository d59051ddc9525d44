"""The finite-width expansion about theta_0 along the real displacement, drawn until its own gauge says that it fails.

Any network, loss, optimizer and batches: H and hidden kernels at theta_0 + d by derivatives at theta_0 (dNTK; dNTK and
ddNTK), d being where the training has gone. The error of the second order is about the square of the gauge, the size of
the second-order change of H over the first; beyond ``LIMIT`` it often predicts nothing, and nothing more is computed.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from torch_eft.live.instrument import Event, Instrument, Measurement, Reading, RunFacts, TrainingStart
from torch_eft.live.instruments.common import LARGEST, current, too_many
from torch_eft.measure.forward.kinks import kinked_operations
from torch_eft.measure.kernels.random_outputs import kernel_norm
from torch_eft.measure.network.expansion import SnapshotExpansion
from torch_eft.measure.network.snapshot import Plan, Snapshot
from torch_eft.results.tags import tag

LIMIT = 0.5
"""Gauge at which the line ends."""

SERIES = ("taylor_1", "taylor_2")


class ExpansionInstrument(Instrument):
    """Changes of NTK and hidden kernels since theta_0 by the dNTK, and by dNTK and ddNTK, beside the real ones.

    Before that two numbers, along the displacement to the first measurement, which is the optimizer's first step unless
    the schedule is another: the radius m*, the rms motion of the probe's outputs at which the gauge reaches ``LIMIT``;
    and the response r_0, the relative change of H per unit of that motion.

    Args:
        largest: Trainable parameters up to which theta_0 is kept.
    """

    name = "expansion"
    cost = "standard"
    needs_theta_0 = True
    looks_back = True

    def __init__(self, *, largest: int = LARGEST) -> None:
        self.largest = largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._refusal: str | None = None
        self._ended: tuple[int, float, float] | None = None  # step, motion of the outputs, gauge
        self._latest: int | None = None
        self._numbers: dict[str, float] = {}
        self._scalars: dict[str, float] = {}
        self._start = 0
        self._page = ""

    def plan(self, outputs: int, samples: int) -> Plan:
        """The NTK, which is expanded."""
        return Plan(ntk=True)

    def keeps_theta_0(self, model: nn.Module) -> bool:
        """Not of a network that is too large for a copy."""
        return too_many(model, self.largest) is None

    def begin(self, start: TrainingStart) -> Reading:
        """Decide whether there is a line."""
        kinked = kinked_operations(start.network.current, start.network.probe, output_fn=start.network.output_fn)
        self._refusal = too_many(start.model, self.largest)
        if kinked:
            more = f" and {len(kinked) - 1} more" if len(kinked) > 1 else ""
            self._refusal = (
                f"at kinks ({kinked[0]}{more}) derivatives miss most of the change; GELU, SiLU or tanh have a line"
            )
        return self._told(Reading())

    def idle(self) -> bool:
        """Return whether there is no line, or it has ended."""
        return self._refusal is not None or self._ended is not None

    def observe(self, measurement: Measurement) -> Reading:
        """Compare, unless the line has ended; at infinite width nothing changes, which costs nothing to say."""
        H, hidden = measurement.snapshot.ntk, measurement.snapshot.hidden
        quantities = ["ntk_drift"] * (H is not None) + ["representation_change"] * bool(hidden)
        reading = Reading({tag(quantity, "order_0"): 0.0 for quantity in quantities})
        if measurement.step == self._latest:
            reading.scalars |= self._scalars
            return reading
        self._latest, self._scalars = measurement.step, reading.scalars
        if self._refusal is not None or self._ended is not None:
            return reading
        self._refusal = _unusable(measurement)
        if self._refusal is not None:
            return self._told(reading)
        if measurement.snapshot is measurement.reference:  # theta_0 itself
            self._start = measurement.step
            reading.scalars |= {tag(quantity, series): 0.0 for quantity in quantities for series in SERIES}
            return reading
        assert measurement.theta_0 is not None
        ends = measurement.reference, measurement.snapshot
        theta = current(measurement.model)
        expansion = measurement.network.expansion(measurement.theta_0, theta, measurement.plan, *ends)
        if expansion is not None:
            if not self._numbers:
                self._measure_radius(measurement, expansion, reading)
            gauge = reading.scalars[tag("expansion_gauge")] = expansion.gauge
            if not gauge <= LIMIT:
                self._end(measurement.step, float(_rms(expansion.change.output)), gauge, reading)
            else:
                reading.scalars |= expansion_scalars(expansion, measurement.reference, measurement.plan.outputs)
        return self._told(reading)

    def _measure_radius(self, measurement: Measurement, expansion: SnapshotExpansion, reading: Reading) -> None:
        """Radius and response: ratios along a direction, in which its length drops out."""
        assert expansion.first.ntk is not None and measurement.reference.ntk is not None
        motion, moved = float(_rms(expansion.first.output)), float(_rms(expansion.change.output))
        if not motion > 0:
            return
        outputs = measurement.plan.outputs
        sizes = [kernel_norm(H, outputs) for H in (expansion.first.ntk, measurement.reference.ntk)]
        response = float(sizes[0]) / float(sizes[1]) / motion
        gauge = expansion.gauge
        self._numbers = {
            "steps": float(measurement.step - self._start),
            "moved": moved,
            "radius": LIMIT * motion / gauge if gauge > 0 else math.inf,
            "response": response,
        }
        values = {
            tag("expansion_radius"): self._numbers["radius"],
            tag("expansion_response"): self._numbers["response"],
            tag("expansion_response", "order_0"): 0.0,
        }
        reading.late[self._start] = {name: value for name, value in values.items() if math.isfinite(value)}

    def _end(self, step: int, moved: float, gauge: float, reading: Reading) -> None:
        self._ended = (step, moved, gauge)
        text = (
            f"expansion about theta_0 ends here, step {step}, outputs moved {moved:.3g}: ddNTK changes H by "
            f"{gauge:.2g} of what dNTK does"
        )
        reading.events.append(Event(step, "ntk_drift", text))

    # ---- words

    def _told(self, reading: Reading) -> Reading:
        page = self._text()
        if page != self._page:
            self._page = reading.pages["expansion"] = page
        return reading

    def _text(self) -> str:
        if self._refusal is not None:
            return self._sentence()
        known = self._numbers
        if not known:
            return (
                "How far the expansion in 1/n about theta_0 reaches is known after the first steps. Its line goes "
                "along the training's own displacement and takes two NTKs a measurement until it ends."
            )
        steps = "first step" if known["steps"] == 1 else f"first {known['steps']:.0f} steps"
        return "\n\n".join(
            [
                f"How far the expansion in 1/n about theta_0 reaches, along the optimizer's own {steps}:",
                f"- radius m* = {known['radius']:.3g}: when the outputs of the probe have moved by so much (rms), "
                f"ddNTK changes H by {LIMIT:g} of what dNTK does, and the line ends: further out, the change of H is "
                f"not this expansion's to tell. The {steps} moved them by {known['moved']:.3g}.\n"
                f"- response r_0 = {known['response']:.3g}: H changes by {100 * known['response']:.3g} % per unit of "
                "motion of the outputs, as they begin to move; at infinite width by 0.",
                self._sentence(),
            ]
        )

    def _sentence(self) -> str:
        """What a chart says where it has no line."""
        if self._refusal is not None:
            return f"No expansion about theta_0 for this run: {self._refusal}."
        if self._ended is None:
            return "The expansion about theta_0 has not ended yet."
        step, moved, gauge = self._ended
        return (
            f"The expansion about theta_0 ended at step {step}, where the outputs had moved by {moved:.3g} and ddNTK "
            f"changed H by {gauge:.2g} of what dNTK does: beyond {LIMIT:g} it is not to be trusted."
        )

    def facts(self) -> RunFacts:
        """Why the charts have no line, where they have none."""
        if self._refusal is None and self._ended is None:
            return RunFacts()
        return RunFacts(unpredicted=dict.fromkeys(("ntk_drift", "representation_change"), self._sentence()))

    def state(self) -> dict[str, Any]:
        """Where the line ended, and the two numbers."""
        return {"ended": self._ended, "numbers": dict(self._numbers), "latest": self._latest, "start": self._start}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        ended = state.get("ended")
        self._ended = None if ended is None else (int(ended[0]), float(ended[1]), float(ended[2]))
        self._numbers = dict(state.get("numbers", {}))
        self._latest, self._start = state.get("latest"), state.get("start", 0)


def expansion_scalars(
    expansion: SnapshotExpansion, reference: Snapshot, outputs: str | None = None
) -> dict[str, float]:
    """Sizes of predicted changes, and errors of the changes themselves; waits for the device once.

    Args:
        expansion: The terms, with the NTK.
        reference: The snapshot at theta_0.
        outputs: The random directions of the outputs that the NTK is on.

    Returns:
        ``{tag: value}``: those of the NTK, and means over hidden layers, of each order.
    """
    first, second, change = expansion.first, expansion.second, expansion.change
    rows = [] if reference.ntk is None else [_compared(first.ntk, second.ntk, change.ntk, reference.ntk, outputs)]
    rows += [
        _compared(K, second.hidden[name], change.hidden[name], reference.hidden[name])
        for name, K in first.hidden.items()
        if name in reference.hidden
    ]
    H, *layers = torch.stack(rows).tolist()
    scalars: dict[str, float] = {}
    for quantity, error, found in (
        ("ntk_drift", "ntk_expansion_error", [H]),
        ("representation_change", "representation_expansion_error", layers),
    ):
        columns = [[value for value in column if math.isfinite(value)] for column in zip(*found, strict=True)]
        if all(columns) and columns:
            means = [sum(column) / len(column) for column in columns]
            names = [*(tag(quantity, series) for series in SERIES), *(tag(error, series) for series in SERIES)]
            scalars |= {**dict(zip(names, means, strict=True)), tag(error, "order_0"): 1.0}
    return scalars


def _compared(
    first: Tensor | None, second: Tensor | None, change: Tensor | None, kernel: Tensor, outputs: str | None = None
) -> Tensor:
    """Sizes of the change by first order and by both, relative to the kernel; and their errors, (4,)."""
    assert first is not None and second is not None and change is not None
    predicted = (first, first + second)
    whole, moved = kernel_norm(kernel, outputs).to(first), kernel_norm(change, outputs)
    sizes = [kernel_norm(P, outputs) / whole for P in predicted]
    return torch.stack([*sizes, *(kernel_norm(P - change, outputs) / moved for P in predicted)])


def _unusable(measurement: Measurement) -> str | None:
    """Why this measurement cannot be expanded about theta_0."""
    if measurement.reference.ntk is None or measurement.snapshot.ntk is None:
        return "the NTK is not measured"
    if measurement.theta_0 is None:
        return "the parameters of theta_0 were not kept"
    if set(measurement.theta_0) != set(current(measurement.model)):
        return "other parameters are trained than at theta_0"
    return None


def _rms(value: Tensor) -> Tensor:
    return value.square().mean().sqrt()
