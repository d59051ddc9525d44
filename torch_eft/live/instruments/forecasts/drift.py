"""Lines and bands of the NTK's drift, of dNTK and ddNTK and of hidden kernels, beside one network's measurements."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from torch_eft.forecast.comparison.compared import Banded
from torch_eft.forecast.comparison.drift import DriftComparison
from torch_eft.live.instrument import History, Measurement
from torch_eft.live.instruments.common import banded_scalars
from torch_eft.results.tags import layer_theory_tag, tag


class DriftLines:
    """What the law of the drift says at every measurement.

    Args:
        comparison: The law, and this network beside it.
        layers: Names of the activation modules, layer by layer; empty where they are not known.

    Attributes:
        validity: Where the law holds.
    """

    def __init__(self, comparison: DriftComparison, layers: Sequence[str]) -> None:
        self._comparison, self._layers = comparison, list(layers)
        self.validity = comparison.validity

    def expected(self, step: int, H_0: Tensor) -> tuple[float, float] | None:
        """The band of 90 % of networks in which the NTK's drift will be at a step; None where it is not known."""
        return self._comparison.expected_drift(step, H_0)

    def scalars(self, measurement: Measurement) -> tuple[dict[str, float], History]:
        """``{tag: value}`` of this step, and ``{step: {tag: value}}`` of earlier ones whose dNTK was measured now."""
        H, H_0 = measurement.snapshot.ntk, measurement.reference.ntk
        late: History = {}
        if H is None or H_0 is None:
            return {}, late
        H_0, step = H_0.to(H), measurement.step  # a checkpoint may have brought it back elsewhere
        names, now, then = self._kernels(measurement)
        found, each = self._comparison.kernels(step, H, H_0, now, then)
        scalars = _scalars(found)
        for name, banded in zip(names, each, strict=False):
            tags = partial(layer_theory_tag, "representation_change", name)
            scalars |= banded_scalars(tags, banded)
        for sizes in measurement.contractions:
            if sizes.end is None:
                found = self._comparison.gradient(sizes.start, H_0, sizes.dntk, sizes.ddntk)
                late.setdefault(sizes.logged, {}).update(_scalars(found))
            else:
                found = self._comparison.displacement(sizes.start, sizes.end, H_0, sizes.dntk, sizes.ddntk)
                scalars |= _scalars(found)
        return scalars, late

    def _kernels(self, measurement: Measurement) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """The hidden kernels, if those that are measured are those of the theory."""
        now, then = measurement.snapshot.hidden, measurement.reference.hidden
        if set(now) != set(self._layers) or not set(self._layers) <= set(then):
            return [], [], []
        return self._layers, [now[name] for name in self._layers], [then[name].to(now[name]) for name in self._layers]


def _scalars(found: dict[str, Banded]) -> dict[str, float]:
    scalars: dict[str, float] = {}
    for quantity, banded in found.items():
        scalars |= banded_scalars(partial(tag, quantity), banded)
    return scalars
