"""Everything at once, measured in one visit to the network."""

from typing import Any, Literal

from torch_eft.callbacks.monitor import Monitor
from torch_eft.callbacks.ntk import NTKPart
from torch_eft.callbacks.representation import RepresentationPart
from torch_eft.callbacks.schedule import Every
from torch_eft.callbacks.theory import TheoryPart
from torch_eft.measure.probe import OutputFn
from torch_eft.theory.activations import ActivationLike
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.trajectory import Validity


class EFTMonitor(Monitor):
    """NTK drift, representation change and the theory beside them, in one callback.

    Logs what ``NTKMonitor``, ``RepresentationMonitor`` and ``TheoryComparison`` log; the network is visited once
    for all three.

    Args:
        probe: Fixed inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments of the forward.
        every: ``"epoch"``, a number of optimizer steps, or a function of the step that says whether to measure.
        ensemble: C_b and C_W, if known (lambda is the optimizer's in any case); None estimates them.
        activation: The activation, where it is none of the registered ones.
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
        ensemble: MLPEnsemble | None = None,
        activation: ActivationLike | None = None,
        output_fn: OutputFn | None = None,
        module: str = "",
        on_error: Literal["warn", "raise"] = "warn",
        name: str = "",
    ) -> None:
        self.theory = TheoryPart(ensemble, activation, output_fn)
        parts = [NTKPart(), RepresentationPart(output_fn=output_fn), self.theory]
        super().__init__(probe, parts, every, output_fn, module, on_error, name)

    @property
    def validity(self) -> Validity | None:
        """Where the theory holds for this run, or why it does not apply; None before the first step."""
        return self.theory.validity
