"""torch_eft: the effective theory of deep learning next to a real training run.

``theory`` computes what an ensemble of networks does, ``measure`` what one real network
does, ``callbacks`` lays both side by side while a Lightning ``Trainer`` trains.
Importing ``torch_eft`` loads nothing else: torch, Lightning, TensorBoard and matplotlib come
with the names that need them, when they are first used. (TensorBoard imports this package for
its tab, and has no use for torch.)

Source of the theory: Roberts, Yaida, Hanin, *The Principles of Deep Learning Theory*
(arXiv:2106.10165), called PDLT throughout.

Symbols, the same in code, charts and reports:

========  =============================================================================================
n, L      width of the hidden layers; depth, the number of weight matrices
r         L / n, the ratio that orders all corrections (PDLT 3.4); n the harmonic mean of hidden widths
epsilon   Var G / (E G)^2 over initializations, G the variance of the output given the last hidden layer: r
          with its coefficient
C_W, C_b  variance of a weight times its fan-in; variance of a bias
K         kernel at infinite width, <z z> or <s s> of a layer: the measured one is its *hidden kernel*
chi       C_W <s'^2> (perp) and C_W d<s^2>/dK (par): growth of small differences, and of K, per layer
H, Theta  neural tangent kernel (NTK) sum lambda dz/dtheta dz/dtheta: of one network, and its mean at
          infinite width
lambda    learning-rate tensor: the relative learning rate of every parameter; eta the common one
dNTK, dH  first derivative of the NTK along training; its second are ddNTK, ddI and ddII
V         four-point vertex, the connected covariance of z z: how much networks differ in their kernel
A B D F   the same of the NTK, and of NTK with kernel; P Q of the dNTK, R S T U of the ddNTK
z, f      outputs of one network; the mean over networks
order 0   infinite width: the NTK is frozen, hidden kernels never change
order 1   the first correction, proportional to 1/n
drift     ||H - H_0|| / ||H_0||, how far the NTK has moved; *change*: the difference itself
========  =============================================================================================
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_eft import callbacks, live, measure, tensorboard, theory
    from torch_eft.diagnosis import Diagnosis, diagnose
    from torch_eft.forecast.averages import average_trajectories
    from torch_eft.forecast.network import predict_from_network
    from torch_eft.forecast.networks import predict_from_networks
    from torch_eft.live.record.saved_run import load_run
    from torch_eft.results.training import Training
    from torch_eft.results.trajectory import Trajectory, Validity, trajectory_from_records

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "Training",
    "Trajectory",
    "Validity",
    "average_trajectories",
    "callbacks",
    "diagnose",
    "live",
    "load_run",
    "measure",
    "predict_from_network",
    "predict_from_networks",
    "tensorboard",
    "theory",
    "trajectory_from_records",
]

_HOMES = {
    "Diagnosis": "diagnosis",
    "Training": "results.training",
    "Trajectory": "results.trajectory",
    "Validity": "results.trajectory",
    "average_trajectories": "forecast.averages",
    "diagnose": "diagnosis",
    "load_run": "live.record.saved_run",
    "predict_from_network": "forecast.network",
    "predict_from_networks": "forecast.networks",
    "trajectory_from_records": "results.trajectory",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"torch_eft.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in __all__:
        return import_module(f"torch_eft.{name}")
    raise AttributeError(f"module 'torch_eft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
