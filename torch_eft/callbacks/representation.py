"""The change of hidden representations."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from torch_eft.callbacks.monitor import Monitor, on_device_of
from torch_eft.callbacks.part import History, Part
from torch_eft.callbacks.schedule import Every
from torch_eft.measure.alignment import linear_cka
from torch_eft.measure.metrics import relative_change
from torch_eft.measure.probe import OutputFn, Probe
from torch_eft.measure.representation import hidden_kernels
from torch_eft.measure.snapshot import Plan, Snapshot
from torch_eft.tensorboard.figures import layers_figure
from torch_eft.tensorboard.tags import tag

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RepresentationPart(Part):
    """Change of the hidden kernels, layer by layer.

    Args:
        layers: Names of submodules; None picks them.
        per_layer: Log every layer's scalars, too, not only the mean over layers.
        output_fn: Turns what the model returns into (N, C).
    """

    def __init__(
        self, layers: Sequence[str] | None = None, per_layer: bool = False, output_fn: OutputFn | None = None
    ) -> None:
        self.layers = layers
        self.per_layer = per_layer
        self.output_fn = output_fn
        self.changes: dict[str, dict[int, float]] = {}

    def plan(self, outputs: int, samples: int) -> Plan:
        """The hidden kernels."""
        return Plan(hidden=True, layers=self.layers)

    def check(self, network: nn.Module, probe: Probe, outputs: int) -> None:
        """The layers asked for must exist."""
        if self.layers is not None:
            hidden_kernels(network, probe, self.layers, self.output_fn)

    def observe(self, step: int, snapshot: Snapshot, reference: Snapshot) -> dict[str, float]:
        """Relative change and 1 - CKA, the mean over layers and perhaps each."""
        changes, distances = {}, {}
        for layer, K in snapshot.hidden.items():
            if layer in reference.hidden:
                K_0 = on_device_of(reference.hidden[layer], K)
                changes[layer] = float(relative_change(K, K_0))
                distances[layer] = 1 - float(linear_cka(K, K_0))
                self.changes.setdefault(layer, {})[step] = changes[layer]
        scalars = {}
        for quantity, values in (("representation_change", changes), ("representation_cka_distance", distances)):
            finite = {layer: value for layer, value in values.items() if math.isfinite(value)}
            if finite:
                scalars[tag(quantity, "measured")] = sum(finite.values()) / len(finite)
            if self.per_layer:
                scalars |= {tag(f"{quantity}_{layer}", "measured"): value for layer, value in finite.items()}
        return scalars

    def last_figures(self, history: History, reference: Snapshot, last: Snapshot) -> "dict[str, Figure]":
        """Relative change of every layer's kernel over training."""
        if not self.changes:
            return {}
        return {"representation_change": layers_figure(self.changes, "Relative change of hidden kernels")}


class RepresentationMonitor(Monitor):
    """Measure how far the hidden representations have moved.

    Logs, on the probe, with K_0 a layer's kernel (1/n) sum_j s_j s_j at theta_0, the mean over layers of

    * ``eft/representation_change/measured``: ||K - K_0|| / ||K_0|| (Frobenius);
    * ``eft/representation_cka_distance/measured``: 1 - linear CKA(K, K_0) (Kornblith et al. 2019);

    and, with ``per_layer``, the same as ``eft/representation_change_<layer>/measured`` and so on.

    Args:
        probe: Fixed inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments of the forward.
        every: ``"epoch"``, a number of optimizer steps, or a function of the step that says whether to measure.
        layers: Names of the submodules to watch; None picks the activations, or the layers with weights.
        per_layer: Log each layer.
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
        layers: Sequence[str] | None = None,
        per_layer: bool = False,
        output_fn: OutputFn | None = None,
        module: str = "",
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
    ) -> None:
        super().__init__(
            probe, [RepresentationPart(layers, per_layer, output_fn)], every, output_fn, module, on_error, name
        )
