"""The average of many networks' trajectories, forecast or measured: mean, band and standard errors.

Means and second moments are accumulated one trajectory after another (Welford 1962; Chan, Golub & LeVeque 1983), so
that memory does not grow with the number of networks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_eft.results.trajectory import Trajectory, Validity

_LEVELS = ("valid", "caution", "invalid")
_FIELDS = ("output_mean", "ntk_mean", "ntk_change", "output_truncation", "ntk_truncation", "train_output_mean")


@dataclass(frozen=True)
class Share:
    """Counts of the verdicts on single networks.

    Args:
        counts: ``{flag: number of networks}``.
        worst: The verdict on the worst network: of the worst flag, the one that moves furthest beyond its forecast.
    """

    counts: dict[str, int]
    worst: Validity

    @property
    def networks(self) -> int:
        """Number of networks."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        parts = [f"{self.counts['invalid']} of {self.networks} networks outside"]
        if self.counts["caution"]:
            parts.append(f"{self.counts['caution']} to be read with caution")
        return ", ".join(parts) + f"; the worst: {self.worst.reason}"


def average_trajectories(trajectories: Iterable[Trajectory], provenance: str) -> Trajectory:
    """Average trajectories of networks drawn independently from one distribution, with their band.

    Args:
        trajectories: Each of one network, with the same steps and points; at least 2. They may come one by one.
        provenance: A description of the networks; their number is added.

    Returns:
        A ``Trajectory``: ``output_covariance`` is the unbiased covariance between networks; ``output_error``,
        ``ntk_error`` and ``ntk_change_error`` are standard errors of means; truncations are means of the networks'
        sizes, which bound that of the mean. A field that one network lacks is None. The verdict is the worst on a
        network, unless fewer than half are "invalid" and the average's own next order is below order 0: then
        "caution". Its reasons give the share.

    Raises:
        TypeError: If one is no ``Trajectory``.
        ValueError: If there are fewer than two, or they differ in steps or shapes.

    Example:
        >>> import torch
        >>> from torch_eft import Validity, average_trajectories, trajectory_from_records
        >>> def run(size):
        ...     outputs = [torch.zeros(1, 1), torch.full((1, 1), size)]
        ...     return trajectory_from_records([0, 1], outputs, "one run", Validity("valid", "measured"))
        >>> average = average_trajectories([run(1.0), run(3.0)], "two runs")
        >>> float(average.output_mean[1]), float(average.output_covariance[1]), float(average.output_error[1])
        (2.0, 2.0, 1.0)
    """
    averages = Averages()
    for trajectory in trajectories:
        averages.add(trajectory)
    return averages.trajectory(provenance)


class Averages:
    """The running average behind ``average_trajectories``."""

    def __init__(self) -> None:
        self._count = 0
        self._means: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._missing: set[str] = set()
        self._products: Tensor | None = None
        self._counts = dict.fromkeys(_LEVELS, 0)
        self._worst: tuple[int, float, Validity] | None = None

    def add(self, trajectory: Trajectory) -> None:
        """Take in one network.

        Raises:
            TypeError: If it is no trajectory.
            ValueError: If it differs in steps or shapes from the first.
        """
        if not isinstance(trajectory, Trajectory):
            raise TypeError(
                f"trajectories: {type(trajectory).__name__} given; give Trajectory objects, which forecasts and "
                "trajectory_from_records return"
            )
        if self._count == 0:
            self._steps = trajectory.steps
        elif not torch.equal(self._steps, trajectory.steps):
            raise ValueError(f"trajectories: number {self._count} is at other steps than the first; use the same")
        self._count += 1
        for name in _FIELDS:
            value = getattr(trajectory, name)
            if value is None:
                self._missing.add(name)
            elif name not in self._missing:
                self._take(name, value)
        self._counts[trajectory.validity.flag] += 1
        judged = (_LEVELS.index(trajectory.validity.flag), relative_truncation(trajectory), trajectory.validity)
        if self._worst is None or judged[:2] > self._worst[:2]:
            self._worst = judged

    def _take(self, name: str, value: Tensor) -> None:
        value = value.double()
        if name not in self._means:
            self._means[name] = torch.zeros_like(value, memory_format=torch.contiguous_format)
            self._squares[name] = torch.zeros_like(self._means[name])
        mean = self._means[name]
        if value.shape != mean.shape:
            raise ValueError(
                f"trajectories: {name} of number {self._count - 1} is {tuple(value.shape)}, of the first "
                f"{tuple(mean.shape)}; use the same points"
            )
        before = value - mean
        mean += before / self._count
        self._squares[name] += before * (value - mean)
        if name == "output_mean":
            product = torch.einsum("tai,tbj->tabij", before, value - mean)
            self._products = product if self._products is None else self._products + product

    def trajectory(self, provenance: str) -> Trajectory:
        """The average so far, as ``average_trajectories`` returns it."""
        if self._count < 2 or self._products is None or self._worst is None:
            raise ValueError(f"trajectories: {self._count} given; an average with its error needs at least 2 networks")
        found = {name: None if name in self._missing else self._means.get(name) for name in _FIELDS}
        errors = {
            name: None
            if found[name] is None
            else (self._squares[name] / ((self._count - 1) * self._count)).clamp_min(0).sqrt()
            for name in ("output_mean", "ntk_mean", "ntk_change")
        }
        z = self._means["output_mean"]
        average = Trajectory(
            steps=self._steps,
            output_mean=z,
            output_covariance=self._products / (self._count - 1),
            ntk_mean=found["ntk_mean"],
            ntk_change=found["ntk_change"],
            provenance=f"mean over {self._count} networks: {provenance}",
            validity=self._worst[2],
            output_truncation=found["output_truncation"],
            ntk_truncation=found["ntk_truncation"],
            train_output_mean=found["train_output_mean"],
            output_error=errors["output_mean"],
            ntk_error=errors["ntk_mean"],
            ntk_change_error=errors["ntk_change"],
        )
        return _judged(average, Share(self._counts, self._worst[2]))


def relative_truncation(trajectory: Trajectory) -> float:
    """Return the largest next order, of the output over its motion or of the NTK over itself; NaN counts as inf.

    It is 0 where no truncation is known.
    """
    z, H = trajectory.output_mean, trajectory.ntk_mean
    sizes = [0.0]
    if trajectory.output_truncation is not None:
        moved = float((z - z[0]).square().mean((1, 2)).sqrt().max())
        largest = float(trajectory.output_truncation.square().mean((1, 2)).sqrt().max())
        sizes.append(largest / moved if moved > 0 else 0.0)
    if trajectory.ntk_truncation is not None and H is not None:
        scale = float(H[0].square().mean().sqrt())
        largest = float(trajectory.ntk_truncation.flatten(1).square().mean(1).sqrt().max())
        sizes.append(largest / scale if scale > 0 else 0.0)
    return max(size if size == size else float("inf") for size in sizes)


def _judged(average: Trajectory, share: Share) -> Trajectory:
    """Return the average with its verdict."""
    size = relative_truncation(average)
    outside = share.counts["invalid"]
    flag = share.worst.flag
    if flag == "invalid" and 2 * outside < share.networks and size < 1:
        flag = "caution"
    reasons = [str(share)]
    if average.output_truncation is not None:
        next_order = f"the next order of the average is about {100 * size:.2g} % of order 0, within a factor of a few"
        reasons.insert(0, next_order)
    numbers = {"relative_truncation": size, "invalid_networks": float(outside), "networks": float(share.networks)}
    return replace(average, validity=Validity(flag, [*reasons, _errors(average)], numbers))


def _errors(average: Trajectory) -> str:
    """Describe the standard errors: the rms at the last time, relative to what moved."""
    z, H, D = average.output_mean, average.ntk_mean, average.ntk_change
    parts = []
    if average.output_error is not None:
        moved = float((z[-1] - z[0]).norm())
        error = float(average.output_error[-1].norm())
        parts.append(f"mean output {error / moved:.2g} of its change" if moved > 0 else f"mean output {error:.2g}")
    if average.ntk_change_error is not None and D is not None and H is not None and len(H) > 1:
        parts.append(f"NTK drift {float(average.ntk_change_error[-1].norm() / H[0].norm()):.2g} of the NTK")
    return "standard errors: " + ", ".join(parts)
