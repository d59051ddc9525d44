"""The forecast where the law over initializations is closed: the squared error on full batches."""

import torch
from torch import Tensor

from torch_eft.results.training import Training
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
from torch_eft.theory.hierarchy.drift.joint import NetworkDraws
from torch_eft.theory.hierarchy.drift.law import DriftForms, ddntk, dntk, drift
from torch_eft.theory.hierarchy.drift.law import times as law_times
from torch_eft.theory.hierarchy.drift.result import ContractedSize, DriftForecast, NTKDrift
from torch_eft.theory.training.corrections.validity import neuron_movement, training_validity
from torch_eft.theory.training.infinite_width import FrozenTraining


class ClosedMoments:
    """Means and variances of the closed law, block by block of pairs of probe points, whose forms need not be kept.

    Args:
        frozen: The training at infinite width.
        times: (T+1,).
        weights: Of the pairs, 1 on the diagonal and 2 beside it.
    """

    def __init__(self, frozen: FrozenTraining, times: Tensor, weights: Tensor) -> None:
        self._frozen, self._times, self._weights = frozen, times, weights
        self._kernels: dict[str, Moments] = {}
        self._squares: list[dict[str, Tensor]] = []
        self._norms: dict[tuple[str, bool], Tensor] = {}
        self._diagonal: DriftForms | None = None

    def add(self, places: Tensor, forms: AllForms, replicas: list[AllForms]) -> None:
        """Add some pairs: their places among all, their forms, and those of single samples, for the error."""
        frozen, times, weights = self._frozen, self._times, self._weights[places]
        shape = len(times), len(self._weights)
        for name, form in named(forms).items():
            whole = self._kernels.setdefault(name, (weights.new_zeros(shape), weights.new_zeros(shape)))
            for part, value in zip(whole, form.moments(frozen, times), strict=True):
                part[:, places] = value
        for motion in (drift, dntk, ddntk):
            mean, variance = forms.ntk.moments(frozen, times, motion)
            averaged = (mean.square() + variance) @ weights
            for full, value in ((False, averaged), (True, forms.full.mean_squares(frozen, times, motion) @ weights)):
                key = motion.__name__, full
                self._norms[key] = self._norms.get(key, 0.0) + value
        last = times.max().reshape(1)
        for number, replica in enumerate(replicas):
            if number == len(self._squares):
                self._squares.append({})
            for name, form in named(replica).items():
                mean, variance = form.moments(frozen, last)
                square = ((mean.square() + variance) @ weights)[0]
                self._squares[number][name] = self._squares[number].get(name, 0.0) + square
        self._diagonal = forms.diagonal if self._diagonal is None else self._diagonal + forms.diagonal

    def __contains__(self, name: str) -> bool:
        return name in self._kernels

    def kernel(self, name: str) -> Moments:
        """Mean and variance of every pair, (T, pairs) each."""
        return self._kernels[name]

    def errors(self) -> dict[str, float]:
        """Relative standard errors of the rms at the last time."""
        return relative_errors([{name: value.sqrt() for name, value in part.items()} for part in self._squares])

    def ntk(self) -> NTKDrift:
        """Of the NTK."""
        assert self._diagonal is not None
        diagonal = self._diagonal.moments(self._frozen, self._times)
        return ntk_drift(self._frozen, self.kernel("ntk"), self._norms["drift", True], diagonal)

    def contracted(self) -> tuple[ContractedSize, ContractedSize]:
        """Of the dNTK and of the ddNTK along the gradient."""
        frozen = self._frozen
        g, _ = frozen.single(self._times)
        seen = frozen.coupling[: frozen.probes]
        errors = g[:, :, None] * frozen.error_gram * g[:, None, :]
        # ||J v||^2 / (N_p n_L)
        motion = (seen @ errors * seen).sum((1, 2)) / (frozen.probes * frozen.outputs)
        reference = frozen.Theta[: frozen.probes, : frozen.probes].norm()
        sizes = []
        for name, divisor in (("dntk", motion.sqrt() * reference), ("ddntk", 2 * motion * reference)):
            averaged, full = (self._norms[name, full].sqrt() / divisor for full in (False, True))
            sizes.append(ContractedSize(averaged, full / frozen.outputs**0.5))
        return sizes[0], sizes[1]


class MomentsOnly:
    """The law where its forms were not kept: there is nothing to draw from.

    Args:
        reason: Why, and what to do.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def draws(self, num_draws: int, seed: int, z: Tensor | None) -> NetworkDraws:
        """Refused."""
        raise ValueError(self._reason)

    def along_mean(self, mean: Tensor) -> Moments:
        """Refused."""
        raise ValueError(self._reason)

    def given(self, z: Tensor) -> DriftForecast:
        """Refused."""
        raise ValueError(self._reason)


def closed_forecast(
    moments: ClosedMoments,
    frozen: FrozenTraining,
    training: Training,
    times: Tensor,
    law: "ClosedLaw | MomentsOnly",
) -> DriftForecast:
    """Put together the forecast over all initializations.

    Args:
        moments: Means and variances.
        frozen: The training at infinite width.
        training: As it was given.
        times: (T+1,).
        law: What draws networks.

    Returns:
        The forecast.
    """
    ntk, layers = moments.ntk(), range(1, frozen.ensemble.depth)
    moved = neuron_movement(frozen.ensemble, frozen.layers, frozen, times)
    sizes = {"rms |H(t) - H(0)| / |Theta|": float(ntk.relative_rms.max())}
    error = frozen.error_gram.trace()
    validity = training_validity(frozen.ensemble, frozen.x, frozen, sizes, float(moved.max()), error)
    if isinstance(law, ClosedLaw):
        law.errors, law.validity = moments.errors(), validity
    return result(
        frozen,
        training,
        times,
        ntk,
        {layer: moments.kernel(name) for layer in layers if (name := f"hidden {layer}") in moments},
        {layer: moments.kernel(name) for layer in layers if (name := f"hidden NTK {layer}") in moments},
        moments.contracted(),
        moments.errors(),
        "",
        validity,
        law,
        law.given,
    )


class ClosedLaw:
    """The law of what training changes, in closed form.

    Args:
        forms: The quadratic forms.
        joint: The joint law over pairs of probe points.
        frozen: The training at infinite width.
        training: As it was given.
        times: (T+1,).

    Attributes:
        errors: Of the forecast.
        validity: Likewise.
    """

    errors: dict[str, float]
    validity: Validity

    def __init__(
        self, forms: AllForms, joint: JointReader, frozen: FrozenTraining, training: Training, times: Tensor
    ) -> None:
        self._forms, self._joint, self._frozen, self._training, self._times = forms, joint, frozen, training, times

    def given(self, z: Tensor) -> DriftForecast:
        """The law over the networks with outputs ``z`` on the training inputs."""
        frozen, times, forms = self._frozen, self._times, self._forms
        check_outputs(z, frozen)
        modes = (frozen.U.T @ z.to(frozen.K))[None]

        def moments(form: DriftForms) -> Moments:
            mean, variance = form.conditional_moments(frozen, law_times(frozen, times, drift), modes)
            return mean[:, 0], variance[:, 0]

        return result(
            frozen,
            self._training,
            times,
            ntk_drift(frozen, moments(forms.ntk), None, moments(forms.diagonal)),
            {layer: moments(form) for layer, form in forms.hidden.items()},
            {layer: moments(form) for layer, form in forms.hidden_ntk.items()},
            (None, None),
            self.errors,
            "",
            self.validity,
            self,
            z=z,
        )

    def draws(self, num_draws: int, seed: int, z: Tensor | None) -> NetworkDraws:
        """Draw networks, those with training outputs ``z`` or all."""
        frozen = self._frozen
        if z is None:
            values, vectors = torch.linalg.eigh(frozen.K[frozen.train][:, frozen.train])
            root = vectors * values.clamp_min(0.0).sqrt()
            generator = torch.Generator(root.device).manual_seed(seed + 1)
            shape = (num_draws, len(root), frozen.outputs)
            z = root @ torch.randn(shape, generator=generator, dtype=root.dtype, device=root.device)
        else:
            z = z.to(frozen.K).expand(num_draws, *z.shape)
        return NetworkDraws(self._joint.all, self._forms.full, frozen, z, seed)

    def along_mean(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the component along ``mean``, (T+1,) each."""
        directions = self._joint.directions(mean)
        along, variance = self._joint.ntk.along(self._frozen, self._times, directions)
        return along, variance.sqrt()
