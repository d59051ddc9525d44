"""What a monitor is made of: one concern, told what was measured and answering with scalars."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torch_eft.measure.probe import Probe
from torch_eft.measure.snapshot import Plan, Snapshot

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from matplotlib.figure import Figure

History = dict[int, dict[str, float]]


class Part:
    """One concern of a monitor; every method has a default that does nothing."""

    def plan(self, outputs: int, samples: int) -> Plan:
        """What it needs measured, for ``outputs`` = C and ``samples`` = N."""
        return Plan()

    def check(self, network: nn.Module, probe: Probe, outputs: int) -> None:
        """Before training: raise ``ValueError`` if its arguments do not fit the network."""

    def begin(
        self, trainer: "Trainer", pl_module: "LightningModule", network: nn.Module, probe: Any, fresh: bool
    ) -> dict[str, str]:
        """Training starts; ``fresh``: from theta_0. Returns pages, ``{name: Markdown}``."""
        return {}

    def forget(self) -> None:
        """Drop what belongs to an earlier run: another one's state is about to be loaded."""

    def observe(self, step: int, snapshot: Snapshot, reference: Snapshot) -> dict[str, float]:
        """The scalars of one measurement; ``reference`` is the snapshot at theta_0."""
        return {}

    def on_batch(self, batch: Any) -> None:
        """A training batch arrived."""

    def on_loss(self, loss: Tensor) -> None:
        """Its loss was computed."""

    def on_gradient(self, step: int, optimizer: Optimizer) -> tuple[History, dict[str, str]]:
        """Its gradient was computed; returns late scalars by step, and pages."""
        return {}, {}

    def first_figures(self, reference: Snapshot) -> "dict[str, Figure]":
        """Figures of theta_0, before training."""
        return {}

    def last_figures(self, history: History, reference: Snapshot, last: Snapshot) -> "dict[str, Figure]":
        """Figures at the end of training."""
        return {}
