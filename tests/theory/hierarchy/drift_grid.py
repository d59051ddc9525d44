"""A grid of small trained ensembles against the law of one network's drift, for the validity that it claims.

Two training inputs and a probe, one output, eta = 0.5 / lambda_max, as in ``training.validity_grid``.
"""

import math
from dataclasses import dataclass

import torch

from tests.oracles.ensembles import draw
from tests.theory.trained.trained_ensembles import Networks
from tests.theory.training.validity_grid import C_W, STEPS, data, descent_at, ensemble_of
from torch_eft.theory import FrozenTraining, MLPEnsemble, get_activation
from torch_eft.theory.hierarchy.drift.forms import FormReader, mean_forms
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.training.corrections.validity import neuron_movement, training_validity

SAMPLES = 20_000


@dataclass(frozen=True)
class Compared:
    """Root mean square of the drift of the NTK on the probe, relative to the NTK.

    Args:
        predicted: By the law.
        largest: The largest up to then.
        measured: Of trained networks.
        error: Its standard error.
        flag: What the law says of its validity.
        neglected: What it says is neglected, over ``largest``.
    """

    predicted: float
    largest: float
    measured: float
    error: float
    flag: str
    neglected: float

    @property
    def beyond(self) -> float:
        """How far off, in units of what is stated; 1 and more, with three standard errors, is false confidence."""
        if not math.isfinite(self.measured):  # networks that diverged: an error without bound
            return math.inf
        return max(0.0, abs(self.measured - self.predicted) - 3 * self.error) / (self.neglected * self.largest)


class Laws:
    """One activation, depth and set of inputs, for any targets, width and time: the forms over n are the same."""

    def __init__(self, name: str, depth: int, close: float | None) -> None:
        self.name, self.depth, self.close, self.x = name, depth, close, data(close, 1.0)[0]
        frozen = self._frozen(ensemble_of(name, depth, 64), 1.0, 1e-9)
        vertices = VertexTiles(frozen.ensemble, frozen.layers, SAMPLES, 2, 0, integrated=2)
        self._form = mean_forms(FormReader(vertices, frozen, False, 2**31).replicas()).ntk
        self.rate = 0.5 / float(frozen.eigenvalues[-1])

    def _frozen(self, ensemble: MLPEnsemble, scale: float, rate: float) -> FrozenTraining:
        y = data(self.close, scale)[1]
        return FrozenTraining(ensemble, self.x[1:], y, self.x[:1], descent_at(rate))

    def compared(self, scale: float, n: int, networks: int, seed: int = 0) -> dict[int, Compared]:
        """By step; without a measurement where the law says that it is invalid, and networks only where it does not."""
        ensemble = ensemble_of(self.name, self.depth, n)
        frozen, steps = self._frozen(ensemble, scale, self.rate), torch.tensor(STEPS)
        mean, variance = self._form.moments(frozen, steps)
        rms = (mean.square() + variance)[:, 0].sqrt() * 64 / n / float(frozen.Theta[0, 0])
        moved = neuron_movement(ensemble, frozen.layers, frozen, steps)
        said = []
        for index in range(len(STEPS)):
            sizes = {"rms |H(t) - H(0)| / |Theta|": float(rms[: index + 1].max())}
            until = float(moved[: index + 1].max())
            said.append(training_validity(ensemble, frozen.x, frozen, sizes, until, frozen.error_gram.trace()))
        wanted = [index for index, validity in enumerate(said) if validity.flag != "invalid"]
        measured = self._measured(ensemble, scale, max((STEPS[i] for i in wanted), default=0), networks, seed)
        found = {}
        for index, step in enumerate(STEPS):
            size, error = measured.get(step, (math.nan, math.nan))
            numbers = float(rms[index]), float(rms[: index + 1].max()), size, error
            found[step] = Compared(*numbers, said[index].flag, said[index].numbers["neglected"])
        return found

    def _measured(self, ensemble, scale, last, networks, seed) -> dict[int, tuple[float, float]]:
        Theta = float(self._frozen(ensemble, scale, self.rate).Theta[0, 0])
        generator, sigma, n = torch.Generator().manual_seed(seed), get_activation(self.name), ensemble.widths[1]
        x, y = (part.float() for part in data(self.close, scale))
        squares: dict[int, list[torch.Tensor]] = {step: [] for step in STEPS if step <= last}
        batch = max(1, min(networks, 16384 // n))
        for _ in range(math.ceil(networks / batch) if squares else 0):
            layers = draw(ensemble.widths, 0.1, C_W[self.name], batch, generator, torch.float32)
            nets = Networks(layers, sigma, 0.3, 1.0)
            start, done = nets.ntk(x[:1]), 0
            for step in squares:
                for _ in range(step - done):
                    nets.step(x[1:], y, self.rate)
                done = step
                squares[step].append(((nets.ntk(x[:1]) - start).flatten().double() / Theta).square())
        found = {}
        for step, parts in squares.items():
            values = torch.cat(parts)
            rms = float(values.mean().sqrt())
            found[step] = rms, float(values.std()) / math.sqrt(len(values)) / (2 * rms)
        return found
