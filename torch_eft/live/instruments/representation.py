"""Change of hidden representations."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch_eft.live.instrument import History, Instrument, Measurement, Reading
from torch_eft.measure.kernels.metrics import relative_change
from torch_eft.measure.network.network import Network
from torch_eft.measure.network.snapshot import Plan, Snapshot
from torch_eft.measure.representations.alignment import linear_cka
from torch_eft.results.tags import layer_tag, layer_theory, tag
from torch_eft.tensorboard.figures import layers_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RepresentationInstrument(Instrument):
    """Change of the hidden kernels, layer by layer.

    Args:
        layers: Names of submodules; None chooses them.
        per_layer: Log every layer's scalars too, not only the mean over layers.
    """

    name = "representation"
    cost = "light"
    of_snapshots = True

    def __init__(self, *, layers: Sequence[str] | None = None, per_layer: bool = False) -> None:
        self.layers = layers
        self.per_layer = per_layer
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to an earlier run."""
        self.changes: dict[str, dict[int, float]] = {}

    def plan(self, outputs: int, samples: int) -> Plan:
        """The hidden kernels."""
        return Plan(hidden=True, layers=self.layers)

    def check(self, network: Network) -> None:
        """Check that the layers asked for exist."""
        if self.layers is not None:
            network.hidden_kernels(layers=self.layers)

    def observe(self, measurement: Measurement) -> Reading:
        """Relative change and 1 - CKA: the mean over layers, and each with ``per_layer``."""
        changes, distances = {}, {}
        for layer, K in measurement.snapshot.hidden.items():
            if layer in measurement.reference.hidden:
                K_0 = measurement.reference.hidden[layer].to(K)  # a checkpoint may have brought it back elsewhere
                changes[layer] = float(relative_change(K, K_0))
                distances[layer] = 1 - float(linear_cka(K, K_0))
                self.changes.setdefault(layer, {})[measurement.step] = changes[layer]
        scalars = {}
        for quantity, values in (("representation_change", changes), ("representation_cka_distance", distances)):
            finite = {layer: value for layer, value in values.items() if math.isfinite(value)}
            if finite:
                scalars[tag(quantity)] = sum(finite.values()) / len(finite)
            if self.per_layer:
                scalars |= {layer_tag(quantity, layer): value for layer, value in finite.items()}
        return Reading(scalars=scalars)

    def state(self) -> dict[str, object]:
        """The changes so far, for the figure at the end."""
        return {"changes": {layer: dict(series) for layer, series in self.changes.items()}}

    def load_state(self, state: dict[str, dict[str, dict[int, float]]]) -> None:
        """Go on from ``state``."""
        self.changes = {layer: dict(series) for layer, series in state.get("changes", {}).items()}

    def last_figures(self, history: History, reference: Snapshot, last: Snapshot) -> "dict[str, Figure]":
        """Relative change of every layer's kernel over training."""
        if not self.changes:
            return {}
        theory = layer_theory(history, "representation_change")
        return {"representation_change": layers_figure(self.changes, "Relative change of hidden kernels", theory)}
