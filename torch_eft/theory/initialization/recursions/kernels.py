"""Recursions of the preactivation and NTK statistics at order 1/n: V, A, B, D, F, and the corrections G1, Theta1.

PDLT 4.3 (V), 4.4 (G1) and 8.2-8.3 (NTK), for any number of inputs and any widths; r = n_l / n_{l-1}. Primed tensors
belong to layer l + 1 and multiply 1/n_l, unprimed ones to layer l and multiply 1/n_{l-1}. With DH = H - E[H],

    E[DH_{i1 i2;12} DH_{i3 i4;34}] = (1/n) [ d_12 d_34 A_(12)(34) + d_13 d_24 B_1324 + d_14 d_23 B_1423 ]
    E[z_{i1;1} z_{i2;2} DH_{i3 i4;34}] = (1/n) [ d_12 d_34 D_1234 + d_13 d_24 F_1324 + d_14 d_23 F_1423 ].

Of orthogonal weights (Haar), with zeta = n_in / max(n_in, n_out), fourth moments lack -zeta times products of two-label
ones in V, F and B; in the other vertices such terms are of order 1/n^2.
"""

from torch import Tensor

from torch_eft.theory.initialization.evaluator import Vertices
from torch_eft.theory.initialization.recursions.responses import (
    f_response,
    ntk_response,
    ntk_source,
    quartic_response,
    response,
)


def V(v: Vertices, layer: int, labels: str) -> Tensor:
    """V_(12)(34): connected four-point function of preactivations."""
    a, b, c, d = labels
    m = layer - 1
    joint = v.moment(m, (0, 0, 0, 0), labels) - v.M(m, 0, 0, a, b) * v.M(m, 0, 0, c, d)

    def first(i: str, j: str) -> Tensor:
        return response(v, m, 0, 0, c, d, lambda k, n: v.array("V", m, i + j + k + n))

    if v.haar_share(m):
        crossed = v.M(m, 0, 0, a, c) * v.M(m, 0, 0, b, d) + v.M(m, 0, 0, a, d) * v.M(m, 0, 0, b, c)
        joint = joint - v.haar_share(m) * crossed
    return v.C_W(m) ** 2 * (joint + v.width_ratio(m) * response(v, m, 0, 0, a, b, first))


def G1(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[z z] = delta (K + G1 / n_{l-1})."""
    m = layer - 1
    return v.width_ratio(m) * v.C_W(m) * mean_correction(v, m, 0, 0, *labels)


def mean_correction(v: Vertices, m: int, p: int, q: int, a: str, b: str) -> Tensor:
    """dM_pq(ab) = Rsp_pq[G1] + Qrt_pq[V]: M_pq at order 1/n."""
    return response(v, m, p, q, a, b, lambda i, j: v.array("G1", m, i + j)) + quartic_response(v, m, p, q, a, b)


def D(v: Vertices, layer: int, labels: str) -> Tensor:
    """D_1234: labels 1, 2 of preactivations, 3, 4 of the NTK."""
    a, b, c, d = labels
    m, C_W = layer - 1, v.C_W(layer - 1)
    joint = (
        v.lambda_W(m) * v.moment(m, (0, 0, 0, 0), labels)
        + C_W * v.Theta(m, c, d) * v.moment(m, (0, 0, 1, 1), labels)
        - v.M(m, 0, 0, a, b) * ntk_source(v, m, c, d)
    )

    def preactivations(i: str, j: str) -> Tensor:
        return ntk_response(v, m, c, d, lambda k, n: v.array("V", m, i + j + k + n))

    def kernel(i: str, j: str) -> Tensor:
        return v.array("D", m, i + j + c + d)

    propagated = response(v, m, 0, 0, a, b, preactivations)
    propagated = propagated + C_W * v.M(m, 1, 1, c, d) * response(v, m, 0, 0, a, b, kernel)
    return C_W * (joint + v.width_ratio(m) * propagated)


def F(v: Vertices, layer: int, labels: str) -> Tensor:
    """F_1324, labels in the order 1, 3, 2, 4: labels 1, 2 of preactivations, 3, 4 of the NTK."""
    one, three, two, four = labels
    m = layer - 1
    joint = v.moment(m, (0, 0, 1, 1), one + two + three + four) * v.Theta(m, three, four)
    if v.haar_share(m):
        crossed = v.M(m, 0, 0, one, two) * v.M(m, 1, 1, three, four) * v.Theta(m, three, four)
        joint = joint - v.haar_share(m) * crossed
    return v.C_W(m) ** 2 * (joint + v.width_ratio(m) * f_response(v, m, 1, 1, three, one, four, two))


def A(v: Vertices, layer: int, labels: str) -> Tensor:
    """A_(12)(34)."""
    a, b, c, d = labels
    m, C_W, lambda_W = layer - 1, v.C_W(layer - 1), v.lambda_W(layer - 1)
    T_12, T_34 = v.Theta(m, a, b), v.Theta(m, c, d)
    M_12, M_34 = v.M(m, 1, 1, a, b), v.M(m, 1, 1, c, d)
    joint = (
        lambda_W**2 * v.moment(m, (0, 0, 0, 0), labels)
        + lambda_W * C_W * T_34 * v.moment(m, (0, 0, 1, 1), labels)
        + lambda_W * C_W * T_12 * v.moment(m, (1, 1, 0, 0), labels)
        + C_W**2 * T_12 * T_34 * v.moment(m, (1, 1, 1, 1), labels)
        - ntk_source(v, m, a, b) * ntk_source(v, m, c, d)
    )

    def preactivations(i: str, j: str) -> Tensor:
        return ntk_response(v, m, c, d, lambda k, n: v.array("V", m, i + j + k + n))

    propagated = (
        C_W**2 * M_12 * M_34 * v.array("A", m, labels)
        + ntk_response(v, m, a, b, preactivations)
        + C_W * M_34 * ntk_response(v, m, a, b, lambda i, j: v.array("D", m, i + j + c + d))
        + C_W * M_12 * ntk_response(v, m, c, d, lambda i, j: v.array("D", m, i + j + a + b))
    )
    return joint + v.width_ratio(m) * propagated


def B(v: Vertices, layer: int, labels: str) -> Tensor:
    """B_1324, labels in the order 1, 3, 2, 4."""
    one, three, two, four = labels
    m = layer - 1
    joint = v.moment(m, (1, 1, 1, 1), labels)
    if v.haar_share(m):
        joint = joint - v.haar_share(m) * v.M(m, 1, 1, one, two) * v.M(m, 1, 1, three, four)
    joint = joint * v.Theta(m, one, two) * v.Theta(m, three, four)
    propagated = v.M(m, 1, 1, one, three) * v.M(m, 1, 1, two, four) * v.array("B", m, labels)
    return v.C_W(m) ** 2 * (joint + v.width_ratio(m) * propagated)


def Theta1(v: Vertices, layer: int, labels: str) -> Tensor:
    """E[H] = delta (Theta + Theta1 / n_{l-1})."""
    a, b = labels
    m, C_W = layer - 1, v.C_W(layer - 1)

    def joint(i: str, j: str) -> Tensor:
        pairings = v.array("D", m, i + j + a + b) + v.array("F", m, i + a + j + b) + v.array("F", m, j + a + i + b)
        return pairings + v.array("E_zzH", m, i + j + a + b) if v.excess_kurtosis(m - 1) else pairings

    slope = (
        v.M(m, 1, 1, a, b) * v.array("Theta1", m, labels)
        + v.Theta(m, a, b) * mean_correction(v, m, 1, 1, a, b)
        + response(v, m, 1, 1, a, b, joint)
    )
    return v.width_ratio(m) * (v.lambda_W(m) * mean_correction(v, m, 0, 0, a, b) + C_W * slope)
