"""theta_0 as an observer remembers it: what was measured there, of which parameters, on which probe, at which rates."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.network.snapshot import Snapshot


class Reference:
    """What later measurements are compared with; kept in checkpoints.

    Attributes:
        snapshot: The measurement at theta_0; None before it is made.
        theta_0: The trainable parameters themselves, where a part needs them; else None.
        lambdas: The learning-rate tensor at theta_0.
        origin: Where theta_0 was taken, in words.
        restored: Whether it came from a checkpoint that no training has gone on from yet.
    """

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.theta_0: dict[str, Tensor] | None = None
        self.lambdas: dict[str, float] = {}
        self.origin = ""
        self.restored = False
        self._parameters: list[str] = []
        self._probe: list[Any] | None = None

    def unlike(self, model: nn.Module, probe: Probe) -> str | None:
        """Why it cannot be compared with this network on this probe, in words; empty where that is nothing to say."""
        parameters = _names(model)
        if parameters != self._parameters:
            if not self.restored:
                return ""  # another network, as is normal where nothing was restored
            names = ", ".join(sorted({*parameters} ^ {*self._parameters})[:2])
            return f"the parameters are others than those of the recorded theta_0 ({names} ...)"
        if self.snapshot is not None and self._probe not in (None, _identity(probe)):
            return "the probe is another than that of the recorded theta_0"
        return None

    def belongs_to(self, model: nn.Module, probe: Probe) -> None:
        """From here on it is that of this network on this probe."""
        self._parameters, self._probe, self.restored = _names(model), _identity(probe), False

    def take(self, snapshot: Snapshot, model: nn.Module, parameters: bool) -> None:
        """Keep the measurement, and with ``parameters`` a copy of them."""
        self.snapshot = snapshot
        if parameters:
            self.theta_0 = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Any]:
        """Plain types and tensors."""
        there = self.snapshot
        return {
            "origin": self.origin,
            "parameters": list(self._parameters),
            "probe": self._probe,
            "lambdas": dict(self.lambdas),
            "reference": None
            if there is None
            else {"output": there.output, "ntk": there.ntk, "hidden": dict(there.hidden)},
            "theta_0": None if self.theta_0 is None else dict(self.theta_0),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Reference":
        """From what ``state`` returned.

        Raises:
            Exception: Of any kind, if it is something else.
        """
        found = cls()
        found.origin = state["origin"]
        found._parameters, found._probe = list(state["parameters"]), state.get("probe")
        found.lambdas = dict(state["lambdas"])
        stored = state["reference"]
        found.snapshot = None if stored is None else Snapshot(stored["output"], stored["ntk"], stored["hidden"])
        found.theta_0 = state["theta_0"]
        found.restored = found.snapshot is not None
        return found


def _names(model: nn.Module) -> list[str]:
    return [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()]


def _identity(probe: Probe) -> list[Any]:
    """Shapes and checksums of the inputs: what tells one probe from another."""
    leaves = [leaf.detach().cpu().reshape(-1) for leaf in tree_leaves(probe.inputs) if isinstance(leaf, Tensor)]
    return [[len(leaf), zlib.crc32(leaf.contiguous().view(torch.uint8).numpy().tobytes())] for leaf in leaves]
