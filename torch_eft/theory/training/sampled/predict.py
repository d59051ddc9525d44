"""The trained distribution of an ensemble by draws of z(0): under any loss, and on minibatches."""

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from torch_eft.results.progress.bar import counted
from torch_eft.results.training import Training
from torch_eft.results.trajectory import Trajectory, Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.initialization.infinite_width import check_inputs, infinite_width
from torch_eft.theory.initialization.neuron.remarks import bias_kurtosis
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.signal_propagation.regimes import first_order_validity, infinite_width_validity
from torch_eft.theory.training.corrections.correction import (
    Correction,
    corrected,
    provenance,
    sizes,
)
from torch_eft.theory.training.corrections.finite_width import check_distinct, check_smooth
from torch_eft.theory.training.corrections.validity import CAUTION, INVALID
from torch_eft.theory.training.optimizer import loss_of, sharpness
from torch_eft.theory.training.sampled.dynamics import Moments, SampledTraining
from torch_eft.theory.training.sampled.initial_distribution import Fluctuations, all_vertices, draw_outputs

BATCHES = 8
"""Independent batches of draws, to estimate the error from."""

_CHUNK = 2**28
"""Bytes of one chunk of draws."""
_TENSORS = 16
_SAME, _CONDITION = 1e-7, 1e9
_NOISY = 0.3
"""Sampling error of a correction, relative to it, from which on the result is only an order of magnitude."""


class SampledForecast:
    """Infinite width and order 1/n of one training, by draws of z(0).

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, as the loss takes them.
        x_probe: Probe inputs, (N_p, n_0); those that are training inputs too, or one another, count once.
        training: The training.
        num_draws: Number of draws of z(0), in ``BATCHES`` batches of pairs z, -z.
        seed: Seed of all samples; the global random state is left alone.
        memory: Bytes allowed for vertices over all points.

    Raises:
        ValueError: If shapes do not fit, draws are too few, or the learning rate is beyond the stability bound.
    """

    def __init__(
        self,
        ensemble: MLPEnsemble,
        x_train: Tensor,
        y_train: Tensor,
        x_probe: Tensor,
        training: Training,
        num_draws: int,
        seed: int,
        memory: int,
    ) -> None:
        x_train = check_inputs("x_train", x_train, ensemble)
        x_probe = check_inputs("x_probe", x_probe, ensemble).to(x_train.device)
        training.check_batches(len(x_train))
        self.ensemble, self._outputs, self._training = ensemble, ensemble.widths[-1], training
        self.loss = loss_of(training, y_train.to(x_train.device), len(x_train), self._outputs)
        self._x_train, self._probes = x_train, len(x_probe)
        kept, self._place = _distinct(x_probe, x_train)
        self.x = torch.cat([x_probe[kept], x_train])
        self._train = len(kept)
        self._size, self._seed, self._memory = 2 * (num_draws // (2 * BATCHES)), seed, memory
        self._layers = infinite_width(ensemble, self.x)
        self.K, self.Theta = self._layers[0][-1], self._layers[1][-1]
        needed = 2 * BATCHES * (int(torch.linalg.matrix_rank(self.K)) * self._outputs + 1)
        if num_draws < needed:
            raise ValueError(
                f"num_draws: {num_draws} given; {len(self.x)} points of {self._outputs} outputs ask for {needed} at "
                "least"
            )
        if training.steps:
            start = draw_outputs(self.K, self._outputs, self._size, self._generator(0))[:BATCHES, self._train :]
            Theta = self.Theta[self._train :, self._train :]
            batches = training.different_batches()
            training.check_stable(
                max(sharpness(self.loss, z, Theta, batch) for z in start for batch in batches), "at infinite width"
            )

    def infinite_width(self, steps: Tensor) -> Trajectory:
        """Return the distribution at infinite width.

        Args:
            steps: (R,), whole numbers.
        """
        training = SampledTraining(self.K, self.Theta, self.loss, self._training)
        return self._averaged(self._draws(training, steps, None), steps)[0]

    def first_order(
        self, steps: Tensor, corrections: Collection[str], num_samples: int, num_replicas: int
    ) -> Trajectory:
        """Return the distribution with corrections of order 1/n.

        Args:
            steps: (R,), whole numbers.
            corrections: ``"mean"``, ``"covariance"``, ``"ntk"``.
            num_samples: As ``predict_training`` takes it.
            num_replicas: Likewise.
        """
        tensors, vertex_error = self._tensors(num_samples, num_replicas)
        training = SampledTraining(self.K, self.Theta, self.loss, self._training, tensors)
        draws = self._draws(training, steps, Fluctuations(tensors, self._outputs, self._train))
        infinite_width, mean, note = self._averaged(draws, steps)
        probes = self._place[: self._probes]
        initial = tensors["Theta1"][probes][:, probes][..., None, None] * self._identity
        terms: dict[str, tuple[list[Tensor], Tensor, Tensor | float]] = {
            "mean": ([batch.z1 for batch in draws], mean, 0.0),
            "covariance": (
                [_covariance_change(batch)[:, probes][:, :, probes] for batch in draws],
                infinite_width.output_covariance,
                0.0,
            ),
            "ntk": ([batch.H1[:, probes][:, :, probes] for batch in draws], infinite_width.ntk_mean, initial),
        }
        wanted = {
            name: Correction(*_average(values), corrects, start)
            for name, (values, corrects, start) in terms.items()
            if name in corrections
        }
        notes = [note, "of the terms of order 1/n: " + ", ".join(f"{k} {v.error:.2g}" for k, v in wanted.items())]
        notes += self._laws(True)
        if vertex_error > 0:
            notes.append(f"relative standard error of sampled vertices up to {vertex_error:.2g}")
        Theta = self.Theta[self._train :, self._train :]
        moved = _average([torch.einsum("tbc,bc->t", batch.pp, Theta) for batch in draws])[0]
        noise = {name: correction.relative_error for name, correction in wanted.items()}
        return corrected(
            infinite_width,
            wanted,
            probes,
            slice(self._train, None),
            provenance(self.ensemble, self._training, list(wanted), notes),
            self._validity(sizes(wanted, steps), noise, float(moved.max()) / self.ensemble.widths[-2]),
        )

    def _laws(self, first_order: bool) -> list[str]:
        """What is taken as Gaussian beside what every forecast names."""
        notes = []
        kurtosis = bias_kurtosis(self.ensemble, self.K)
        if kurtosis:
            notes.append(f"z(0) is drawn as Gaussian, its bias gives it the excess kurtosis {kurtosis:.2g}")
        if first_order and EXCESS_KURTOSIS[self.ensemble.weight_law[-1]] and self._outputs > 1:
            notes.append("the read-out's weights are taken as Gaussian in cumulants of one and the same output")
        return notes

    @property
    def _identity(self) -> Tensor:
        return torch.eye(self._outputs, dtype=self.K.dtype, device=self.K.device)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator(self.K.device).manual_seed(self._seed + number)

    def _draws(self, training: SampledTraining, steps: Tensor, fluctuations: Fluctuations | None) -> list[Moments]:
        """The moments of each batch of draws at all steps."""
        wanted = sorted({int(step) for step in steps})
        where = [wanted.index(int(step)) for step in steps]
        N, points, C = len(self._x_train), len(self.x), self._outputs
        single = 8 * (2 * points * C if fluctuations is None else 4 * points * C * N * C + 12 * N**2 * points * C)
        rows = max(1, _CHUNK // single)
        moments = []
        for number in counted("predicting the training by draws", range(BATCHES), BATCHES):
            generator = self._generator(number)
            total: list[Tensor] | None = None
            for z in draw_outputs(self.K, C, self._size, generator).split(rows):
                weights = z.new_full((len(z),), 1 / self._size)
                parts = [training.moments(z, weights, wanted, None, fluctuations is not None)]
                if fluctuations is not None:
                    parts += [
                        training.moments(z, weights, wanted, some, means=False)
                        for some in fluctuations.draw(len(z), generator)
                    ]
                total = _summed(total, parts)
            assert total is not None
            moments.append(Moments(*(value[where] for value in total)))
        return moments

    def _averaged(self, draws: Sequence[Moments], steps: Tensor) -> tuple[Trajectory, Tensor, str]:
        """The trajectory at infinite width, the mean output on all points, and the standard errors in a sentence."""
        probes = self._place[: self._probes]
        mean, error = _average([batch.z for batch in draws])
        covariance, spread = _average([_covariance(batch)[:, probes][:, :, probes] for batch in draws])
        Theta = self.Theta[probes][:, probes][..., None, None] * self._identity
        Theta = Theta.expand(len(steps), -1, -1, -1, -1)
        note = f"{self._size * BATCHES} draws of z(0), standard errors (rms): mean {error:.2g}, covariance {spread:.2g}"
        trajectory = Trajectory(
            steps=steps,
            output_mean=mean[:, probes],
            output_covariance=covariance,
            ntk_mean=Theta,
            ntk_change=Theta.new_zeros(1).expand(Theta.shape),
            provenance=provenance(self.ensemble, self._training, notes=[note, *self._laws(False)]),
            validity=infinite_width_validity(self.ensemble, self.x),
            train_output_mean=mean[:, self._train :],
        )
        return trajectory, mean, note

    def _tensors(self, num_samples: int, num_replicas: int) -> tuple[dict[str, Tensor], float]:
        """Return vertices over n, and the largest relative error of those that were sampled.

        Raises:
            ValueError: If the activation has a kink, inputs nearly coincide or the vertices do not fit into memory.
        """
        check_smooth(self.ensemble)
        check_distinct(self._x_train, torch.zeros(len(self._x_train), 1))
        points = len(self.x)
        needed = 8 * (_TENSORS * points**4 + 3 * (2 * points**2) ** 2)
        if needed > self._memory:
            raise ValueError(
                f"x_train: {points} different points need about {needed / 2**30:.1f} GiB for vertices over all of "
                f"them, memory allows {self._memory / 2**30:.1f} GiB; give fewer points, more memory, or order=0"
            )
        values = torch.linalg.eigvalsh(self.K)
        if float(values[-1]) > _CONDITION * float(values[0]):
            raise ValueError(
                f"x_train, x_probe: the kernel of their outputs has eigenvalues from {float(values[0]):.2g} to "
                f"{float(values[-1]):.2g}; outputs that nearly determine one another leave no density to expand. Drop "
                "near-duplicate inputs, or use order=0"
            )
        tiles = VertexTiles(self.ensemble, self._layers, num_samples, num_replicas, self._seed)
        tensors, error = all_vertices(
            tiles,
            torch.arange(len(self.x), device=self.x.device),
            single=self._outputs == 1 and EXCESS_KURTOSIS[self.ensemble.weight_law[-1]] != 0,
        )
        return {name: value / self.ensemble.widths[-2] for name, value in tensors.items()}, error

    def _validity(self, term_sizes: dict[str, float], noise: dict[str, float], moved: float) -> Validity:
        start = first_order_validity(self.ensemble, self.x)
        terms = ", ".join(f"{key} = {value:.3g}" for key, value in term_sizes.items())
        reasons = [f"terms of order 1/n over those of order 0: {terms}; |theta - theta_0|^2 / n = {moved:.3g}"]
        largest = max(*term_sizes.values(), moved)
        noisy = max(noise, key=lambda name: noise[name])
        numbers = {**start.numbers, **term_sizes, "|theta - theta_0|^2 / n": moved, "sampling error": noise[noisy]}
        if noise[noisy] > _NOISY:
            reasons.append(
                f"the {noisy} of order 1/n has a sampling error of {100 * noise[noisy]:.2g} %: give more draws"
            )
        if largest >= CAUTION:
            reasons.append("wider layers or shorter training make the terms of order 1/n smaller")
        if largest >= INVALID or start.flag == "invalid":
            return Validity("invalid", (f"order 1/n: {reasons[0]}", *reasons[1:], *start.reasons), numbers)
        cautious = start.flag == "caution" or largest >= CAUTION or noise[noisy] > _NOISY
        reasons[0] = f"in training, {reasons[0]}"
        decides = cautious and start.flag == "valid"  # what decides is said first
        ordered = (*reasons, *start.reasons) if decides else (*start.reasons, *reasons)
        return Validity("caution" if cautious else "valid", ordered, numbers)


def _distinct(x_probe: Tensor, x_train: Tensor) -> tuple[list[int], Tensor]:
    """Probes that are neither training inputs nor earlier probes; the place of each input among these and x_train."""
    x = torch.cat([x_train, x_probe])
    length = x.norm(dim=1).max().clamp_min(torch.finfo(x.dtype).tiny)
    close = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") < _SAME * length
    count, kept, place = len(x_train), list[int](), list[int]()
    for probe in range(len(x_probe)):
        same = close[count + probe, : count + probe].nonzero()[:, 0].tolist()
        if same and same[0] < count:
            place.append(-count + same[0])
        elif same:
            place.append(place[same[0] - count])
        else:
            place.append(len(kept))
            kept.append(probe)
    total = len(kept) + count
    where = [index if index >= 0 else total + index for index in place]
    return kept, torch.tensor([*where, *range(len(kept), total)], device=x.device)


def _summed(total: list[Tensor] | None, parts: Sequence[Moments]) -> list[Tensor]:
    """Adds infinite width of the first part and the corrections of all parts to the total."""
    fields = [field.name for field in dataclasses.fields(Moments)]
    corrections = ("z1", "zz1", "H1")
    values = [
        sum((getattr(part, name) for part in parts[1:]), getattr(parts[0], name))
        if name in corrections
        else getattr(parts[0], name)
        for name in fields
    ]
    return values if total is None else [before + value for before, value in zip(total, values, strict=True)]


def _covariance(batch: Moments) -> Tensor:
    """(R, N, N, C, C)."""
    return (batch.zz - torch.einsum("txi,tyj->txiyj", batch.z, batch.z)).permute(0, 1, 3, 2, 4)


def _covariance_change(batch: Moments) -> Tensor:
    cross = torch.einsum("txi,tyj->txiyj", batch.z1, batch.z)
    return (batch.zz1 - cross - cross.permute(0, 3, 4, 1, 2)).permute(0, 1, 3, 2, 4)


def _average(values: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Mean over batches, and the standard error of its entries (rms)."""
    stacked = torch.stack(list(values))
    return stacked.mean(0), float((stacked.var(0).mean() / len(stacked)).sqrt())
