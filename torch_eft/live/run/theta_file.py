"""theta_0 in a file beside the logs, for checkpoints that should not carry a second copy of the parameters."""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

KeepTheta = Literal["checkpoint", "file", "none"]
"""Where the parameters of theta_0 are kept for a resumed training, if a part needs them."""


def save_theta_0(path: Path, theta_0: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write the parameters, and return what finds them again: {"path", "checksum"}, of plain types.

    Raises:
        OSError: If the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    torch.save(dict(theta_0), unfinished)
    checksum = zlib.crc32(unfinished.read_bytes())
    os.replace(unfinished, path)  # what an earlier checkpoint points to is never half a file
    return {"path": str(path.absolute()), "checksum": checksum}


def load_theta_0(found_by: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters, from what ``save_theta_0`` returned; nothing is unpickled but tensors and plain types.

    Raises:
        ValueError: If the file is gone or holds something else, in words.
    """
    path = Path(found_by["path"])
    if not path.is_file():
        raise ValueError(f"the file of theta_0, {path}, is not there")
    if zlib.crc32(path.read_bytes()) != found_by["checksum"]:
        raise ValueError(f"the file of theta_0, {path}, is not the one that the checkpoint was written with")
    return dict(torch.load(path, map_location="cpu", weights_only=True))
