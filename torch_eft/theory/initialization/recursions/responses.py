"""Responses of expectations to changes of the covariance: the building blocks of the recursions at order 1/n.

With f = sigma^(p)_1 sigma^(q)_2 and a change X_bb' of the covariance (PDLT 4.3 and 8.2, in the form in which K is never
inverted; derived by d<f>/dK_bb' = (1/2) <d_b d_b' f> summed over the two labels that f depends on):

    Rsp_pq[X](12)  = 1/2 M_{p+2,q} X_11 + M_{p+1,q+1} X_12 + 1/2 M_{p,q+2} X_22     (M: <d^i d^j s^(p) s^(q)>)
    RspO[X](12)    = lambda_W Rsp_00[X](12) + C_W Theta_12 Rsp_11[X](12)
    Qrt_pq[V](12)  = the connected quartic part, sum over label quadruples of V <d^4 f> / 8
    sum_b X_b <d_b f> = one neuron's f = s^(p)_h s^(p-1)_x and a vertex with one preactivation label, P or Q
    CF[f, g]       = two neurons, functions of (z_h, z_x) and (z_h', z_x'), joined by F
"""

import math
from collections.abc import Callable

from torch import Tensor

from torch_eft.theory.initialization.evaluator import Vertices


def response(v: Vertices, m: int, p: int, q: int, a: str, b: str, X: Callable[[str, str], Tensor]) -> Tensor:
    """Rsp_pq[X](ab) at layer m."""
    return (
        v.response(m, p, q, 2, 0, a, b) * X(a, a) / 2
        + v.response(m, p, q, 1, 1, a, b) * X(a, b)
        + v.response(m, p, q, 0, 2, a, b) * X(b, b) / 2
    )


def ntk_response(v: Vertices, m: int, a: str, b: str, X: Callable[[str, str], Tensor]) -> Tensor:
    """RspO[X](ab): the response of O_ab = lambda_W s_a s_b + C_W Theta_ab s'_a s'_b."""
    weight, slope = response(v, m, 0, 0, a, b, X), response(v, m, 1, 1, a, b, X)
    return v.lambda_W(m) * weight + v.C_W(m) * v.Theta(m, a, b) * slope


def ntk_source(v: Vertices, m: int, a: str, b: str) -> Tensor:
    """<O_ab> = lambda_W M_00 + C_W Theta M_11."""
    return v.lambda_W(m) * v.M(m, 0, 0, a, b) + v.C_W(m) * v.Theta(m, a, b) * v.M(m, 1, 1, a, b)


def quartic_response(v: Vertices, m: int, p: int, q: int, a: str, b: str) -> Tensor:
    """Qrt_pq[V](ab), and the same of E_zzzz where weights are not Gaussian."""

    def V(*labels: str) -> Tensor:
        return v.array("V", m, "".join(labels))

    value = (
        v.response(m, p, q, 4, 0, a, b) * V(a, a, a, a)
        + 4 * v.response(m, p, q, 3, 1, a, b) * V(a, a, a, b)
        + v.response(m, p, q, 2, 2, a, b) * (2 * V(a, a, b, b) + 4 * V(a, b, a, b))
        + 4 * v.response(m, p, q, 1, 3, a, b) * V(b, b, a, b)
        + v.response(m, p, q, 0, 4, a, b) * V(b, b, b, b)
    ) / 8
    if m > 1 and v.excess_kurtosis(m - 1):
        for i in range(5):
            E = v.array("E_zzzz", m, a * i + b * (4 - i))
            value = value + math.comb(4, i) / 24 * v.response(m, p, q, i, 4 - i, a, b) * E
    return value


def f_response(v: Vertices, m: int, f: int, g: int, h: str, x: str, h2: str, x2: str) -> Tensor:
    """CF[f, g](h, x; h', x'), f and g the derivative on the NTK leg: 1 for s'_h s_x, 2 for s''_h s'_x."""
    f_h, f_x = v.response(m, f, f - 1, 1, 0, h, x), v.response(m, f, f - 1, 0, 1, h, x)
    g_h, g_x = v.response(m, g, g - 1, 1, 0, h2, x2), v.response(m, g, g - 1, 0, 1, h2, x2)

    def F(*labels: str) -> Tensor:
        return v.array("F", m, "".join(labels))

    return (
        f_h * g_h * F(h, h, h2, h2)
        + f_h * g_x * F(h, h, x2, h2)
        + f_x * g_h * F(x, h, h2, h2)
        + f_x * g_x * F(x, h, x2, h2)
    )


def vertex_response(v: Vertices, m: int, f: int, h: str, x: str, to_h: Tensor, to_x: Tensor) -> Tensor:
    """sum_b <d_b s^(f)_h s^(f-1)_x> X_b over b = h, x, for a vertex X with one preactivation label."""
    return v.response(m, f, f - 1, 1, 0, h, x) * to_h + v.response(m, f, f - 1, 0, 1, h, x) * to_x
