"""torch_eft: the effective theory of deep learning next to a real training run.

``theory`` computes what an ensemble of networks does, ``measure`` what one real network
does, ``callbacks`` lays both side by side while a Lightning ``Trainer`` trains.
Importing ``torch_eft`` imports torch alone: Lightning, TensorBoard and matplotlib are
loaded by the subpackages that need them, when they are first used.

Source of the theory: Roberts, Yaida, Hanin, *The Principles of Deep Learning Theory*
(arXiv:2106.10165), called PDLT throughout.
"""

from importlib import import_module
from typing import Any

from torch_eft import measure, theory
from torch_eft.diagnosis import Diagnosis, diagnose
from torch_eft.forecast import predict_from_network
from torch_eft.trajectory import Trajectory, Validity

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "Trajectory",
    "Validity",
    "callbacks",
    "diagnose",
    "measure",
    "predict_from_network",
    "tensorboard",
    "theory",
]


def __getattr__(name: str) -> Any:
    if name in ("callbacks", "tensorboard"):
        return import_module(f"torch_eft.{name}")
    raise AttributeError(f"module 'torch_eft' has no attribute {name!r}")
