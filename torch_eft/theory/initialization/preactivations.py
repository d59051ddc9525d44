"""Recursions of the preactivation statistics at order 1/n: the four-point vertex V and the correction G1 of K.

PDLT 4.3 (V) and 4.4 (G1), for any number of inputs and any widths; r = n_l / n_{l-1}. Primed tensors belong to layer
l + 1 and multiply 1/n_l, unprimed ones to layer l and multiply 1/n_{l-1}.
"""

from torch import Tensor

from torch_eft.theory.initialization.evaluator import Vertices
from torch_eft.theory.initialization.responses import quartic_response, response


def V(v: Vertices, layer: int, letters: str) -> Tensor:
    """V_(12)(34): connected four-point function of preactivations."""
    a, b, c, d = letters
    m = layer - 1
    joint = v.four(m, (0, 0, 0, 0), letters) - v.M(m, 0, 0, a, b) * v.M(m, 0, 0, c, d)

    def first(i: str, j: str) -> Tensor:
        return response(v, m, 0, 0, c, d, lambda k, n: v.array("V", m, i + j + k + n))

    return v.C_W(m) ** 2 * (joint + v.width_ratio(m) * response(v, m, 0, 0, a, b, first))


def G1(v: Vertices, layer: int, letters: str) -> Tensor:
    """E[z z] = delta (K + G1 / n_{l-1})."""
    m = layer - 1
    return v.width_ratio(m) * v.C_W(m) * mean_correction(v, m, 0, 0, *letters)


def mean_correction(v: Vertices, m: int, p: int, q: int, a: str, b: str) -> Tensor:
    """dM_pq(ab) = Rsp_pq[G1] + Qrt_pq[V]: M_pq at order 1/n."""
    return response(v, m, p, q, a, b, lambda i, j: v.array("G1", m, i + j)) + quartic_response(v, m, p, q, a, b)
