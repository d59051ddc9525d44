"""The forecast of an ensemble of any architecture, from networks drawn at random: where no recursion exists.

``theory.predict_training`` knows the ensemble of an MLP in closed form. A CNN, a transformer, kinked activations, fixed
minibatches have no such recursion, but their networks have tensors: each network's own forecast
(``predict_from_network``) is averaged over draws. With S draws, the average differs from the ensemble's mean by a
sampling error of order 1/sqrt(S), which is reported, and by the next order, O(1/n^2) at order 1 (derived here: order 1
of every network errs by O(1/n^2), so does its mean). Fluctuations of outputs and of the NTK at the start are there in
full; nothing assumes that outputs are exchangeable or odd under a change of sign of the last layer.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from torch_eft.forecast.network import predict_from_network
from torch_eft.results.averages import Averages
from torch_eft.results.trajectory import Trajectory


def predict_from_networks(
    make_model: Callable[[], nn.Module],
    x_train: Any,
    y_train: Tensor,
    x_probe: Any,
    learning_rate: float,
    steps: int,
    networks: int = 50,
    seed: int = 0,
    order: int = 1,
    **options: Any,
) -> Trajectory:
    """The trained distribution over initializations of any architecture, by ``networks`` forecasts of single networks.

    The ensemble counterpart of ``predict_from_network``, for what ``theory.predict_training`` has no recursion for; for
    a smooth MLP that one is exact in the average and much cheaper. The cost is that of ``networks`` single forecasts.

    Args:
        make_model: Builds one network, drawn from the global random state (of torch, NumPy or Python), on the device
            where it is to be measured; e.g. ``lambda: Net().cuda()``.
        x_train: Training inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        y_train: Targets, (N, C); classes (N,) for the cross-entropy.
        x_probe: Probe inputs, like ``x_train``.
        learning_rate: eta > 0, multiplying ``lambdas``.
        steps: Number T of optimizer steps.
        networks: S >= 2. Standard errors fall as 1/sqrt(S).
        seed: Of the first network; the others follow. The global random state is left alone.
        order: 0, every network with its NTK frozen; 1, with its response to dNTK and ddNTK.
        options: All others of ``predict_from_network``: ``lambdas``, ``momentum``, ``loss``, ``batches``, ...

    Returns:
        A ``Trajectory``, as ``average_trajectories`` makes it: means over networks with their standard errors, the
        covariance between networks, and a verdict that tells how many of them are outside the expansion.

    Raises:
        ValueError: If an argument is out of range, networks come out all alike, or one of them cannot be forecast; the
            message says which.
    """
    if networks < 2:
        raise ValueError(f"networks: {networks} given; a mean with its standard error needs at least 2")
    averages, provenance = Averages(), ""
    first: Trajectory | None = None
    for index in range(networks):
        with _drawn_from(seed + index):
            model = make_model()
        if not isinstance(model, nn.Module):
            raise ValueError(f"make_model: it returned {type(model).__name__}; return a torch.nn.Module")
        try:
            found = predict_from_network(model, x_train, y_train, x_probe, learning_rate, steps, order=order, **options)
        except ValueError as error:
            raise ValueError(f"{error} (network {index} of {networks}, drawn with seed {seed + index})") from error
        averages.add(found)
        if first is None:
            first, settings = found, found.provenance.partition("; ")[2]
            provenance = (
                f"order {order} of each one's NTK hierarchy; {settings}; {type(model).__name__}, seeds {seed} on"
            )
        elif index == 1 and torch.equal(first.ntk_mean[0], found.ntk_mean[0]):
            raise ValueError(
                "make_model: it returned the same network twice; build a new one at every call, drawn from the global "
                "random state"
            )
    return averages.trajectory(provenance)


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """The global random states, seeded, and afterwards what they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
