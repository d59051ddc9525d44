"""What the forecasts over closed and over drawn paths share: the joint law of probe pairs, and kernels from pairs."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from torch_eft.results.training import Training
from torch_eft.results.trajectory import Validity
from torch_eft.theory.gaussian.laws import EXCESS_KURTOSIS
from torch_eft.theory.hierarchy.drift.forms import AllForms, FormReader
from torch_eft.theory.hierarchy.drift.joint import JointForms
from torch_eft.theory.hierarchy.drift.law import DriftForms
from torch_eft.theory.hierarchy.drift.paths import DrawnTraining
from torch_eft.theory.hierarchy.drift.result import ContractedSize, DriftForecast, JointLaw, KernelDrift, NTKDrift
from torch_eft.theory.initialization.neuron.remarks import bias_kurtosis, counted_laws
from torch_eft.theory.training.infinite_width import FrozenTraining

Frozen = FrozenTraining | DrawnTraining
Moments = tuple[Tensor, Tensor]
"""Mean and variance of several drifts, (T, forms) each."""


class JointReader:
    """The joint law over pairs of probe points, read at the first call.

    Args:
        reader: Of the covariances.
        forms: Of single pairs.
        frozen: The training at infinite width.
        memory: Bytes allowed.
        points: Probe points whose pairs are drawn together, at most.

    Attributes:
        weights: Of the pairs, 1 on the diagonal and 2 beside it.
        points: The probe points that are drawn together.
    """

    def __init__(self, reader: FormReader, forms: AllForms, frozen: Frozen, memory: int, points: int) -> None:
        self._reader, self._forms, self._frozen, self._memory = reader, forms, frozen, memory
        probes, device = frozen.probes, frozen.K.device
        rows, columns = torch.triu_indices(probes, probes, device=device)
        self.weights = pair_weights(frozen)
        # Evenly spread, as data are often sorted.
        self.points = torch.linspace(0, probes - 1, min(points, probes), device=device).round().long()
        chosen = torch.isin(rows, self.points) & torch.isin(columns, self.points)
        self._pairs = chosen.nonzero()[:, 0]

    def directions(self, mean: Tensor) -> Tensor:
        """Matrices of norm 1 along ``mean`` (T, N_p, N_p), their entries for the pairs of probe points."""
        probes = self._frozen.probes
        if len(self.points) < probes:
            raise ValueError(
                f"joint_points: {len(self.points)} of {probes} probe points are drawn together; the component along "
                f"the mean takes all of them, give joint_points={probes}"
            )
        rows, columns = torch.triu_indices(probes, probes, device=mean.device)
        norms = mean.flatten(1).norm(dim=1)
        return mean[:, rows, columns] / torch.where(norms > 0, norms, 1.0)[:, None]

    @property
    def ntk(self) -> JointForms:
        """Of the NTK averaged over outputs."""
        return self.all["output", self._frozen.ensemble.depth]

    @functools.cached_property
    def all(self) -> dict[tuple[str, int], JointForms]:
        """By observable and layer.

        Raises:
            ValueError: If they do not fit into memory.
        """
        observables = 1 + len(self._forms.hidden) + len(self._forms.hidden_ntk)
        needed = 8 * (observables + 3) * (len(self._pairs) * len(self._frozen.eigenvalues)) ** 2
        if needed > self._memory:
            raise ValueError(
                f"joint_points: {len(self.points)} probe points and {len(self._frozen.x_train)} training points need "
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
        for (observable, layer, _), X in self._reader.joint(self.points).items():
            kernel = pairs[layer - 1].explicit((0,), (0,)) if observable == "activations" else Theta[layer - 1]
            norm = kernel[probes, probes].norm()
            found[observable, layer] = JointForms(forms[observable][layer], self.weights, self._pairs, X, norm)
        single, one = self._forms.diagonal, torch.ones_like(self.weights[:1])
        at = torch.zeros_like(self._pairs[:1])
        found["diagonal", frozen.ensemble.depth] = JointForms(single, one, at, single.X[None], one[0])
        return found


def pair_weights(frozen: Frozen) -> Tensor:
    """1 for pairs of a probe point with itself, 2 for others, which stand for two entries; (pairs,)."""
    rows, columns = torch.triu_indices(frozen.probes, frozen.probes, device=frozen.K.device)
    return torch.where(rows == columns, 1.0, 2.0).to(frozen.K)


def square(pairs: Tensor, probes: int) -> Tensor:
    """(T, pairs) as symmetric (T, N_p, N_p)."""
    rows, columns = torch.triu_indices(probes, probes, device=pairs.device)
    whole = pairs.new_zeros(len(pairs), probes, probes)
    whole[:, rows, columns] = pairs
    whole[:, columns, rows] = pairs
    return whole


def kernel_drift(reference: Tensor, moments: Moments, probes: int) -> KernelDrift:
    """The law of a kernel's drift from those of the pairs."""
    return KernelDrift(reference[:probes, :probes], *(square(part, probes) for part in moments))


def ntk_drift(frozen: Frozen, ntk: Moments, full: Tensor | None, diagonal: Moments) -> NTKDrift:
    """The law of the NTK's drift; ``full`` the mean square over all pairs of outputs, summed, (T,)."""
    kernel = kernel_drift(frozen.Theta, ntk, frozen.probes)
    norm = kernel.reference.norm() * frozen.outputs**0.5
    relative = None if full is None else full.sqrt() / norm
    mean, variance = (part[:, 0] for part in diagonal)
    return NTKDrift(kernel.reference, kernel.mean, kernel.variance, relative, mean, variance.sqrt())


def result(
    frozen: Frozen,
    training: Training,
    times: Tensor,
    ntk: NTKDrift,
    hidden: dict[int, Moments],
    hidden_ntk: dict[int, Moments],
    contracted: tuple[ContractedSize | None, ContractedSize | None],
    errors: dict[str, float],
    note: str,
    validity: Validity,
    joint: JointLaw,
    given: Callable[[Tensor], DriftForecast] | None = None,
    z: Tensor | None = None,
) -> DriftForecast:
    """The forecast."""
    _, Theta, pairs = frozen.layers
    probes = frozen.probes
    return DriftForecast(
        times,
        ntk,
        {i: kernel_drift(pairs[i - 1].explicit((0,), (0,)), moments, probes) for i, moments in hidden.items()},
        {i: kernel_drift(Theta[i - 1], moments, probes) for i, moments in hidden_ntk.items()},
        *contracted,
        errors,
        f"one network's drift at leading order in 1/n, n = {frozen.ensemble.widths[-2]}, {frozen.ensemble}; "
        f"{'; '.join([training.describe(), *_laws(frozen)])}{note}",
        validity,
        joint,
        given,
        z,
    )


def _laws(frozen: Frozen) -> list[str]:
    """How weights and biases that are not Gaussian enter, in words."""
    ensemble = frozen.ensemble
    sentences = list(counted_laws(ensemble, first_order=True))
    if EXCESS_KURTOSIS[ensemble.weight_law[-1]]:
        several = "the mean drift of one output and the covariance of the dNTK take"
        taken = "the covariance of the dNTK takes" if frozen.outputs == 1 else several
        sentences.append(f"{taken} the read-out's weights as Gaussian")
    if "orthogonal" in ensemble.weight_law:
        sentences.append("the covariance of the dNTK takes orthogonal weights as independent ones")
    if bias_kurtosis(ensemble, frozen.K):
        sentences.append("outputs at the start are taken as Gaussian, whatever the law of their bias")
    return sentences


def check_outputs(z: Tensor, frozen: Frozen) -> None:
    """Refuse outputs at initialization that are not those of the training inputs."""
    shape = len(frozen.x_train), frozen.outputs
    if tuple(z.shape) != shape or not bool(torch.isfinite(z).all()):
        raise ValueError(
            f"z: shape {tuple(z.shape)} given; the outputs on the training inputs are {shape} finite numbers"
        )


def rms(mean: Tensor, variance: Tensor, weights: Tensor) -> Tensor:
    """Root mean square of a norm, (T,)."""
    return ((mean.square() + variance) @ weights).sqrt()


def relative_errors(replicas: list[dict[str, Tensor]]) -> dict[str, float]:
    """Relative standard errors of what independent samples give, a number each; none for one."""
    if len(replicas) == 1:
        return {}
    errors = {}
    for name in replicas[0]:
        found = torch.stack([replica[name] for replica in replicas])
        errors[name] = float(found.std() / len(found) ** 0.5 / found.mean()) if bool(found.any()) else 0.0
    return errors


def named(forms: AllForms) -> dict[str, DriftForms]:
    """The kernels' forms by the names under which their errors are stated."""
    found = {"ntk": forms.ntk}
    found |= {f"hidden {layer}": form for layer, form in forms.hidden.items()}
    return found | {f"hidden NTK {layer}": form for layer, form in forms.hidden_ntk.items()}
