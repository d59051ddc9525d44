"""The NTK's drift from initialisation."""

from typing import TYPE_CHECKING, Any, Literal

from torch_eft.callbacks.monitor import Monitor, on_device_of
from torch_eft.callbacks.part import History, Part
from torch_eft.callbacks.schedule import Every
from torch_eft.measure.metrics import as_trace, kernel_distance, ntk_trace, relative_change, top_eigenvalue
from torch_eft.measure.probe import OutputFn
from torch_eft.measure.snapshot import Plan, Snapshot
from torch_eft.tensorboard.figures import kernel_figure
from torch_eft.tensorboard.tags import tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_FULL_KERNEL = 1024
"""Rows N C up to which the full kernel is the default; beyond it the average over outputs is."""


class NTKPart(Part):
    """Drift of the NTK.

    Args:
        outputs: ``"full"``: H_{ij;ab} with all output blocks; ``"trace"``: its average over outputs;
            ``"auto"``: full up to 1024 rows (N C).
    """

    def __init__(self, outputs: Literal["auto", "full", "trace"] = "auto") -> None:
        if outputs not in ("auto", "full", "trace"):
            raise ValueError(f"outputs: {outputs!r} given; give 'auto', 'full' or 'trace'")
        self.outputs = outputs

    def plan(self, outputs: int, samples: int) -> Plan:
        """The NTK, in full or its trace."""
        trace = self.outputs == "trace" or (self.outputs == "auto" and outputs * samples > LARGEST_FULL_KERNEL)
        return Plan(ntk=True, ntk_trace=trace)

    def observe(self, step: int, snapshot: Snapshot, reference: Snapshot) -> dict[str, float]:
        """Drift, distance, trace and largest eigenvalue."""
        H, H_0 = snapshot.ntk, reference.ntk
        if H is None or H_0 is None:
            return {}
        H_0 = on_device_of(H_0, H)
        return {
            tag("ntk_drift", "measured"): float(relative_change(H, H_0)),
            tag("ntk_kernel_distance", "measured"): float(kernel_distance(H, H_0)),
            tag("ntk_top_eigenvalue", "measured"): float(top_eigenvalue(H)),
            tag("ntk_trace", "measured"): float(ntk_trace(H)),
        }

    def first_figures(self, reference: Snapshot) -> "dict[str, Figure]":
        """The kernel matrix at theta_0."""
        if reference.ntk is None:
            return {}
        return {"ntk_matrix/start": kernel_figure(as_trace(reference.ntk), "NTK at theta_0 (mean over outputs)")}

    def last_figures(self, history: History, reference: Snapshot, last: Snapshot) -> "dict[str, Figure]":
        """The kernel matrix at the end, on the scale of the first, and its change."""
        if reference.ntk is None or last.ntk is None:
            return {}
        end = as_trace(last.ntk)
        start = on_device_of(as_trace(reference.ntk), end)
        step = max(history)
        return {
            "ntk_matrix/end": kernel_figure(end, f"NTK, step {step} (mean over outputs)", float(start.abs().max())),
            "ntk_matrix/change": kernel_figure(end - start, f"Change of the NTK, theta_0 to step {step}"),
        }


class NTKMonitor(Monitor):
    """Measure how far the neural tangent kernel has moved.

    Logs, on the probe, with H_0 the NTK at theta_0 and the optimizer's relative learning rates as lambda:

    * ``eft/ntk_drift/measured``: ||H - H_0|| / ||H_0|| (Frobenius);
    * ``eft/ntk_kernel_distance/measured``: 1 - cos(H, H_0) (Fort et al. 2020);
    * ``eft/ntk_top_eigenvalue/measured``: the largest eigenvalue of H;
    * ``eft/ntk_trace/measured``: the mean diagonal of H.

    Args:
        probe: Fixed inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments of the forward.
        every: ``"epoch"``, a number of optimizer steps, or a function of the step that says whether to measure.
        outputs: ``"full"``, ``"trace"`` (average over outputs) or ``"auto"``.
        output_fn: Turns what the model returns into (N, C).
        module: Name of the submodule to measure; empty means the LightningModule itself.
        on_error: ``"warn"`` or ``"raise"``.
        name: Tells several monitors of this class apart in checkpoints.

    Raises:
        ValueError: Here or in ``setup``, if an argument or the model is not usable.
    """

    def __init__(
        self,
        probe: Any,
        every: Every = "epoch",
        outputs: Literal["auto", "full", "trace"] = "auto",
        output_fn: OutputFn | None = None,
        module: str = "",
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
    ) -> None:
        super().__init__(probe, [NTKPart(outputs)], every, output_fn, module, on_error, name)
