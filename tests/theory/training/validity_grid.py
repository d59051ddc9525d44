"""A grid of small trained ensembles against the forecast of order 1/n, for the validity that it claims.

Two training inputs and a probe, one output, eta = 0.5 / lambda_max, mirrored pairs of networks. What the control
variate H(0) - Theta - Theta1 / n has of a mean beyond order 1/n is measured on more networks, and put back.
"""

import math
from dataclasses import dataclass

import torch

from tests.oracles.ensembles import draw
from tests.theory.trained.trained_ensembles import Networks, linear_response, measured
from torch_eft import Training
from torch_eft.theory import MLPEnsemble, get_activation, initial_statistics
from torch_eft.theory.training.corrections.correction import relative_size
from torch_eft.theory.training.corrections.finite_width import FiniteWidthTraining
from torch_eft.theory.training.infinite_width import FrozenTraining, InfiniteWidthPath

C_W = {"tanh": 1.5, "gelu": 1.7}
STEPS = (5, 25, 125)
MORE = 20
"""Initialized networks for each trained one."""


def ensemble_of(name, depth, n):
    return MLPEnsemble([3, *[n] * (depth - 1), 1], name, C_b=0.1, C_W=C_W[name], lambda_b=0.3, lambda_W=1.0)


def descent_at(rate):
    return Training(learning_rate=rate, steps=max(STEPS), reduction="sum")


def data(close, scale, seed=3):
    """Inputs, probe first, of which the training inputs are ``close`` apart in units of their length."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    x = x / x.norm(dim=1, keepdim=True) * 3**0.5
    if close is not None:
        x[2] = x[1] + close * x[2]
    return x, scale * torch.randn(2, 1, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class Compared:
    """One observable at one time: norms at infinite width, of order 1/n, of the measured rest, and its error."""

    infinite_width: float
    first: float
    neglected: float
    error: float


class Forecasts:
    """One activation, depth and set of inputs, for any targets, width and time: the vertices are the same."""

    def __init__(self, name, depth, close):
        self.name, self.depth, self.x = name, depth, data(close, 1.0)[0]
        ensemble = ensemble_of(name, depth, 8)
        y = data(close, 1.0)[1]
        self.finite = FiniteWidthTraining(FrozenTraining(ensemble, self.x[1:], y, self.x[:1], descent_at(1e-9)))
        self.rate = 0.5 / float(self.finite.path.eigenvalues[-1])
        last = initial_statistics(ensemble, self.x, statistics=("K", "Theta", "G1", "Theta1"), check_validity=False)[-1]
        self.G1, self.Theta1 = last.G1, last.Theta1

    def at(self, y, steps=STEPS):
        """n times the corrections (T, ..) and what they correct."""
        finite, times = self.finite, torch.tensor(steps)
        finite.path = InfiniteWidthPath(finite.path.K, finite.path.Theta, y, descent_at(self.rate))
        n = finite.ensemble.widths[-2]
        J = finite.path.response(times)
        infinite_width = {
            "mean": finite.path.mean_output(times),
            "covariance": (J @ finite.path.K @ J.mT)[:, :1, :1, None, None],
            "ntk": finite.path.Theta[:1, :1, None, None].expand(len(steps), -1, -1, -1, -1),
        }
        first = {
            "mean": n * finite.mean_output(times).value,
            "covariance": n * finite.covariance(times).value,
            "ntk": n * finite.ntk_change(times).value,
        }
        return infinite_width, first

    def compared(self, y, n, pairs, seed, steps=STEPS):
        """{(observable, step): Compared} from ``pairs`` trained pairs of width n."""
        infinite_width, first = self.at(y, steps)
        ensemble, path = ensemble_of(self.name, self.depth, n), self.finite.path
        run = (self.x, y, 1, self.rate, steps, pairs, path, self.G1, self.Theta1, seed, max(1, min(pairs, 16384 // n)))
        samples = measured(ensemble, *run)
        response = samples.pop("response")
        back = self._mean_response(y, n, len(response), seed + 1, steps)
        found = {}
        for key, value in samples.items():
            count = len(value)
            extra = value.mean(0) + (back if key == "mean" else 0.0) - first[key]
            variance = value.var(0) / count
            if key == "mean":
                variance = variance + response.var(0) / (MORE * count)
            for index, step in enumerate(steps):
                sizes = infinite_width[key][index].norm(), first[key][index].norm() / n
                beyond = extra[index].norm() / n, variance[index].sum().sqrt() / n
                found[key, step] = Compared(*(float(value) for value in (*sizes, *beyond)))
        return found

    def _mean_response(self, y, n, networks, seed, steps):
        ensemble, path = ensemble_of(self.name, self.depth, n), self.finite.path
        generator, total, batch = torch.Generator().manual_seed(seed), 0.0, max(1, 65536 // n)
        rounds = math.ceil(MORE * networks / batch)
        for _ in range(rounds):
            layers = draw(ensemble.widths, ensemble.C_b[0], ensemble.C_W[0], batch, generator, torch.float32)
            nets = Networks(layers, get_activation(self.name), ensemble.lambda_b[0], ensemble.lambda_W[0])
            total = total + nets.ntk(self.x.float()).double().mean(0) / rounds
        deviation = total - (path.Theta + self.Theta1 / n)[..., None, None]
        return n * linear_response(path, deviation[None], y, self.rate, steps)[0]

    def validity(self, y, n, step, observables=("mean", "covariance", "ntk")):
        """The forecast's own validity at width n, for training up to one step."""
        infinite_width, first = self.at(y, (step,))
        ensemble = ensemble_of(self.name, self.depth, n)
        x = self.x
        finite = FiniteWidthTraining(FrozenTraining(ensemble, x[1:], y, x[:1], descent_at(self.rate)))
        names = {"mean": "|z1| / |z0|", "covariance": "|Cov1| / |Cov0|", "ntk": "|H1| / |Theta|"}
        shift = {"mean": 0.0, "covariance": 0.0, "ntk": float(self.Theta1[0, 0])}
        sizes = {names[key]: relative_size((first[key] + shift[key]) / n, infinite_width[key]) for key in observables}
        return finite.validity(sizes, torch.tensor([step])), sizes
