"""Ensembles trained on digits next to their forecast of order 1/n: tanh 64-n-n-10, one-hot targets, mirrored pairs.

Of the outputs of every network its linear response z_lin(t; z(0), Theta) is subtracted, which in the mean over a
mirrored pair, where z(0) drops out, is the forecast at infinite width; and its linear response to
H(0) - Theta - Theta1 / n, whose mean is zero up to 1/n^2.
"""

import math

import torch

from tests.benchmarks.trajectories import digits
from tests.oracles.ensembles import draw
from tests.theory.trained.trained_ensembles import Networks, linear_response, stacked_pair
from torch_eft import Training
from torch_eft.theory import MLPEnsemble, get_activation
from torch_eft.theory.initialization.vertex_blocks import vertex_block
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.infinite_width import FrozenTraining

OUTPUTS = 10


def ensemble_of(n):
    return MLPEnsemble([64, n, n, OUTPUTS], "tanh", C_b=0.1, C_W=1.5, lambda_b=0.3, lambda_W=1.0)


def traceless(drift):
    """Mean over i = j of (.., n_L, n_L), and what is left."""
    trace = drift.diagonal(dim1=-2, dim2=-1).mean(-1)
    return trace, drift - trace[..., None, None] * torch.eye(drift.shape[-1], dtype=drift.dtype)


class DigitsForecast:
    """n times the corrections at the given steps: for equal hidden widths n the same at any n.

    Args:
        images: Number of training images.
        probes: Number of probe images, at most 8.
        steps: At which steps.
        samples: Sample size of the mean output; that of the drift, which costs less, is 16 times as large.
        seed: Seed of the samples.
    """

    def __init__(self, images, probes, steps, samples, seed=0):
        x_probe, self.x_train, self.y = digits(images, OUTPUTS)
        self.x_probe, self.steps, self.probes = x_probe[:probes], steps, probes
        at = torch.tensor(steps)
        finite = self._training(1e-9, samples, seed)
        self.rate = 0.5 / float(finite.path.eigenvalues[-1])
        finite = self._training(self.rate, samples, seed)
        self.path, n = finite.path, finite.ensemble.widths[-2]
        mean = finite.mean_output(at)
        self.predicted = {"mean, probe": n * mean.value[:, :probes], "mean, train": n * mean.value[:, probes:]}
        self.errors = dict.fromkeys(self.predicted, n * mean.error)
        first, second = (self._training(self.rate, 8 * samples, seed + k).ntk_change(at).value for k in (1, 2))
        halves = zip(("drift, trace", "drift, traceless"), traceless(n * first), traceless(n * second), strict=True)
        for name, one, other in halves:
            self.predicted[name] = (one + other) / 2
            self.errors[name] = ((one - other) / 2).flatten(1).square().mean(1).sqrt()
        self.infinite_width = finite.path.mean_output(at)
        x = torch.cat([self.x_probe, self.x_train])
        sets = dict.fromkeys("xy", torch.arange(len(x)))
        self.Theta1 = vertex_block(ensemble_of(128), x, name="Theta1", labels="xy", label_sets=sets).value

    def _training(self, rate, samples, seed):
        training = Training(learning_rate=rate, steps=max(self.steps), reduction="sum")
        frozen = FrozenTraining(ensemble_of(128), self.x_train, self.y, self.x_probe, training)
        return FiniteWidthTraining(frozen, num_samples=samples, seed=seed)

    def sampling_errors(self):
        """Standard error over rms of the forecast's entries, {name: (T,)}."""
        return {
            name: self.errors[name] / value.flatten(1).square().mean(1).sqrt() for name, value in self.predicted.items()
        }


def slopes(forecast, n, pairs, batch, seed):
    """{name: (slope (T,), standard error (T,), cosine (T,))} of the measured on the predicted correction.

    Args:
        forecast: A ``DigitsForecast``.
        n: Hidden width.
        pairs: Mirrored pairs of networks to train.
        batch: Pairs at a time.
        seed: Seed of the networks.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([forecast.x_probe, forecast.x_train]).float()
    y, ensemble = forecast.y.float(), ensemble_of(n)
    tallies = {name: _Tally(value) for name, value in forecast.predicted.items()}
    for _ in range(math.ceil(pairs / batch)):
        layers = draw(ensemble.widths, ensemble.C_b[0], ensemble.C_W[0], batch, generator, torch.float32)
        networks = Networks(stacked_pair(layers), get_activation("tanh"), ensemble.lambda_b[0], ensemble.lambda_W[0])
        means, drifts = _trained(forecast, networks, x, y, batch)
        means = means - _response(forecast, ensemble, layers, x)
        trace, off = traceless(drifts)
        tallies["mean, probe"].add(n * means[:, :, : forecast.probes])
        tallies["mean, train"].add(n * means[:, :, forecast.probes :])
        tallies["drift, trace"].add(n * trace)
        tallies["drift, traceless"].add(n * off)
    return {name: tally.result() for name, tally in tallies.items()}


def _trained(forecast, networks, x, y, batch):
    """Means over pairs: z - infinite width, (batch, T, N_all, n_L); H(t) - H(0), (batch, T, N_p, N_p, n_L, n_L)."""
    probes = forecast.probes
    H0 = networks.ntk(x[:probes])[:batch]
    means, drifts, done = [], [], 0
    for index, step in enumerate(forecast.steps):
        for _ in range(step - done):
            networks.step(x[probes:], y, forecast.rate)
        done = step
        z, H = networks.forward(x)[0].double(), networks.ntk(x[:probes])
        means.append((z[:batch] + z[batch:]) / 2 - forecast.infinite_width[index])
        drifts.append(((H[:batch] + H[batch:]) / 2 - H0).double())
    return torch.stack(means, 1), torch.stack(drifts, 1)


def _response(forecast, ensemble, layers, x):
    """To H(0) - Theta - Theta1 / n, (batch, T, N_all, n_L)."""
    networks = Networks(layers, get_activation("tanh"), ensemble.lambda_b[0], ensemble.lambda_W[0])
    eye = torch.eye(OUTPUTS, dtype=torch.float64)
    mean = forecast.path.Theta + forecast.Theta1 / ensemble.widths[-2]
    deviation = networks.ntk(x).double() - mean[..., None, None] * eye
    return linear_response(forecast.path, deviation, forecast.y, forecast.rate, forecast.steps)


class _Tally:
    """Slopes of samples (S, T, ..) on the theory (T, ..), and their mean."""

    def __init__(self, theory):
        self.theory = theory.flatten(1)
        self.slopes, self.count = [], 0
        self.total = self.squares = torch.zeros_like(self.theory)

    def add(self, samples):
        samples = samples.flatten(2)
        self.slopes.append((samples * self.theory).sum(2) / self.theory.square().sum(1))
        self.total = self.total + samples.sum(0)
        self.squares = self.squares + samples.square().sum(0)
        self.count += len(samples)

    def result(self):
        each = torch.cat(self.slopes)
        mean = self.total / self.count
        noise = (self.squares / self.count - mean.square()).sum(1) / (self.count - 1)
        length = (mean.square().sum(1) - noise).clamp_min(0.0).sqrt()
        cosine = (mean * self.theory).sum(1) / (length * self.theory.norm(dim=1))
        return each.mean(0), each.std(0) / math.sqrt(self.count), cosine
