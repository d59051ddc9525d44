"""Recursions of the dNTK (P, Q) and ddNTK (R, S, T, U) statistics at leading order, 1/n.

PDLT 11.2-11.3 and chapter infinity (the ddNTK), for any number of inputs and any widths; conventions as in
``kernels``, index structure:

    E[dH_{i0 i1 i2;012} z_{i3;3}] = (1/n) [ d_03 d_12 P_0123 + d_01 d_23 Q_0123 + d_02 d_13 Q_0213 ]
    E[ddI_{i0 i1 i2 i3;0123}]     = (1/n) [ d_01 d_23 R_0123 + d_02 d_31 R_0231 + d_03 d_12 R_0312 ]
    E[ddII_{i1 i2 i3 i4;1234}]    = (1/n) [ d_12 d_34 S_1234 + d_13 d_24 T_1324 + d_14 d_23 U_1423 ].

``v.curved`` is false for a scale-invariant activation whose kink automatic differentiation does not see: every term
with an explicit sigma'' (one that multiplies H's in the network's derivatives) is then absent. The second derivatives
inside responses are derivatives of Gaussian expectations, and stay.
"""

from torch import Tensor

from torch_eft.theory.initialization.evaluator import Vertices
from torch_eft.theory.initialization.recursions.responses import f_response, vertex_response


def P(v: Vertices, layer: int, labels: str) -> Tensor:
    """P_0123."""
    if not v.curved:
        return v.zero()
    a, b, c, d = labels
    m = layer - 1
    joint = v.moment(m, (2, 1, 1, 0), labels) * v.Theta(m, a, b) * v.Theta(m, a, c)
    inner = vertex_response(v, m, 1, a, d, v.array("P", m, a + b + c + a), v.array("P", m, labels))
    propagated = v.M(m, 1, 1, b, c) * (v.M(m, 2, 0, a, d) * v.array("B", m, a + a + b + c) + inner)
    return v.C_W(m) ** 2 * (joint + v.width_ratio(m) * propagated)


def Q(v: Vertices, layer: int, labels: str) -> Tensor:
    """Q_0123."""
    a, b, c, d = labels
    m, C_W, r = layer - 1, v.C_W(layer - 1), v.width_ratio(layer - 1)
    inner = vertex_response(v, m, 1, c, d, v.array("Q", m, a + b + c + c), v.array("Q", m, labels))
    slope = r * v.M(m, 1, 1, a, b) * inner
    if v.curved:
        slope = slope + v.moment(m, (2, 1, 1, 0), labels) * v.Theta(m, a, b) * v.Theta(m, a, c)
        slope = slope + r * v.Theta(m, a, b) * f_response(v, m, 2, 1, a, b, c, d)
    weight = v.moment(m, (1, 0, 1, 0), labels) * v.Theta(m, a, c) + r * f_response(v, m, 1, 1, a, b, c, d)
    return C_W**2 * slope + v.lambda_W(m) * C_W * weight


def R(v: Vertices, layer: int, labels: str) -> Tensor:
    """R_0123."""
    if not v.curved:
        return v.zero()
    a, b, c, d = labels
    m, C_W, r = layer - 1, v.C_W(layer - 1), v.width_ratio(layer - 1)
    T_01, T_02, T_03 = v.Theta(m, a, b), v.Theta(m, a, c), v.Theta(m, a, d)
    M_23, B_0023 = v.M(m, 1, 1, c, d), v.array("B", m, a + a + c + d)
    P_0230, P_0231 = v.array("P", m, a + c + d + a), v.array("P", m, a + c + d + b)
    slope = v.moment(m, (3, 1, 1, 1), labels) * T_01 * T_02 * T_03 + r * M_23 * (
        T_01 * (v.M(m, 3, 1, a, b) * B_0023 + vertex_response(v, m, 2, a, b, P_0230, P_0231))
        + v.M(m, 1, 1, a, b) * v.array("R", m, labels)
    )
    weight = v.moment(m, (2, 0, 1, 1), labels) * T_02 * T_03 + r * M_23 * (
        v.M(m, 2, 0, a, b) * B_0023 + vertex_response(v, m, 1, a, b, P_0230, P_0231)
    )
    return C_W**2 * slope + v.lambda_W(m) * C_W * weight


def S(v: Vertices, layer: int, labels: str) -> Tensor:
    """S_1234."""
    a, b, c, d = labels
    m, C_W, r = layer - 1, v.C_W(layer - 1), v.width_ratio(layer - 1)
    T_12, T_13, T_24 = v.Theta(m, a, b), v.Theta(m, a, c), v.Theta(m, b, d)
    M_12, M_34, B_1234 = v.M(m, 1, 1, a, b), v.M(m, 1, 1, c, d), v.array("B", m, labels)
    slope = r * M_12 * M_34 * v.array("S", m, labels)
    if v.curved:
        slope = slope + v.moment(m, (2, 2, 1, 1), labels) * T_12 * T_13 * T_24
        slope = slope + r * T_12 * v.M(m, 2, 2, a, b) * M_34 * B_1234
    weight = v.moment(m, (1, 1, 1, 1), labels) * T_13 * T_24 + r * M_12 * M_34 * B_1234
    return C_W**2 * slope + v.lambda_W(m) * C_W * weight


def T(v: Vertices, layer: int, labels: str) -> Tensor:
    """T_1324, labels in the order 1, 3, 2, 4."""
    one, three, two, four = labels
    m, C_W, lambda_W, r = layer - 1, v.C_W(layer - 1), v.lambda_W(layer - 1), v.width_ratio(layer - 1)
    T_12, T_13, T_24 = v.Theta(m, one, two), v.Theta(m, one, three), v.Theta(m, two, four)
    M_13, M_24 = v.M(m, 1, 1, one, three), v.M(m, 1, 1, two, four)
    Q_2411, Q_2413 = v.array("Q", m, two + four + one + one), v.array("Q", m, two + four + one + three)
    Q_1322, Q_1324 = v.array("Q", m, one + three + two + two), v.array("Q", m, one + three + two + four)
    slope = r * M_13 * M_24 * v.array("T", m, labels)
    mixed = r * M_24 * vertex_response(v, m, 1, one, three, Q_2411, Q_2413)
    mixed = mixed + r * M_13 * vertex_response(v, m, 1, two, four, Q_1322, Q_1324)
    if v.curved:
        slope = slope + v.moment(m, (2, 2, 1, 1), one + two + three + four) * T_12 * T_13 * T_24
        slope = slope + r * T_13 * T_24 * f_response(v, m, 2, 2, one, three, two, four)
        slope = slope + r * T_13 * M_24 * vertex_response(v, m, 2, one, three, Q_2411, Q_2413)
        slope = slope + r * T_24 * M_13 * vertex_response(v, m, 2, two, four, Q_1322, Q_1324)
        mixed = mixed + v.moment(m, (1, 2, 0, 1), one + two + three + four) * T_12 * T_24
        mixed = mixed + v.moment(m, (2, 1, 1, 0), one + two + three + four) * T_12 * T_13
        mixed = mixed + r * T_24 * f_response(v, m, 1, 2, one, three, two, four)
        mixed = mixed + r * T_13 * f_response(v, m, 2, 1, one, three, two, four)
    weight = v.moment(m, (1, 1, 0, 0), one + two + three + four) * T_12 + r * f_response(
        v, m, 1, 1, one, three, two, four
    )
    return C_W**2 * slope + lambda_W * C_W * mixed + lambda_W**2 * weight


def U(v: Vertices, layer: int, labels: str) -> Tensor:
    """U_1423, labels in the order 1, 4, 2, 3."""
    if not v.curved:
        return v.zero()
    one, four, two, three = labels
    m = layer - 1
    T_12, T_13, T_24 = v.Theta(m, one, two), v.Theta(m, one, three), v.Theta(m, two, four)
    joint = v.moment(m, (2, 2, 1, 1), one + two + three + four) * T_12 * T_13 * T_24
    propagated = v.M(m, 1, 1, one, four) * v.M(m, 1, 1, two, three) * v.array("U", m, labels)
    return v.C_W(m) ** 2 * (joint + v.width_ratio(m) * propagated)
