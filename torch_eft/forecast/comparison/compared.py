"""One number at one step: measured, and as the theory has it, by order."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Compared:
    """One quantity at one step.

    Args:
        measured: Of this network; None where only the theory's own number is meant.
        order_0: At infinite width, or with this network's NTK frozen; None where nothing says it.
        order_1: With the first correction in 1/n; None where it is not derived or was not computed.
        sigma: One standard deviation over initializations, around the highest order there is.
        truncation: Estimated size of what the next order would add.
    """

    measured: float | None = None
    order_0: float | None = None
    order_1: float | None = None
    sigma: float | None = None
    truncation: float | None = None

    @property
    def theory(self) -> float | None:
        """The highest order there is."""
        return self.order_0 if self.order_1 is None else self.order_1


def component(value: Tensor, along: Tensor) -> Tensor:
    """<value, along> / |along|, 0-d; 0 where there is no direction.

    What a mean or a first order predicts is its direction and its size: noise of one network is in all directions, and
    would make a norm larger.
    """
    size = along.norm()
    return (value * along).sum() / size.clamp_min(1e-300 if along.dtype.itemsize == 8 else 1e-37)
