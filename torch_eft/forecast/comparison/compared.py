"""One number at one step: measured, and predicted by order or by its law over seeds."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Compared:
    """One quantity at one step.

    Args:
        measured: The value of this network; None where only the theory has one.
        order_0: At infinite width, or with this network's NTK frozen; None where it is not predicted.
        order_1: With the first correction in 1/n; None where it is not derived or was not computed.
        sigma: One standard deviation over initializations, around the highest order available.
        truncation: Estimated size of what the next order would add.
    """

    measured: float | None = None
    order_0: float | None = None
    order_1: float | None = None
    sigma: float | None = None
    truncation: float | None = None

    @property
    def theory(self) -> float | None:
        """The prediction of the highest order available."""
        return self.order_0 if self.order_1 is None else self.order_1


@dataclass(frozen=True)
class Banded:
    """One quantity at one step, measured, and its law over seeds; infinite width has 0.

    Args:
        measured: The value of this network.
        median: Over seeds.
        band_68: Quantiles 0.16 and 0.84 over seeds; None, as all that follow, where they were found not to hold.
        band_90: Quantiles 0.05 and 0.95 over seeds.
        quantile: Share of seeds below the measured value.
        given: Median over the seeds that start with this network's outputs.
        given_90: Quantiles 0.05 and 0.95 over those.
    """

    measured: float
    median: float
    band_68: tuple[float, float] | None = None
    band_90: tuple[float, float] | None = None
    quantile: float | None = None
    given: float | None = None
    given_90: tuple[float, float] | None = None


def component(value: Tensor, along: Tensor) -> Tensor:
    """Compute <value, along> / |along|, 0-d; 0 if ``along`` vanishes.

    A mean or a first order predicts a direction and a size. The noise of one network points in all directions, and
    would only increase a norm.

    Args:
        value: Any tensor.
        along: The direction, of the same shape.

    Returns:
        The component of ``value``.
    """
    size = along.norm()
    return (value * along).sum() / size.clamp_min(1e-300 if along.dtype.itemsize == 8 else 1e-37)
