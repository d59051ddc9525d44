"""How many Taylor orders does this network need? The terms of its real trajectory about theta_0 (PDLT 0.5)."""

from torch_eft.live.part import Event, Instrument, Measurement, Reading, Start
from torch_eft.live.parts.theta import LARGEST, current, memory, too_many
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.measure.taylor.series import taylor_series
from torch_eft.results.tags import layer_tag, tag

TOLERANCE = 0.05
"""Of ``orders_needed``: what may be left of the outputs' change."""


class TaylorPart(Instrument):
    """Sizes of the Taylor terms of order 1, 2, 3 and of the remainder; any network, loss, optimizer and batches.

    Args:
        output_fn: Turns what the network returns into (N, C).
        largest: Trainable parameters up to which theta_0 is kept.
    """

    name = "taylor"
    cost = "standard"
    needs_theta_0 = True

    def __init__(self, output_fn: OutputFn | None = None, largest: int = LARGEST) -> None:
        self.output_fn, self.largest = output_fn, largest
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self._refusal: str | None = None
        self._remarks: tuple[str, ...] = ()
        self._method = ""
        self._told = False

    def begin(self, start: Start) -> Reading:
        """See whether theta_0 is kept."""
        self._refusal = too_many(start.network, self.largest)
        if self._refusal is not None:
            return Reading(pages={"taylor": f"No Taylor terms for this run: {self._refusal}."})
        return Reading(pages={"taylor": f"Taylor terms about theta_0 take {memory(start.network, 1)}."})

    def observe(self, visit: Measurement) -> Reading:
        """The sizes at one visit."""
        if self._refusal is not None or visit.theta_0 is None:
            return Reading()
        theta = current(visit.network)
        series = taylor_series(visit.network, visit.probe, visit.theta_0, theta, output_fn=visit.output_fn)
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
        report = Reading(scalars)
        if sizes.rounding < TOLERANCE < sizes.left[-1] and not self._told:
            self._told = True
            report.events.append(
                Event(
                    visit.step,
                    "taylor_remainder",
                    f"Taylor terms up to order 3 leave {sizes.left[-1]:.3g} of the outputs' change since theta_0, "
                    f"more than {TOLERANCE:.0%}: orders k >= 4 are not negligible from here on"
                    + (", or the crossings of kinks, which no term contains" if series.kinked else ""),
                )
            )
        if visit.last or (series.remarks, series.method) != (self._remarks, self._method):
            self._remarks, self._method = series.remarks, series.method
            needed = sizes.orders_needed(TOLERANCE)
            count = f"{needed}" if needed <= 3 else "more than 3"
            lines = [
                f"Step {visit.step}: {count} Taylor order{'s leave' if needed != 1 else ' leaves'} less than "
                f"{TOLERANCE:.0%} of the change of the outputs since theta_0. Terms of order 1, 2, 3 relative to it: "
                f"{', '.join(f'{size:.3g}' for size in sizes.terms)}; they leave {sizes.left[-1]:.3g}.",
                f"In one pass by {series.method}, {series.cost:.2g} times a forward.",
                *series.remarks,
            ]
            report.pages["taylor"] = "\n\n".join(lines)
        return report
