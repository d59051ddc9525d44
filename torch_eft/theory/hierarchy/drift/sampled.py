"""The forecast by draws of z(0): losses other than the squared error, and minibatches."""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_eft.results.trajectory import Validity
from torch_eft.theory.hierarchy.drift.assembly import (
    JointReader,
    Moments,
    check_outputs,
    named,
    ntk_drift,
    relative_errors,
    result,
)
from torch_eft.theory.hierarchy.drift.forms import AllForms
from torch_eft.theory.hierarchy.drift.joint import JointForms
from torch_eft.theory.hierarchy.drift.paths import Coefficients, DrawnTraining, FullGivenOutputs, GivenOutputs
from torch_eft.theory.hierarchy.drift.result import ContractedSize, DriftForecast, NTKDrift
from torch_eft.theory.training.corrections.validity import neuron_movement_by, training_validity

BATCHES = 8
"""Batches of draws, to estimate the error from."""

_CHUNK = 2**27
"""Bytes of eta at once."""


class SampledLaw:
    """The law of what training changes, as the mean over draws of z(0) of the law given z(0).

    Args:
        forms: The quadratic forms.
        replicas: Those of independent samples, for the error.
        joint: The joint law over pairs of probe points.
        frozen: The training at infinite width.
        times: (T+1,).
        num_draws: Draws.
        seed: Of the draws.
    """

    def __init__(
        self,
        forms: AllForms,
        replicas: list[AllForms],
        joint: JointReader,
        frozen: DrawnTraining,
        times: Tensor,
        num_draws: int,
        seed: int,
    ) -> None:
        self._forms, self._replicas, self._joint, self._frozen, self._times = forms, replicas, joint, frozen, times
        self._num_draws, self._seed = num_draws, seed
        self._steps = [int(step) for step in times]
        self._kernels = {**named(forms), "diagonal": forms.diagonal}
        self._given_z = {name: GivenOutputs(form, frozen.inverse) for name, form in self._kernels.items()}
        self._full = FullGivenOutputs(forms.full, frozen.inverse, joint.weights, frozen.outputs)

    def forecast(self) -> DriftForecast:
        """The law over all initializations."""
        frozen = self._frozen
        batches = [self._average(z) for z in frozen.draw(self._num_draws, self._seed).chunk(BATCHES)]
        whole = {name: torch.stack([batch[name] for batch in batches]).mean(0) for name in batches[0]}
        moments = {}
        for name in self._kernels:
            mean, square = whole[name].unbind(1)
            moments[name] = mean, (square - mean.square()).clamp_min(0.0)
        ntk = ntk_drift(frozen, moments["ntk"], whole["full"], moments["diagonal"])
        moved = neuron_movement_by(frozen.ensemble, frozen.layers, frozen, whole["pp"])
        sizes = {"rms |H(t) - H(0)| / |Theta|": float(ntk.relative_rms.max())}
        validity = training_validity(frozen.ensemble, frozen.x, frozen, sizes, float(moved.max()))
        errors = self._errors(batches)
        note = f"; {self._num_draws} draws of z(0)"
        return self._result(ntk, moments, self._contracted(whole), errors, note, validity, given=True)

    def _average(self, z: Tensor) -> dict[str, Tensor]:
        """Means over draws at all times."""
        frozen, steps = self._frozen, self._steps
        total: dict[tuple[int, str], Tensor] = {}
        for some in frozen.chunks(z, full=True):
            modes = frozen.U.T @ some
            for step, at in frozen.walk(some, steps, full=True):
                for name, value in self._observed(modes, at, step == max(steps)):
                    total[step, name] = total.get((step, name), 0.0) + value.sum(0) / len(z)
        names = dict.fromkeys(name for _, name in total)
        return {name: torch.stack([total[step, name] for step in steps if (step, name) in total]) for name in names}

    def _observed(self, z: Tensor, at: Coefficients, last: bool) -> Iterator[tuple[str, Tensor]]:
        """First and second moments of every drift, and mean squares; those of single replicas at the end."""
        drift, frozen, weights = at.drift(), self._frozen, self._joint.weights
        for name, given in self._given_z.items():
            mean, variance = given.moments(z, drift)
            yield name, torch.stack([mean, mean.square() + variance], 1)
        yield "full", self._full.mean_squares(z, drift)
        for name, moved in (("dntk", at.dntk()), ("ddntk", at.ddntk())):
            mean, variance = self._given_z["ntk"].moments(z, moved)
            yield name, (mean.square() + variance) @ weights
            yield f"full {name}", self._full.mean_squares(z, moved)
        seen = frozen.coupling[: frozen.probes] @ at.e
        yield "motion", seen.square().sum((1, 2)) / (frozen.probes * frozen.outputs)
        yield "pp", at.p @ at.p.mT
        if last and len(self._replicas) > 1:
            for number, replica in enumerate(self._replicas):
                for name, form in named(replica).items():
                    mean, variance = GivenOutputs(form, frozen.inverse).moments(z, drift)
                    yield f"{number} {name}", (mean.square() + variance) @ weights

    def _errors(self, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Of the rms drifts at the last time: from draws, and from sampled moments."""
        weights, names = self._joint.weights, list(named(self._forms))

        def squares(batch: dict[str, Tensor], name: str) -> Tensor:
            return batch[name][-1, 1] @ weights

        drawn = relative_errors([{name: squares(batch, name).sqrt() for name in names} for batch in batches])
        means = {name: torch.stack([batch[name] for batch in batches]).mean(0) for name in batches[0]}
        sampled = relative_errors(
            [{name: means[f"{i} {name}"][0].sqrt() for name in names} for i in range(len(self._replicas))]
            if len(self._replicas) > 1
            else [{}]
        )
        return {name: math.hypot(error, sampled.get(name, 0.0)) for name, error in drawn.items()}

    def _contracted(self, whole: dict[str, Tensor]) -> tuple[ContractedSize, ContractedSize]:
        """Of the dNTK and of the ddNTK along the gradient."""
        frozen, motion = self._frozen, whole["motion"]
        reference = frozen.Theta[: frozen.probes, : frozen.probes].norm()
        sizes = []
        for name, divisor in (("dntk", motion.sqrt() * reference), ("ddntk", 2 * motion * reference)):
            averaged, full = whole[name].sqrt(), whole[f"full {name}"].sqrt()
            sizes.append(ContractedSize(averaged / divisor, full / divisor / frozen.outputs**0.5))
        return sizes[0], sizes[1]

    def _result(
        self,
        ntk: NTKDrift,
        moments: dict[str, Moments],
        contracted: tuple[ContractedSize | None, ContractedSize | None],
        errors: dict[str, float],
        note: str,
        validity: Validity,
        given: bool = False,
        z: Tensor | None = None,
    ) -> DriftForecast:
        forms = self._forms
        return result(
            self._frozen,
            self._frozen.training,
            self._times,
            ntk,
            {layer: moments[f"hidden {layer}"] for layer in forms.hidden},
            {layer: moments[f"hidden NTK {layer}"] for layer in forms.hidden_ntk},
            contracted,
            errors,
            note,
            validity,
            self,
            functools.partial(self._given, errors, validity) if given else None,
            z,
        )

    def _given(self, errors: dict[str, float], validity: Validity, z: Tensor) -> DriftForecast:
        """The law over the networks with outputs ``z`` on the training inputs: nothing is drawn."""
        frozen = self._frozen
        check_outputs(z, frozen)
        z = z.to(frozen.K)
        found: dict[str, list[Moments]] = {name: [] for name in self._kernels}
        at = dict(frozen.walk(z[None], self._steps, full=False))
        for step in self._steps:
            for name, law in self._given_z.items():
                found[name].append(law.moments((frozen.U.T @ z)[None], at[step].drift()))
        moments = {
            name: (torch.cat([mean for mean, _ in parts]), torch.cat([variance for _, variance in parts]))
            for name, parts in found.items()
        }
        ntk = ntk_drift(frozen, moments["ntk"], None, moments["diagonal"])
        return self._result(ntk, moments, (None, None), errors, "", validity, z=z)

    def draws(self, num_draws: int, seed: int, z: Tensor | None) -> "PathDraws":
        """Draw networks, those with training outputs ``z`` or all."""
        frozen = self._frozen
        starts = frozen.draw(num_draws, seed + 1) if z is None else z.to(frozen.K)[None]
        return PathDraws(self._joint.all, self._given_z, self._full, frozen, starts, num_draws, self._steps, seed)

    def along_mean(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the component along ``mean``, (T+1,) each."""
        frozen = self._frozen
        laws = [
            GivenOutputs(self._joint.ntk.contracted(direction), frozen.inverse)
            for direction in self._joint.directions(mean)
        ]
        first, second = torch.zeros(2, len(laws), dtype=mean.dtype, device=mean.device)
        for some in frozen.chunks(frozen.draw(self._num_draws, self._seed), full=False):
            for step, at in frozen.walk(some, self._steps, full=False):
                for place, law in enumerate(laws):
                    if self._steps[place] == step:
                        value, variance = law.moments(frozen.U.T @ some, at.drift())
                        first[place] += value.sum() / self._num_draws
                        second[place] += (value.square() + variance).sum() / self._num_draws
        return first, (second - first.square()).clamp_min(0.0).sqrt()


class PathDraws:
    """Networks drawn from the law of what their training changes, at the steps of a forecast.

    As ``NetworkDraws``, whose statement of the law of the NTK with all pairs of outputs holds here too.

    Args:
        joint: ``{(observable, layer): law}``.
        given_z: The laws given z of all pairs, by name.
        full: Of the NTK with all pairs of outputs.
        frozen: The training at infinite width.
        starts: Training outputs at initialization, one for each network or for all, (draws or 1, N, n_L).
        num_draws: Networks drawn.
        steps: The steps.
        seed: Seed.

    Attributes:
        layers: Numbers of the hidden layers.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, classes = torch.eye(2, 3), torch.tensor([0, 1])
        >>> ensemble = theory.MLPEnsemble([3, 64, 64, 2], "linear")
        >>> forecast = theory.predict_drift(ensemble, x, classes, x, learning_rate=0.1, steps=4, loss="cross_entropy")
        >>> networks = forecast.draws(100)
        >>> isinstance(networks, theory.PathDraws), networks.layers, networks.ntk_drift(4).shape
        (True, [1, 2], torch.Size([100]))
    """

    def __init__(
        self,
        joint: dict[tuple[str, int], JointForms],
        given_z: dict[str, GivenOutputs],
        full: FullGivenOutputs,
        frozen: DrawnTraining,
        starts: Tensor,
        num_draws: int,
        steps: list[int],
        seed: int,
    ) -> None:
        self._joint, self._given_z, self._full, self._frozen, self._steps = joint, given_z, full, frozen, steps
        self.layers = [layer for observable, layer in joint if observable == "activations"]
        generator = torch.Generator(frozen.K.device).manual_seed(seed)
        pairs = frozen.outputs * (frozen.outputs + 1) // 2 - 1
        shape = num_draws, max(1, pairs)
        normal = torch.randn(shape, generator=generator, dtype=frozen.K.dtype, device=frozen.K.device)
        self._beyond = normal.square().mean(1)
        entries = frozen.outputs * sum(len(law.pairs) for law in joint.values()) * len(frozen.eigenvalues)
        rows = max(1, _CHUNK // (8 * entries))
        parts: dict[tuple[int, str], list[Tensor]] = {}
        for first in range(0, num_draws, rows):
            count = min(rows, num_draws - first)
            own = starts[first : first + count] if len(starts) > 1 else starts
            for some in frozen.chunks(own, full=True):
                for key, value in self._drawn(some, len(some) if len(starts) > 1 else count, generator):
                    parts.setdefault(key, []).append(value)
        self._values = {key: torch.cat(values) for key, values in parts.items()}

    def ntk_drift(self, step: float, *, full: bool = False) -> Tensor:
        """|H(t) - H(0)| / |H| with H at infinite width, (draws,); averaged over outputs, or ``full``."""
        squares = self._squares(("output", self._frozen.ensemble.depth), step)
        if full:
            squares = squares + self._beyond * self._at(step, "beyond").clamp_min(0.0)
        return squares.sqrt() / self._joint["output", self._frozen.ensemble.depth].reference

    def diagonal_drift(self, step: float) -> Tensor:
        """Drift of the mean of the NTK's diagonal, (draws,)."""
        return self._at(step, "diagonal")

    def hidden_change(self, layer: int, step: float, *, ntk: bool = False) -> Tensor:
        """Relative change of the kernel of a hidden layer, or of its NTK, (draws,)."""
        key = ("ntk" if ntk else "activations", layer)
        return self._squares(key, step).sqrt() / self._joint[key].reference

    def _at(self, step: float, name: str) -> Tensor:
        if step not in self._steps:
            raise ValueError(
                f"step: {step:g} given; under this training networks are drawn at the steps of the forecast, "
                f"{self._steps}: name it in at_steps of predict_drift"
            )
        return self._values[int(step), name]

    def _squares(self, key: tuple[str, int], step: float) -> Tensor:
        """Squared norms; of those of some pairs, scaled to the exact mean square of all."""
        name, law = _name(*key), self._joint[key]
        drawn = self._at(step, name)
        if len(law.pairs) == len(law.weights):
            return drawn
        part, whole = (self._at(step, f"{name} {of}").mean() for of in ("of these", "of all"))
        return drawn * torch.where(part > 0, whole / torch.where(part > 0, part, 1.0), 0.0)

    def _drawn(self, z: Tensor, count: int, generator: torch.Generator) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """The values of some networks, ``{(step, name): (count,)}``."""
        frozen, modes = self._frozen, self._frozen.U.T @ z
        eta = {}
        for key, law in self._joint.items():
            root, explained = law.given_z(frozen)
            shape = count, frozen.outputs, len(root)
            u = torch.randn(shape, generator=generator, dtype=z.dtype, device=z.device)
            eta[key] = (u @ root.T + modes.mT @ explained.T).unflatten(
                2, (len(law.pairs), -1)
            )  # (S, n_L, pairs, modes)
        for step, at in frozen.walk(z, self._steps, full=True):
            moved = at.drift()
            p = moved.linear.mT[:, :, None]
            for key, law in self._joint.items():
                forms, name = law.some, _name(*key)
                value = moved.squares.flatten(1) @ forms.A.flatten(1).T + moved.q.flatten(1) @ forms.B.flatten(1).T
                entries = forms.scale * ((eta[key] * p).sum((1, 3)) + value)
                if name == "diagonal":
                    yield (step, name), entries[:, 0]
                    continue
                yield (step, name), entries.square() @ law.weights[law.pairs]
                mean, variance = self._given_z[name].moments(modes, moved)
                expected = law.weights * (mean.square() + variance)
                yield (step, f"{name} of all"), expected.sum(1).expand(count)
                yield (step, f"{name} of these"), expected[:, law.pairs].sum(1).expand(count)
                if name == "ntk":
                    everything = self._full.mean_squares(modes, moved) / frozen.outputs
                    yield (step, "beyond"), (everything - expected.sum(1)).expand(count)


def _name(observable: str, layer: int) -> str:
    """The name of a kernel as in ``named``."""
    names = {"output": "ntk", "diagonal": "diagonal", "activations": f"hidden {layer}", "ntk": f"hidden NTK {layer}"}
    return names[observable]
