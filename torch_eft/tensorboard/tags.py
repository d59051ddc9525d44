"""The names under which results are logged: ``eft/<quantity>/<series>``.

Series: ``measured``, ``theory``, and ``theory_minus_sigma`` / ``theory_plus_sigma``, the band of one
standard deviation over initialisations.
"""

import math
from collections.abc import Mapping

from torch_eft.comparison import Compared

PREFIX = "eft"
BAND = ("theory_minus_sigma", "theory_plus_sigma")

TITLES = {  # in the order in which they are drawn
    "output_projection": "Output along its predicted first direction",
    "output_chi_squared": "Output: squared deviation from theory / variance",
    "ntk_trace": "NTK: mean diagonal, (1/NC) sum H",
    "ntk_drift": "NTK drift: ||H - H_0|| / ||H_0||",
    "representation_change": "Hidden kernels: ||K - K_0|| / ||K_0||, mean over layers",
    "ntk_kernel_distance": "NTK: 1 - cos(H, H_0)",
    "ntk_top_eigenvalue": "NTK: largest eigenvalue",
    "representation_cka_distance": "Hidden kernels: 1 - CKA(K, K_0), mean over layers",
    "overhead_percent": "Time spent measuring, % of the training's own",
}


def tag(quantity: str, series: str) -> str:
    """``eft/<quantity>/<series>``."""
    return f"{PREFIX}/{quantity}/{series}"


def compared_quantities(history: Mapping[int, Mapping[str, float]]) -> list[str]:
    """The quantities of a history ``{step: {tag: value}}`` that have a theory beside them."""
    logged = {name for scalars in history.values() for name in scalars}
    return [quantity for quantity in TITLES if tag(quantity, "theory") in logged]


def compared_scalars(compared: dict[str, Compared]) -> dict[str, float]:
    """The scalars of a comparison, without what is not finite."""
    scalars = {}
    for quantity, values in compared.items():
        scalars[tag(quantity, "measured")] = values.measured
        scalars[tag(quantity, "theory")] = values.theory
        if values.sigma is not None:
            scalars[tag(quantity, BAND[0])] = values.theory - values.sigma
            scalars[tag(quantity, BAND[1])] = values.theory + values.sigma
    return {name: value for name, value in scalars.items() if math.isfinite(value)}
