"""The names under which results are logged: ``eft/<quantity>/<series>``.

Series: ``measured``, ``theory``, and ``theory_minus_sigma`` / ``theory_plus_sigma``, the band of one
standard deviation over initialisations.
"""

import math

from torch_eft.comparison import Compared

PREFIX = "eft"
BAND = ("theory_minus_sigma", "theory_plus_sigma")

TITLES = {
    "ntk_drift": "NTK drift  ||H - H_0|| / ||H_0||",
    "ntk_kernel_distance": "NTK kernel distance  1 - cos(H, H_0)",
    "ntk_top_eigenvalue": "NTK largest eigenvalue",
    "ntk_trace": "NTK mean diagonal  (1/NC) sum H",
    "output_chi_squared": "Output: mean squared deviation from theory, in units of its variance",
    "output_projection": "Output along the predicted first direction",
    "representation_change": "Hidden kernels: relative change, mean over layers",
    "representation_cka_distance": "Hidden kernels: 1 - CKA to theta_0, mean over layers",
    "overhead_percent": "Time spent measuring, % of the training itself",
    "overhead_seconds": "Time spent measuring, s",
}


def tag(quantity: str, series: str) -> str:
    """``eft/<quantity>/<series>``."""
    return f"{PREFIX}/{quantity}/{series}"


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
