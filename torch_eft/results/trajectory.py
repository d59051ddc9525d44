"""The one result type of every forecast and measurement of training, shared by theory, measurement and drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_eft.results.presentation.figures import label_steps, new_figure
from torch_eft.results.presentation.result import Result
from torch_eft.results.presentation.tables import data_frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

MaybeNone: TypeAlias = Any
"""In ``Tensor | MaybeNone``: every forecast knows this, so that its readers need not ask; a measurement may not."""


@dataclass(frozen=True, init=False)
class Validity:
    """A judgment of how far a number can be trusted: a flag, the reasons, and the numbers that decided.

    Args:
        flag: ``"valid"``, ``"caution"`` (corrections of order one in some quantities) or
            ``"invalid"`` (outside the regime or outside the derivation).
        reasons: Sentences: what decided it, with its size, and what would make it better; one string is one reason.
        numbers: ``{name: value}`` of what decided it, to be read by programs.

    Example:
        >>> from torch_eft import Validity
        >>> validity = Validity("caution", "r = L/n = 0.3: corrections are of order one", {"aspect_ratio": 0.3})
        >>> validity.flag, validity.numbers["aspect_ratio"]
        ('caution', 0.3)
        >>> print(validity)
        caution: r = L/n = 0.3: corrections are of order one
    """

    flag: Literal["valid", "caution", "invalid"]
    reasons: tuple[str, ...]
    numbers: Mapping[str, float] = field(compare=False)

    def __init__(
        self,
        flag: Literal["valid", "caution", "invalid"],
        reasons: str | Sequence[str],
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        object.__setattr__(self, "flag", flag)
        object.__setattr__(self, "reasons", (reasons,) if isinstance(reasons, str) else tuple(reasons))
        object.__setattr__(self, "numbers", dict(numbers or {}))

    @property
    def reason(self) -> str:
        """The reasons as one text."""
        return "; ".join(self.reasons)

    def __str__(self) -> str:
        return f"{self.flag}: {self.reason}"


@dataclass(frozen=True, repr=False)
class Trajectory(Result):
    """Outputs and NTK on N_p probe points with C outputs, at T+1 times; of a forecast, a shadow or a measured run.

    What is not known is None, never zero: a measured run without recorded NTKs has no ``ntk_mean``.

    Args:
        steps: (T+1,) optimizer steps; for gradient flow, flow time / learning rate.
        output_mean: (T+1, N_p, C), mean over initializations; of one network, its output.
        output_covariance: (T+1, N_p, N_p, C, C), ``[t, a, b, i, j] = Cov(z_{i;a}(t), z_{j;b}(t))``; 0 for one network.
        ntk_mean: (T+1, N_p, N_p, C, C), ``[t, a, b, i, j] = E H_{ij;ab}(t)``.
        ntk_change: Same shape, ``ntk_mean`` minus its value at step 0.
        provenance: Which level and order of the theory, for which ensemble; or what was measured.
        validity: Where it holds.
        output_truncation: (T+1, N_p, C), the size of what the next order would add to the output, estimated; None where
            nothing estimates it.
        ntk_truncation: (T+1, N_p, N_p, C, C), the same for the NTK.
        train_output_mean: (T+1, N, C), as ``output_mean``, on the training points.
        output_error: (T+1, N_p, C), the standard error of ``output_mean`` where it is an average over networks.
        ntk_error: (T+1, N_p, N_p, C, C), that of ``ntk_mean``.
        ntk_change_error: Same shape, that of ``ntk_change``, in which the spread of the NTK at the start cancels.

    Example:
        >>> import torch
        >>> from torch_eft import Trajectory, Validity
        >>> Trajectory(torch.arange(3), torch.zeros(3, 2, 1), None, None, None, "zeros", Validity("valid", "exact"))
        Trajectory(
          steps: (3,) int64
          output_mean: (3, 2, 1) float32
          provenance: zeros
          validity: valid: exact
        )

    ``.plot()`` draws one output and the drift of the NTK, ``.to_pandas()`` has all outputs as a table, ``.save(path)``
    and ``Trajectory.load(path)`` keep it.
    """

    steps: Tensor
    output_mean: Tensor
    output_covariance: Tensor | MaybeNone
    ntk_mean: Tensor | MaybeNone
    ntk_change: Tensor | MaybeNone
    provenance: str
    validity: Validity
    output_truncation: Tensor | None = None
    ntk_truncation: Tensor | None = None
    train_output_mean: Tensor | None = None
    output_error: Tensor | None = None
    ntk_error: Tensor | None = None
    ntk_change_error: Tensor | None = None

    def plot(
        self,
        *,
        point: int = 0,
        output: int = 0,
        label: str = "this",
        beside: "Mapping[str, Trajectory] | None" = None,
    ) -> "Figure":
        """Draw one output, and the relative drift of the mean NTK, over the steps.

        Args:
            point: Index of the probe point, 0 .. N_p - 1.
            output: Index of its output, 0 .. C - 1.
            label: What the legend calls it.
            beside: ``{label: trajectory}`` of others, such as what was measured.

        Returns:
            The figure: a notebook shows it, ``.savefig("picture.png")`` keeps it.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If there is no such point or output.

        Example:
            >>> import torch
            >>> import torch_eft as eft
            >>> model, x, y = torch.nn.Linear(3, 2), torch.eye(3), torch.ones(3, 2)
            >>> forecast = eft.predict_from_network(model, x, y, x[:2], learning_rate=0.1, steps=5)
            >>> [axes.get_title() for axes in forecast.plot(label="forecast").axes]
            ['output 0 at probe point 0', 'NTK drift']
        """
        return trajectory_figure({label: self, **(beside or {})}, point, output)

    def to_pandas(self) -> "DataFrame":
        """Return a table with one row for every step, probe point and output.

        Returns:
            Columns ``output_mean``; ``output_sd`` over initializations; ``output_truncation``, ``output_error``,
            ``ntk_mean`` and ``ntk_change`` (of the same point and output, H_ii;aa), as far as they are known.

        Raises:
            ImportError: If pandas is missing.
        """
        T, points, C = self.output_mean.shape

        def diagonal(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.diagonal(dim1=1, dim2=2).diagonal(dim1=1, dim2=2)

        covariance = diagonal(self.output_covariance)
        columns = {
            "output_mean": self.output_mean,
            "output_sd": None if covariance is None else covariance.clamp_min(0).sqrt(),
            "output_truncation": self.output_truncation,
            "output_error": self.output_error,
            "ntk_mean": diagonal(self.ntk_mean),
            "ntk_change": diagonal(self.ntk_change),
        }
        known = {
            name: value.detach().cpu().reshape(-1).tolist() for name, value in columns.items() if value is not None
        }
        places = torch.cartesian_prod(torch.arange(T), torch.arange(points), torch.arange(C)).reshape(-1, 3)
        step = self.steps.cpu()[places[:, 0]].tolist()
        return data_frame(known, {"step": step, "point": places[:, 1].tolist(), "output": places[:, 2].tolist()})


def trajectory_from_records(
    steps: Sequence[int],
    outputs: Sequence[Tensor],
    provenance: str,
    validity: Validity,
    ntks: Sequence[Tensor] | None = None,
    train_outputs: Sequence[Tensor] | None = None,
) -> Trajectory:
    """Return the trajectory of one network from what was recorded while it trained.

    Args:
        steps: Increasing optimizer steps, one per record.
        outputs: (N_p, C) each, on the probe points.
        provenance: A sentence that says what was recorded.
        validity: Where it holds.
        ntks: (N_p, N_p, C, C) each, as ``measure.ntk`` gives them; None if there are none.
        train_outputs: (N, C) each, on the training points; likewise.

    Returns:
        A ``Trajectory`` whose covariance is None, as that of one run is not known; so are ``ntk_mean`` and
        ``ntk_change`` without ``ntks``, and the drift if the first record is not at step 0.

    Raises:
        ValueError: If there is no record, steps do not increase, or shapes or numbers of records do not agree.

    Example:
        >>> import torch
        >>> from torch_eft import Validity, trajectory_from_records
        >>> outputs = [torch.zeros(2, 1), torch.ones(2, 1)]
        >>> trajectory_from_records([0, 5], outputs, "one run", Validity("valid", "measured")).output_mean.shape
        torch.Size([2, 2, 1])
    """
    if not steps or any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"steps: {list(steps)} given; give at least one record, at increasing steps")
    z = _stacked("outputs", outputs, len(steps), 2)
    H = None if ntks is None else _stacked("ntks", ntks, len(steps), 4)
    points, C = z.shape[1:]
    if H is not None and tuple(H.shape[1:]) != (points, points, C, C):
        raise ValueError(f"ntks: {tuple(H.shape[1:])} given; outputs ask for {(points, points, C, C)}")
    trained = None if train_outputs is None else _stacked("train_outputs", train_outputs, len(steps), 2)
    return Trajectory(
        steps=torch.tensor(list(steps), device=z.device),
        output_mean=z,
        output_covariance=None,
        ntk_mean=H,
        ntk_change=None if H is None or steps[0] != 0 else H - H[0],
        provenance=provenance,
        validity=validity,
        train_output_mean=trained,
    )


def _stacked(name: str, records: Sequence[Tensor], count: int, axes: int) -> Tensor:
    shapes = {tuple(record.shape) for record in records}
    if len(records) != count or len(shapes) != 1 or any(len(shape) != axes for shape in shapes):
        raise ValueError(
            f"{name}: {len(records)} records of shapes {sorted(shapes)} given for {count} steps; give one per step, "
            f"all of the same shape, with {axes} axes"
        )
    return torch.stack([record.detach() for record in records])


def trajectory_figure(trajectories: Mapping[str, Trajectory], point: int = 0, output: int = 0) -> "Figure":
    """Draw forecasts and measured runs on each other: one output, and the relative drift of the NTK.

    Args:
        trajectories: ``{label: trajectory}``, drawn in this order; bands are one standard deviation over
            initializations.
        point: Index of the probe point, 0 .. N_p - 1.
        output: Index of its output, 0 .. C - 1.

    Returns:
        Two panels: z_{output; point}(t), and ||H(t) - H(0)||_F / ||H(0)||_F where it is known; of ensembles that of the
        mean NTK, which moves less than most networks' own.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no trajectory, or one has no such point or output.

    Example:
        >>> import torch
        >>> from torch_eft import Validity, trajectory_from_records
        >>> from torch_eft.tensorboard import trajectory_figure
        >>> outputs = [torch.zeros(3, 2), torch.ones(3, 2)]
        >>> run = trajectory_from_records([0, 10], outputs, "a run", Validity("valid", "measured"))
        >>> [axes.get_title() for axes in trajectory_figure({"measured": run}).axes]
        ['output 0 at probe point 0', 'NTK drift']
    """
    if not isinstance(trajectories, Mapping) or not trajectories:
        given = "none" if isinstance(trajectories, Mapping) else type(trajectories).__name__
        raise ValueError(f"trajectories: {given} given; give {{label: trajectory}} with at least one")
    for label, trajectory in trajectories.items():
        points, count = trajectory.output_mean.shape[1:]
        if not (0 <= point < points and 0 <= output < count):
            raise ValueError(f"point: {point}, output: {output} given; {label!r} has {points} points, {count} outputs")
    drawing, (outputs, drifts) = new_figure(2)
    for label, trajectory in trajectories.items():
        steps = trajectory.steps.cpu().numpy()
        mean = trajectory.output_mean[:, point, output].detach().double().cpu()
        (line,) = outputs.plot(steps, mean.numpy(), lw=2.5, label=label)
        if trajectory.output_covariance is not None:
            variance = trajectory.output_covariance[:, point, point, output, output].detach().double().cpu()
            sigma = variance.clamp_min(0).sqrt()
            if bool(sigma.any()):
                outputs.fill_between(
                    steps, (mean - sigma).numpy(), (mean + sigma).numpy(), color=line.get_color(), alpha=0.2, lw=0
                )
        if trajectory.ntk_change is not None and trajectory.ntk_mean is not None:
            drift, start = trajectory.ntk_change.flatten(1).double(), trajectory.ntk_mean[0].double()
            drifts.plot(steps, (drift.norm(dim=1) / start.norm()).cpu().numpy(), lw=2.5, color=line.get_color())
    label_steps(outputs, f"output {output} at probe point {point}")
    ensembles = [one for one in trajectories.values() if one.output_covariance is not None]
    of_means = any(bool(one.output_covariance.any()) for one in ensembles)
    label_steps(drifts, "drift of the mean NTK" if of_means else "NTK drift")
    outputs.legend(fontsize=13, frameon=False)
    return drawing
