"""The forecast of an ensemble of any architecture from networks drawn at random, where no recursion exists.

``theory.predict_training`` knows the ensemble of an MLP in closed form. A CNN, a transformer, kinked activations, fixed
minibatches have no such recursion, but their networks have tensors: each network's own forecast
(``predict_from_network``) is averaged over draws. With S draws, the average differs from the ensemble's mean by a
sampling error of order 1/sqrt(S), which is reported, and by the next order, O(1/n^2) at order 1 (derived here: order 1
of every network errs by O(1/n^2), so does its mean). Fluctuations of outputs and of the NTK at the start are there in
full; nothing assumes that outputs are exchangeable or odd under a change of sign of the last layer.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from torch_eft.forecast.averages import Averages
from torch_eft.forecast.network import predict_from_network
from torch_eft.measure.forward.probe import OutputFn
from torch_eft.results.progress.bar import counted
from torch_eft.results.training import Training, as_training
from torch_eft.results.trajectory import Trajectory
from torch_eft.theory.hierarchy.contractions import DEFAULT_MEMORY


def predict_from_networks(
    make_model: Callable[[], nn.Module],
    x_train: Any,
    y_train: Tensor,
    x_probe: Any,
    training: Training | None = None,
    *,
    learning_rate: float | None = None,
    steps: float | None = None,
    num_networks: int = 50,
    seed: int = 0,
    order: int = 1,
    lambdas: Mapping[str, float] | float | None = None,
    output_fn: OutputFn | None = None,
    num_modes: int | None = None,
    tolerance: float = 1e-4,
    memory: int = DEFAULT_MEMORY,
    **keywords: Any,
) -> Trajectory:
    """Predict the trained distribution over initializations of any architecture, from forecasts of single networks.

    The ensemble counterpart of ``predict_from_network``, for ensembles that have no recursion in
    ``theory.predict_training``; for a smooth MLP that one is exact in the average and much cheaper. The cost is that of
    ``num_networks`` single forecasts.

    Args:
        make_model: Builds one network, drawn from the global random state (of torch, NumPy or Python), on the device
            where it is to be measured; e.g. ``lambda: Net().cuda()``.
        x_train: Training inputs: a tensor (N, ...), a tuple of arguments or a dict of keyword arguments.
        y_train: Targets, (N, C); classes (N,) for the cross-entropy.
        x_probe: Probe inputs, like ``x_train``.
        training: The training; None builds it from the keywords.
        learning_rate: eta > 0, multiplying ``lambdas``.
        steps: Number T of optimizer steps.
        num_networks: S >= 2. Standard errors fall as 1/sqrt(S).
        seed: Seed of the first network; the others follow. The global random state is left alone.
        order: 0, each network with its NTK frozen; 1, with its response to dNTK and ddNTK.
        lambdas: See ``predict_from_network``, like all further arguments.
        output_fn: Likewise.
        num_modes: Likewise.
        tolerance: Likewise.
        memory: Likewise.
        **keywords: Further fields of a ``torch_eft.Training``: ``loss``, ``batches``, ...

    Returns:
        The average made by ``average_trajectories``: means over networks with their standard errors, the covariance
        between networks, and a verdict with the share of networks outside the expansion.

    Raises:
        TypeError: If ``make_model`` is no function.
        ValueError: If an argument is out of range, all networks come out alike, or one of them cannot be forecast; the
            message says which.

    Example:
        >>> import torch
        >>> import torch_eft as eft
        >>> x, y = torch.eye(3), torch.ones(3, 2)
        >>> forecast = eft.predict_from_networks(
        ...     lambda: torch.nn.Linear(3, 2), x, y, x[:1], learning_rate=0.1, steps=4, num_networks=3
        ... )
        >>> forecast.output_mean.shape, forecast.output_error.shape
        (torch.Size([5, 1, 2]), torch.Size([5, 1, 2]))
    """
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise TypeError(
            f"make_model: {type(make_model).__name__} given; give a function that draws a new network, lambda: Net()"
        )
    if num_networks < 2:
        raise ValueError(f"num_networks: {num_networks} given; a mean with its standard error needs at least 2")
    training = as_training(training, learning_rate=learning_rate, steps=steps, **keywords)
    averages, kind = Averages(), ""
    first: Trajectory | None = None
    for index in counted("forecasting networks", range(num_networks), num_networks):
        with _seeded(seed + index):
            model = make_model()
        if not isinstance(model, nn.Module):
            raise ValueError(f"make_model: it returned {type(model).__name__}; return a torch.nn.Module")
        try:
            forecast = predict_from_network(
                model,
                x_train,
                y_train,
                x_probe,
                training,
                order=order,
                lambdas=lambdas,
                output_fn=output_fn,
                num_modes=num_modes,
                tolerance=tolerance,
                memory=memory,
            )
        except ValueError as error:
            raise ValueError(f"{error} (network {index} of {num_networks}, drawn with seed {seed + index})") from error
        averages.add(forecast)
        if first is None:
            first, kind = forecast, type(model).__name__
        elif index == 1 and _same_start(first, forecast):
            raise ValueError(
                "make_model: it returned the same network twice; build a new one at every call, drawn from the global "
                "random state"
            )
    return averages.trajectory(f"order {order} of each one's NTK hierarchy; {training}; {kind}, seeds from {seed}")


def _same_start(first: Trajectory, second: Trajectory) -> bool:
    return all(torch.equal(getattr(first, name)[0], getattr(second, name)[0]) for name in ("output_mean", "ntk_mean"))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random states, and restore them afterwards."""
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
