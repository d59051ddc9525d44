"""What Taylor models of order 1, 2 and 3 predict of a change, beside it: sizes, errors, and how far order 3 goes."""

import math

from torch import Tensor

from torch_eft.results.tags import MEASURED, TRUNCATION, tag

LIMIT = 0.3
"""|order 3 - order 2| / |order 3| above which nothing is drawn: beyond, order 3 was seen wrong by 0.3 to 1."""


def gauge_of(predicted: dict[int, Tensor]) -> float | None:
    """|order 3 - order 2| / |order 3|; infinite where the orders do not fall by half at least; None without order 3."""
    # Of orders that fall by a factor q each, what order 3 leaves out is q / (1 - q) times |order 3 - order 2|: inside
    # the band up to q = 1/2.
    if 3 not in predicted:
        return None
    size, last, before = (
        float(each.norm()) for each in (predicted[3], predicted[3] - predicted[2], predicted[2] - predicted[1])
    )
    if last == 0:
        return 0.0
    return last / size if size > 0 and last <= before / 2 else math.inf


def sizes(
    quantity: str, change: Tensor, predicted: dict[int, Tensor], scale: float, rounding: float
) -> dict[str, float]:
    """Sizes of the real and of the predicted changes and the band, and errors relative to the real one.

    Args:
        quantity: Its name.
        change: The real one.
        predicted: By order.
        scale: The unit of sizes.
        rounding: Relative error besides, by which the band is wider.

    Returns:
        ``{tag: value}``.
    """
    scalars: dict[str, float] = {}
    moved = float(change.norm())
    scalars[tag(quantity, MEASURED)] = moved / scale
    for order, value in predicted.items():
        scalars[tag(quantity, f"order_{order}")] = float(value.norm()) / scale
        if moved > 0:
            scalars[tag(f"{quantity}_error", f"order_{order}")] = float((value - change).norm()) / moved
    if 3 in predicted:
        size, rest = float(predicted[3].norm()), float((predicted[3] - predicted[2]).norm())
        rest += rounding * size
        band = (size - rest) / scale, (size + rest) / scale
        scalars |= {tag(quantity, series): value for series, value in zip(TRUNCATION, band, strict=True)}
    return scalars
