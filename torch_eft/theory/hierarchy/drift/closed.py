"""The forecast where the law over initializations is closed: the squared error on full batches."""

import functools

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
    rms,
)
from torch_eft.theory.hierarchy.drift.forms import AllForms
from torch_eft.theory.hierarchy.drift.joint import NetworkDraws
from torch_eft.theory.hierarchy.drift.law import DriftForms, ddntk, dntk, drift
from torch_eft.theory.hierarchy.drift.law import times as law_times
from torch_eft.theory.hierarchy.drift.result import ContractedSize, DriftForecast
from torch_eft.theory.training.corrections.validity import neuron_movement, training_validity
from torch_eft.theory.training.infinite_width import FrozenTraining


class ClosedLaw:
    """The law of what training changes, in closed form.

    Args:
        forms: The quadratic forms.
        replicas: Those of independent samples, for the error.
        joint: The joint law over pairs of probe points.
        frozen: The training at infinite width.
        training: As it was given.
        times: (T+1,).
    """

    def __init__(
        self,
        forms: AllForms,
        replicas: list[AllForms],
        joint: JointReader,
        frozen: FrozenTraining,
        training: Training,
        times: Tensor,
    ) -> None:
        self._forms, self._joint, self._frozen, self._training, self._times = forms, joint, frozen, training, times
        last = times.max().reshape(1)
        self._errors = relative_errors(
            [
                {name: rms(*form.moments(frozen, last), joint.weights)[0] for name, form in named(replica).items()}
                for replica in replicas
            ]
        )

    def forecast(self) -> DriftForecast:
        """The law over all initializations."""
        frozen, times, forms = self._frozen, self._times, self._forms
        full = forms.full.mean_squares(frozen, times) @ self._joint.weights
        ntk = ntk_drift(frozen, forms.ntk.moments(frozen, times), full, forms.diagonal.moments(frozen, times))
        moved = neuron_movement(frozen.ensemble, frozen.layers, frozen, times)
        sizes = {"rms |H(t) - H(0)| / |Theta|": float(ntk.relative_rms.max())}
        error = frozen.error_gram.trace()
        validity = training_validity(frozen.ensemble, frozen.x, frozen, sizes, float(moved.max()), error)
        return result(
            frozen,
            self._training,
            times,
            ntk,
            {layer: form.moments(frozen, times) for layer, form in forms.hidden.items()},
            {layer: form.moments(frozen, times) for layer, form in forms.hidden_ntk.items()},
            self._contracted(),
            self._errors,
            "",
            validity,
            self,
            functools.partial(self._given, validity),
        )

    def _contracted(self) -> tuple[ContractedSize, ContractedSize]:
        """Of the dNTK and of the ddNTK along the gradient."""
        frozen, times, weights = self._frozen, self._times, self._joint.weights
        g, _ = frozen.single(times)
        seen = frozen.coupling[: frozen.probes]
        errors = g[:, :, None] * frozen.error_gram * g[:, None, :]
        # ||J v||^2 / (N_p n_L)
        motion = (seen @ errors * seen).sum((1, 2)) / (frozen.probes * frozen.outputs)
        reference = frozen.Theta[: frozen.probes, : frozen.probes].norm()
        sizes = []
        for along, divisor in ((dntk, motion.sqrt() * reference), (ddntk, 2 * motion * reference)):
            averaged = rms(*self._forms.ntk.moments(frozen, times, along), weights)
            full = (self._forms.full.mean_squares(frozen, times, along) @ weights).sqrt()
            sizes.append(ContractedSize(averaged / divisor, full / divisor / frozen.outputs**0.5))
        return sizes[0], sizes[1]

    def _given(self, validity: Validity, z: Tensor) -> DriftForecast:
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
            self._errors,
            "",
            validity,
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
