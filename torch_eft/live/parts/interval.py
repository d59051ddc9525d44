"""The next interval, predicted from derivatives at its start and the steps that were really taken, beside what came.

Any network, loss, optimizer and batches: between two visits the parameters move by d, whoever moved them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_eft.forecast.comparison.compared import Compared, component
from torch_eft.live.part import Instrument, Measurement, Reading, Start
from torch_eft.live.parts.common import compared_scalars
from torch_eft.live.parts.theta import LARGEST, copied, current, memory, too_many
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.network.snapshot import Plan
from torch_eft.measure.taylor.displacement import DisplacementTerms, displacement_terms


@dataclass
class _Earlier:
    step: int
    theta: dict[str, Tensor]
    ntk: Tensor | None
    lambdas: dict[str, float]


class IntervalPart(Instrument):
    """Changes of outputs and NTK over the interval between two visits, and dNTK and ddNTK along the displacement.

    Args:
        output_fn: Turns what the network returns into (N, C).
        order: 1: the NTK's change by dNTK; 2: by the ddNTKs as well.
        largest: Trainable parameters up to which a copy is kept.
    """

    name = "interval"
    cost = "standard"
    looks_back = True

    def __init__(self, output_fn: OutputFn | None = None, order: int = 2, largest: int = LARGEST) -> None:
        if order not in (1, 2):
            raise ValueError(f"order: {order} given; 1 is dNTK, 2 is dNTK and ddNTK")
        self.output_fn, self.order, self.largest = output_fn, order, largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._earlier: _Earlier | None = None
        self._refusal: str | None = None
        self._validity = ""

    def plan(self, outputs: int, samples: int) -> Plan:
        """The NTK, which both ends have."""
        return Plan(ntk=True)

    def begin(self, start: Start) -> Reading:
        """See whether a copy of the parameters can be kept."""
        self._refusal = too_many(start.network, self.largest)
        self._earlier = None
        if self._refusal is not None:
            return Reading(pages={"interval": f"No forecast of intervals for this run: {self._refusal}."})
        return Reading(pages={"interval": f"Forecasts of intervals take {memory(start.network, 1)}."})

    def observe(self, visit: Measurement) -> Reading:
        """The interval that ends here; the next one begins."""
        if self._refusal is not None:
            return Reading()
        earlier, self._earlier = self._earlier, None  # dropped also if what follows fails
        report = Reading()
        if earlier is not None and earlier.step < visit.step and set(earlier.theta) == set(current(visit.network)):
            report = self._between(earlier, visit)
        if not visit.last:
            self._earlier = _Earlier(visit.step, copied(visit.network), visit.snapshot.ntk, dict(visit.lambdas))
        return report

    def _between(self, earlier: _Earlier, visit: Measurement) -> Reading:
        H, H_now = earlier.ntk, visit.snapshot.ntk
        kernels = None if H is None or H_now is None or earlier.lambdas != visit.lambdas else (H, H_now)
        found = displacement_terms(
            visit.network,
            visit.probe,
            earlier.theta,
            current(visit.network),
            lambdas=visit.lambdas,
            derivatives=self.order,
            output_fn=visit.output_fn,
            kernels=kernels,
            ntk=kernels is not None,
        )
        report = Reading(compared_scalars(interval_compared(found, visit.step - earlier.step)))
        if found.validity.reason != self._validity:
            self._validity = found.validity.reason
            report.pages["interval"] = (
                f"Changes over an interval by derivatives at its start: {found.validity.reason}. It takes "
                f"{memory(visit.network, 1)}."
            )
        return report


def interval_compared(found: DisplacementTerms, steps: int) -> dict[str, Compared]:
    """Prediction beside what came, with the next order estimated as the last term squared over the one before.

    A network with kinks has no such estimate: their crossings are in no term.

    Args:
        found: The interval.
        steps: Its length.
    """
    linear, correction = found.output_terms[0], found.output_terms[1:].sum(0)
    eps = torch.finfo(linear.dtype).eps
    moved, size = float(found.output_change.norm()), float(linear.norm())
    compared = {}
    if moved > 0 and size > 0:
        rest = found.output_change - linear
        terms = found.output_terms.flatten(1).norm(dim=1).tolist()
        rounding = 32 * eps * float(found.output.norm()) / size
        compared["interval_output"] = Compared(
            float(component(rest, correction)) / size,
            0.0,
            float(correction.norm()) / size,
            truncation=None if found.kinked else (terms[2] ** 2 / terms[1] if terms[1] > 0 else 0.0) / size + rounding,
        )
        compared["interval_output_error"] = Compared(
            None, float(rest.norm()) / moved, float((rest - correction).norm()) / moved
        )
    if found.ntk is not None and found.ntk_change is not None and found.ntk_terms is not None:
        P, scale = found.ntk_terms.sum(0), float(found.ntk.norm())
        change = float(found.ntk_change.norm())
        first, *second = found.ntk_terms.flatten(1).norm(dim=1).tolist()
        following = second[0] ** 2 / first if second and first > 0 else first**2 / scale if scale > 0 else 0.0
        if scale > 0 and math.isfinite(change):
            compared["ntk_rate"] = Compared(
                float(component(found.ntk_change, P)) / scale / steps,
                0.0,
                float(P.norm()) / scale / steps,
                truncation=None if found.kinked else (following / scale + 32 * eps) / steps,
            )
        if scale > 0 and size > 0:
            rms = size / linear.numel() ** 0.5
            compared["dntk"] = Compared(first / scale / rms, 0.0)
            if second:
                compared["ddntk"] = Compared(second[0] / scale / rms**2, 0.0)
        if change > 0:
            compared["interval_ntk_error"] = Compared(None, 1.0, float((found.ntk_change - P).norm()) / change)
    return compared
