"""Taylor terms of the network's real trajectory about theta_0: how many orders does it need (PDLT 0.5)?"""

from torch import nn

from torch_eft.live.instrument import Event, Instrument, Measurement, Reading, TrainingStart
from torch_eft.live.instruments.common import LARGEST, current, memory, too_many
from torch_eft.results.tags import layer_tag, tag

TOLERANCE = 0.05
"""The share of the outputs' change that ``orders_needed`` may leave."""


class TaylorInstrument(Instrument):
    """Sizes of the Taylor terms of order 1, 2, 3 and of the remainder; any network, loss, optimizer and batches.

    Args:
        largest: Trainable parameters up to which theta_0 is kept.
    """

    name = "taylor"
    cost = "standard"
    needs_theta_0 = draws_curves = True

    def __init__(self, *, largest: int = LARGEST) -> None:
        self.largest = largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._refusal: str | None = None
        self._remarks: tuple[str, ...] = ()
        self._method = ""
        self._reported = False

    def keeps_theta_0(self, model: nn.Module) -> bool:
        """Not of a network that is too large for a copy."""
        return too_many(model, self.largest) is None

    def begin(self, start: TrainingStart) -> Reading:
        """Decide whether theta_0 can be kept."""
        self._refusal = too_many(start.model, self.largest)
        if self._refusal is not None:
            return Reading(pages={"taylor": f"No Taylor terms for this run: {self._refusal}."})
        return Reading(pages={"taylor": f"Taylor terms about theta_0 take {memory(start.model, 1)}."})

    def observe(self, measurement: Measurement) -> Reading:
        """The sizes of the terms and of the remainder."""
        if self._refusal is not None or measurement.theta_0 is None:
            return Reading()
        network = measurement.network
        if measurement.statistics:  # constants for derivatives: those of the parameters at which these are taken
            network = network.at(measurement.theta_0)
        series = network.taylor(measurement.theta_0, current(measurement.model))
        sizes = series.sizes()
        if sizes is None:
            return Reading()
        scalars = {layer_tag("taylor_terms", f"order_{k}"): size for k, size in enumerate(sizes.terms, start=1)}
        if sizes.left[-1] > sizes.rounding:
            scalars |= {tag("taylor_remainder"): sizes.left[-1], tag("taylor_remainder", "order_0"): 0.0}
        if sizes.rounding < TOLERANCE:
            scalars |= {
                tag("taylor_orders_needed"): float(sizes.orders_needed(TOLERANCE)),
                tag("taylor_orders_needed", "order_0"): 1.0,
            }
        reading = Reading({} if series.cut else scalars)
        if sizes.rounding < TOLERANCE < sizes.left[-1] and not self._reported:
            self._reported = True
            reading.events.append(
                Event(
                    measurement.step,
                    "taylor_remainder",
                    f"Taylor terms up to order 3 leave {sizes.left[-1]:.3g} of the outputs' change since theta_0, "
                    f"more than {TOLERANCE:.0%}: orders k >= 4 are not negligible from here on"
                    + (", or the crossings of kinks, which no term contains" if series.kinked else ""),
                )
            )
        if measurement.last or (series.remarks, series.method) != (self._remarks, self._method):
            self._remarks, self._method = series.remarks, series.method
            needed = sizes.orders_needed(TOLERANCE)
            count = f"{needed}" if needed <= 3 else "more than 3"
            lines = [
                f"Step {measurement.step}: {count} Taylor order{'s leave' if needed != 1 else ' leaves'} less than "
                f"{TOLERANCE:.0%} of the change of the outputs since theta_0. Terms of order 1, 2, 3 relative to it: "
                f"{', '.join(f'{size:.3g}' for size in sizes.terms)}; they leave {sizes.left[-1]:.3g}.",
                f"In one pass by {series.method}, {series.cost:.2g} times a forward.",
                *series.remarks,
            ]
            reading.pages["taylor"] = "\n\n".join(lines)
        return reading
