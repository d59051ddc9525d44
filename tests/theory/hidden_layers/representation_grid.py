"""A grid of small trained ensembles against the forecast of their hidden layers, for the validity that it claims."""

import dataclasses
import math

import torch

from tests.oracles.trained_hidden import trained_changes
from tests.theory.training.validity_grid import data
from torch_eft.theory import MLPEnsemble, initial_statistics
from torch_eft.theory.hidden_layers.moments import TrainingMoments
from torch_eft.theory.hidden_layers.predict import predict_representation
from torch_eft.theory.hidden_layers.validity import difference_movement, representation_validity
from torch_eft.theory.initialization.infinite_width import infinite_width

C_W = {"tanh": 1.5, "gelu": 1.7, "relu": 2.0}
HYPER = dict(C_b=0.1, lambda_b=0.3, lambda_W=1.0)
SIGMA = {"tanh": torch.tanh, "gelu": torch.nn.functional.gelu, "relu": torch.relu}
UNIT = 64


def ensemble_of(name, depth, n):
    return MLPEnsemble([3, *[n] * (depth - 1), 1], name, C_W=C_W[name], **HYPER)


class Forecast:
    """Of one activation, depth and data, scaled to any width: only ratios of widths enter but for 1/n."""

    def __init__(self, name, depth, close, scale, steps):
        self.name, self.depth, self.steps = name, depth, steps
        self.x, self.y = data(close, scale)
        unit = ensemble_of(name, depth, UNIT)
        eigenvalues = torch.linalg.eigvalsh(initial_statistics(unit, self.x[1:], statistics=("K", "Theta"))[-1].Theta)
        self.rate, self.spread = 0.5 / float(eigenvalues[-1]), float(eigenvalues[-1] / eigenvalues[0])
        K, Theta, pairs = infinite_width(unit, self.x, "distributional")
        train = torch.arange(1, len(self.x))
        moments = TrainingMoments(Theta[-1][1:, 1:], K[-1][1:, 1:] + self.y @ self.y.T, self.rate, "gradient_descent")
        times = torch.tensor(steps, dtype=torch.float64)
        self.parted = difference_movement(unit, Theta, pairs, train, moments, times)
        spec = dict(learning_rate=self.rate, steps=steps[-1], reduction="sum", at_steps=steps, ntk=False)
        self.layers = predict_representation(unit, self.x[1:], self.y, self.x, **spec).layers

    def at(self, n, step):
        """The layers at width n and the validity of the forecast up to one step."""
        index, scaled = self.steps.index(step), UNIT / n
        layers = [
            dataclasses.replace(
                layer,
                width=n,
                kernel_mean=layer.kernel_infinite_width + scaled * (layer.kernel_mean - layer.kernel_infinite_width),
                kernel_change=scaled * layer.kernel_change[: index + 1],
                kernel_terms=scaled * layer.kernel_terms[: index + 1],
                movement=scaled * layer.movement[: index + 1],
            )
            for layer in self.layers
        ]
        ensemble, parted = ensemble_of(self.name, self.depth, n), scaled * float(self.parted[: index + 1].max())
        return layers, representation_validity(ensemble, self.x, layers, self.spread, "distributional", parted), parted

    def measured(self, n, pairs, seed):
        """{(what, layer, step): (pairs, N, N)}: changes over mirrored pairs."""
        widths, chunk = [3, *[n] * (self.depth - 1), 1], min(pairs, 16384 // n)
        run = (self.x[1:].float(), self.y.float(), self.x.float(), self.rate, self.steps)
        spec = dict(C_W=C_W[self.name], **HYPER, pairs=math.ceil(pairs / chunk) * chunk, chunk=chunk, seed=seed)
        return trained_changes(widths, SIGMA[self.name], *run, **spec)
