"""The trained distribution of an ensemble by draws of z(0): under any loss, and on minibatches."""

import dataclasses
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from torch_eft.results.trajectory import Trajectory, Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.initialization.infinite_width import check_inputs
from torch_eft.theory.initialization.statistics import initial_statistics
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.signal_propagation.regimes import first_order_validity, infinite_width_validity
from torch_eft.theory.training.corrections.finite_width import check_distinct
from torch_eft.theory.training.corrections.validity import CAUTION, INVALID, relative_size, truncation
from torch_eft.theory.training.optimizer import Descent, Loss, LossFunction, Reduction
from torch_eft.theory.training.sampled.dynamics import Moments, SampledTraining
from torch_eft.theory.training.sampled.initial_distribution import Fluctuations, all_vertices, draw_outputs
from torch_eft.theory.training.scope import check_stable

BATCHES = 8
"""Independent batches of draws, to estimate the error from."""

_CHUNK = 2**28
"""Bytes of one chunk of draws."""
_TENSORS = 16
_SAME, _CONDITION = 1e-7, 1e9
_NOISY = 0.3
"""Sampling error of a correction, relative to it, from which on the result is no more than an order of magnitude."""
_UNITS = 16
"""Directions of the loss's Hessian at once: under vmap each takes megabytes."""
_SIZES = {"mean": "|z1| / |z0|", "covariance": "|Cov1| / |Cov0|", "ntk": "|H1| / |Theta|"}


class SampledForecast:
    """Order 0 and 1 for one loss.

    Args:
        ensemble: The ensemble.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, as the loss takes them.
        x_probe: Probe inputs, (N_p, n_0); those that are training inputs too, or one another, count once.
        loss: ``"cross_entropy"``, ``"mse"``, or a differentiable function of (outputs, targets) to a number.
        reduction: As in torch, for a named loss.
        optimizer: With the learning rates of all steps.
        draws: Of z(0) in all, in ``BATCHES`` batches of pairs z, -z.
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
        loss: str | LossFunction,
        reduction: Reduction,
        optimizer: Descent,
        draws: int,
        seed: int,
        memory: int,
    ) -> None:
        x_train = check_inputs("x_train", x_train, ensemble)
        x_probe = check_inputs("x_probe", x_probe, ensemble).to(x_train.device)
        self.ensemble, self._outputs, self._optimizer = ensemble, ensemble.widths[-1], optimizer
        self.loss = Loss(loss, _targets(y_train.to(x_train.device), len(x_train), self._outputs, loss), reduction)
        self._x_train, self._probes = x_train, len(x_probe)
        kept, self._place = _distinct(x_probe, x_train)
        self.x = torch.cat([x_probe[kept], x_train])
        self._train = len(kept)
        self._size, self._seed, self._memory = 2 * (draws // (2 * BATCHES)), seed, memory
        last = initial_statistics(ensemble, self.x, statistics=("K", "Theta"))[-1]
        self.K, self.Theta = last.K, last.Theta
        if optimizer.steps:
            start = draw_outputs(self.K, self._outputs, self._size, self._generator(0))[:BATCHES, self._train :]
            Theta = self.Theta[self._train :, self._train :]
            batches = optimizer.batches or (None,)
            different = {None if batch is None else tuple(batch.tolist()): batch for batch in batches}.values()
            sharpest = max(_sharpness(self.loss, z, Theta, batch) for z in start for batch in different)
            check_stable(1.0, 1.0, sharpest, optimizer)

    def order_0(self, steps: Tensor, told: str) -> Trajectory:
        """The distribution at infinite width.

        Args:
            steps: (R,), whole numbers.
            told: The optimizer in words, for the provenance.
        """
        training = SampledTraining(self.K, self.Theta, self.loss, self._optimizer)
        return self._zeroth(self._batches(training, steps, None), steps, told)

    def order_1(
        self, steps: Tensor, told: str, corrections: Collection[str], samples: int, replicas: int
    ) -> Trajectory:
        """With the corrections of order 1/n; arguments as ``order_0`` and ``predict_training`` take them.

        Raises:
            ValueError: If the activation has a kink, inputs all but coincide or the vertices do not fit into memory.
        """
        tensors, sampled = self._tensors(samples, replicas)
        training = SampledTraining(self.K, self.Theta, self.loss, self._optimizer, tensors)
        batches = self._batches(training, steps, Fluctuations(tensors, self._outputs, self._train))
        zeroth = self._zeroth(batches, steps, told)
        probes = self._place[: self._probes]
        initial = tensors["Theta1"][probes][:, probes][..., None, None] * self._identity
        terms = {
            "mean": _average([batch.z1 for batch in batches]),
            "covariance": _average([_covariance_change(batch)[:, probes][:, :, probes] for batch in batches]),
            "ntk": _average([batch.H1[:, probes][:, :, probes] for batch in batches]),
        }
        order_0 = {
            "mean": _average([batch.z for batch in batches])[0],
            "covariance": zeroth.output_covariance,
            "ntk": zeroth.ntk_mean,
        }
        changes: dict[str, Tensor] = {}
        if "mean" in corrections:
            mean, change = order_0["mean"], terms["mean"][0]
            changes["output_mean"] = (mean + change)[:, probes]
            changes["output_truncation"] = truncation(change[:, probes], mean[:, probes])
            changes["train_output_mean"] = (mean + change)[:, self._train :]
        if "covariance" in corrections:
            changes["output_covariance"] = order_0["covariance"] + terms["covariance"][0]
        if "ntk" in corrections:
            drift = terms["ntk"][0]
            changes["ntk_mean"], changes["ntk_drift"] = zeroth.ntk_mean + initial + drift, drift
            changes["ntk_truncation"] = truncation(initial + drift, zeroth.ntk_mean)
        wanted = {name: terms[name] for name in terms if name in corrections}
        sizes, noise = {}, {}
        for name, (value, error) in wanted.items():
            late = (steps > 0) & (order_0[name].flatten(1).norm(dim=1) > 0)
            whole = value + initial if name == "ntk" else value
            sizes[_SIZES[name]] = relative_size(whole[late], order_0[name][late]) if bool(late.any()) else 0.0
            largest = float(value.flatten(1).norm(dim=1).max())
            noise[name] = error * math.sqrt(value[0].numel()) / largest if largest > 0 else 0.0
        told_errors = ", ".join(f"{name} {error:.2g}" for name, (_, error) in wanted.items())
        provenance = f"order 1/n, n = {self.ensemble.widths[-2]}"
        provenance += f" ({', '.join(name for name in terms if name not in wanted)} at order 0)" * (len(wanted) < 3)
        provenance += zeroth.provenance.removeprefix("order 0 (infinite width)")
        provenance += f"; of the terms of order 1/n: {told_errors}"
        if sampled > 0:
            provenance += f"; relative standard error of sampled vertices up to {sampled:.2g}"
        Theta = self.Theta[self._train :, self._train :]
        moved = _average([torch.einsum("tbc,bc->t", batch.pp, Theta) for batch in batches])[0]
        validity = self._validity(sizes, noise, float(moved.max()) / self.ensemble.widths[-2])
        return dataclasses.replace(zeroth, **changes, provenance=provenance, validity=validity)

    @property
    def _identity(self) -> Tensor:
        return torch.eye(self._outputs, dtype=self.K.dtype, device=self.K.device)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator(self.K.device).manual_seed(self._seed + number)

    def _batches(self, training: SampledTraining, steps: Tensor, fluctuations: Fluctuations | None) -> list[Moments]:
        """The moments of every batch at all steps."""
        wanted = sorted({int(step) for step in steps})
        where = [wanted.index(int(step)) for step in steps]
        N, points, C = len(self._x_train), len(self.x), self._outputs
        single = 8 * (2 * points * C if fluctuations is None else 4 * points * C * N * C + 12 * N**2 * points * C)
        rows = max(1, _CHUNK // single)
        found = []
        for number in range(BATCHES):
            generator = self._generator(number)
            total: list[Tensor] | None = None
            draws = draw_outputs(self.K, C, self._size, generator).split(rows)
            for z in draws:
                weights = z.new_full((len(z),), 1 / self._size)
                parts = [training.moments(z, weights, wanted, None, fluctuations is not None)]
                if fluctuations is not None:
                    parts += [
                        training.moments(z, weights, wanted, some, means=False)
                        for some in fluctuations.draw(len(z), generator)
                    ]
                total = _summed(total, parts)
            assert total is not None
            found.append(Moments(*(value[where] for value in total)))
        return found

    def _zeroth(self, batches: Sequence[Moments], steps: Tensor, told: str) -> Trajectory:
        probes = self._place[: self._probes]
        mean, error = _average([batch.z for batch in batches])
        covariance, spread = _average([_covariance(batch)[:, probes][:, :, probes] for batch in batches])
        Theta = self.Theta[probes][:, probes][..., None, None] * self._identity
        Theta = Theta.expand(len(steps), -1, -1, -1, -1)
        return Trajectory(
            steps=steps,
            output_mean=mean[:, probes],
            output_covariance=covariance,
            ntk_mean=Theta,
            ntk_drift=Theta.new_zeros(1).expand(Theta.shape),
            provenance=(
                f"order 0 (infinite width), {self.ensemble}, {told}; {self._size * BATCHES} draws of z(0), standard "
                f"errors (rms): mean {error:.2g}, covariance {spread:.2g}"
            ),
            validity=infinite_width_validity(self.ensemble, self.x),
            train_output_mean=mean[:, self._train :],
        )

    def _tensors(self, samples: int, replicas: int) -> tuple[dict[str, Tensor], float]:
        """Vertices over n, and the largest relative error of those that were sampled."""
        if self.ensemble.activation.kinked:
            raise ValueError(
                f"activation: {self.ensemble.activation.name} has a kink, and the expansion of training in 1/n does "
                "not exist. Use a smooth activation, or order=0"
            )
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
                f"{float(values[-1]):.2g}; outputs that all but determine one another leave no density to expand. Drop "
                "near-duplicate inputs, or use order=0"
            )
        tensors, error = all_vertices(VertexTiles(self.ensemble, self.x, samples, replicas, self._seed))
        return {name: value / self.ensemble.widths[-2] for name, value in tensors.items()}, error

    def _validity(self, sizes: dict[str, float], noise: dict[str, float], moved: float) -> Validity:
        start = first_order_validity(self.ensemble, self.x)
        told = ", ".join(f"{key} = {value:.3g}" for key, value in sizes.items())
        reason = f"terms of order 1/n over those of order 0: {told}; |theta - theta_0|^2 / n = {moved:.3g}"
        largest = max(*sizes.values(), moved)
        noisy = max(noise, key=lambda name: noise[name])
        if noise[noisy] > _NOISY:
            reason += f"; the {noisy} of order 1/n has a sampling error of {100 * noise[noisy]:.2g} %: give more draws"
        advice = ". Wider layers or shorter training make it smaller" if largest >= CAUTION else ""
        if largest >= INVALID or start.flag == "invalid":
            return Validity("invalid", f"order 1/n: {reason}{advice}. {start.reason}")
        cautious = start.flag == "caution" or largest >= CAUTION or noise[noisy] > _NOISY
        return Validity("caution" if cautious else "valid", f"{start.reason}; in training, {reason}{advice}")


def _targets(y: Tensor, count: int, outputs: int, loss: str | LossFunction) -> Tensor:
    """Targets as the loss takes them.

    Raises:
        ValueError: If they do not fit.
    """
    classes = loss == "cross_entropy" and not y.is_floating_point()
    if classes and tuple(y.shape) == (count,) and 0 <= int(y.min()) <= int(y.max()) < outputs:
        # As probabilities: gathering by class index is slower under vmap.
        return torch.nn.functional.one_hot(y.long(), outputs).double()
    if len(y) != count or classes or (loss in ("mse", "cross_entropy") and tuple(y.shape) != (count, outputs)):
        raise ValueError(
            f"y_train: shape {tuple(y.shape)} given; x_train and widths ask for ({count}, {outputs})"
            + f", or ({count},) classes below {outputs}" * (loss == "cross_entropy")
        )
    return y.double() if y.is_floating_point() else y


def _distinct(x_probe: Tensor, x_train: Tensor) -> tuple[list[int], Tensor]:
    """Probes that are neither training inputs nor earlier probes, and where every input is among these and x_train."""
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


def _sharpness(loss: Loss, z: Tensor, Theta: Tensor, batch: Tensor | None) -> float:
    """The largest eigenvalue of the loss's Hessian in parameter space for outputs z (N, C), Theta (N, N)."""
    values, vectors = torch.linalg.eigh(Theta)
    units = torch.eye(z.numel(), dtype=z.dtype, device=z.device).unflatten(1, z.shape)
    changes = torch.func.vmap(lambda unit: loss.change_of_error(z, unit, batch), chunk_size=_UNITS)(units)
    curvature = changes.reshape(z.numel(), *z.shape)
    root = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    half = torch.einsum("ab,bicj,cd->aidj", root, curvature.unflatten(0, z.shape), root)
    return float(torch.linalg.eigvalsh(half.reshape(z.numel(), -1))[-1])


def _summed(total: list[Tensor] | None, parts: Sequence[Moments]) -> list[Tensor]:
    """Order 0 of the first part, the corrections of all."""
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
