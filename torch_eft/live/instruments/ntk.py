"""Drift of the NTK from initialization."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_eft.live.instrument import History, Instrument, Measurement, Reading, TrainingStart
from torch_eft.measure.forward.isolation import IsolatedModel
from torch_eft.measure.kernels.metrics import as_matrix, as_trace, kernel_distance, ntk_trace, relative_change
from torch_eft.measure.kernels.ntk import ntk
from torch_eft.measure.kernels.random_outputs import estimates, random_outputs
from torch_eft.measure.network.snapshot import Plan, Snapshot
from torch_eft.results.choices import check_choice
from torch_eft.results.tags import ERROR, SPECTRUM, tag
from torch_eft.tensorboard.figures import kernel_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_FULL_KERNEL = 1024
"""Rows N C up to which the full kernel is the default, and the average over outputs beyond."""


class BatchNormInstrument(Instrument):
    """The part that BatchNorm's statistics have in the drift of the NTK."""

    name = "batch_norm"
    cost = "standard"

    def __init__(self) -> None:
        self._idle = False

    def idle(self) -> bool:
        """Return whether there are no such layers."""
        return self._idle

    def observe(self, measurement: Measurement) -> Reading:
        """How far the NTK is from that with the statistics of theta_0, beside how far it is from that of theta_0."""
        self._idle = not measurement.statistics
        H, H_0, network = measurement.snapshot.ntk, measurement.reference.ntk, measurement.network.current
        if H is None or H_0 is None or not measurement.statistics or not isinstance(network, IsolatedModel):
            return Reading()
        if measurement.snapshot is measurement.reference:
            return Reading()
        moved = (H - H_0.to(H)).norm()
        before = {name: value.to(network.constants[name]) for name, value in measurement.statistics.items()}
        frozen = ntk(
            replace(network, constants=network.constants | before),
            measurement.network.probe,
            lambdas=measurement.lambdas,
            trace=H.ndim == 2,
            memory=measurement.network.memory,
            outputs=measurement.plan.outputs,
        )
        share = (H - frozen).norm() / moved
        return Reading({tag("ntk_batch_norm_share"): float(share)})


class NTKInstrument(Instrument):
    """Drift of the NTK.

    Args:
        outputs: ``"full"``: H_{ij;ab} with all output blocks; ``"trace"``: its average over outputs;
            ``"auto"``: full up to 1024 rows (N C); ``"probes:16"``: on 16 random directions of the outputs, with error
            bars, where there are more outputs than that.

    Raises:
        ValueError: If ``outputs`` is something else.
    """

    name = "ntk"
    cost = "light"
    of_snapshots = True

    def __init__(self, outputs: str = "auto") -> None:
        self.outputs = checked_outputs(outputs)

    def plan(self, outputs: int, samples: int) -> Plan:
        """The NTK, in full or its trace."""
        if self.outputs.startswith("probes"):
            directions = random_outputs(self.outputs)
            assert directions is not None
            return Plan(ntk=True, outputs=self.outputs if directions.count < outputs else None)
        trace = self.outputs == "trace" or (self.outputs == "auto" and outputs * samples > LARGEST_FULL_KERNEL)
        return Plan(ntk=True, ntk_trace=trace)

    def begin(self, start: TrainingStart) -> Reading:
        """Say on which outputs the NTK is measured, where these are not all."""
        directions = random_outputs(start.network.outputs)
        if directions is None:
            return Reading()
        return Reading(pages={"ntk": _ON_DIRECTIONS.format(directions.count)})

    def observe(self, measurement: Measurement) -> Reading:
        """Drift, distance, trace, largest eigenvalue and spectrum."""
        H, H_0 = measurement.snapshot.ntk, measurement.reference.ntk
        if H is None or H_0 is None:
            return Reading()
        if H.shape != H_0.shape:
            raise ValueError(
                f"outputs: the NTK of theta_0 is {tuple(H_0.shape)}, this one {tuple(H.shape)}; go on with the "
                "outputs= of the run that was resumed"
            )
        if measurement.plan.outputs is not None:
            return _estimated(H, H_0)
        H_0 = H_0.to(H)  # a checkpoint may have brought it back elsewhere
        eigenvalues = torch.linalg.eigvalsh(as_matrix(H))
        scalars = {
            tag("ntk_drift"): relative_change(H, H_0),
            tag("ntk_kernel_distance"): kernel_distance(H, H_0),
            tag("ntk_top_eigenvalue"): eigenvalues[-1],
            tag("ntk_trace"): ntk_trace(H),
        }
        values = torch.stack(list(scalars.values())).tolist()  # one wait for the device, not four
        rounding = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1]
        seen = eigenvalues[eigenvalues > rounding]
        return Reading(
            scalars=dict(zip(scalars, values, strict=True)),
            histograms={SPECTRUM: seen.log10()} if len(seen) else {},
        )

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
        start = as_trace(reference.ntk).to(end)
        step = max(history)
        return {
            "ntk_matrix/end": kernel_figure(end, f"NTK, step {step} (mean over outputs)", float(start.abs().max())),
            "ntk_matrix/change": kernel_figure(end - start, f"Change of the NTK, theta_0 to step {step}"),
        }


_ON_DIRECTIONS = (
    "NTK on {} random output directions, the same at all times: numbers of it are estimates of those of all outputs, "
    "logged with error bars (68 %, over directions, not over seeds). Its eigenvalues are not estimated. What "
    "other instruments say of the NTK's change is of these directions, without error bars; hidden layers and outputs "
    "are measured in full."
)


def checked_outputs(outputs: str) -> str:
    """Return what was given for ``outputs``.

    Raises:
        ValueError: If it is unknown.
    """
    if not (isinstance(outputs, str) and outputs.startswith("probes")):
        check_choice("outputs", outputs, ("auto", "full", "trace"), "'probes:16', on random directions of the outputs")
    else:
        random_outputs(outputs)
    return outputs


def _estimated(H: Tensor, H_0: Tensor) -> Reading:
    """The numbers of a kernel on random directions, with error bars."""
    found = estimates(H, H_0)
    assert found.relative_change is not None and found.kernel_distance is not None
    scalars: dict[str, float] = {}
    for quantity, number in (
        ("ntk_drift", found.relative_change),
        ("ntk_kernel_distance", found.kernel_distance),
        ("ntk_trace", found.ntk_trace),
    ):
        scalars[tag(quantity)] = number.value
        scalars |= {tag(quantity, end): value for end, value in zip(ERROR, number.interval(0.68), strict=True)}
    return Reading(scalars)
