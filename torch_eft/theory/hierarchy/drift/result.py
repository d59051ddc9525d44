"""The forecast of one network's drift."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from torch_eft.results.presentation.figures import label_steps, new_figure
from torch_eft.results.presentation.files import load_result
from torch_eft.results.presentation.result import Result
from torch_eft.results.presentation.tables import data_frame
from torch_eft.results.progress.bar import working
from torch_eft.results.trajectory import Validity

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class KernelDrift(Result):
    """The law of g(t) - g(0) of a kernel g on N_p probe points, over initializations.

    Args:
        reference: (N_p, N_p), g at infinite width.
        mean: (T+1, N_p, N_p).
        variance: (T+1, N_p, N_p), of every entry.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> drift = theory.KernelDrift(torch.eye(2), torch.zeros(3, 2, 2), 0.01 * torch.ones(3, 2, 2))
        >>> drift.relative_rms
        tensor([0.1414, 0.1414, 0.1414])
    """

    reference: Tensor
    mean: Tensor
    variance: Tensor

    def __str__(self) -> str:
        return f"{100 * float(self.relative_rms[-1]):.3g} % by the last step (rms over networks)"

    @property
    def relative_rms(self) -> Tensor:
        """Root mean square of ||g(t) - g(0)||_F over ||g||_F at infinite width, (T+1,)."""
        return (self.mean.square() + self.variance).sum((1, 2)).sqrt() / self.reference.norm()


@dataclass(frozen=True, repr=False)
class NTKDrift(KernelDrift):
    """The law of the drift of the NTK averaged over outputs, (1/n_L) sum_i H_ii.

    Args:
        relative_rms_full: (T+1,), root mean square over initializations of ||H(t) - H(0)||_F over ||H||_F at infinite
            width, of the NTK with all pairs of outputs; None in a conditional forecast.
        diagonal_mean: (T+1,), mean of the drift of the mean of the diagonal over probe points.
        diagonal_sd: (T+1,), its standard deviation.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> zero = torch.zeros(1)
        >>> theory.NTKDrift(torch.eye(1), zero[:, None, None], zero[:, None, None], zero, zero, zero)
        NTKDrift(
          reference: (1, 1) float32
          mean: (1, 1, 1) float32
          variance: (1, 1, 1) float32
          relative_rms_full: (1,) float32
          diagonal_mean: (1,) float32
          diagonal_sd: (1,) float32
        )
    """

    relative_rms_full: Tensor | None
    diagonal_mean: Tensor
    diagonal_sd: Tensor


@dataclass(frozen=True, repr=False)
class ContractedSize(Result):
    """The size of the dNTK or ddNTK along the training gradient v, as it is measured.

    Of the dNTK (||dH v + transpose|| / ||H||) / (||J v|| / sqrt(N_p n_L)), of the ddNTK
    (||ddI v v + transpose + 2 ddII v v|| / (2 ||H||)) / (||J v||^2 / (N_p n_L)): root mean squares over initializations
    of numerator and denominator, on the probe points; NaN where v vanishes, at the end of training.

    Args:
        rms: (T+1,), of the NTK averaged over outputs.
        rms_full: (T+1,), of all pairs of outputs.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> theory.ContractedSize(torch.ones(3), torch.ones(3))
        ContractedSize(
          rms: (3,) float32
          rms_full: (3,) float32
        )
    """

    rms: Tensor
    rms_full: Tensor

    def __str__(self) -> str:
        return f"up to {float(self.rms.nan_to_num().max()):.3g} (rms over networks)"


@dataclass(frozen=True, repr=False)
class DriftQuantiles(Result):
    """Quantiles over initializations, (T+1, Q) each.

    Args:
        ntk: Of ||H(t) - H(0)||_F over ||H||_F at infinite width, H averaged over outputs.
        ntk_full: The same with all pairs of outputs.
        diagonal: Of the drift of the mean of its diagonal over probe points.
        hidden: ``{l: ..}`` of the relative change of the kernel of layer l.
        hidden_ntk: ``{l: ..}`` of the layer's own NTK.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> theory.DriftQuantiles(*[torch.ones(3, 2)] * 3, {}, {}).ntk.shape
        torch.Size([3, 2])
    """

    ntk: Tensor
    ntk_full: Tensor
    diagonal: Tensor
    hidden: Mapping[int, Tensor]
    hidden_ntk: Mapping[int, Tensor]


class DrawnNetworks(Protocol):
    """Networks drawn from the law: ``NetworkDraws`` at any step, ``PathDraws`` at those of the forecast.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
        >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
        >>> networks = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=4).draws(100)
        >>> networks.diagonal_drift(step=4).shape
        torch.Size([100])
    """

    layers: list[int]

    def ntk_drift(self, step: float, *, full: bool = False) -> Tensor:
        """|H(t) - H(0)| / |H| with H at infinite width, (draws,); averaged over outputs, or ``full``."""
        ...

    def diagonal_drift(self, step: float) -> Tensor:
        """Drift of the mean of the NTK's diagonal, (draws,)."""
        ...

    def hidden_change(self, layer: int, step: float, *, ntk: bool = False) -> Tensor:
        """Relative change of the kernel of a hidden layer, or of its NTK, (draws,)."""
        ...


class _Unknown:
    """The joint law of a forecast that was read from a file, where only moments are."""

    def draws(self, num_draws: int, seed: int, z: Tensor | None) -> DrawnNetworks:
        raise ValueError(_FROM_FILE)

    def along_mean(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError(_FROM_FILE)


_FROM_FILE = (
    "forecast: read from a file, which holds means and variances but not the law that networks are drawn from; predict "
    "it again for draws, quantiles, along_mean and given"
)


class JointLaw(Protocol):
    """What knows the joint law over pairs of probe points, computed when first asked for."""

    def draws(self, num_draws: int, seed: int, z: Tensor | None) -> DrawnNetworks:
        """Draw networks, those with training outputs ``z`` or all."""
        ...

    def along_mean(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation along a mean drift (T+1, N_p, N_p)."""
        ...


@dataclass(frozen=True, repr=False)
class DriftForecast(Result):
    """What training will change in one network of an ensemble.

    Args:
        steps: (T+1,) optimizer steps; for gradient flow, flow time / learning rate.
        ntk: Of the NTK.
        hidden: ``{l: ..}`` of the kernel of activations (1/n_l) sum_j s(z_ja) s(z_jb), l = 1 .. L-1.
        hidden_ntk: ``{l: ..}`` of the layer's own NTK, the mean of its diagonal over neurons, l = 2 .. L-1.
        dntk: Size of the dNTK along the gradient at every step; None in a conditional forecast.
        ddntk: Likewise of the ddNTK.
        error: ``{"ntk": .., "hidden 1": ..}``: relative standard error of the largest ``relative_rms`` over time from
            sampled moments, and from draws of z(0) where the law is not closed; empty where nothing is sampled.
        provenance: Which theory, for which ensemble and training.
        validity: Where it holds.

    Example:
        >>> import torch
        >>> from torch_eft import theory
        >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
        >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
        >>> forecast = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=4)
        >>> forecast.steps.tolist(), sorted(forecast.hidden), sorted(forecast.hidden_ntk)
        ([0, 1, 2, 3, 4], [1, 2], [2])

    ``.plot()`` draws it, ``.to_pandas()`` has it as a table; ``.save(path)`` and ``DriftForecast.load(path)`` keep the
    moments.
    """

    steps: Tensor
    ntk: NTKDrift
    hidden: Mapping[int, KernelDrift]
    hidden_ntk: Mapping[int, KernelDrift]
    dntk: ContractedSize | None
    ddntk: ContractedSize | None
    error: Mapping[str, float]
    provenance: str
    validity: Validity
    _joint: JointLaw = field(repr=False)
    _given: "Callable[[Tensor], DriftForecast] | None" = field(default=None, repr=False)
    _z: Tensor | None = field(default=None, repr=False)

    def given(self, z: Tensor) -> "DriftForecast":
        """The forecast for the network at hand, by its outputs before training.

        The outputs are correlated with the dNTK and so determine part of the drift: about a tenth of its variance
        for tanh networks on a few inputs.

        Args:
            z: Outputs at initialization on the training inputs, (N, n_L).

        Returns:
            Mean and variance over the networks of the ensemble with these outputs.

        Raises:
            ValueError: If the shape does not fit, values are not finite, or this is such a forecast already.

        Example:
            >>> import torch
            >>> from torch_eft import theory
            >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
            >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
            >>> forecast = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=4)
            >>> bool((forecast.given(y).ntk.mean == 0).all())  # no error, no drift
            True
        """
        if self._given is None and isinstance(self._joint, _Unknown):
            raise ValueError(_FROM_FILE)
        if self._given is None:
            raise ValueError("z: this forecast is conditional on outputs already; call given() of predict_drift's")
        return self._given(z)

    def draws(self, num_draws: int = 2048, *, seed: int = 0) -> DrawnNetworks:
        """Draw networks from the law, of all initializations or of those that ``given`` asks for.

        The joint law over pairs of probe points takes the dNTK's covariance at four of ``joint_points`` points, N^2
        entries each, read at the first call: ten seconds for eight points and sixteen training points. Negative
        eigenvalues that sampling leaves in it are set to 0.

        Args:
            num_draws: Networks drawn.
            seed: Seed; the global random state is left alone.

        Returns:
            The networks: what any of them does at any step; at any of the forecast's, where it has draws of z(0).

        Raises:
            ValueError: If the joint law does not fit into memory.

        Example:
            >>> import torch
            >>> from torch_eft import theory
            >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
            >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
            >>> forecast = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=4)
            >>> networks = forecast.draws(100)
            >>> networks.ntk_drift(step=4).shape, networks.hidden_change(layer=1, step=2).shape
            (torch.Size([100]), torch.Size([100]))
        """
        with working("drawing networks from the law of the drift"):
            return self._joint.draws(num_draws, seed, self._z)

    def quantiles(self, q: Tensor, *, num_draws: int = 2048, seed: int = 0) -> DriftQuantiles:
        """Quantiles over initializations of relative changes and of the mean diagonal, by ``draws``.

        Args:
            q: (Q,), probabilities in [0, 1].
            num_draws: Networks drawn; the standard error of the quantile q is sqrt(q (1 - q) / num_draws) over the
                density there.
            seed: Seed; the global random state is left alone.

        Returns:
            The quantiles, (T+1, Q) each; of a conditional forecast, over the networks with the given outputs.

        Raises:
            ValueError: If the joint law does not fit into memory.

        Example:
            >>> import torch
            >>> from torch_eft import theory
            >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
            >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
            >>> forecast = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=4)
            >>> forecast.quantiles(torch.tensor([0.05, 0.95])).ntk.shape
            torch.Size([5, 2])
        """
        networks = self.draws(num_draws, seed=seed)

        def over(values: Callable[[float], Tensor]) -> Tensor:
            drawn = [values(step) for step in self.steps.tolist()]
            return torch.stack([torch.quantile(value, q.to(value), dim=0) for value in drawn])

        def of_layer(layer: int, ntk: bool) -> Tensor:
            return over(lambda step: networks.hidden_change(layer, step, ntk=ntk))

        return DriftQuantiles(
            over(networks.ntk_drift),
            over(lambda step: networks.ntk_drift(step, full=True)),
            over(networks.diagonal_drift),
            {layer: of_layer(layer, False) for layer in self.hidden},
            {layer: of_layer(layer, True) for layer in self.hidden_ntk},
        )

    def along_mean(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the component of the NTK's drift along its mean, in units of the NTK.

        It takes the joint law over pairs of probe points, as ``quantiles`` does.

        Returns:
            (T+1,) each; 0 where the mean vanishes.

        Raises:
            ValueError: As in ``draws``; if this is a conditional forecast; if not all probe points are drawn together.

        Example:
            >>> import torch
            >>> from torch_eft import theory
            >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
            >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
            >>> forecast = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=4)
            >>> mean, sd = forecast.along_mean()
            >>> torch.allclose(mean, forecast.ntk.mean.flatten(1).norm(dim=1))
            True
        """
        if self._z is not None:
            raise ValueError("forecast: along_mean is of the law over all initializations; ask predict_drift's")
        return self._joint.along_mean(self.ntk.mean)

    def plot(self, *, bands: bool = False) -> "Figure":
        """Draw root mean squares over initializations of the relative changes, of the NTK and of hidden kernels.

        Args:
            bands: True to shade where 90 % of networks lie; it takes the joint law, as ``quantiles`` does.

        Returns:
            The figure: a notebook shows it, ``.savefig("picture.png")`` keeps it.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: With ``bands``, as in ``draws``.

        Example:
            >>> import torch
            >>> from torch_eft import theory
            >>> x, y = torch.eye(2, 3), torch.ones(2, 1)
            >>> ensemble = theory.MLPEnsemble([3, 64, 64, 1], "linear")
            >>> forecast = theory.predict_drift(ensemble, x, y, x, learning_rate=0.1, steps=4)
            >>> forecast.plot().axes[0].get_title()
            'relative change, rms over networks'
        """
        drawing, (axes,) = new_figure()
        steps = self.steps.cpu().numpy()
        found = self.quantiles(torch.tensor([0.05, 0.95], dtype=torch.float64)) if bands else None
        lines = [("NTK", self.ntk.relative_rms, None if found is None else found.ntk)]
        for layer, drift in sorted(self.hidden.items()):
            shaded = None if found is None else found.hidden[layer]
            lines.append((f"hidden kernel {layer}", drift.relative_rms, shaded))
        for label, rms, shaded in lines:
            (line,) = axes.plot(steps, rms.detach().cpu().numpy(), lw=2.5, label=label)
            if shaded is not None:
                low, high = shaded.detach().cpu().numpy().T
                axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
        label_steps(axes, "relative change, rms over networks")
        axes.legend(fontsize=11, frameon=False)
        return drawing

    def to_pandas(self) -> "DataFrame":
        """Return a table with a row for every step.

        Returns:
            Columns ``ntk_drift`` (root mean square of ||H - H_0|| over ||H||, averaged over outputs),
            ``ntk_drift_full`` (all pairs of outputs), ``ntk_diagonal_mean``, ``ntk_diagonal_sd``, ``hidden_1``, ...,
            ``hidden_ntk_2``, ..., ``dntk`` and ``ddntk``, as far as they are known.

        Raises:
            ImportError: If pandas is missing.
        """
        columns: dict[str, Tensor | None] = {
            "ntk_drift": self.ntk.relative_rms,
            "ntk_drift_full": self.ntk.relative_rms_full,
            "ntk_diagonal_mean": self.ntk.diagonal_mean,
            "ntk_diagonal_sd": self.ntk.diagonal_sd,
            **{f"hidden_{layer}": drift.relative_rms for layer, drift in sorted(self.hidden.items())},
            **{f"hidden_ntk_{layer}": drift.relative_rms for layer, drift in sorted(self.hidden_ntk.items())},
            "dntk": None if self.dntk is None else self.dntk.rms,
            "ddntk": None if self.ddntk is None else self.ddntk.rms,
        }
        known = {name: value.detach().cpu().tolist() for name, value in columns.items() if value is not None}
        return data_frame(known, {"step": self.steps.tolist()})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "DriftForecast":
        """Read what ``save`` wrote: the moments, not the law that networks are drawn from.

        Args:
            path: The file.
            device: Where the tensors go.

        Returns:
            The forecast, whose ``draws``, ``quantiles``, ``along_mean`` and ``given`` ask to predict it again.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is none of ours, is damaged, holds another kind of result, or is of a later version.
        """
        return load_result(cls, path, device, _joint=_Unknown())
