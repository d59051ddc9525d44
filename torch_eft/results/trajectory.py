"""The one result type of every forecast and measurement of training, shared by theory, measurement and drawing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_eft.results.repr import short_repr

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
class Trajectory:
    """Outputs and NTK on N_p probe points with C outputs, at T+1 times; of a forecast, a shadow or a measured run.

    What is not known is None, never zero: a measured run without recorded NTKs has no ``ntk_mean``.

    Args:
        steps: (T+1,) optimizer steps; for gradient flow, flow time / learning rate.
        output_mean: (T+1, N_p, C), mean over initializations; of one network, its output.
        output_covariance: (T+1, N_p, N_p, C, C), ``[t, a, b, i, j] = Cov(z_{i;a}(t), z_{j;b}(t))``; 0 for one network.
        ntk_mean: (T+1, N_p, N_p, C, C), ``[t, a, b, i, j] = E H_{ij;ab}(t)``.
        ntk_drift: Same shape, ``ntk_mean`` minus its value at step 0.
        provenance: Which level and order of the theory, for which ensemble; or what was measured.
        validity: Where it holds.
        output_truncation: (T+1, N_p, C), the size of what the next order would add to the output, estimated; None where
            nothing estimates it.
        ntk_truncation: (T+1, N_p, N_p, C, C), the same for the NTK.
        train_output_mean: (T+1, N, C), as ``output_mean``, on the training points.
        output_error: (T+1, N_p, C), the standard error of ``output_mean`` where it is an average over networks.
        ntk_error: (T+1, N_p, N_p, C, C), that of ``ntk_mean``.
        ntk_drift_error: Same shape, that of ``ntk_drift``, in which the spread of the NTK at the start cancels.

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
    """

    steps: Tensor
    output_mean: Tensor
    output_covariance: Tensor | MaybeNone
    ntk_mean: Tensor | MaybeNone
    ntk_drift: Tensor | MaybeNone
    provenance: str
    validity: Validity
    output_truncation: Tensor | None = None
    ntk_truncation: Tensor | None = None
    train_output_mean: Tensor | None = None
    output_error: Tensor | None = None
    ntk_error: Tensor | None = None
    ntk_drift_error: Tensor | None = None

    def __repr__(self) -> str:
        return short_repr(self)


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
        ``ntk_drift`` without ``ntks``, and the drift if the first record is not at step 0.

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
        ntk_drift=None if H is None or steps[0] != 0 else H - H[0],
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
