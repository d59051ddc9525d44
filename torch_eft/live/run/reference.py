"""theta_0 as an observer remembers it: what was measured there, of which parameters, on which probe, at which rates.

Its parameters may be kept in a file beside the logs, for checkpoints that should not carry a second copy of them.
"""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torch_eft.live.run.calibration import Calibration
from torch_eft.measure.forward.probe import Probe
from torch_eft.measure.network.snapshot import Snapshot

KeepTheta = Literal["checkpoint", "file", "none"]
"""Where the parameters of theta_0 are kept for a resumed training, if an instrument needs them."""


class Reference:
    """The point with which later measurements are compared; kept in checkpoints.

    Attributes:
        snapshot: The measurement at theta_0; None before it is made.
        theta_0: The trainable parameters themselves, where an instrument needs them; else None.
        lambdas: The learning-rate tensor at theta_0.
        calibration: The statistics with which BatchNorm layers are measured.
        origin: A phrase saying where theta_0 was taken.
        restored: Whether it came from a checkpoint that no training has gone on from yet.
        files: ``{name: {"path", "checksum"}}``, the files that hold the parameters of theta_0: the reference's own
            under the name ``""``, an instrument's under its name.
    """

    def __init__(self) -> None:
        self.calibration = Calibration()
        self.forget()

    def forget(self) -> None:
        """Drop everything: a new theta_0 is about to be taken or loaded."""
        self.snapshot: Snapshot | None = None
        self.theta_0: dict[str, Tensor] | None = None
        self.lambdas: dict[str, float] = {}
        self.origin = ""
        self.calibration.forget()
        self.restored = False
        self.files: dict[str, dict[str, Any]] = {}
        self._parameters: list[str] = []
        self._probe: list[Any] | None = None

    def differs(self, model: nn.Module, probe: Probe) -> bool:
        """Return whether it belongs to other parameters or to another probe."""
        other_probe = self.snapshot is not None and self._probe not in (None, _identity(probe))
        return _names(model) != self._parameters or other_probe

    def difference(self, model: nn.Module) -> str | None:
        """Say why it ``differs``; None where that is normal: another network, and nothing restored."""
        parameters = _names(model)
        if parameters == self._parameters:
            return "the probe is another than that of the recorded theta_0"
        if not self.restored:
            return None
        names = ", ".join(sorted({*parameters} ^ {*self._parameters})[:2])
        return f"the parameters are others than those of the recorded theta_0 ({names} ...)"

    def bind(self, model: nn.Module, probe: Probe) -> None:
        """Bind this reference to the given network and probe."""
        self._parameters, self._probe, self.restored = _names(model), _identity(probe), False

    def take(self, snapshot: Snapshot, model: nn.Module, parameters: bool) -> None:
        """Keep the measurement, and with ``parameters`` a copy of them."""
        self.snapshot = snapshot
        if parameters:
            self.theta_0 = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """Everything that ``load_state`` needs: plain types and tensors."""
        snapshot = self.snapshot
        stored = snapshot and {"output": snapshot.output, "ntk": snapshot.ntk, "hidden": dict(snapshot.hidden)}
        return {
            "origin": self.origin,
            "parameters": list(self._parameters),
            "probe": self._probe,
            "lambdas": dict(self.lambdas),
            "reference": stored,
            "theta_0": None if self.theta_0 is None else dict(self.theta_0),
            "calibration": self.calibration.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned; anything else raises an exception of any kind."""
        self.origin = state["origin"]
        self._parameters, self._probe = list(state["parameters"]), state.get("probe")
        self.lambdas = dict(state["lambdas"])
        stored = state["reference"]
        self.snapshot = None if stored is None else Snapshot(stored["output"], stored["ntk"], stored["hidden"])
        self.theta_0 = state["theta_0"]
        self.calibration.load_state(state.get("calibration"))
        self.restored = self.snapshot is not None

    def write_theta_0(self, name: str, state: Mapping[str, Any], file: Path) -> None:
        """Write the parameters that a state holds to a file, once; ``set_aside`` points to it."""
        if state["theta_0"] is not None and name not in self.files:
            path = file.with_stem(f"{file.stem}-{name}") if name else file
            self.files[name] = save_theta_0(path, state["theta_0"])

    def set_aside(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        """A state without theta_0, which points to the file that holds it, if there is one."""
        own = {} if name else {"calibration": self.calibration.state(parameters=False)}
        return state | own | {"theta_0": None, "theta_0_file": self.files.get(name)}

    def fetch_theta_0(self, name: str, state: dict[str, Any]) -> None:
        """Put the theta_0 that a state points to into it."""
        record = state.get("theta_0_file")
        if record is not None:
            self.files[name] = record
            state["theta_0"] = load_theta_0(record)


def save_theta_0(path: Path, theta_0: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write the parameters; returns what finds them again: {"path", "checksum"}, of plain types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    torch.save(dict(theta_0), unfinished)
    checksum = zlib.crc32(unfinished.read_bytes())
    os.replace(unfinished, path)  # an earlier checkpoint never points to half a file
    return {"path": str(path.absolute()), "checksum": checksum}


def load_theta_0(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the parameters that ``save_theta_0`` wrote; only tensors and plain types are unpickled.

    Returns:
        ``{name: tensor}``, on the CPU.

    Raises:
        ValueError: If the file is gone or holds something else.
    """
    path = Path(record["path"])
    if not path.is_file():
        raise ValueError(f"the file of theta_0, {path}, is not there")
    if zlib.crc32(path.read_bytes()) != record["checksum"]:
        raise ValueError(f"the file of theta_0, {path}, is not the one that the checkpoint was written with")
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _names(model: nn.Module) -> list[str]:
    return [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()]


def _identity(probe: Probe) -> list[Any]:
    """Shapes and checksums of the inputs: they tell one probe from another."""
    leaves = [leaf.detach().cpu().reshape(-1) for leaf in tree_leaves(probe.inputs) if isinstance(leaf, Tensor)]
    return [[len(leaf), zlib.crc32(leaf.contiguous().view(torch.uint8).numpy().tobytes())] for leaf in leaves]
