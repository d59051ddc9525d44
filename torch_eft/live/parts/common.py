"""Comparisons as scalars."""

import math
from collections.abc import Mapping

from torch_eft.forecast.comparison.compared import Compared
from torch_eft.results.tags import BAND, MEASURED, tag


def compared_scalars(compared: Mapping[str, Compared]) -> dict[str, float]:
    """``{tag: value}`` of comparisons, ``{quantity: Compared}``, without what is not finite."""
    scalars: dict[str, float] = {}
    for quantity, values in compared.items():
        theory, sigma = values.theory, values.sigma
        series = {
            MEASURED: values.measured,
            "order_0": values.order_0,
            "order_1": values.order_1,
            "truncation": values.truncation,
        }
        if theory is not None and sigma is not None:
            series |= {BAND[0]: theory - sigma, BAND[1]: theory + sigma}
        scalars |= {
            tag(quantity, name): value for name, value in series.items() if value is not None and math.isfinite(value)
        }
    return scalars
