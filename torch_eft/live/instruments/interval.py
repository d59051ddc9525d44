"""The change over an interval, predicted from derivatives at its start and the real displacement, beside the real one.

Any network, loss, optimizer and batches: between two measurements the parameters move by d, whoever moves them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.forecast.comparison.compared import Compared, component
from torch_eft.live.instrument import Contraction, Instrument, Measurement, Reading, TrainingStart
from torch_eft.live.instruments.common import LARGEST, compared_scalars, copied, current, memory, too_many
from torch_eft.measure.network.snapshot import Plan, Snapshot
from torch_eft.measure.taylor.displacement import DisplacementTerms

OF_ALL_ORDERS = ("ntk_rate", "interval_ntk_error")
"""Quantities that compare with the sum of the NTK's terms."""


@dataclass
class _Earlier:
    step: int
    theta: dict[str, Tensor]
    ntk: Tensor | None
    lambdas: dict[str, float]
    reference: Snapshot


class IntervalInstrument(Instrument):
    """Changes of outputs and NTK between two measurements, and dNTK and ddNTK along the displacement.

    Args:
        derivatives: 1: the NTK's change by dNTK; 2: by the ddNTKs as well.
        largest: Trainable parameters up to which a copy is kept.

    Raises:
        ValueError: If ``derivatives`` is not 1 or 2.
    """

    name = "interval"
    cost = "standard"
    looks_back = draws_curves = True
    left_out = "ddNTK"

    def __init__(self, *, derivatives: int = 2, largest: int = LARGEST) -> None:
        if derivatives not in (1, 2):
            raise ValueError(f"derivatives: {derivatives} given; 1 is dNTK, 2 is dNTK and ddNTK")
        self.derivatives, self.largest = derivatives, largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._earlier: _Earlier | None = None
        self._refusal: str | None = None
        self._validity = ""

    def plan(self, outputs: int, samples: int) -> Plan:
        """The NTK, which is compared at both ends."""
        return Plan(ntk=True)

    def begin(self, start: TrainingStart) -> Reading:
        """Decide whether a copy of the parameters can be kept."""
        self._refusal = too_many(start.model, self.largest)
        self._earlier = None
        if self._refusal is not None:
            return Reading(pages={"interval": f"No forecast of intervals for this run: {self._refusal}."})
        return Reading(pages={"interval": f"Forecasts of intervals take {memory(start.model, 1)}."})

    def observe(self, measurement: Measurement) -> Reading:
        """Compare over the interval that ends here, and begin the next one."""
        if self._refusal is not None:
            return Reading()
        earlier, self._earlier = self._earlier, None  # dropped also if what follows fails
        reading = Reading()
        if (
            earlier is not None
            and earlier.step < measurement.step
            and set(earlier.theta) == set(current(measurement.model))
        ):
            reading = self._between(earlier, measurement)
        if not measurement.last:
            self._earlier = _Earlier(
                measurement.step,
                copied(measurement.model),
                measurement.snapshot.ntk,
                dict(measurement.lambdas),
                measurement.reference,
            )
        return reading

    def _between(self, earlier: _Earlier, measurement: Measurement) -> Reading:
        H, H_now = earlier.ntk, measurement.snapshot.ntk
        derivatives = self.derivatives if measurement.thorough else 1
        network = measurement.network
        if measurement.statistics:  # constants for derivatives: those of the parameters at which these are taken
            network = network.at(earlier.theta)
            if earlier.reference is not measurement.reference and H_now is not None:  # of more batches than before
                H = network.ntk(trace=H_now.ndim == 2)
        same = earlier.lambdas == measurement.lambdas
        kernels = (H, H_now) if same and H is not None and H_now is not None else None
        displacement = network.displacement_terms(
            earlier.theta,
            current(measurement.model),
            derivatives=derivatives,
            kernels=kernels,
            ntk=kernels is not None,
        )
        reading = Reading()
        if not displacement.cut:  # else the terms are no derivatives
            compared = interval_compared(displacement, measurement.step - earlier.step)
            if derivatives < self.derivatives:  # these would be of another order than at other measurements
                compared = {name: value for name, value in compared.items() if name not in OF_ALL_ORDERS}
            reading = Reading(compared_scalars(compared))
            sizes = [compared[name].measured if name in compared else None for name in ("dntk", "ddntk")]
            if sizes[0] is not None:
                found = Contraction(earlier.step, measurement.step, sizes[0], sizes[1], measurement.step)
                measurement.contractions.append(found)
        if displacement.validity.reason != self._validity:
            self._validity = displacement.validity.reason
            reading.pages["interval"] = (
                f"Changes over an interval by derivatives at its start: {self._validity}. It takes "
                f"{memory(measurement.model, 1)}."
            )
        return reading


def interval_compared(displacement: DisplacementTerms, steps: int) -> dict[str, Compared]:
    """Prediction and measurement, with the next order estimated as the last term squared over the one before.

    A network with kinks has no such estimate: no term contains their crossings.

    Args:
        displacement: The changes over the interval.
        steps: Its length.

    Returns:
        ``{quantity: comparison}``.
    """
    linear, correction = displacement.output_terms[0], displacement.output_terms[1:].sum(0)
    eps = torch.finfo(linear.dtype).eps
    moved, size = float(displacement.output_change.norm()), float(linear.norm())
    compared = {}
    if moved > 0 and size > 0:
        rest = displacement.output_change - linear
        terms = displacement.output_terms.flatten(1).norm(dim=1).tolist()
        rounding = 32 * eps * float(displacement.output.norm()) / size
        compared["interval_output"] = Compared(
            float(component(rest, correction)) / size,
            0.0,
            float(correction.norm()) / size,
            truncation=None
            if displacement.kinked
            else (terms[2] ** 2 / terms[1] if terms[1] > 0 else 0.0) / size + rounding,
        )
        compared["interval_output_error"] = Compared(
            None, float(rest.norm()) / moved, float((rest - correction).norm()) / moved
        )
    if displacement.ntk is not None and displacement.ntk_change is not None and displacement.ntk_terms is not None:
        P, scale = displacement.ntk_terms.sum(0), float(displacement.ntk.norm())
        change = float(displacement.ntk_change.norm())
        first, *second = displacement.ntk_terms.flatten(1).norm(dim=1).tolist()
        following = second[0] ** 2 / first if second and first > 0 else first**2 / scale if scale > 0 else 0.0
        if scale > 0 and math.isfinite(change):
            compared["ntk_rate"] = Compared(
                float(component(displacement.ntk_change, P)) / scale / steps,
                0.0,
                float(P.norm()) / scale / steps,
                truncation=None if displacement.kinked else (following / scale + 32 * eps) / steps,
            )
        if scale > 0 and size > 0:
            rms = size / linear.numel() ** 0.5
            compared["dntk"] = Compared(first / scale / rms, 0.0)
            if second:
                compared["ddntk"] = Compared(second[0] / scale / rms**2, 0.0)
        if change > 0:
            compared["interval_ntk_error"] = Compared(None, 1.0, float((displacement.ntk_change - P).norm()) / change)
    return compared
