"""Forecast of what training changes in one network: the drift of its NTK and of its hidden layers, with their spread.

The mean drift is of order 1/n (``training``, ``hidden_layers``), and one network's drift fluctuates by as much: by the
covariance of its dNTK (``initialization``), which makes the law closed (``law``). Measured against trained ensembles
(tanh; one to three hidden layers; one, two and ten outputs): mean squares tend to the forecast as 1/n, from 5 to 25 %
below it at n = 64.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_eft.results.progress.bar import working
from torch_eft.results.training import Training, as_training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.ensemble import MLPEnsemble
from torch_eft.theory.hierarchy.drift.forms import AllForms, FormReader, mean_forms
from torch_eft.theory.hierarchy.drift.joint import JointForms, NetworkDraws
from torch_eft.theory.hierarchy.drift.law import DriftForms, ddntk, dntk, drift
from torch_eft.theory.hierarchy.drift.law import times as law_times
from torch_eft.theory.hierarchy.drift.result import (
    ContractedSize,
    DriftForecast,
    JointLaw,
    KernelDrift,
    NTKDrift,
)
from torch_eft.theory.initialization.estimators import check_statistics
from torch_eft.theory.initialization.evaluator import FLUCTUATIONS
from torch_eft.theory.initialization.vertex_tiles import VertexTiles
from torch_eft.theory.training.corrections.validity import neuron_movement, training_validity
from torch_eft.theory.training.infinite_width import FrozenTraining

_STORED = 20
"""Float64 matrices over modes for every pair of probe points, beside those of hidden layers."""


def predict_drift(
    ensemble: MLPEnsemble,
    x_train: Tensor,
    y_train: Tensor,
    x_probe: Tensor,
    training: Training | None = None,
    *,
    learning_rate: float | None = None,
    steps: float | None = None,
    at_steps: Sequence[float] | None = None,
    hidden_ntk: bool = True,
    num_samples: int = 4096,
    num_replicas: int = 2,
    joint_points: int = 8,
    seed: int = 0,
    memory: int = 2 * 2**30,
    **keywords: Any,
) -> DriftForecast:
    """Predict how far training will move the NTK and the hidden layers of one network, before it is trained.

    Mean and variance over initializations at leading order, 1/n and 1/n^2, in closed form, for gradient descent with
    momentum (heavy ball or Nesterov) and any schedule and for gradient flow, on full batches of the squared error. The
    cost grows as N_p^2 N^2 times the sample size, and does not grow with any width nor with n_L.

    Args:
        ensemble: The ensemble; its activation smooth.
        x_train: Training inputs, (N, n_0).
        y_train: Targets, (N, n_L).
        x_probe: Probe inputs, (N_p, n_0).
        training: The training; None builds it from the keywords.
        learning_rate: eta > 0, multiplying the learning-rate tensor of the ensemble.
        steps: Number T of optimizer steps.
        at_steps: The steps to return; None means 0, 1, .. T.
        hidden_ntk: True for the NTKs of hidden layers, too.
        num_samples: Sample size in all, for more than four inputs; its error falls as 1/sqrt(num_samples).
        num_replicas: Independent samples it is shared by, at least 2, to estimate the error.
        joint_points: Probe points whose pairs are drawn together by ``quantiles`` and ``draws``, spread evenly over the
            probe; the cost grows as their number to the power 4. Norms over more points are those over these, scaled
            to the exact mean square.
        seed: Seed; the global random state is left alone.
        memory: Bytes allowed for arrays over two probe and two training inputs, which are tiled to fit, and for the
            result's matrices of N^2 entries for every pair of probe inputs.
        **keywords: Further fields of a ``torch_eft.Training``.

    Returns:
        The forecast, float64.

    Raises:
        ValueError: If shapes or steps do not fit, the activation has a kink, r >= 1, the training is not of this kind
            or beyond the stability bound, or the points do not fit into ``memory``.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
        >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
        >>> forecast = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=20)
        >>> forecast.ntk.mean.shape, bool(forecast.ntk.relative_rms[-1] > forecast.ntk.relative_rms[1] > 0)
        (torch.Size([21, 2, 2]), True)
    """
    training = as_training(training, learning_rate=learning_rate, steps=steps, **keywords)
    if training.loss != "mse" or not training.is_full_batch:
        raise ValueError(
            f"training: {training} given; the law of one network's drift is closed for the squared error on full "
            "batches. Give such a training, or train a few seeds and look at their spread"
        )
    if num_replicas < 2:
        raise ValueError(f"num_replicas: {num_replicas} given; at least 2 are needed to estimate the error")
    if joint_points < 1:
        raise ValueError(f"joint_points: {joint_points} given; at least 1 point is needed for the law of a norm")
    if ensemble.activation.kinked:
        raise ValueError(
            f"activation: {ensemble.activation.name} has a kink; its dNTK contains delta functions whose covariance "
            "diverges, and the drift has no expansion in 1/n. Use a smooth activation, e.g. gelu"
        )
    frozen = FrozenTraining(ensemble, x_train, y_train, x_probe, training)
    check_statistics(ensemble, frozen.x, FLUCTUATIONS, "autograd", check_validity=True)
    _check_memory(frozen, memory, hidden_ntk, num_replicas)
    times = training.times(at_steps, frozen.x.device)
    vertices = VertexTiles(ensemble, frozen.layers, num_samples, num_replicas, seed)
    reader = FormReader(vertices, frozen, hidden_ntk, memory)
    with working("predicting the drift"):
        replicas = reader.replicas()
    forms = mean_forms(replicas)
    joint = _Joint(reader, forms, frozen, times, memory, joint_points)
    return _Forecast(frozen, training, times, joint).over_seeds(forms, _errors(replicas, frozen, times))


class _Joint:
    """The joint law over pairs of probe points, read at the first call.

    Args:
        reader: Of the covariances.
        forms: Of single pairs.
        frozen: The training at infinite width.
        times: (T+1,).
        memory: Bytes allowed.
        points: Probe points whose pairs are drawn together, at most.
    """

    def __init__(
        self,
        reader: FormReader,
        forms: AllForms,
        frozen: FrozenTraining,
        times: Tensor,
        memory: int,
        points: int,
    ) -> None:
        self._reader, self._forms, self._frozen, self._times, self._memory = reader, forms, frozen, times, memory
        probes, device = frozen.probes, frozen.K.device
        rows, columns = torch.triu_indices(probes, probes, device=device)
        self._weights = torch.where(rows == columns, 1.0, 2.0).to(frozen.K)
        # Evenly spread, as data are often sorted.
        self._points = torch.linspace(0, probes - 1, min(points, probes), device=device).round().long()
        chosen = torch.isin(rows, self._points) & torch.isin(columns, self._points)
        self._pairs = chosen.nonzero()[:, 0]

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
        return NetworkDraws(self._all, self._forms.full, frozen, z, seed)

    def along_mean(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the component along ``mean``, (T+1,) each."""
        probes = self._frozen.probes
        if len(self._points) < probes:
            raise ValueError(
                f"joint_points: {len(self._points)} of {probes} probe points are drawn together; the component along "
                f"the mean takes all of them, give joint_points={probes}"
            )
        rows, columns = torch.triu_indices(probes, probes, device=mean.device)
        norms = mean.flatten(1).norm(dim=1)
        directions = mean[:, rows, columns] / torch.where(norms > 0, norms, 1.0)[:, None]
        joint = self._all["output", self._frozen.ensemble.depth]
        along, variance = joint.along(self._frozen, self._times, directions)
        return along, variance.sqrt()

    @functools.cached_property
    def _all(self) -> dict[tuple[str, int], JointForms]:
        observables = 1 + len(self._forms.hidden) + len(self._forms.hidden_ntk)
        needed = 8 * (observables + 3) * (len(self._pairs) * len(self._frozen.eigenvalues)) ** 2
        if needed > self._memory:
            raise ValueError(
                f"joint_points: {len(self._points)} probe points and {len(self._frozen.x_train)} training points need "
                f"about {needed / 2**30:.1f} GiB for the joint law of all pairs, memory allows "
                f"{self._memory / 2**30:.1f} GiB; give fewer points, or more memory to predict_drift"
            )
        frozen = self._frozen
        probes, (_, Theta, pairs) = slice(frozen.probes), frozen.layers
        forms: dict[str, dict[int, DriftForms]] = {
            "output": {frozen.ensemble.depth: self._forms.ntk},
            "activations": self._forms.hidden,
            "ntk": self._forms.hidden_ntk,
        }
        found = {}
        for (observable, layer, _), X in self._reader.joint(self._points).items():
            kernel = pairs[layer - 1].explicit((0,), (0,)) if observable == "activations" else Theta[layer - 1]
            norm = kernel[probes, probes].norm()
            found[observable, layer] = JointForms(forms[observable][layer], self._weights, self._pairs, X, norm)
        single, one = self._forms.diagonal, torch.ones_like(self._weights[:1])
        at = torch.zeros_like(self._pairs[:1])
        found["diagonal", frozen.ensemble.depth] = JointForms(single, one, at, single.X[None], one[0])
        return found


class _Forecast:
    """Puts results together.

    Args:
        frozen: The training at infinite width.
        training: As it was given.
        times: (T+1,).
        joint: The joint law over pairs of probe points.
    """

    def __init__(self, frozen: FrozenTraining, training: Training, times: Tensor, joint: JointLaw) -> None:
        self._frozen, self._training, self._times, self._joint = frozen, training, times, joint

    def over_seeds(self, forms: AllForms, errors: dict[str, float]) -> DriftForecast:
        """The law over all initializations."""
        frozen, times = self._frozen, self._times
        ntk = self._kernel(forms.ntk, frozen.Theta)
        full = self._square(forms.full.mean_squares(frozen, times)).sum((1, 2)).sqrt()
        mean, variance = (part[:, 0] for part in forms.diagonal.moments(frozen, times))
        norm = ntk.reference.norm() * frozen.outputs**0.5
        ntk = NTKDrift(ntk.reference, ntk.mean, ntk.variance, full / norm, mean, variance.sqrt())
        moved = neuron_movement(frozen.ensemble, frozen.layers, frozen, times)
        sizes = {"rms |H(t) - H(0)| / |Theta|": float(ntk.relative_rms.max())}
        validity = training_validity(frozen.ensemble, frozen.x, frozen, sizes, float(moved.max()))
        return self._result(
            forms,
            ntk,
            self._kernel,
            errors,
            validity,
            contracted=self._contracted(forms),
            given=functools.partial(self.given, forms, errors, validity),
        )

    def _contracted(self, forms: AllForms) -> tuple[ContractedSize, ContractedSize]:
        """Of the dNTK and of the ddNTK along the gradient."""
        frozen, times = self._frozen, self._times
        g, _ = frozen.single(times)
        seen = frozen.coupling[: frozen.probes]
        errors = g[:, :, None] * frozen.error_gram * g[:, None, :]
        # ||J v||^2 / (N_p n_L)
        motion = (seen @ errors * seen).sum((1, 2)) / (frozen.probes * frozen.outputs)
        reference = frozen.Theta[: frozen.probes, : frozen.probes].norm()

        def relative(squares: Tensor, divisor: Tensor) -> Tensor:
            return self._square(squares).sum((1, 2)).sqrt() / divisor

        sizes = []
        for along, divisor in ((dntk, motion.sqrt() * reference), (ddntk, 2 * motion * reference)):
            mean, variance = forms.ntk.moments(frozen, times, along)
            full = forms.full.mean_squares(frozen, times, along)
            averaged = relative(mean.square() + variance, divisor)
            sizes.append(ContractedSize(averaged, relative(full, divisor) / frozen.outputs**0.5))
        return sizes[0], sizes[1]

    def given(self, forms: AllForms, errors: dict[str, float], validity: Validity, z: Tensor) -> DriftForecast:
        """The law over the networks with outputs ``z`` on the training inputs."""
        frozen, times = self._frozen, self._times
        if tuple(z.shape) != tuple(frozen.y_train.shape) or not bool(torch.isfinite(z).all()):
            raise ValueError(
                f"z: shape {tuple(z.shape)} given; the outputs on the training inputs are {tuple(frozen.y_train.shape)}"
                " finite numbers"
            )
        modes = (frozen.U.T @ z.to(frozen.K))[None]

        def moments(form: DriftForms) -> tuple[Tensor, Tensor]:
            mean, variance = form.conditional_moments(frozen, law_times(frozen, times, drift), modes)
            return mean[:, 0], variance[:, 0]

        def kernel(form: DriftForms, reference: Tensor) -> KernelDrift:
            return self._kernel(form, reference, moments(form))

        ntk = kernel(forms.ntk, frozen.Theta)
        mean, variance = (part[:, 0] for part in moments(forms.diagonal))
        ntk = NTKDrift(ntk.reference, ntk.mean, ntk.variance, None, mean, variance.sqrt())
        return self._result(forms, ntk, kernel, errors, validity, z=z)

    def _kernel(self, form: DriftForms, reference: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> KernelDrift:
        mean, variance = form.moments(self._frozen, self._times) if moments is None else moments
        probes = self._frozen.probes
        return KernelDrift(reference[:probes, :probes], self._square(mean), self._square(variance))

    def _square(self, pairs: Tensor) -> Tensor:
        """(T, pairs) as symmetric (T, N_p, N_p)."""
        probes = self._frozen.probes
        rows, columns = torch.triu_indices(probes, probes, device=pairs.device)
        square = pairs.new_zeros(len(pairs), probes, probes)
        square[:, rows, columns] = pairs
        square[:, columns, rows] = pairs
        return square

    def _result(
        self,
        forms: AllForms,
        ntk: NTKDrift,
        kernel: Callable[[DriftForms, Tensor], KernelDrift],
        errors: dict[str, float],
        validity: Validity,
        contracted: tuple[ContractedSize | None, ContractedSize | None] = (None, None),
        given: Callable[[Tensor], DriftForecast] | None = None,
        z: Tensor | None = None,
    ) -> DriftForecast:
        frozen = self._frozen
        _, Theta, pairs = frozen.layers
        return DriftForecast(
            self._times,
            ntk,
            {layer: kernel(form, pairs[layer - 1].explicit((0,), (0,))) for layer, form in forms.hidden.items()},
            {layer: kernel(form, Theta[layer - 1]) for layer, form in forms.hidden_ntk.items()},
            *contracted,
            errors,
            f"one network's drift at leading order in 1/n, n = {frozen.ensemble.widths[-2]}, {frozen.ensemble}; "
            f"{self._training.describe()}",
            validity,
            self._joint,
            given,
            z,
        )


def _errors(replicas: list[AllForms], frozen: FrozenTraining, times: Tensor) -> dict[str, float]:
    """Relative standard errors of the rms drift at the last time, from independent samples."""
    if len(replicas) == 1:
        return {}
    last = times.max().reshape(1)
    rows, columns = torch.triu_indices(frozen.probes, frozen.probes, device=frozen.K.device)
    twice = torch.where(rows == columns, 1.0, 2.0).double()

    def error(forms: list[DriftForms]) -> float:
        rms = []
        for form in forms:
            mean, variance = form.moments(frozen, last)
            rms.append(((mean.square() + variance)[0] @ twice).sqrt())
        found = torch.stack(rms)
        return float(found.std() / len(found) ** 0.5 / found.mean()) if bool(found.any()) else 0.0

    errors = {"ntk": error([replica.ntk for replica in replicas])}
    errors |= {
        f"hidden {layer}": error([replica.hidden[layer] for replica in replicas]) for layer in replicas[0].hidden
    }
    for layer in replicas[0].hidden_ntk:
        errors[f"hidden NTK {layer}"] = error([replica.hidden_ntk[layer] for replica in replicas])
    return errors


def _check_memory(frozen: FrozenTraining, memory: int, hidden_ntk: bool, num_replicas: int) -> None:
    """Refuse what does not fit: matrices over modes for every pair of probe points."""
    layers = (frozen.ensemble.depth - 1) * (8 if hidden_ntk else 4)
    pairs = frozen.probes * (frozen.probes + 1) // 2
    needed = 8 * (_STORED + layers) * (1 + num_replicas) * pairs * len(frozen.x_train) ** 2
    if needed > memory:
        raise ValueError(
            f"x_train: {len(frozen.x_train)} points and {frozen.probes} probe points need about "
            f"{needed / 2**30:.1f} GiB, memory allows {memory / 2**30:.1f} GiB; give fewer points or more memory"
        )
